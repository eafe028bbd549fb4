/* SPDX-License-Identifier: Apache-2.0
 *
 * The AVX2 kernel's loop of products: a panel of heads against the next keys of a block, in 16
 * registers. In assembly, since all of them are in use, and gcc 12 spills sums in every round where
 * it can.
 *
 * A round multiplies 8 elements. Between its steps it also widens 8 elements of as many keys as it
 * multiplies, which is next to free there: nothing else wants the ports that shift and store.
 *
 * Operands 0 to 11 are the sums, ymm12 to ymm14 the query vectors of a step; ymm15 takes the
 * broadcasts, and what is widened.
 */
#ifndef LIDX_AVX2_MULTIPLY_H
#define LIDX_AVX2_MULTIPLY_H

#include <immintrin.h>

#include "kernel.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    LANES = 8,
    PANEL_SUMS = 12,      /* most sums of a panel */
    PITCH = MAX_HEAD_DIM, /* floats from key to key in the scratch */
    NOTHING = KEY_DTYPES, /* to widen, in the place of a dtype */
};

/* Where a panel is on its way over a block of keys. */
struct place {
    const float *keys;
    const unsigned char *line; /* to fetch */
    const unsigned char *row;  /* to widen */
    float *wide;
};

/* A panel of the packed query, and where on a block it begins. */
struct panel {
    const float *query, *weights, *masks;
    int head_dim;
    int is_first;  /* of the panels: it begins the sums */
    int is_padded; /* some lanes are no heads */
    int64_t step;  /* bytes from one fetch to the next */
    int64_t row_stride;
    struct place begin;
};

_Static_assert(PITCH * sizeof(float) == 512, "the distance from key to key below");

/* clang-format off */

#define LOAD(at, q) "vmovaps " at "(%[query]), %%ymm" q "\n"

/* Element s of the key at `at`, times the query vector of each sum. */
#define KEY_1(s, at, a)                                                                            \
    "vbroadcastss " at "+4*" #s "(%[keys]), %%ymm15\n"                                             \
    "vfmadd231ps %%ymm15, %%ymm12, " a "\n"
#define KEY_2(s, at, a, b)                                                                         \
    KEY_1(s, at, a)                                                                                \
    "vfmadd231ps %%ymm15, %%ymm13, " b "\n"
#define KEY_3(s, at, a, b, c)                                                                      \
    KEY_2(s, at, a, b)                                                                             \
    "vfmadd231ps %%ymm15, %%ymm14, " c "\n"

