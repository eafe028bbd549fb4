/* SPDX-License-Identifier: Apache-2.0
 *
 * Lets a kernel have more than 48 KiB of dynamic shared memory, asking the runtime once on a
 * device: each time costs a tenth of a launch.
 */
#ifndef LIDX_ALLOW_SHARED_CUH
#define LIDX_ALLOW_SHARED_CUH

#include <cuda_runtime.h>
#include <stdint.h>

/* `allowed` is the kernel's own: bit d is set when it has been done on device d. Threads that race
 * do it twice. */
static inline cudaError_t allow_shared(const void *kernel, int bytes, uint64_t *allowed) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
        return error;
    uint64_t bit = (uint64_t)1 << (device & 63);
    if (device < 64 && __atomic_load_n(allowed, __ATOMIC_RELAXED) & bit)
        return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess && device < 64)
        __atomic_fetch_or(allowed, bit, __ATOMIC_RELAXED);
    return error;
}

#endif
