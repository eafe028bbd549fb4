#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# What the CPU operator does on this machine, in about a minute: near its limits
# (bench_cpu_limits.c), and beside torch if python3 has it (bench_cpu_torch.py; torch.compile takes
# minutes more). Needs a C compiler, neither CMake nor cJSON. Prints, and writes NAME.txt and, with
# torch, NAME.json.
#
#     sh bench/bench_cpu.sh bench/results/NAME [threads [options of bench_cpu_torch.py]]
#     sh bench/bench_cpu.sh bench/results/NAME 16 --no-compile
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
name=${1:?say where to write: bench/results/NAME}
threads=${2:-$(nproc)}
shift $(($# < 2 ? $# : 2))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build() {
    (cd "$here" && ${CC:-cc} -std=c11 -O2 -ffp-contract=off -fopenmp -Iinclude -Itools \
        "$@" src/[a-z]*.c src/cpu/[a-z]*.c -lm)
}
build -shared -fPIC -o "$work/liblightning_indexer.so"
build bench/bench_cpu_limits.c tools/peak.c tools/numbers.c -o "$work/limits"
{
    printf '# sh bench/bench_cpu.sh, %s,%s\n' "$(date -u +%Y-%m-%d)" \
        "$(sed -n 's/^model name.*://p' /proc/cpuinfo | head -n 1)"
    "$work/limits" "$threads" 250
    if python3 -c 'import torch' 2> /dev/null; then
        python3 "$here/bench/bench_cpu_torch.py" --library "$work/liblightning_indexer.so" \
            --threads "$threads" --seconds 2 --out "$name.json" "$@"
    fi
} 2>&1 | tee "$name.txt"
