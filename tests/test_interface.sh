#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test_interface.sh LIBRARY.so [CC]: the shared library exports the functions of its header and
# nothing else, as tests/abi/symbols.txt has them, and the header stands alone in C11 and in C++.
set -eu
library=$1 cc=${2:-cc}
here=$(cd "$(dirname "$0")" && pwd)
header=$here/../include/lightning_indexer.h
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0

check() { # WHAT COMMAND...
    what=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'failed: %s\n' "$what"
        head -n 20 "$work/log"
    fi
}

nm -D --defined-only "$library" | awk '{print $NF}' | sed 's/@.*//' |
    grep -Ev '^(_init|_fini|_edata|_end|__bss_start)$' | LC_ALL=C sort >"$work/exported"
grep -o 'LIDX_API [^;(]*(' "$header" | grep -o 'lidx_[a-z_]*(' | tr -d '(' | LC_ALL=C sort >"$work/declared"
check 'exported symbols are the header'"'"'s' diff "$work/declared" "$work/exported"
check 'exported symbols are the published ones' diff "$here/abi/symbols.txt" "$work/exported"

strict='-Wall -Wextra -Wpedantic -Werror -fsyntax-only'
printf '#include "lightning_indexer.h"\n#include "lightning_indexer.h"\nstruct lidx_args a = LIDX_ARGS_INIT;\nstruct lidx_options o = LIDX_OPTIONS_INIT;\n' >"$work/alone.c"
cp "$work/alone.c" "$work/alone.cpp"
# shellcheck disable=SC2086 # lists of flags
check 'the header alone as C11' "$cc" -std=c11 $strict -I"$(dirname "$header")" "$work/alone.c"
if printf 'int i;\n' | "$cc" -x c++ -fsyntax-only - 2>/dev/null; then
    for standard in c++11 c++17; do
        # shellcheck disable=SC2086
        check "the header alone as $standard" "$cc" -x c++ -std=$standard $strict \
            -I"$(dirname "$header")" "$work/alone.cpp"
    done
else
    echo "no C++ compiler here: the header was not tried as C++"
fi
printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
