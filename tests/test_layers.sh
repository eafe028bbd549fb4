#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The rules of the house that a compiler does not see, by grep: who may include whom, names, flags,
# and what the library must not do. The table of rooms is in docs/design.md.
set -eu
cd "$(dirname "$0")/.."
passed=0 failed=0

verdict() { # LINES RULE: no lines, no fault
    if [ -z "$1" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'broken rule: %s\n%s\n' "$2" "$1"
    fi
}

# Headers that FILE includes, in quotes or not, one a line.
includes() {
    sed -n 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*\([<"][^>"]*[>"]\).*/\1/p' "$1"
}

# room FILES ALLOWED: each include of the files matches the extended expression.
room() {
    lines=
    for file in $1; do
        [ -f "$file" ] || continue
        bad=$(includes "$file" | grep -Ev "^($2)\$" || true)
        [ -z "$bad" ] || lines="$lines$file includes $(echo "$bad" | tr '\n' ' ')
"
    done
    verdict "$lines" "$1 may include $2"
}

c='<(assert|ctype|errno|fenv|float|inttypes|limits|math|setjmp|signal|stdalign|stdarg|stdatomic|stdbool|stddef|stdint|stdio|stdlib|string|time)\.h>'
public='"lightning_indexer\.h"'
core='"(backend|check(_tensor|_values)?|dtype|error|problem|visible)\.h"'
above='"\.\./(backend|dtype|error|problem|visible)\.h"'
intrinsics='<(immintrin|arm_neon|cpuid)\.h>'
# Kernels: of each, FILE.c, FILE.h, FILE_PART.c ...
isa=$(sed -n 's/^const struct kernel lidx_kernel_\([a-z0-9]*\).*/\1/p' src/cpu/*.c | sort -u | tr '\n' ' ')

room 'include/lightning_indexer.h' '<(stddef|stdint)\.h>'
room 'src/*.c src/*.h' "$c|$public|$core"
others=$(for file in src/cpu/*.c src/cpu/*.h; do
    stem=${file##*/}
    case " $isa " in *" ${stem%%[._]*} "*) ;; *) echo "$file" ;; esac
done | tr '\n' ' ')
# shellcheck disable=SC2086 # room splits its first argument itself
room "$others" "$c|$public|$above|\"(answer|environment|features|join|kernel|kernels|plan|split|topk|topk_x86|worker)\.h\"|$intrinsics|<omp\.h>|<(sys/auxv|sys/syscall|pthread|unistd)\.h>"
for stem in $isa; do
    room "src/cpu/$stem.[ch] src/cpu/${stem}_*.[ch]" "$c|\"\.\./dtype\.h\"|\"(kernel|features|avx512|avx2_multiply|amx(_[a-z]+)?)\.h\"|$intrinsics"
done
room 'src/cpu/plan.c src/cpu/plan.h' '"plan\.h"|"\.\./visible\.h"'
room 'src/cuda/*.c' "$c|$public|$above|\"launch\.h\"|<cuda_runtime_api\.h>"
room 'src/cuda/*.cu src/cuda/*.cuh src/cuda/*.h' \
    "$c|\"(launch|schedule)\.h\"|\"[a-z0-9_]+\.cuh\"|\"\.\./(problem|visible)\.h\"|<cuda[a-z0-9_]*\.h>"

verdict "$(grep -ln 'include.*src/' tools/*.[ch] bindings/*.[ch] examples/*.c 2>/dev/null || true)" \
    'tools, bindings and examples see include/ only'
verdict "$(grep -n 'include.*\.\./src/' tests/*.[ch] |
    grep -Ev '^tests/(test_kernels|kernel_data|kernel_speed|test_worker|test_plan|test_topk|test_join|test_schedule|cuda_notes|amx_emulated|amx_emulation)\.[ch]:' || true)" \
    'only tests of inner rooms include them'

# The library computes and returns: no words to the terminal, no exit, memory only with a context.
verdict "$(grep -nE '\b(printf|fprintf|puts|putchar|perror|abort|exit|assert)[[:space:]]*\(' \
    src/*.[ch] src/cpu/*.[ch] src/cuda/*.[ch] || true)" 'the library neither prints nor exits'
