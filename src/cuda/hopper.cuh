/* SPDX-License-Identifier: Apache-2.0
 *
 * Hopper's instructions as inline functions: TMA loads and what their barriers need, wgmma,
 * register reallocation. Shared-memory addresses are 32-bit, as PTX takes them. What other GPUs
 * have too, other operations on barriers included, is in device.cuh.
 */
#ifndef LIDX_HOPPER_CUH
#define LIDX_HOPPER_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "device.cuh"

static __device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(elected));
    return elected != 0;
}

/* Makes initialised barriers visible to TMA, before the block's first __syncthreads. */
static __device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Arrives and announces `bytes` that TMA will deliver in this phase. */
static __device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* mbarrier_wait, its loop out of the compiler's sight: with that one prefill takes 1.05 of the
 * time. */
static __device__ __forceinline__ void mbarrier_await(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred p;\n"
                 "WAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
                 "@p bra DONE;\n\tbra WAIT;\nDONE:\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

static __device__ __forceinline__ void tma_prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

static __device__ __forceinline__ void prefetch_l2(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/* What L2 does with lines that a load brings: KEEP_SHORT gives them up before others. */
enum keep { KEEP_NORMAL, KEEP_SHORT };

template <enum keep KEEP> static __device__ __forceinline__ uint64_t cache_policy() {
    uint64_t policy = 0;
    if (KEEP == KEEP_SHORT)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

template <enum keep KEEP>
static __device__ __forceinline__ void tma_load_4d(uint32_t destination, const CUtensorMap *map,
                                                   uint32_t barrier, int c0, int c1, int c2, int c3,
                                                   uint64_t policy) {
    if (KEEP == KEEP_NORMAL)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
            "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
            "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
            : "memory");
}

static __device__ __forceinline__ void tma_load_5d(uint32_t destination, const CUtensorMap *map,
                                                   uint32_t barrier, int c0, int c1, int c2, int c3,
                                                   int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* The lower word of an operand's descriptor; the address counts in units of 16 bytes. The operand
 * is K-major, in rows of 128 bytes with the 128-byte swizzle; the leading offset (bit 16) is not
 * used with it. A step of k16 is 32 bytes further. */
static __device__ __forceinline__ uint32_t operand_start(uint32_t address) {
    return address >> 4 | 1 << 16;
}

/* The upper word: 128-byte swizzle (1 at bit 62), 1024 bytes from 8 rows to the next 8. */
#define OPERAND_LAYOUT "0x40000040"

static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

/* The operand lists of an accumulator of 32, 64 or 128 registers. */
#define ACC4(d, i)   "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC16(d, i)  ACC4(d, i), ACC4(d, i + 4), ACC4(d, i + 8), ACC4(d, i + 12)
#define ACC32(d, i)  ACC16(d, i), ACC16(d, i + 16)
#define ACC64(d, i)  ACC32(d, i), ACC32(d, i + 32)
#define ACC128(d, i) ACC64(d, i), ACC64(d, i + 64)
#define NAMES32                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                    \
    NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES128                                                                                   \
    NAMES64                                                                                        \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "       \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "   \
    "%126, %127"
#define WGMMA(n, type, names, outputs, a, b, scale)                                                \
    asm volatile("{\n\t.reg .pred p;\n\t.reg .b64 a, b;\n\tsetp.ne.b32 p, %" scale ", 0;\n\t"      \
                 "mov.b64 a, {%" a ", " OPERAND_LAYOUT "};\n\t"                                    \
                 "mov.b64 b, {%" b ", " OPERAND_LAYOUT "};\n\t"                                    \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " "                \
                 "{" names "}, a, b, p, 1, 1, 0, 0;\n\t}"                                          \
                 : outputs                                                                         \
                 : "r"(key), "r"(query), "r"(accumulate))

/* One k16 step: 64 keys (A) times N query columns (B), both in shared memory. `accumulate` 0
 * starts a new sum. */
template <class T> struct wgmma;

template <> struct wgmma<__nv_bfloat16> {
    static __device__ __forceinline__ void step(float (&d)[32], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("64", "bf16", NAMES32, ACC32(d, 0), "32", "33", "34");
    }
    static __device__ __forceinline__ void step(float (&d)[64], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("128", "bf16", NAMES64, ACC64(d, 0), "64", "65", "66");
    }
    static __device__ __forceinline__ void step(float (&d)[128], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("256", "bf16", NAMES128, ACC128(d, 0), "128", "129", "130");
    }
};

template <> struct wgmma<__half> {
    static __device__ __forceinline__ void step(float (&d)[32], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("64", "f16", NAMES32, ACC32(d, 0), "32", "33", "34");
    }
    static __device__ __forceinline__ void step(float (&d)[64], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("128", "f16", NAMES64, ACC64(d, 0), "64", "65", "66");
    }
    static __device__ __forceinline__ void step(float (&d)[128], uint32_t key, uint32_t query,
                                                int accumulate) {
        WGMMA("256", "f16", NAMES128, ACC128(d, 0), "128", "129", "130");
    }
};

template <int REGISTERS> static __device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> static __device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif
