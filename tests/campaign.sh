#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# campaign.sh quick|long [STAGE...]: the tests that need builds of their own. What each promises:
#
#   asan         the whole C suite under AddressSanitizer, LeakSanitizer and UBSan: no read or write
#                outside of a buffer, no leak, no undefined behaviour
#   fuzz         libFuzzer on lidx_run (every kernel against the oracle and with three threads) and
#                on the safetensors reader, both under the same sanitizers, from small corpora
#   torch        the torch operator's argument path on random, mostly wrong arguments
#   tsan         teams, and several contexts at once, under ThreadSanitizer. LLVM's OpenMP runtime
#                tells TSan through its Archer tool what its barriers and forks order, so nothing is
#                suppressed
#   valgrind     a subset under memcheck: no value that was never written decides anything
#   coverage     lines of src/ that the C suite runs without its largest sizes, at least 95 %
#   reproduce    two builds in different places give the same bytes
#   cases        50,000 random cases of the operator against the oracle and itself (long only)
#
# quick takes some ten minutes on two cores (fuzzing: 60 s each), long hours (600 s each). make
# runs the stages of quick side by side. Logs stay in build-campaign/. What cannot be run for want
# of a tool is said and counted, and with CI=true it is a failure. CAMPAIGN_DIR names another place
# for the builds.
set -u
cd "$(dirname "$0")/.."
root=$(pwd) form=${1:-quick} jobs=$(nproc 2>/dev/null || echo 2)
build_jobs="-j $jobs"
case ${MAKEFLAGS:-} in *jobserver*) build_jobs= ;; esac # make -j deals out its own
work=${CAMPAIGN_DIR:-$root/build-campaign}
[ $# -gt 0 ] && shift
case $form in
quick)
    asan_cases=250 tsan_cases=60 valgrind_cases=20 coverage_cases=250
    fuzz_seconds=60 test_seconds=900 # of one test, then it hangs
    ;;
long)
    asan_cases=5000 tsan_cases=3000 valgrind_cases=100 coverage_cases=2000
    fuzz_seconds=600 test_seconds=7200
    ;;
*)
    echo "usage: campaign.sh quick|long [STAGE...]" >&2
    exit 2
    ;;
esac
cases=50000
stages=${*:-asan fuzz torch tsan valgrind coverage reproduce $([ "$form" = long ] && echo cases)}
mkdir -p "$work"
passed=0 failed=0 skipped=0
export OMP_WAIT_POLICY=passive

# step NAME COMMAND...: runs it with a log, says how it went.
step() {
    name=$1
    shift
    began=$(date +%s)
    if "$@" >"$work/$name.log" 2>&1; then
        passed=$((passed + 1))
        printf 'passed  %-12s %4d s\n' "$name" $(($(date +%s) - began))
    else
        failed=$((failed + 1))
        printf 'FAILED  %-12s %4d s, %s\n' "$name" $(($(date +%s) - began)) "$work/$name.log"
        tail -n 40 "$work/$name.log"
    fi
}

# need STAGE TOOL PACKAGES...: whether the tool is there, after an attempt to install it.
need() {
    stage=$1 tool=$2
    shift 2
    command -v "$tool" >/dev/null || sh scripts/setup.sh "$@" >/dev/null 2>&1 || true
    command -v "$tool" >/dev/null && return 0
    skip "$stage" "$tool is missing ($*)"
    return 1
}

skip() {
    if [ "${CI:-}" = true ]; then
        failed=$((failed + 1))
        printf 'FAILED  %-12s %s\n' "$1" "$2"
    else
        skipped=$((skipped + 1))
        printf 'skipped %-12s %s\n' "$1" "$2"
    fi
}

# Whether clang can build with what it is asked for.
clang_can() {
    echo 'int main(void) { return 0; }' | clang -x c - -o "$work/probe.$$" "$@" 2>/dev/null
}

