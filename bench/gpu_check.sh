#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a GPU, in one call on a bare CUDA machine: build, correctness on every
# kernel, compute-sanitizer, graph replay (in the correctness test), the benchmark against this
# machine's floors.
#
#     bench/gpu_check.sh RESULTS_DIRECTORY [BUILD_DIRECTORY]
#
# Needs cmake, a C compiler, nvcc, compute-sanitizer, and for the benchmark a python3 with torch.
# Writes gpu_check.txt (what was said), gpu_check.json (steps) and bench_cuda.json, all as far as it
# came; logs of single tools stay in the build directory. Each step has a limit of time, and the
# next ones go on without it. Fails when a step failed; a missed speed bound is reported but is not
# a failure.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
results=${1:?usage: bench/gpu_check.sh RESULTS_DIRECTORY [BUILD_DIRECTORY]}
build=${2:-$(mktemp -d)}
mkdir -p "$results" "$build"
results=$(cd "$results" && pwd)
build=$(cd "$build" && pwd)
log=$results/gpu_check.txt
: > "$log"
steps=
failed=0

# step NAME SECONDS COMMAND...: runs it, shows the last lines, remembers how it ended.
step() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    printf '== %s\n' "$name" | tee -a "$log"
    timeout "$limit" "$@" > "$build/step.txt" 2>&1
    code=$?
    cat "$build/step.txt" >> "$log"
    report "$name" $((SECONDS - begin)) $code "$build/step.txt"
}

# report NAME SECONDS CODE FILE
report() {
    tail -n "${shown:-4}" "$4"
    printf -- '-- %s: exit %d, %d s\n' "$1" "$3" "$2" | tee -a "$log"
    steps="$steps${steps:+,}{\"name\":\"$1\",\"seconds\":$2,\"exit\":$3}"
    [ "$3" -eq 0 ] || failed=1
}

# The library and what tests it, and beside them the test of the selection alone.
configure() {
    local beside
    nvcc -std=c++17 -O3 -arch=native -Xcompiler -fopenmp "$root/tests/test_topk.cu" \
        "$root/src/cuda/topk.cu" -o "$build/test_topk" &
    beside=$!
    cmake -S "$root" -B "$build/cmake" -DCMAKE_BUILD_TYPE=Release -DLIDX_TOOLS=OFF &&
        cmake --build "$build/cmake" --parallel "$(nproc)" --target lightning_indexer $cuda_tests &&
        wait $beside
}

# The benchmark's shared library adds the cycle counter's door.
link_benchmark() {
    local cuda flags archive
    cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    for cuda in "${CUDA_HOME:-}" "$cuda" /usr/local/cuda; do
        [ -f "$cuda/include/cuda_runtime_api.h" ] && break
    done
    flags="-L$cuda/lib64 -L$cuda/targets/x86_64-linux/lib -lcudart_static -ldl -lrt -lpthread -lm"
    archive=$build/cmake/liblightning_indexer_static.a
    cc -std=c11 -O2 -fPIC -fopenmp -shared "$root/bench/count_cycles.c" \
        -Wl,--whole-archive "$archive" -Wl,--no-whole-archive $flags -o "$build/libbench.so"
}

# All tests and both kernels at once, each in a process of its own: a fault ends only that.
correctness() {
    local kernel test text code=0
    for test in $cuda_tests; do
        for kernel in smxx sm90; do
            timeout 140 "$build/cmake/tests/$test" --kernel $kernel > "$build/${test}_$kernel.txt" 2>&1 &
        done
    done
    wait
    for test in $cuda_tests; do
        for kernel in smxx sm90; do
            text=$build/${test}_$kernel.txt
            printf '%s, %s:\n' $test $kernel
            tail -n 6 "$text" | sed 's/^/    /'
            tail -n 1 "$text" | grep -q ' passed, 0 failed$' || code=1
        done
    done
    return $code
}

# What compute-sanitizer sees: the tests of the operator on both kernels, and the selection alone, whose
# clusters their small shapes do not reach. One a line: a name, then the command.
sanitized_programs() {
    local kernel test
    for kernel in smxx sm90; do
        for test in test_cuda test_cuda_repeats test_cuda_hostile; do
            printf '%s, %s\t%s\n' $test $kernel \
                "$build/cmake/tests/$test --kernel $kernel --exact --sanitizer"
        done
    done
    printf 'test_topk\t%s\n' "$build/test_topk sanitize"
}

