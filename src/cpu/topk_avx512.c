/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection's loops with AVX-512: 16 scores or 8 candidates a step. Candidates are compressed
 * in a register and stored whole: VPCOMPRESSQ with a memory operand is microcoded on Zen 4 and
 * several times slower. The store's dead lanes are what TOPK_SLACK allows for.
 */
#include "topk.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum {
    COLUMNS = 8,             /* runs that are sorted side by side, each in a lane */
    RUN = 16,                /* entries of a run, each in a register */
    BLOCK = COLUMNS * RUN,
};

/* lidx_topk_key of 16 scores. */
TARGET static inline __m512i keys_of(__m512 score) {
    __m512 positive_zero = _mm512_add_ps(score, _mm512_setzero_ps());
    __m512i bits = _mm512_castps_si512(positive_zero);
    __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    __mmask16 is_number = _mm512_cmp_ps_mask(score, score, _CMP_ORD_Q);
    return _mm512_mask_xor_epi32(_mm512_set1_epi32(TOPK_NAN), is_number, bits, flip);
}

/* Appends those of 8 candidates that are live and beat the threshold. */
TARGET static inline int append(uint64_t *entry, __m256i keys, __m512i low, __mmask8 live,
                                __m512i threshold) {
    __m512i candidate = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(keys), 31), low);
    __mmask8 beats = _mm512_mask_cmpgt_epu64_mask(live, candidate, threshold);
    _mm512_storeu_si512(entry, _mm512_maskz_compress_epi64(beats, candidate));
    return __builtin_popcount(beats);
}

TARGET static int filter(uint64_t *entry, const float *score, int n, uint32_t position,
                         uint64_t threshold) {
    const __m512i bound = _mm512_set1_epi64((long long)threshold);
    const __m512i least_key = _mm512_set1_epi32((int)(threshold >> 31));
    const __m512i eight = _mm512_set1_epi64(8);
    /* The low half of a candidate is the complement of its position: it falls by one a lane. */
    __m512i low = _mm512_sub_epi64(_mm512_set1_epi64(~position & INT32_MAX),
                                   _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    int kept = 0;
    for (int i = 0; i < n; i += 16) {
        __mmask16 live = n - i >= 16 ? 0xFFFF : (__mmask16)((1u << (n - i)) - 1);
        __m512i keys = keys_of(_mm512_maskz_loadu_ps(live, score + i));
        __m512i low8 = _mm512_sub_epi64(low, eight);
        live = _mm512_mask_cmpge_epu32_mask(live, keys, least_key);
        if (live) {
            kept += append(entry + kept, _mm512_castsi512_si256(keys), low, (__mmask8)live, bound);
            kept += append(entry + kept, _mm512_extracti64x4_epi64(keys, 1), low8,
                           (__mmask8)(live >> 8), bound);
        }
        low = _mm512_sub_epi64(low8, eight);
    }
    return kept;
}

TARGET static struct topk_range range(const uint64_t *entry, int n) {
    __m512i low = _mm512_set1_epi64((long long)entry[0]), high = low;
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        low = _mm512_mask_min_epu64(low, live, low, e);
        high = _mm512_max_epu64(high, e);
    }
    return (struct topk_range){_mm512_reduce_min_epu64(low), _mm512_reduce_max_epu64(high)};
}

TARGET static int keep(uint64_t *entry, int n, uint64_t bound) {
    const __m512i least = _mm512_set1_epi64((long long)bound);
    int kept = 0;
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        live = _mm512_mask_cmpge_epu64_mask(live, e, least);
        _mm512_storeu_si512(entry + kept, _mm512_maskz_compress_epi64(live, e));
        kept += __builtin_popcount(live);
    }
    return kept;
}

TARGET static int count(const uint64_t *entry, int n, uint64_t bound) {
    const __m512i least = _mm512_set1_epi64((long long)bound);
    int counted = 0;
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        counted += __builtin_popcount(_mm512_mask_cmpge_epu64_mask(live, e, least));
    }
    return counted;
}

/* The scores of 8 entries, lidx_topk_score but for which NaN it is. */
INLINE __m256 scores_of(__m512i entry) {
    __m256i key = _mm512_cvtepi64_epi32(_mm512_srli_epi64(entry, 31));
    __m256i flip = _mm256_or_si256(_mm256_srai_epi32(_mm256_xor_si256(key, _mm256_set1_epi32(-1)), 31),
                                   _mm256_set1_epi32(INT32_MIN));
    return _mm256_castsi256_ps(_mm256_xor_si256(key, flip));
}

