/* SPDX-License-Identifier: Apache-2.0
 *
 * What avx512.c and avx512_bf16.c share: lanes are heads in both, and both bring a block of 16 keys
 * down to 16 rows of 16 sums, a lane for each 16th head.
 */
#ifndef LIDX_AVX512_H
#define LIDX_AVX512_H

#include <immintrin.h>

#include "kernel.h"

enum { LANES = 16 };

/* In avx512.c: its fp16 path, which is avx512_bf16.c's too, since fp16 has no product instruction
 * there; and 16 rows of 16 32-bit elements, n of them given and the rest 0, written as columns. */
size_t lidx_avx512_packed_size(int n_heads, int head_dim);
void lidx_avx512_pack_fp16(void *packed, const struct query_row *row);
void lidx_avx512_score_fp16(float *score, const void *packed, int n_heads, int head_dim,
                            const struct key_run *run);
void lidx_avx512_transpose(void *out, int64_t out_stride, const void *rows, int64_t row_stride,
                           int n);

/* The next bytes to fetch, and how far from one fetch to the next; 0 where there is nothing. */
struct ahead {
    const unsigned char *line;
    int64_t step;
};

static inline int group_count(int n_heads) {
    return (n_heads + LANES - 1) / LANES;
}

/* Up to 8 heads fill half a register, so each takes two lanes: the even one multiplies every other
 * element, or pair of elements, the odd one those between. */
static inline int lanes_of_head(int n_heads) {
    return n_heads <= LANES / 2 ? 2 : 1;
}

/* The lanes of the last group that stand for heads. */
static inline __mmask16 last_lanes(int n_heads) {
    if (lanes_of_head(n_heads) == 2)
        return (__mmask16)(0x5555 >> (LANES - 2 * n_heads));
    return (__mmask16)(0xFFFF >> (group_count(n_heads) * LANES - n_heads));
}

/* The scores of the first n keys of a block. The 16 lanes of each key are added in one order for
 * all: a transposing tree. */
static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl"))) void
store_scores(float *score, int n, float sums[KEY_BLOCK][LANES]) {
    __m512 pairs[8], quads[4], halves[2];
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int k = 0; k < 2; k++) {
            __m512 a = _mm512_load_ps(sums[4 * i + 2 * k]);
            __m512 b = _mm512_load_ps(sums[4 * i + 2 * k + 1]);
            pairs[2 * i + k] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLL
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xDD));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                               _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD));
    __mmask16 valid = n < KEY_BLOCK ? (__mmask16)((1u << n) - 1) : (__mmask16)0xFFFF;
    _mm512_mask_store_ps(score, valid, all);
}

#endif