# All tools and programs at once: they are slow on the host's side, not on the GPU's. `barriers` is
# how many barriers in shared memory two of them follow: up to 48 a block here. For initcheck the
# test has written the workspace: the selection reads scores in whole vectors and drops those past
# a row's end, which nobody wrote.
sanitize() {
    local tool name command barriers text code=0
    for tool in memcheck racecheck synccheck initcheck; do
        barriers=
        case $tool in racecheck | synccheck) barriers="--num-cuda-barriers 65536" ;; esac
        while IFS=$'\t' read -r name command; do
            timeout 100 compute-sanitizer --tool $tool $barriers --print-limit 3 $command \
                > "$build/$tool, $name.txt" 2>&1 < /dev/null &
        done < <(sanitized_programs)
    done
    wait
    for tool in memcheck racecheck synccheck initcheck; do
        while IFS=$'\t' read -r name command; do
            text="$build/$tool, $name.txt"
            printf '%s, %s: ' $tool "$name"
            grep -E '^[0-9]+ (rows )?passed, |SUMMARY' "$text" | tail -n 2 | tr '\n' ' '
            printf '\n'
            grep -E '=== +[A-Z]' "$text" | grep -vE 'SUMMARY|COMPUTE-SAN|Host|Saved' |
                cut -c1-150 | sort | uniq -c | sort -rn | head -n 3
            grep -qE ' passed, 0 fail' "$text" || code=1
            if [ "$tool, $name" = "racecheck, test_cuda_hostile, sm90" ]; then
                printf '    shown, not judged: see docs/kernel-sm90.md on racecheck\n'
            else
                grep -qE 'SUMMARY: 0 (errors|hazards)' "$text" || code=1
            fi
        done < <(sanitized_programs)
    done
    return $code
}

# The Python package as installed, against the library just built; nothing to do without torch.
torch_tests() {
    if ! python3 -c 'import pytest, torch'; then
        printf 'no torch or no pytest: left out\n'
        return 0
    fi
    cmake -S "$root" -B "$build/cmake" -DLIDX_PYTHON=ON -DLIDX_TESTS=OFF > /dev/null &&
        cmake --build "$build/cmake" --parallel "$(nproc)" > /dev/null &&
        cmake --install "$build/cmake" --prefix "$build/site" --component python > /dev/null &&
        cd "$root" && PYTHONPATH=$build/site \
        python3 -m pytest -q -rs -p no:cacheprovider tests/test_torch_cuda.py
}

# One section of the table, in a process of its own: a fault ends only that. What fails with the
# kernels of choice is measured with the one that runs everywhere.
bench_section() {
    python3 "$root/bench/bench_cuda.py" --library "$build/libbench.so" --section "$1" \
        --json "$build/bench_$1.json" && return
    printf 'section %s failed; once more with smxx\n' "$1"
    python3 "$root/bench/bench_cuda.py" --library "$build/libbench.so" --section "$1" \
        --kernel smxx --json "$build/bench_${1}_smxx.json"
    return 1
}
export -f configure link_benchmark correctness sanitized_programs sanitize torch_tests bench_section
cuda_tests='test_cuda test_cuda_repeats test_cuda_hostile test_cuda_full'
export root build results cuda_tests

step build 240 bash -c configure
step link 60 bash -c link_benchmark
shown=4 step selection 60 "$build/test_topk" check
shown=50 step correctness 150 bash -c correctness
shown=60 step sanitizer 210 bash -c sanitize
for section in prefill variants decode; do
    shown=40 step "benchmark $section" 80 bash -c "bench_section $section"
done
python3 "$root/bench/bench_cuda.py" --json "$results/bench_cuda.json" \
    --merge "$build"/bench_{prefill,variants,decode}.json | tee -a "$log"
shown=6 step torch 150 bash -c torch_tests

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
printf '{"gpu":"%s","nvcc":"%s","failed":%d,"seconds":%d,"steps":[%s]}\n' "$gpu" \
    "$(nvcc --version | sed -n 's/.*, V//p')" "$failed" "$SECONDS" "$steps" \
    > "$results/gpu_check.json"
printf 'gpu_check: %s in %d s\n' "$([ $failed -eq 0 ] && echo passed || echo FAILED)" "$SECONDS" |
    tee -a "$log"
exit $failed