TARGET static void place(uint16_t *bin, const uint64_t *entry, int n,
                         const struct topk_bins *bins) {
    const __m512i high = _mm512_set1_epi64((long long)bins->high);
    const __m128i shift = _mm_cvtsi32_si128(bins->shift);
    const __m256 best = _mm256_set1_ps(bins->best), scale = _mm256_set1_ps(bins->scale);
    const __m256i last = _mm256_set1_epi32(bins->last);
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        __m128i number;
        if (bins->scale == 0) {
            number = _mm512_cvtepi64_epi16(_mm512_srl_epi64(_mm512_sub_epi64(high, e), shift));
        } else {
            __m256 part = _mm256_mul_ps(_mm256_sub_ps(best, scores_of(e)), scale);
            number = _mm256_cvtepi32_epi16(_mm256_min_epi32(_mm256_cvttps_epi32(part), last));
        }
        _mm_mask_storeu_epi16(bin + i, live, number);
    }
}

/* Lane i of the result is the sum of lanes 0 to i. */
INLINE __m512i running_sum(__m512i x) {
    const __m512i zero = _mm512_setzero_si512();
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 15));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 14));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 12));
    return _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 8));
}

TARGET static uint32_t begin(uint32_t *bin, int bins) {
    const __m512i last = _mm512_set1_epi32(15);
    __m512i next = _mm512_setzero_si512(), most = next;
    for (int b = 0; b < bins; b += 16) {
        __m512i n = _mm512_loadu_si512(bin + b);
        __m512i end = running_sum(n);
        _mm512_storeu_si512(bin + b, _mm512_add_epi32(next, _mm512_sub_epi32(end, n)));
        next = _mm512_add_epi32(next, _mm512_permutexvar_epi32(last, end));
        most = _mm512_max_epu32(most, n);
    }
    return _mm512_reduce_max_epu32(most);
}

/* ---- settling neighbours ---------------------------------------------------------------------
 *
 * A block of 128 entries is 8 runs of 16. Transposed, a run is a lane of 16 registers, and a
 * network of minima and maxima between registers sorts all runs at once without a shuffle. Two
 * runs in neighbouring lanes become one of 32 by a bitonic merge: one step between lanes, four
 * between registers. A group of at most 16 entries lies within an aligned 32 or within the halves
 * of two that meet: so the runs are merged in pairs, and then merged in the other pairs.
 */

INLINE void order(__m512d *r, int better, int worse) {
    __m512d a = r[better], b = r[worse];
    r[better] = _mm512_max_pd(a, b);
    r[worse] = _mm512_min_pd(a, b);
}

