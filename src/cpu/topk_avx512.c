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

INLINE vector but_first_lane(vector a, vector b) {
    __m512i x = _mm512_castpd_si512(a), y = _mm512_castpd_si512(b);
    return _mm512_castsi512_pd(_mm512_alignr_epi64(y, x, 1));
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
INLINE __m512i keys_of(__m512 score, int with_nan) {
    __m512 positive_zero = _mm512_add_ps(score, _mm512_setzero_ps());
    __m512i bits = _mm512_castps_si512(positive_zero);
    __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    if (!with_nan)
        return _mm512_xor_si512(bits, flip);
    __mmask16 is_number = _mm512_cmp_ps_mask(score, score, _CMP_ORD_Q);
    return _mm512_mask_xor_epi32(_mm512_set1_epi32(TOPK_NAN), is_number, bits, flip);
}

/* Appends those of 16 candidates that the mask names. Of an entry the lower word is the last bit of
 * the key and the complement of the position, the upper one the rest of the key. Words are
 * compressed each for itself, 16 at once, which takes half as long as entries do. */
INLINE int append(uint64_t *entry, __m512i keys, __m512i low, __mmask16 named) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    low = _mm512_or_si512(low, _mm512_slli_epi32(keys, 31));
    low = _mm512_maskz_compress_epi32(named, low);
    __m512i high = _mm512_maskz_compress_epi32(named, _mm512_srli_epi32(keys, 1));
    _mm512_storeu_si512(entry, _mm512_permutex2var_epi32(low, first, high));
    _mm512_storeu_si512(entry + 8, _mm512_permutex2var_epi32(low, second, high));
    return __builtin_popcount(named);
}

/* filter() of scores whose key is `least` or more. Where no NaN can be among them, scores tell as
 * well as their keys. */
INLINE int filter_from(uint64_t *entry, const float *score, int n, uint32_t position,
                       uint32_t least, int with_nan) {
    const __m512 bound = _mm512_set1_ps(lidx_topk_score((uint64_t)least << 31));
    const __m512i sixteen = _mm512_set1_epi32(16);
    /* The complement of a position falls by one a lane. */
    __m512i low =
        _mm512_sub_epi32(_mm512_set1_epi32((int)(~position & INT32_MAX)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int kept = 0;
    for (int i = 0; i < n; i += 16) {
        __mmask16 named = n - i >= 16 ? 0xFFFF : (__mmask16)((1u << (n - i)) - 1);
        __m512 x = _mm512_maskz_loadu_ps(named, score + i);
        if (!with_nan)
            named = _mm512_mask_cmp_ps_mask(named, x, bound, _CMP_GE_OQ);
        if (named)
            kept += append(entry + kept, keys_of(x, with_nan), low, named);
        low = _mm512_sub_epi32(low, sixteen);
    }
    return kept;
}

/* Keys below that of -inf are those of NaN. */
INLINE int filter_by_key(uint64_t *entry, const float *score, int n, uint32_t position,
                         uint32_t least) {
    const uint32_t least_number = lidx_topk_key(-__builtin_inff());
    if (least <= TOPK_NAN)
        return filter_from(entry, score, n, position, least_number, 1);
    least = least > least_number ? least : least_number;
    return filter_from(entry, score, n, position, least, 0);
}

/* Of equal scores a candidate that stands before the threshold's beats it. */
TARGET static int filter(uint64_t *entry, const float *score, int n, uint32_t position,
                         uint64_t threshold) {
    const uint32_t key = (uint32_t)(threshold >> 31);
    int64_t before = (int64_t)lidx_topk_position(threshold) - position;
    int first = before < 0 ? 0 : before < n ? (int)before : n;
    int kept = filter_by_key(entry, score, first, position, key);
    return kept + filter_by_key(entry + kept, score + first, n - first, position + (uint32_t)first,
                                key + 1);
}

TARGET static struct topk_range range(const uint64_t *entry, int n) {
    const double *numbers = (const double *)(const void *)entry;
    vector low = _mm512_set1_pd(numbers[0]), high = low, low2 = low, high2 = low;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        vector e = load(numbers + i), f = load(numbers + i + 8);
        low = worse_of(low, e);
        high = better_of(high, e);
        low2 = worse_of(low2, f);
        high2 = better_of(high2, f);
    }
    for (; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        vector e = _mm512_mask_loadu_pd(low, live, numbers + i);
        low = worse_of(low, e);
        high = better_of(high, e);
    }
    low = worse_of(low, low2);
    high = better_of(high, high2);
    return (struct topk_range){_mm512_reduce_min_epu64(_mm512_castpd_si512(low)),
                               _mm512_reduce_max_epu64(_mm512_castpd_si512(high))};
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

TARGET static int below(uint64_t *out, const uint64_t *entry, int n, uint64_t bound) {
    const __m512i least = _mm512_set1_epi64((long long)bound);
    int copied = 0;
    for (int i = 0; i < n; i += 8) {
        __mmask8 live = n - i >= 8 ? 0xFF : (__mmask8)((1u << (n - i)) - 1);
        __m512i e = _mm512_maskz_loadu_epi64(live, entry + i);
        live = _mm512_mask_cmplt_epu64_mask(live, e, least);
        _mm512_storeu_si512(out + copied, _mm512_maskz_compress_epi64(live, e));
        copied += __builtin_popcount(live);
    }
    return copied;
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

/* Lane i of the result is the sum of lanes 0 to i: of its quarter of the lanes, and of the quarters
 * before. */
INLINE __m512i running_sum(__m512i x) {
    x = _mm512_add_epi16(x, _mm512_bslli_epi128(x, 2));
    x = _mm512_add_epi16(x, _mm512_bslli_epi128(x, 4));
    x = _mm512_add_epi16(x, _mm512_bslli_epi128(x, 8));
    __m512i quarter = _mm512_shuffle_epi8(x, _mm512_set1_epi16(0x0F0E)); /* its last lane */
    __m512i first = _mm512_maskz_shuffle_i64x2(0xC0, quarter, quarter, 0x00);
    __m512i before = _mm512_maskz_shuffle_i64x2(0xFC, quarter, quarter, 0x90);
    quarter = _mm512_add_epi16(quarter, before);
    before = _mm512_maskz_shuffle_i64x2(0xFC, quarter, quarter, 0x90);
    return _mm512_add_epi16(x, _mm512_add_epi16(before, first));
}

TARGET static uint32_t begin(uint16_t *bin, int bins) {
    const __m512i last = _mm512_set1_epi16(31);
    __m512i next = _mm512_setzero_si512(), most = next;
    for (int b = 0; b < bins; b += 32) {
        __m512i n = _mm512_loadu_si512(bin + b);
        __m512i end = running_sum(n);
        _mm512_storeu_si512(bin + b, _mm512_add_epi16(next, _mm512_sub_epi16(end, n)));
        next = _mm512_add_epi16(next, _mm512_permutexvar_epi16(last, end));
        most = _mm512_max_epu16(most, n);
    }
    most = _mm512_max_epu16(most, _mm512_srli_epi32(most, 16));
    return _mm512_reduce_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xFFFF)));
}

TARGET static void settle(uint64_t *out, const uint64_t *in, int n) {
    settle_neighbours(out, in, n);
}

const struct topk_loops lidx_topk_avx512 = {filter, range, keep,  below,
                                            count,  place, begin, settle};

#endif