# The runtimes of clang's sanitizers are a package of their own, with clang's version in its name.
clang_runtime() {
    clang_can -fsanitize=address && return 0
    version=$(clang -dumpversion | cut -d. -f1)
    sh scripts/setup.sh "libclang-rt-$version-dev" >/dev/null 2>&1
    clang_can -fsanitize=address
}

# build DIRECTORY 'TARGET...' CMAKE-ARGUMENTS...
build() {
    directory=$1 targets=$2
    shift 2
    # shellcheck disable=SC2086 # lists
    cmake -S "$root" -B "$directory" -DLIDX_CUDA=OFF -DLIDX_TOOLS=OFF -DLIDX_WERROR=ON \
        -DCMAKE_C_FLAGS_DEBUG= "$@" &&
        cmake --build "$directory" $build_jobs --target $targets
}

build_library() { # SOURCE DIRECTORY
    # shellcheck disable=SC2086 # a list
    cmake -S "$1" -B "$2" -DCMAKE_BUILD_TYPE=Release -DLIDX_CUDA=OFF -DLIDX_TOOLS=OFF \
        -DLIDX_TESTS=OFF && cmake --build "$2" $build_jobs
}

# Line tables are enough for a report; to track variables takes gcc minutes, and so CMake must not add
# its -g of Debug builds behind this.
sanitized='-g1 -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize='

run_asan() {
    build "$work/asan" all -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_COMPILER=gcc \
        "-DCMAKE_C_FLAGS=${sanitized}address,undefined" || return
    LIDX_TEST_CASES=$asan_cases ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 \
        ctest --test-dir "$work/asan" -j "$jobs" --timeout "$test_seconds" --output-on-failure
}

build_fuzz() {
    build "$work/fuzz" fuzz -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_COMPILER=clang -DLIDX_FUZZ=ON \
        "-DCMAKE_C_FLAGS=${sanitized}address,undefined,fuzzer-no-link"
}

# fuzz TARGET CORPUS LENGTH: new inputs go to the work directory, the corpus is read only. A run
# that takes 30 s or 2 GiB is a finding too.
run_fuzz() {
    mkdir -p "$work/corpus_$1"
    "$work/fuzz/tests/fuzz/fuzz_$1" "$work/corpus_$1" "tests/fuzz/corpus_$1" -max_len="$2" \
        -max_total_time="$fuzz_seconds" -timeout=30 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$work/finding_$1_"
}

stage_asan() {
    need asan gcc gcc && need asan cmake cmake || return
    step asan run_asan
}

stage_fuzz() {
    need fuzz clang clang || return
    clang_runtime || { skip fuzz 'clang has no sanitizer runtime'; return; }
    step fuzz_build build_fuzz
    run_fuzz run 400 >"$work/fuzz_run.background" 2>&1 &
    process=$!
    if [ -x "$work/fuzz/tests/fuzz/fuzz_safetensors" ]; then
        step fuzz_safetensors run_fuzz safetensors 600
    else
        skip fuzz_safetensors 'no cJSON (libcjson-dev)'
    fi
    step fuzz_run wait $process
    mv "$work/fuzz_run.background" "$work/fuzz_run.log"
    grep -hE 'ERROR|SUMMARY|fuzz_run:|runtime error' "$work/fuzz_run.log"
    grep -h 'number_of_executed_units' "$work/fuzz_run.log" "$work/fuzz_safetensors.log" |
        awk '{n += $2} END {print "        inputs tried:", n}'
}

# The Python that has torch and this package: the one that `make test` sets up, or PYTHON.
python_with_torch() {
    for candidate in "${PYTHON:-}" "$root/.venv/bin/python"; do
        [ -n "$candidate" ] && "$candidate" -c 'import torch, hypothesis, lightning_indexer' \
            2>/dev/null && echo "$candidate" && return
    done
}

stage_torch() {
    python=$(python_with_torch)
    [ -n "$python" ] || { skip torch 'no Python with torch and this package'; return; }
    step torch "$python" tests/fuzz/fuzz_torch.py "$fuzz_seconds"
    tail -n 1 "$work/torch.log"
}

