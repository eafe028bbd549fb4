/* SPDX-License-Identifier: Apache-2.0
 *
 * What the selection's loops for AVX2 and AVX-512 share, for registers of either width. A file that
 * includes this has defined before:
 *
 *     INLINE                    how functions are declared
 *     LANES                     doubles of a register
 *     vector                    a register of doubles
 *     load, store               LANES doubles at any address
 *     better_of, worse_of       maxima and minima, lane by lane
 *     swap_neighbours           changes lanes 2i and 2i + 1 for each other
 *     odd_worse_of(x, a, b)     x in even lanes, the worse of a and b in odd ones
 *     but_first_lane(a, b)      lanes 1 and up of a, and behind them lane 0 of b
 *     transpose(out, in)        LANES registers: row i to lane i
 */
#ifndef LIDX_TOPK_X86_H
#define LIDX_TOPK_X86_H

#include <immintrin.h>

#include "topk.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* The bins of 8 keys where these are equal parts of scores. Which NaN a score is does not matter:
 * among scores that span a finite range there is none. */
INLINE __m256i bins_by_score(__m256i key, const struct topk_bins *bins) {
    __m256i is_negative = _mm256_srai_epi32(_mm256_xor_si256(key, _mm256_set1_epi32(-1)), 31);
    __m256i flip = _mm256_or_si256(is_negative, _mm256_set1_epi32(INT32_MIN));
    __m256 below =
        _mm256_sub_ps(_mm256_set1_ps(bins->best), _mm256_castsi256_ps(_mm256_xor_si256(key, flip)));
    __m256 part = _mm256_mul_ps(below, _mm256_set1_ps(bins->scale));
    return _mm256_min_epi32(_mm256_cvttps_epi32(part), _mm256_set1_epi32(bins->last));
}

/* ---- settling neighbours ---------------------------------------------------------------------
 *
 * A block is LANES runs of 16 entries. Transposed, a run is a lane of 16 registers, and a network
 * of minima and maxima between registers sorts all runs at once without a shuffle. Two runs in
 * neighbouring lanes become one of 32 by a bitonic merge: one step between lanes, four between
 * registers. A group of at most 16 entries lies within an aligned 32 or within the halves of two
 * that meet: so the runs are merged in pairs, and then merged in the other pairs.
 */

enum {
    RUN = TOPK_NEAR, /* entries of a run, each in a register */
    BLOCK = LANES * RUN,
};

INLINE void order(vector *r, int better, int worse) {
    vector a = r[better], b = r[worse];
    r[better] = better_of(a, b);
    r[worse] = worse_of(a, b);
}

/* The network of 60 exchanges in 10 steps that M. W. Green found for 16. */
INLINE void sort_runs(vector *r) {
    order(r, 0, 1), order(r, 2, 3), order(r, 4, 5), order(r, 6, 7);
    order(r, 8, 9), order(r, 10, 11), order(r, 12, 13), order(r, 14, 15);
    order(r, 0, 2), order(r, 1, 3), order(r, 4, 6), order(r, 5, 7);
    order(r, 8, 10), order(r, 9, 11), order(r, 12, 14), order(r, 13, 15);
    order(r, 0, 4), order(r, 1, 5), order(r, 2, 6), order(r, 3, 7);
    order(r, 8, 12), order(r, 9, 13), order(r, 10, 14), order(r, 11, 15);
    order(r, 0, 8), order(r, 1, 9), order(r, 2, 10), order(r, 3, 11);
    order(r, 4, 12), order(r, 5, 13), order(r, 6, 14), order(r, 7, 15);
    order(r, 5, 10), order(r, 6, 9), order(r, 3, 12), order(r, 13, 14);
    order(r, 4, 8), order(r, 7, 11), order(r, 1, 2);
    order(r, 1, 4), order(r, 7, 13), order(r, 2, 8), order(r, 11, 14);
    order(r, 2, 4), order(r, 5, 6), order(r, 9, 10), order(r, 11, 13);
    order(r, 3, 8), order(r, 7, 12);
    order(r, 6, 8), order(r, 10, 12), order(r, 3, 5), order(r, 7, 9);
    order(r, 3, 4), order(r, 5, 6), order(r, 7, 8), order(r, 9, 10), order(r, 11, 12);
    order(r, 6, 7), order(r, 8, 9);
}