/* Element s of 8 keys times 1 query vector, of 4 keys times 2 or 3. */
#define STEP_1(s)                                                                                  \
    LOAD("32*" #s, "12")                                                                           \
    KEY_1(s, "0", "%0") KEY_1(s, "512", "%1") KEY_1(s, "1024", "%2") KEY_1(s, "1536", "%3")        \
    KEY_1(s, "2048", "%4") KEY_1(s, "2560", "%5") KEY_1(s, "3072", "%6") KEY_1(s, "3584", "%7")
#define STEP_2(s)                                                                                  \
    LOAD("64*" #s, "12") LOAD("64*" #s "+32", "13")                                                \
    KEY_2(s, "0", "%0", "%1") KEY_2(s, "512", "%2", "%3")                                          \
    KEY_2(s, "1024", "%4", "%5") KEY_2(s, "1536", "%6", "%7")
#define STEP_3(s)                                                                                  \
    LOAD("96*" #s, "12") LOAD("96*" #s "+32", "13") LOAD("96*" #s "+64", "14")                     \
    KEY_3(s, "0", "%0", "%1", "%2") KEY_3(s, "512", "%3", "%4", "%5")                              \
    KEY_3(s, "1024", "%6", "%7", "%8") KEY_3(s, "1536", "%9", "%10", "%11")

#define WIDEN_BF16(from, to)                                                                       \
    "vpmovzxwd (" from "), %%ymm15\n"                                                              \
    "vpslld $16, %%ymm15, %%ymm15\n"                                                               \
    "vmovaps %%ymm15, " to "(%[wide])\n"
#define WIDEN_FP16(from, to)                                                                       \
    "vcvtph2ps (" from "), %%ymm15\n"                                                              \
    "vmovaps %%ymm15, " to "(%[wide])\n"
#define WIDEN_NONE(from, to) ""

#define ADVANCE_BF16                                                                               \
    "addq $16, %[row]\n"                                                                           \
    "addq $16, %[row4]\n"                                                                          \
    "addq $32, %[wide]\n"
#define ADVANCE_FP16 ADVANCE_BF16
#define ADVANCE_NONE ""

#define FETCH                                                                                      \
    "prefetcht0 (%[line])\n"                                                                       \
    "addq %[step], %[line]\n"

#define ROUND_1(type)                                                                              \
    STEP_1(0) WIDEN_##type("%[row]", "0")                                                          \
    STEP_1(1) WIDEN_##type("%[row],%[stride]", "512") FETCH                                        \
    STEP_1(2) WIDEN_##type("%[row],%[stride],2", "1024")                                           \
    STEP_1(3) WIDEN_##type("%[row],%[stride3]", "1536")                                            \
    STEP_1(4) WIDEN_##type("%[row4]", "2048")                                                      \
    STEP_1(5) WIDEN_##type("%[row4],%[stride]", "2560") FETCH                                      \
    STEP_1(6) WIDEN_##type("%[row4],%[stride],2", "3072")                                          \
    STEP_1(7) WIDEN_##type("%[row4],%[stride3]", "3584")
#define ROUND_OF_4_KEYS(STEP, type)                                                                \
    STEP(0) STEP(1) WIDEN_##type("%[row]", "0")                                                    \
    STEP(2) STEP(3) WIDEN_##type("%[row],%[stride]", "512") FETCH                                  \
    STEP(4) STEP(5) WIDEN_##type("%[row],%[stride],2", "1024")                                     \
    STEP(6) STEP(7) WIDEN_##type("%[row],%[stride3]", "1536")
#define ROUND_2(type) ROUND_OF_4_KEYS(STEP_2, type)
#define ROUND_3(type) ROUND_OF_4_KEYS(STEP_3, type)

#define ZERO(a) "vxorps " a ", " a ", " a "\n"
#define ZERO_4(a, b, c, d) ZERO(a) ZERO(b) ZERO(c) ZERO(d)
#define ZERO_1 ZERO_4("%0", "%1", "%2", "%3") ZERO_4("%4", "%5", "%6", "%7")
#define ZERO_2 ZERO_1
#define ZERO_3 ZERO_2 ZERO_4("%8", "%9", "%10", "%11")

#define MULTIPLY(P, type)                                                                          \
    __asm__ volatile(                                                                              \
        ZERO_##P                                                                                   \
        "1:\n"                                                                                     \
        ROUND_##P(type)                                                                            \
        ADVANCE_##type                                                                             \
        "addq $256*" #P ", %[query]\n"                                                             \
        "addq $32, %[keys]\n"                                                                      \
        "cmpq %[end], %[keys]\n"                                                                   \
        "jb 1b\n"                                                                                  \
        : "=&x"(sum[0]), "=&x"(sum[1]), "=&x"(sum[2]), "=&x"(sum[3]), "=&x"(sum[4]),               \
          "=&x"(sum[5]), "=&x"(sum[6]), "=&x"(sum[7]), "=&x"(sum[8]), "=&x"(sum[9]),               \
          "=&x"(sum[10]), "=&x"(sum[11]), [query] "+r"(query), [keys] "+r"(at->keys),              \
          [line] "+r"(at->line), [row] "+r"(at->row), [row4] "+r"(row4), [wide] "+r"(at->wide)     \
        : [end] "r"(end), [step] "r"(p->step), [stride] "r"(stride), [stride3] "r"(3 * stride)     \
        : "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory")

/* clang-format on */

#define MULTIPLY_AND_WIDEN(P)                                                                      \
    do {                                                                                           \
        if (widened == DTYPE_BF16)                                                                 \
            MULTIPLY(P, BF16);                                                                     \
        else if (widened == DTYPE_FP16)                                                            \
            MULTIPLY(P, FP16);                                                                     \
        else                                                                                       \
            MULTIPLY(P, NONE);                                                                     \
    } while (0)

/* sum[i * P + g] of the next keys i and the panel's groups g; those beyond are not set. */
INLINE void multiply(__m256 sum[PANEL_SUMS], struct place *at, const struct panel *p, int P,
                     int widened) {
    const int64_t stride = p->row_stride;
    const float *query = p->query, *end = at->keys + p->head_dim;
    const unsigned char *row4 = at->row + 4 * stride;
    if (P == 1)
        MULTIPLY_AND_WIDEN(1);
    else if (P == 2)
        MULTIPLY_AND_WIDEN(2);
    else
        MULTIPLY_AND_WIDEN(3);
}

#endif
