#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test_install.sh BUILD CC: an installation under any prefix has the licence and is found by pkg-config
# and by CMake, there also by who asks for an earlier version of the same soname, and a program built
# with each of them runs.
set -eu
build=$1 cc=$2 root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0

runs() {
    "$2" >"$work/out" && [ "$(wc -w <"$work/out")" -ge 8 ] && passed=$((passed + 1)) && return
    echo "built with $1, the program does not run"
    exit 1
}

cmake --install "$build" --prefix "$work/prefix" --component library >/dev/null
library=$(dirname "$(find "$work/prefix" -name liblightning_indexer.so)")
[ -n "$(find "$work/prefix/share/doc" -name LICENSE)" ] || { echo "the licence is not installed"; exit 1; }

if command -v pkg-config >/dev/null; then
    flags=$(PKG_CONFIG_PATH=$library/pkgconfig pkg-config --cflags --libs lightning_indexer)
    # shellcheck disable=SC2086 # a list of flags
    "$cc" -std=c11 "$root/examples/minimal.c" $flags "-Wl,-rpath,$library" -o "$work/minimal"
    runs pkg-config "$work/minimal"
else
    echo "no pkg-config: left out"
fi

cat >"$work/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.22)
project(user C)
find_package(lightning_indexer 0.0.1 REQUIRED)
add_executable(user $root/examples/minimal.c)
target_link_libraries(user lightning_indexer::lightning_indexer)
END
cmake -S "$work" -B "$work/user" -DCMAKE_C_COMPILER="$cc" -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/user" >/dev/null
runs CMake "$work/user/user"
echo "$passed passed, 0 failed"
