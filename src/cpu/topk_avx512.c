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

/* lidx_topk_key of 16 scores. */
TARGET static inline __m512i keys_of(__m512 score) {
    __m512 positive_zero = _mm512_add_ps(score, _mm512_setzero_ps());
    __m512i bits = _mm512_castps_si512(positive_zero);
    __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN));
    __mmask16 is_number = _mm512_cmp_ps_mask(score, score, _CMP_ORD_Q);
    return _mm512_maskz_xor_epi32(is_number, bits, flip);
}

/* Appends those of 8 candidates that are live and beat the threshold. */
TARGET static inline int append(uint64_t *entry, __m256i keys, __m512i low, __mmask8 live,
                                __m512i threshold) {
    __m512i candidate = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(keys), 32), low);
    __mmask8 beats = _mm512_mask_cmpgt_epu64_mask(live, candidate, threshold);
    _mm512_storeu_si512(entry, _mm512_maskz_compress_epi64(beats, candidate));
    return __builtin_popcount(beats);
}

TARGET static int filter(uint64_t *entry, const float *score, int n, uint32_t position,
                         uint64_t threshold) {
    const __m512i bound = _mm512_set1_epi64((long long)threshold);
    const __m512i least_key = _mm512_set1_epi32((int)(threshold >> 32));
    const __m512i eight = _mm512_set1_epi64(8);
    /* The low half of a candidate is the complement of its position: it falls by one a lane. */
    __m512i low = _mm512_sub_epi64(_mm512_set1_epi64((uint32_t)~position),
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

const struct topk_loops lidx_topk_avx512 = {filter, range, keep};

#endif