archer() {
    find /usr/lib/llvm-*/lib "$(clang -print-resource-dir)/../../.." -name libarcher.so 2>/dev/null |
        head -n 1
}

run_tsan() {
    build "$work/tsan" "test_operator test_process test_split" -DCMAKE_BUILD_TYPE=Debug \
        -DCMAKE_C_COMPILER=clang "-DCMAKE_C_FLAGS=${sanitized}thread" || return
    # Races that TSan sees only in the runtime's own code are the runtime's: Archer says what it
    # orders. Races in our code are reported wherever the other access is.
    for test in "test_operator --cases $tsan_cases" 'test_process threads' \
        "test_split $tsan_cases"; do
        # shellcheck disable=SC2086 # a program and its arguments
        OMP_TOOL_LIBRARIES=$(archer) TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
            "$work/tsan/tests/"$test || return
    done
}

stage_tsan() {
    need tsan clang clang || return
    clang_runtime || { skip tsan 'clang has no sanitizer runtime'; return; }
    [ -n "$(archer)" ] || sh scripts/setup.sh libomp-dev >/dev/null 2>&1
    [ -n "$(archer)" ] || { skip tsan 'no libarcher.so (libomp-dev)'; return; }
    step tsan run_tsan
}

run_valgrind() {
    tests="test_operator test_arguments test_tensors test_context"
    build "$work/plain" "$tests" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS=-g1 || return
    for test in $tests; do
        LIDX_TEST_CASES=$valgrind_cases valgrind -q --error-exitcode=9 --leak-check=full \
            --show-leak-kinds=definite --errors-for-leak-kinds=definite \
            "$work/plain/tests/$test" || return
    done
}

stage_valgrind() {
    need valgrind valgrind valgrind || return
    step valgrind run_valgrind
}

run_coverage() {
    rm -rf "$work/coverage"
    build "$work/coverage" all -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS=-O1 -DLIDX_COVERAGE=ON ||
        return
    LIDX_TEST_CASES=$coverage_cases ctest --test-dir "$work/coverage" -j "$jobs" \
        --timeout "$test_seconds" --exclude-regex test_scale --output-on-failure || return
    kernels=$("$work/coverage/tests/test_operator" --cases 1 | sed -n 's/^kernels: //p' | tr -d ,)
    set --
    for file in $(grep -l '^const struct kernel lidx_kernel_' src/cpu/*.c); do
        kernel=$(basename "$file" .c)
        case " amx $kernels " in *" $kernel "*) ;; *) set -- "$@" --skip "$kernel" ;; esac
    done
    # AMX runs on emulated tiles; what it does beside them, and the selection's vector loops, do not.
    case " $kernels " in *" avx512 "*) ;; *) set -- "$@" --skip amx --skip topk_avx512 ;; esac
    python3 tests/coverage.py "$work/coverage" "$root" --least 95 "$@"
}

stage_coverage() {
    need coverage gcov gcc && need coverage python3 python3 || return
    step coverage run_coverage
    sed -n 's/^line coverage/        &/p' "$work/coverage.log"
}

run_reproduce() {
    rm -rf "$work/first" "$work/second" "$work/another place"
    mkdir -p "$work/another place"
    cp -R CMakeLists.txt cmake include src "$work/another place/" || return
    build_library "$root" "$work/first" && build_library "$work/another place" "$work/second" &&
        cmp "$work/first/liblightning_indexer.so" "$work/second/liblightning_indexer.so"
}

stage_reproduce() {
    need reproduce cmake cmake || return
    step reproduce run_reproduce
}

run_cases() {
    build "$work/plain" test_operator -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS=-g1 &&
        "$work/plain/tests/test_operator" --cases "$cases"
}

stage_cases() {
    need cases cmake cmake || return
    step cases run_cases
    tail -n 2 "$work/cases.log"
}

for stage in $stages; do
    "stage_$stage"
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ] && [ $((passed + skipped)) -gt 0 ]