/* The network of 60 exchanges in 10 steps that M. W. Green found for 16. */
INLINE void sort_runs(__m512d *r) {
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
INLINE void part_lanes(__m512d *r, int a, int b) {
    const __mmask8 odd = 0xAA;
    __m512d from_b = _mm512_permute_pd(r[b], 0x55), from_a = _mm512_permute_pd(r[a], 0x55);
    __m512d x = _mm512_max_pd(r[a], from_b), y = _mm512_max_pd(r[b], from_a);
    r[a] = _mm512_mask_min_pd(x, odd, r[a], from_b);
    r[b] = _mm512_mask_min_pd(y, odd, r[b], from_a);
}

INLINE void order_four(__m512d *r, int first, int distance, int stride) {
    order(r, first, first + distance);
    order(r, first + stride, first + stride + distance);
    order(r, first + 2 * stride, first + 2 * stride + distance);
    order(r, first + 3 * stride, first + 3 * stride + distance);
}

INLINE void merge_runs(__m512d *r) {
    part_lanes(r, 0, 15), part_lanes(r, 1, 14), part_lanes(r, 2, 13), part_lanes(r, 3, 12);
    part_lanes(r, 4, 11), part_lanes(r, 5, 10), part_lanes(r, 6, 9), part_lanes(r, 7, 8);
    order_four(r, 0, 8, 1), order_four(r, 4, 8, 1);
    order_four(r, 0, 4, 1), order_four(r, 8, 4, 1);
    order_four(r, 0, 2, 4), order_four(r, 1, 2, 4);
    order_four(r, 0, 1, 2), order_four(r, 8, 1, 2);
}

/* Row i to lane i. */
INLINE void transpose(__m512d *out, const __m512d *r) {
    __m512d a0 = _mm512_unpacklo_pd(r[0], r[1]);
    __m512d a1 = _mm512_unpackhi_pd(r[0], r[1]);
    __m512d a2 = _mm512_unpacklo_pd(r[2], r[3]);
    __m512d a3 = _mm512_unpackhi_pd(r[2], r[3]);
    __m512d a4 = _mm512_unpacklo_pd(r[4], r[5]);
    __m512d a5 = _mm512_unpackhi_pd(r[4], r[5]);
    __m512d a6 = _mm512_unpacklo_pd(r[6], r[7]);
    __m512d a7 = _mm512_unpackhi_pd(r[6], r[7]);
    __m512d b0 = _mm512_shuffle_f64x2(a0, a2, 0x88), b1 = _mm512_shuffle_f64x2(a1, a3, 0x88);
    __m512d b2 = _mm512_shuffle_f64x2(a0, a2, 0xDD), b3 = _mm512_shuffle_f64x2(a1, a3, 0xDD);
    __m512d b4 = _mm512_shuffle_f64x2(a4, a6, 0x88), b5 = _mm512_shuffle_f64x2(a5, a7, 0x88);
    __m512d b6 = _mm512_shuffle_f64x2(a4, a6, 0xDD), b7 = _mm512_shuffle_f64x2(a5, a7, 0xDD);
    out[0] = _mm512_shuffle_f64x2(b0, b4, 0x88), out[1] = _mm512_shuffle_f64x2(b1, b5, 0x88);
    out[2] = _mm512_shuffle_f64x2(b2, b6, 0x88), out[3] = _mm512_shuffle_f64x2(b3, b7, 0x88);
    out[4] = _mm512_shuffle_f64x2(b0, b4, 0xDD), out[5] = _mm512_shuffle_f64x2(b1, b5, 0xDD);
    out[6] = _mm512_shuffle_f64x2(b2, b6, 0xDD), out[7] = _mm512_shuffle_f64x2(b3, b7, 0xDD);
}

/* Lanes of register `index` of a block that holds n entries. */
INLINE __mmask8 live_lanes(int n, int index) {
    int live = n - index * 8;
    return live >= 8 ? 0xFF : live <= 0 ? 0 : (__mmask8)((1u << live) - 1);
}

/* Register 2i holds the first half of run i, register 2i + 1 the second. What is not there is 0,
 * worse than any entry. */
INLINE void load_half(__m512d *r, const double *in, int n, int half) {
    __m512d v[8];
    v[0] = _mm512_maskz_loadu_pd(live_lanes(n, half), in + half * 8);
    v[1] = _mm512_maskz_loadu_pd(live_lanes(n, 2 + half), in + 16 + half * 8);
    v[2] = _mm512_maskz_loadu_pd(live_lanes(n, 4 + half), in + 32 + half * 8);
    v[3] = _mm512_maskz_loadu_pd(live_lanes(n, 6 + half), in + 48 + half * 8);
    v[4] = _mm512_maskz_loadu_pd(live_lanes(n, 8 + half), in + 64 + half * 8);
    v[5] = _mm512_maskz_loadu_pd(live_lanes(n, 10 + half), in + 80 + half * 8);
    v[6] = _mm512_maskz_loadu_pd(live_lanes(n, 12 + half), in + 96 + half * 8);
    v[7] = _mm512_maskz_loadu_pd(live_lanes(n, 14 + half), in + 112 + half * 8);
    transpose(r, v);
}

INLINE void store_half(double *out, const __m512d *r, int n, int half) {
    __m512d v[8];
    transpose(v, r);
    _mm512_mask_storeu_pd(out + half * 8, live_lanes(n, half), v[0]);
    _mm512_mask_storeu_pd(out + 16 + half * 8, live_lanes(n, 2 + half), v[1]);
    _mm512_mask_storeu_pd(out + 32 + half * 8, live_lanes(n, 4 + half), v[2]);
    _mm512_mask_storeu_pd(out + 48 + half * 8, live_lanes(n, 6 + half), v[3]);
    _mm512_mask_storeu_pd(out + 64 + half * 8, live_lanes(n, 8 + half), v[4]);
    _mm512_mask_storeu_pd(out + 80 + half * 8, live_lanes(n, 10 + half), v[5]);
    _mm512_mask_storeu_pd(out + 96 + half * 8, live_lanes(n, 12 + half), v[6]);
    _mm512_mask_storeu_pd(out + 112 + half * 8, live_lanes(n, 14 + half), v[7]);
}

INLINE void settle_block(double *out, const double *in, int n, int sorted) {
    __m512d r[RUN];
    load_half(r, in, n, 0);
    load_half(r + 8, in, n, 1);
    if (!sorted)
        sort_runs(r);
    merge_runs(r);
    store_half(out, r, n, 0);
    store_half(out, r + 8, n, 1);
}

INLINE void settle_blocks(double *out, const double *in, int n, int sorted) {
    int i = 0;
    for (; i + BLOCK <= n; i += BLOCK)
        settle_block(out + i, in + i, BLOCK, sorted);
    if (i < n)
        settle_block(out + i, in + i, n - i, sorted);
}

TARGET static void settle(uint64_t *out, const uint64_t *in, int n) {
    double *to = (double *)(void *)out;
    settle_blocks(to, (const double *)(const void *)in, n, 0);
    settle_blocks(to + RUN, to + RUN, n - RUN, 1);
}

const struct topk_loops lidx_topk_avx512 = {filter, range, keep, count, place, begin, settle};

#endif
