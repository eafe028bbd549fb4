/* SPDX-License-Identifier: Apache-2.0
 *
 * fp16 through bf16: an fp16 number is the sum of a bf16 number with its upper 8 significant bits
 * and one with the other 3. The four products of the parts of two numbers are exact in fp32, so
 * four TDPBF16PS add up the products of the fp16 numbers themselves. inf and NaN cannot be split
 * (inf * 0 would make a NaN where the true product is inf): a key or query that holds one is
 * scored by vector instructions instead.
 */
#ifndef LIDX_AMX_PARTS_H
#define LIDX_AMX_PARTS_H

#include "amx_pass.h"

enum {
    SPLIT_BYTES = KEY_BLOCK * MAX_HEAD_DIM * 4, /* both parts of a block of fp16 keys */
};

/* The two bf16 parts of 32 fp16 numbers. A lane pairs dimension p with dimension 16 + p, on both
 * sides of the product. Where a number is not finite, high is it and low is a NaN. */
INLINE void split(pairs *high, pairs *low, const void *halves) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    __m512i both = _mm512_loadu_si512(halves);
    __m512 a = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    __m512 b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    __m512i a_high = _mm512_and_si512(_mm512_castps_si512(a), upper);
    __m512i b_high = _mm512_and_si512(_mm512_castps_si512(b), upper);
    __m512 a_low = _mm512_sub_ps(a, _mm512_castsi512_ps(a_high)); /* exact, at most 3 bits */
    __m512 b_low = _mm512_sub_ps(b, _mm512_castsi512_ps(b_high));
    *high = _mm512_or_si512(_mm512_srli_epi32(a_high, 16), b_high);
    *low = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a_low), 16),
                           _mm512_castps_si512(b_low));
}

/* Lanes of 16 bits that are inf or NaN in fp16. */
INLINE __mmask32 not_finite(const void *halves) {
    const __m512i exponent = _mm512_set1_epi16(0x7C00);
    __m512i x = _mm512_loadu_si512(halves);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
}

/* Splits row r of a block of fp16 keys into the block's half of scratch: for each step a tile of
 * high and a tile of low parts. Flags a key that has no parts. Rows behind the run become zeros. */
INLINE void split_row(struct pass *p, int block, int r, int steps) {
    pairs *out = (pairs *)(void *)(p->scratch + block % 2 * SPLIT_BYTES) + r;
    __mmask32 special = 0;
    for (int step = 0; step < steps; step++) {
        pairs high = _mm512_setzero_si512(), low = high;
        if (r < rows_in_block(&p->run, block)) {
            const unsigned char *key = p->run.block[block];
            key += p->run.row_stride * r + step * 64;
            split(&high, &low, key);
            special |= not_finite(key);
        }
        _mm512_store_si512(out + step * 2 * LANES, high);
        _mm512_store_si512(out + (step * 2 + 1) * LANES, low);
    }
    p->flags[block % FLAG_RING] |= (unsigned)(special != 0) << r;
}

/* One fp16 key by vector FMA, lanes = heads, the packed query's parts put together again. */
TARGET static inline float score_special(const struct pass *p, const void *key) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    const pairs *high = (const pairs *)(const void *)p->token[0].tiles;
    float total[LANES];
    __m512 sum = _mm512_setzero_ps();
    for (int tile = 0; tile < p->n_tiles; tile++) {
        __m512 dot = _mm512_setzero_ps();
        for (int dim = 0; dim < p->head_dim; dim += STEP_DIMS, high += 2 * LANES) {
            for (int i = 0; i < LANES; i++) {
                __m512i h = high[i], l = high[LANES + i];
                __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
                __m512 b = _mm512_castsi512_ps(_mm512_and_si512(h, upper));
                __m512 a_low = _mm512_castsi512_ps(_mm512_slli_epi32(l, 16));
                __m512 b_low = _mm512_castsi512_ps(_mm512_and_si512(l, upper));
                /* A low part that is NaN stands beside an inf or NaN that says all. */
                a = _mm512_mask_add_ps(a, _mm512_cmp_ps_mask(a_low, a_low, _CMP_ORD_Q), a, a_low);
                b = _mm512_mask_add_ps(b, _mm512_cmp_ps_mask(b_low, b_low, _CMP_ORD_Q), b, b_low);
                dot = _mm512_fmadd_ps(a, _mm512_set1_ps(lidx_load(key, dim + i, DTYPE_FP16)), dot);
                dot = _mm512_fmadd_ps(
                    b, _mm512_set1_ps(lidx_load(key, dim + LANES + i, DTYPE_FP16)), dot);
            }
        }
        __m512 relu = _mm512_maskz_max_ps(heads_of(p, tile), _mm512_setzero_ps(), dot);
        sum = _mm512_fmadd_ps(relu, _mm512_load_ps(p->token[0].weights + tile * LANES), sum);
    }
    _mm512_storeu_ps(total, sum);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            total[i] += total[i + width];
    return total[0];
}

static inline const void *key_at(const struct key_run *run, int j) {
    return (const unsigned char *)run->block[j / KEY_BLOCK] + run->row_stride * (j % KEY_BLOCK);
}

TARGET static inline void score_flagged(const struct pass *p, int block, unsigned flags) {
    for (; flags; flags &= flags - 1) {
        int j = block * KEY_BLOCK + __builtin_ctz(flags);
        p->token[0].score[j] = score_special(p, key_at(&p->run, j));
    }
}

#endif
