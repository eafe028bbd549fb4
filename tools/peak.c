/* SPDX-License-Identifier: Apache-2.0
 *
 * Peak loops, in assembly so that a figure is that of the instruction and not of a compiler's
 * idea of it. Accumulators are independent of each other and more than latency x throughput, and
 * the operands are ordinary numbers: arithmetic on zeros may draw less power and clock higher.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "peak.h"

#include <stdint.h>
#include <string.h>

#include "lightning_indexer.h"
#include "numbers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

/* One kind of peak. A loop does `rounds` rounds and returns the flop done. */
struct instruction {
    const char *name;
    int (*available)(void);
    double (*loop)(int64_t rounds);
};

#if defined(__x86_64__)

/* Read as fp32 or as pairs of bf16, these are numbers between 0.25 and 1.75 of either sign. */
static const uint32_t operand[2][16] __attribute__((aligned(64))) = {
    {0xbf91bf4e, 0x3f98bf94, 0x3f23bf09, 0x3f873f58, 0xbf19bfc6, 0x3faebefa, 0xbf33bfbe, 0x3f753fa9,
     0x3f573fd9, 0xbfc8be9b, 0x3f133fb5, 0x3f613f8e, 0x3f903fa2, 0xbfc4bfa6, 0x3fd9bfa9,
     0xbf993f2d},
    {0xbf793ec3, 0xbf5dbe8f, 0x3fb3bea1, 0xbf513f89, 0x3f81bf36, 0xbed3bfd6, 0x3f2f3ef7, 0xbfdc3f38,
     0xbfcc3f50, 0x3f9bbf97, 0x3f65bfd3, 0x3fdb3f89, 0xbfb73e8f, 0xbeae3f73, 0x3f943fad,
     0xbf91bfd8},
};

