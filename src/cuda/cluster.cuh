/* SPDX-License-Identifier: Apache-2.0
 *
 * Clusters of blocks, SM90 on: their barrier, and what they do to each other's shared memory.
 */
#ifndef LIDX_CLUSTER_CUH
#define LIDX_CLUSTER_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __CUDACC__ /* the emulation of the tests brings its own */

static __device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* Barrier over the cluster, in two halves; what was written before the one, in whichever block, can
 * be read after the other. */
static __device__ __forceinline__ void cluster_arrive(void) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

static __device__ __forceinline__ void cluster_wait(void) {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The address, in block `rank`, of what has this address here. */
static __device__ __forceinline__ uint32_t remote(const void *here, uint32_t rank) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(here), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

static __device__ __forceinline__ void remote_store(uint32_t address, uint64_t x) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
}

static __device__ __forceinline__ uint32_t remote_add(uint32_t address, uint32_t x) {
    uint32_t old;
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(address), "r"(x)
                 : "memory");
    return old;
}

/* Adds, and asks for nothing back. */
static __device__ __forceinline__ void remote_count(uint32_t address, uint32_t x) {
    asm volatile("red.shared::cluster.add.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

#endif

static __device__ __forceinline__ void cluster_sync(void) {
    cluster_arrive();
    cluster_wait();
}

#endif
