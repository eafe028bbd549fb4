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
# Writes gpu_check.txt (all that was said), gpu_check.json (steps) and bench_cuda.json. Fails when
# a step failed; a missed speed bound is reported but is not a failure.
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

configure() {
    cmake -S "$root" -B "$build/cmake" -DCMAKE_BUILD_TYPE=Release -DLIDX_TOOLS=OFF \
        -DLIDX_TESTS=OFF &&
        cmake --build "$build/cmake" --parallel "$(nproc)"
}

# The test links the static library; the benchmark's shared library adds the cycle counter's door.
link_programs() {
    local cuda flags archive
    cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    for cuda in "${CUDA_HOME:-}" "$cuda" /usr/local/cuda; do
        [ -f "$cuda/include/cuda_runtime_api.h" ] && break
    done
    flags="-L$cuda/lib64 -L$cuda/targets/x86_64-linux/lib -lcudart_static -ldl -lrt -lpthread -lm"
    archive=$build/cmake/liblightning_indexer_static.a
    cc -std=c11 -O2 -fopenmp -I"$root/include" -I"$cuda/include" "$root/tests/test_cuda.c" \
        "$root/tests/scenario.c" "$root/tests/oracle.c" "$archive" $flags -o "$build/test_cuda" &&
        cc -std=c11 -O2 -fPIC -fopenmp -shared "$root/bench/count_cycles.c" \
            -Wl,--whole-archive "$archive" -Wl,--no-whole-archive $flags \
            -o "$build/libbench.so"
}

# The four tools at once: they are slow on the host's side, not on the GPU's.
sanitize() {
    local tool pids= names= code=0
    for tool in memcheck racecheck initcheck synccheck; do
        timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
            "$build/test_cuda" --exact --sanitizer > "$build/$tool.txt" 2>&1 &
        pids="$pids $!"
        names="$names $tool"
    done
    for pid in $pids; do
        wait "$pid" || code=1
    done
    for tool in $names; do
        printf '%s\n' "$tool:"
        grep -E 'passed|ERROR SUMMARY|RACECHECK SUMMARY|Invalid|Uninit|Race|hazard' \
            "$build/$tool.txt" | tail -n 8
        cp "$build/$tool.txt" "$results/sanitizer_$tool.txt"
    done
    return $code
}
export -f sanitize
export build results

step build 300 bash -c "$(declare -f configure); root='$root' build='$build'; configure"
step link 60 bash -c "$(declare -f link_programs); root='$root' build='$build'; link_programs"
shown=16 step correctness 200 "$build/test_cuda"
shown=24 step sanitizer 170 bash -c sanitize
shown=70 step benchmark 200 python3 "$root/bench/bench_cuda.py" --library "$build/libbench.so" \
    --json "$results/bench_cuda.json"

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
printf '{"gpu":"%s","nvcc":"%s","failed":%d,"seconds":%d,"steps":[%s]}\n' "$gpu" \
    "$(nvcc --version | sed -n 's/.*, V//p')" "$failed" "$SECONDS" "$steps" \
    > "$results/gpu_check.json"
printf 'gpu_check: %s in %d s\n' "$([ $failed -eq 0 ] && echo passed || echo FAILED)" "$SECONDS" |
    tee -a "$log"
exit $failed