verdict "$(grep -nE '\b(malloc|calloc|realloc|aligned_alloc|alloca|strdup)[[:space:]]*\(' \
    src/*.[ch] src/cpu/*.[ch] src/cuda/*.[ch] | grep -Ev '^src/(indexer|cpu/cpu|cuda/cuda)\.c:' || true)" \
    'only the makers of contexts allocate'
verdict "$(grep -nE '\bcuda(Malloc|Free|DeviceSynchronize|StreamSynchronize|HostAlloc)[A-Za-z]*[[:space:]]*\(' \
    src/cuda/*.cu src/cuda/*.cuh || true)" 'launchers neither allocate nor synchronise'

# One build for all machines, and the same bits from each compiler.
verdict "$(grep -rnE '(-march=|-mtune=|-ffast-math|-Ofast|-mavx|-mfma|-mamx|funsafe-math)' CMakeLists.txt \
    CMakePresets.json Makefile src tools/CMakeLists.txt bindings/CMakeLists.txt tests/CMakeLists.txt \
    2>/dev/null || true)" 'no flags that tie the build to a machine or loosen its arithmetic'
verdict "$(grep -n 'ffp-contract=off' CMakeLists.txt >/dev/null || echo CMakeLists.txt)" \
    'the build forbids contraction'

# The map of docs/design.md names each source file, by itself ("check.h", "check.c", "check.h .c") or
# with its family ("amx_*.h"); and what it names is there.
map=$(sed -n '/^## The map/,/^## Direction/p' docs/design.md)
verdict "$(for file in src/*.[ch] src/cpu/*.[ch] src/cuda/*.c src/cuda/*.cu src/cuda/*.cuh src/cuda/*.h; do
    name=${file##*/}
    stem=${name%.*} ending=${name##*.}
    echo "$map" | grep -Eq "\b($stem|${stem%%_*}_\*)(\.[a-z]+ )?\.$ending\b" || echo "$file"
done)" 'docs/design.md has every source file on its map'
verdict "$(echo "$map" | grep -Eo '[a-z][a-z0-9_]*\.(c|h|cu|cuh|py|sh)\b' | sort -u | while read -r name; do
    [ -n "$(find include src bindings tools examples tests bench -name "$name")" ] || echo "$name"
done)" 'docs/design.md has nothing on its map that is not there'

# Names and leftovers.
sources=$(find src include tools bindings tests examples bench \
    \( -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.sh' \) \
    -not -path '*/build*')
header_version=$(sed -n 's/^#define LIDX_VERSION_[A-Z]* //p' include/lightning_indexer.h | paste -sd . -)
verdict "$(grep -q "^project(lightning_indexer VERSION $header_version " CMakeLists.txt || echo CMakeLists.txt)" \
    'the header and the build have one version'

# shellcheck disable=SC2086 # file names here have no spaces
verdict "$(for file in $sources; do
    head -n 3 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || echo "$file"
done)" 'every file names its licence'
# shellcheck disable=SC2086
verdict "$(grep -nE '^[[:space:]]*#[[:space:]]*if[[:space:]]+0|\b(TODO|FIXME|XXX)\b' $sources |
    grep -v '^tests/test_layers.sh:' || true)" 'no dead code, no promises'
# shellcheck disable=SC2086
verdict "$(echo $sources | tr ' ' '\n' | grep -E '_v[0-9]+\.|_new\.|_old\.|/(utils?|common|misc|helpers?)\.' || true)" \
    'files are nouns, without version numbers'
verdict "$(grep -n 'typedef struct' include/*.h src/*.h src/cpu/*.h src/cuda/*.h || true)" \
    'structs have tags, not typedefs'
verdict "$(grep -nE '^#define [a-z_]*\(.*##' src/*.[ch] src/cpu/*.[ch] src/cuda/*.[ch] || true)" \
    'no macros that make functions'

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