static int has_fma_ymm(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_fma_zmm(void) {
    return __builtin_cpu_supports("avx512f");
}

static int has_vdpbf16ps(void) {
    return __builtin_cpu_supports("avx512bf16");
}

/* 14 chains of an instruction, `rounds` times, in registers of the kind "ymm" or "zmm"; those above
 * 15 would need a clobber list that not every compiler takes. */
#define RUN_14_CHAINS(instruction, kind, rounds)                                                   \
    __asm__ volatile("vmovaps (%1), %%" kind "14\n"                                                \
                     "vmovaps 64(%1), %%" kind "15\n"                                              \
                     ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n"                                    \
                     "vxorps %%xmm\\i, %%xmm\\i, %%xmm\\i\n"                                       \
                     ".endr\n"                                                                     \
                     ".p2align 6\n"                                                                \
                     "1:\n"                                                                        \
                     ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n" instruction " %%" kind             \
                     "14, %%" kind "15, %%" kind "\\i\n"                                           \
                     ".endr\n"                                                                     \
                     "decq %0\n"                                                                   \
                     "jnz 1b\n"                                                                    \
                     "vzeroupper\n"                                                                \
                     : "+r"(rounds)                                                                \
                     : "r"(operand)                                                                \
                     : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",     \
                       "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",        \
                       "xmm15")

static double loop_fma_ymm(int64_t rounds) {
    double flop = (double)rounds * 14 * 8 * 2;
    RUN_14_CHAINS("vfmadd231ps", "ymm", rounds);
    return flop;
}

static double loop_fma_zmm(int64_t rounds) {
    double flop = (double)rounds * 14 * 16 * 2;
    RUN_14_CHAINS("vfmadd231ps", "zmm", rounds);
    return flop;
}

/* Two products a lane. */
static double loop_vdpbf16ps(int64_t rounds) {
    double flop = (double)rounds * 14 * 16 * 4;
    RUN_14_CHAINS("vdpbf16ps", "zmm", rounds);
    return flop;
}

/* Tile registers: the CPU has them and the system grants them to this process. */
static int has_tdpbf16ps(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM_ = 0x1023, XFEATURE_XTILEDATA_ = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
        return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM_, XFEATURE_XTILEDATA_) == 0;
#else
    return 0;
#endif
}

/* All eight tiles 16 rows of 64 bytes; six sums, and two operands of 16 equal rows (stride 0). */
static void tiles_begin(void) {
    unsigned char config[64] __attribute__((aligned(64))) = {1};
    for (int t = 0; t < 8; t++) {
        config[16 + 2 * t] = 64;
        config[48 + t] = 16;
    }
    __asm__ volatile("ldtilecfg (%0)\n"
                     ".irp i,0,1,2,3,4,5\n"
                     "tilezero %%tmm\\i\n"
                     ".endr\n"
                     "tileloadd (%1,%2,1), %%tmm6\n"
                     "tileloadd 64(%1,%2,1), %%tmm7\n"
                     :
                     : "r"(config), "r"(operand), "r"((int64_t)0)
                     : "memory");
}

static void tiles_end(void) {
    __asm__ volatile("tilerelease" ::: "memory");
}

enum { TDP_FLOP = 16 * 16 * 32 * 2 };

static double loop_tdpbf16ps(int64_t rounds) {
    double flop = (double)rounds * 6 * TDP_FLOP;
    tiles_begin();
    __asm__ volatile(".p2align 6\n"
                     "1:\n"
                     ".irp i,0,1,2,3,4,5\n"
                     "tdpbf16ps %%tmm7, %%tmm6, %%tmm\\i\n"
                     ".endr\n"
                     "decq %0\n"
                     "jnz 1b\n"
                     : "+r"(rounds)
                     :
                     : "cc");
    tiles_end();
    return flop;
}

/* Twelve additions behind each product; they fit into its 16 cycles many times over. */
static double loop_tdpbf16ps_spaced(int64_t rounds) {
    double flop = (double)rounds * 6 * TDP_FLOP;
    tiles_begin();
    __asm__ volatile(".p2align 6\n"
                     "1:\n"
                     ".irp i,0,1,2,3,4,5\n"
                     "tdpbf16ps %%tmm7, %%tmm6, %%tmm\\i\n"
                     ".rept 3\n"
                     "leaq 1(%%rax), %%rax\n"
                     "leaq 1(%%rcx), %%rcx\n"
                     "leaq 1(%%rdx), %%rdx\n"
                     "leaq 1(%%rsi), %%rsi\n"
                     ".endr\n"
                     ".endr\n"
                     "decq %0\n"
                     "jnz 1b\n"
                     : "+r"(rounds)
                     :
                     : "cc", "rax", "rcx", "rdx", "rsi");
    tiles_end();
    return flop;
}

static const struct instruction instructions[] = {
    {"FMA ymm", has_fma_ymm, loop_fma_ymm},
    {"FMA zmm", has_fma_zmm, loop_fma_zmm},
    {"VDPBF16PS zmm", has_vdpbf16ps, loop_vdpbf16ps},
    {"TDPBF16PS", has_tdpbf16ps, loop_tdpbf16ps},
    {"TDPBF16PS spaced", has_tdpbf16ps, loop_tdpbf16ps_spaced},
};

#elif defined(__aarch64__)

static int has_fmla(void) {
    return 1;
}

static int has_bf16(void) {
    enum { HWCAP2_BF16_ = 1 << 14 };
    return (getauxval(AT_HWCAP2) & HWCAP2_BF16_) != 0;
}

/* 24 chains in v0..v23, `rounds` times, operands in v28 and v29: four pipes of latency 4 want 16.
 */
#define RUN_24_CHAINS(instruction, rounds)                                                         \
    __asm__ volatile(                                                                              \
        "fmov v28.4s, #0.5\n"                                                                      \
        "fmov v29.4s, #-1.25\n"                                                                    \
        "1:\n"                                                                                     \
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n" instruction "\n"  \
        ".endr\n"                                                                                  \
        "subs %0, %0, #1\n"                                                                        \
        "b.ne 1b\n"                                                                                \
        : "+r"(rounds)                                                                             \
        :                                                                                          \
        : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12",   \
          "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v28",      \
          "v29")

static double loop_fmla(int64_t rounds) {
    double flop = (double)rounds * 24 * 4 * 2;
    RUN_24_CHAINS("fmla v\\i\\().4s, v28.4s, v29.4s", rounds);
    return flop;
}

/* Given by their encodings, which every assembler takes: no architecture flag is needed. */
static double loop_bfmmla(int64_t rounds) {
    double flop = (double)rounds * 24 * 16 * 2;
    RUN_24_CHAINS(".inst 0x6e40ec00 + (29 << 16) + (28 << 5) + \\i", rounds);
    return flop;
}

static const struct instruction instructions[] = {
    {"FMLA", has_fmla, loop_fmla},
    {"BFMMLA", has_bf16, loop_bfmmla},
};

#else

static int has_nothing(void) {
    return 0;
}

static const struct instruction instructions[] = {{"none", has_nothing, NULL}};

#endif

enum { N_INSTRUCTIONS = sizeof instructions / sizeof instructions[0] };

static const struct instruction *find(const char *name) {
    for (int i = 0; i < N_INSTRUCTIONS; i++) {
        if (strcmp(instructions[i].name, name) == 0)
            return instructions[i].available() ? &instructions[i] : NULL;
    }
    return NULL;
}

const char *peak_instruction(const char *kernel, int type_code) {
    static const struct {
        const char *kernel, *bf16, *fp16;
    } rows[] = {
        {"avx2", "FMA ymm", "FMA ymm"},
        {"avx512", "FMA zmm", "FMA zmm"},
        {"avx512_bf16", "VDPBF16PS zmm", "FMA zmm"},
        {"amx", "TDPBF16PS", "TDPBF16PS"},
        {"neon_bf16", "BFMMLA", "FMLA"},
        {"neon", "FMLA", "FMLA"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (strcmp(rows[i].kernel, kernel) == 0) {
            const char *name = type_code == LIDX_BFLOAT ? rows[i].bf16 : rows[i].fp16;
            return find(name) ? name : NULL;
        }
    }
    return NULL;
}

/* The best rate of this thread in slices of 1 ms or little more. */
static double best_rate(double (*loop)(int64_t rounds), double seconds) {
    double end = now() + seconds, best = 0;
    int64_t rounds = 1000;
    do {
        double begin = now();
        double flop = loop(rounds);
        double took = now() - begin;
        if (took < 1e-3) {
            rounds *= 2;
            continue;
        }
        if (flop / took > best)
            best = flop / took;
    } while (now() < end || best == 0);
    return best;
}

double peak_flops_of(const char *instruction, double seconds, int n_threads) {
    const struct instruction *chosen = find(instruction);
    double sum = 0;
    if (!chosen)
        return 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads) reduction(+ : sum)
#endif
    sum += best_rate(chosen->loop, seconds);
    (void)n_threads;
    return sum;
}

double peak_flops_threads(const char *kernel, int type_code, double seconds, int n_threads) {
    const char *instruction = peak_instruction(kernel, type_code);
    return instruction ? peak_flops_of(instruction, seconds, n_threads) : 0;
}

double peak_flops(const char *kernel, int type_code, double seconds) {
    return peak_flops_threads(kernel, type_code, seconds, 1);
}
