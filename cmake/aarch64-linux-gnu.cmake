# SPDX-License-Identifier: Apache-2.0
#
# Builds for 64-bit ARM with Debian's cross gcc and runs the tests under qemu-user:
#
#     apt install gcc-aarch64-linux-gnu qemu-user
#     cmake -S . -B build-aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
#     cmake --build build-aarch64 && ctest --test-dir build-aarch64
#
# LIDX_QEMU_CPU picks the emulated CPU: "max" has BF16, "cortex-a57" only the baseline.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

set(LIDX_QEMU_CPU max CACHE STRING "CPU that qemu-aarch64 emulates for the tests")
set(CMAKE_CROSSCOMPILING_EMULATOR
    qemu-aarch64;-cpu;${LIDX_QEMU_CPU};-L;/usr/aarch64-linux-gnu)

# The host's nvcc and Python are of no use to the target.
set(LIDX_CUDA OFF CACHE BOOL "Build the CUDA backend when nvcc is found")
