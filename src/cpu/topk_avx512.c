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

#define LANES 8

typedef __m512d vector;

INLINE vector load(const double *from) {
    return _mm512_loadu_pd(from);
}

INLINE void store(double *to, vector x) {
    _mm512_storeu_pd(to, x);
}

INLINE vector better_of(vector a, vector b) {
    return _mm512_max_pd(a, b);
}

INLINE vector worse_of(vector a, vector b) {
    return _mm512_min_pd(a, b);
}

INLINE vector swap_neighbours(vector x) {
    return _mm512_permute_pd(x, 0x55);
}

INLINE vector odd_worse_of(vector x, vector a, vector b) {
    return _mm512_mask_min_pd(x, 0xAA, a, b);
}

INLINE void transpose(vector *out, const vector *r) {
    vector a0 = _mm512_unpacklo_pd(r[0], r[1]);
    vector a1 = _mm512_unpackhi_pd(r[0], r[1]);
    vector a2 = _mm512_unpacklo_pd(r[2], r[3]);
    vector a3 = _mm512_unpackhi_pd(r[2], r[3]);
    vector a4 = _mm512_unpacklo_pd(r[4], r[5]);
    vector a5 = _mm512_unpackhi_pd(r[4], r[5]);
    vector a6 = _mm512_unpacklo_pd(r[6], r[7]);
    vector a7 = _mm512_unpackhi_pd(r[6], r[7]);
    vector b0 = _mm512_shuffle_f64x2(a0, a2, 0x88), b1 = _mm512_shuffle_f64x2(a1, a3, 0x88);
    vector b2 = _mm512_shuffle_f64x2(a0, a2, 0xDD), b3 = _mm512_shuffle_f64x2(a1, a3, 0xDD);
    vector b4 = _mm512_shuffle_f64x2(a4, a6, 0x88), b5 = _mm512_shuffle_f64x2(a5, a7, 0x88);
    vector b6 = _mm512_shuffle_f64x2(a4, a6, 0xDD), b7 = _mm512_shuffle_f64x2(a5, a7, 0xDD);
    out[0] = _mm512_shuffle_f64x2(b0, b4, 0x88), out[1] = _mm512_shuffle_f64x2(b1, b5, 0x88);
    out[2] = _mm512_shuffle_f64x2(b2, b6, 0x88), out[3] = _mm512_shuffle_f64x2(b3, b7, 0x88);
    out[4] = _mm512_shuffle_f64x2(b0, b4, 0xDD), out[5] = _mm512_shuffle_f64x2(b1, b5, 0xDD);
    out[6] = _mm512_shuffle_f64x2(b2, b6, 0xDD), out[7] = _mm512_shuffle_f64x2(b3, b7, 0xDD);
}

#include "topk_x86.h"

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

TARGET static void place(uint16_t *bin, const uint64_t *entry, int n,
                         const struct topk_bins *bins) {
    const __m512i high = _mm512_set1_epi64((long long)bins->high);
    const __m128i shift = _mm_cvtsi32_si128(bins->shift);
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        __m128i number;
        if (bins->scale == 0) {
            number = _mm512_cvtepi64_epi16(_mm512_srl_epi64(_mm512_sub_epi64(high, e), shift));
        } else {
            __m256i key = _mm512_cvtepi64_epi32(_mm512_srli_epi64(e, 31));
            number = _mm256_cvtepi32_epi16(bins_by_score(key, bins));
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

TARGET static void settle(uint64_t *out, const uint64_t *in, int n) {
    settle_neighbours(out, in, n);
}

const struct topk_loops lidx_topk_avx512 = {filter, range, keep, count, place, begin, settle};

#endif