/* Of the runs in lanes 2i and 2i + 1, the better 16 to lane 2i and the others to lane 2i + 1. */
INLINE void part_lanes(vector *r, int a, int b) {
    vector from_b = swap_neighbours(r[b]), from_a = swap_neighbours(r[a]);
    vector x = better_of(r[a], from_b), y = better_of(r[b], from_a);
    r[a] = odd_worse_of(x, r[a], from_b);
    r[b] = odd_worse_of(y, r[b], from_a);
}

INLINE void order_four(vector *r, int first, int distance, int stride) {
    order(r, first, first + distance);
    order(r, first + stride, first + stride + distance);
    order(r, first + 2 * stride, first + 2 * stride + distance);
    order(r, first + 3 * stride, first + 3 * stride + distance);
}

INLINE void merge_runs(vector *r) {
    part_lanes(r, 0, 15), part_lanes(r, 1, 14), part_lanes(r, 2, 13), part_lanes(r, 3, 12);
    part_lanes(r, 4, 11), part_lanes(r, 5, 10), part_lanes(r, 6, 9), part_lanes(r, 7, 8);
    order_four(r, 0, 8, 1), order_four(r, 4, 8, 1);
    order_four(r, 0, 4, 1), order_four(r, 8, 4, 1);
    order_four(r, 0, 2, 4), order_four(r, 1, 2, 4);
    order_four(r, 0, 1, 2), order_four(r, 8, 1, 2);
}

/* The first BLOCK of n entries, each run sorted and runs merged in pairs of lanes. What is missing
 * of a block is 0, worse than any entry. */
INLINE void sort_block(vector *r, const double *in, int n) {
    double filled[BLOCK];
    if (n <= 0) {
        memset(r, 0, sizeof *r * RUN);
        return;
    }
    if (n < BLOCK) {
        size_t bytes = sizeof *in * (size_t)n;
        memcpy(filled, in, bytes);
        memset((unsigned char *)filled + bytes, 0, sizeof filled - bytes);
        in = filled;
    }
    vector rows[LANES];
    UNROLL
    for (int part = 0; part < RUN; part += LANES) {
        UNROLL
        for (int i = 0; i < LANES; i++)
            rows[i] = load(in + RUN * i + part);
        transpose(r + part, rows);
    }
    sort_runs(r);
    merge_runs(r);
}

/* The first n entries of a block. */
INLINE void store_block(double *out, const vector *r, int n) {
    double whole[BLOCK], *to = n < BLOCK ? whole : out;
    vector rows[LANES];
    UNROLL
    for (int part = 0; part < RUN; part += LANES) {
        transpose(rows, r + part);
        UNROLL
        for (int i = 0; i < LANES; i++)
            store(to + RUN * i + part, rows[i]);
    }
    if (n < BLOCK)
        memcpy(out, whole, sizeof *out * (size_t)n);
}

/* The other pairs: the runs of a block but the first, and the first of the next block. */
INLINE void merge_across(vector *r, const vector *block, const vector *next) {
    UNROLL
    for (int i = 0; i < RUN; i++)
        r[i] = but_first_lane(block[i], next[i]);
    merge_runs(r);
}

/* struct topk_loops.settle */
INLINE void settle_neighbours(uint64_t *to, const uint64_t *from, int n) {
    double *out = (double *)(void *)to;
    const double *in = (const double *)(const void *)from;
    vector block[RUN], next[RUN], across[RUN];
    memset(block, 0, sizeof block);
    for (int i = 0, stored = 0; stored < n; i += BLOCK) {
        sort_block(next, in + i, n - i);
        if (i == 0) {
            store_block(out, next, n < RUN ? n : RUN);
            stored = RUN;
        } else {
            merge_across(across, block, next);
            store_block(out + stored, across, n - stored);
            stored += BLOCK;
        }
        memcpy(block, next, sizeof block);
    }
}

#endif
