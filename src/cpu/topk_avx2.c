/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection's loops with AVX2: 8 scores or 4 candidates a step. There is no compression, so a
 * table says for each mask which candidates come first.
 */
#include "topk.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,popcnt")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define LANES  4

typedef __m256d vector;

INLINE vector load(const double *from) {
    return _mm256_loadu_pd(from);
}

INLINE void store(double *to, vector x) {
    _mm256_storeu_pd(to, x);
}

INLINE vector better_of(vector a, vector b) {
    return _mm256_max_pd(a, b);
}

INLINE vector worse_of(vector a, vector b) {
    return _mm256_min_pd(a, b);
}

INLINE vector swap_neighbours(vector x) {
    return _mm256_permute_pd(x, 0x5);
}

INLINE vector odd_worse_of(vector x, vector a, vector b) {
    return _mm256_blend_pd(x, _mm256_min_pd(a, b), 0xA);
}

INLINE vector but_first_lane(vector a, vector b) {
    return _mm256_shuffle_pd(a, _mm256_permute2f128_pd(a, b, 0x21), 0x5);
}

INLINE void transpose(vector *out, const vector *r) {
    vector a0 = _mm256_unpacklo_pd(r[0], r[1]), a1 = _mm256_unpackhi_pd(r[0], r[1]);
    vector a2 = _mm256_unpacklo_pd(r[2], r[3]), a3 = _mm256_unpackhi_pd(r[2], r[3]);
    out[0] = _mm256_permute2f128_pd(a0, a2, 0x20), out[1] = _mm256_permute2f128_pd(a1, a3, 0x20);
    out[2] = _mm256_permute2f128_pd(a0, a2, 0x31), out[3] = _mm256_permute2f128_pd(a1, a3, 0x31);
}

#include "topk_x86.h"

/* For each mask of 4 entries the halves of those that it names, one behind the other. */
static const uint8_t halves_first[16][8] = {
    {0},
    {0, 1},
    {2, 3},
    {0, 1, 2, 3},
    {4, 5},
    {0, 1, 4, 5},
    {2, 3, 4, 5},
    {0, 1, 2, 3, 4, 5},
    {6, 7},
    {0, 1, 6, 7},
    {2, 3, 6, 7},
    {0, 1, 2, 3, 6, 7},
    {4, 5, 6, 7},
    {0, 1, 4, 5, 6, 7},
    {2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6, 7},
};

INLINE __m256i load_entries(const uint64_t *entry) {
    return _mm256_loadu_si256((const __m256i *)(const void *)entry);
}

INLINE void store_entries(uint64_t *to, __m256i entry) {
    _mm256_storeu_si256((__m256i *)(void *)to, entry);
}

/* Stores the entries that the mask names, and as many more as make 4; returns how many it names. */
INLINE int store_named(uint64_t *to, __m256i entry, int mask) {
    __m128i first = _mm_loadl_epi64((const __m128i *)(const void *)halves_first[mask]);
    entry = _mm256_permutevar8x32_epi32(entry, _mm256_cvtepu8_epi32(first));
    store_entries(to, entry);
    return __builtin_popcount((unsigned)mask);
}

/* Bits of a mask for those of `lanes` lanes from place i on that are there. */
INLINE int live_lanes(int n, int i, int lanes) {
    return n - i >= lanes ? (1 << lanes) - 1 : (1 << (n - i)) - 1;
}

/* Those of n entries from place i on, and zeros behind them. */
INLINE __m256i load_live(const uint64_t *entry, int n, int i) {
    if (n - i >= 4)
        return load_entries(entry + i);
    __m256i live = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n - i), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_maskload_epi64((const long long *)(const void *)(entry + i), live);
}

/* lidx_topk_key of 8 scores. */
INLINE __m256i keys_of(__m256 score) {
    __m256i bits = _mm256_castps_si256(_mm256_add_ps(score, _mm256_setzero_ps()));
    __m256i flip = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN));
    __m256 key = _mm256_castsi256_ps(_mm256_xor_si256(bits, flip));
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(TOPK_NAN));
    return _mm256_castps_si256(
        _mm256_blendv_ps(key, nan, _mm256_cmp_ps(score, score, _CMP_UNORD_Q)));
}

/* Appends those of 4 candidates that are live and beat the threshold. */
INLINE int append(uint64_t *entry, __m128i keys, __m256i low, int live, __m256i threshold) {
    __m256i candidate = _mm256_or_si256(_mm256_slli_epi64(_mm256_cvtepu32_epi64(keys), 31), low);
    __m256i beats = _mm256_cmpgt_epi64(candidate, threshold);
    return store_named(entry, candidate, live & _mm256_movemask_pd(_mm256_castsi256_pd(beats)));
}

TARGET static int filter(uint64_t *entry, const float *score, int n, uint32_t position,
                         uint64_t threshold) {
    const __m256i bound = _mm256_set1_epi64x((long long)threshold);
    const __m256i least_key = _mm256_set1_epi32((int)(threshold >> 31));
    const __m256i four = _mm256_set1_epi64x(4);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    /* The low half of a candidate is the complement of its position: it falls by one a lane. */
    __m256i low =
        _mm256_sub_epi64(_mm256_set1_epi64x(~position & INT32_MAX), _mm256_setr_epi64x(0, 1, 2, 3));
    int kept = 0;
    for (int i = 0; i < n; i += 8) {
        __m256i is_there = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - i), lanes);
        __m256i keys = keys_of(n - i >= 8 ? _mm256_loadu_ps(score + i)
                                          : _mm256_maskload_ps(score + i, is_there));
        __m256i reaches = _mm256_cmpeq_epi32(_mm256_max_epu32(keys, least_key), keys);
        int live = live_lanes(n, i, 8) & _mm256_movemask_ps(_mm256_castsi256_ps(reaches));
        __m256i low4 = _mm256_sub_epi64(low, four);
        if (live) {
            kept += append(entry + kept, _mm256_castsi256_si128(keys), low, live & 15, bound);
            kept += append(entry + kept, _mm256_extracti128_si256(keys, 1), low4, live >> 4, bound);
        }
        low = _mm256_sub_epi64(low4, four);
    }
    return kept;
}

TARGET static struct topk_range range(const uint64_t *entry, int n) {
    __m256d low = _mm256_castsi256_pd(_mm256_set1_epi64x((long long)entry[0])), high = low;
    uint64_t lows[LANES], highs[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        __m256d e = _mm256_castsi256_pd(load_entries(entry + i));
        low = worse_of(low, e);
        high = better_of(high, e);
    }
    store_entries(lows, _mm256_castpd_si256(low));
    store_entries(highs, _mm256_castpd_si256(high));
    struct topk_range r = {lows[0], highs[0]};
    for (int lane = 1; lane < LANES; lane++) {
        r.low = lows[lane] < r.low ? lows[lane] : r.low;
        r.high = highs[lane] > r.high ? highs[lane] : r.high;
    }
    for (; i < n; i++) {
        r.low = entry[i] < r.low ? entry[i] : r.low;
        r.high = entry[i] > r.high ? entry[i] : r.high;
    }
    return r;
}

TARGET static int keep(uint64_t *entry, int n, uint64_t bound) {
    const __m256i below = _mm256_set1_epi64x((long long)(bound - 1));
    int kept = 0;
    for (int i = 0; i < n; i += LANES) {
        __m256i e = load_live(entry, n, i);
        __m256i reaches = _mm256_cmpgt_epi64(e, below);
        int mask = live_lanes(n, i, LANES) & _mm256_movemask_pd(_mm256_castsi256_pd(reaches));
        kept += store_named(entry + kept, e, mask);
    }
    return kept;
}

TARGET static int below(uint64_t *out, const uint64_t *entry, int n, uint64_t bound) {
    const __m256i least = _mm256_set1_epi64x((long long)bound);
    int copied = 0;
    for (int i = 0; i < n; i += LANES) {
        __m256i e = load_live(entry, n, i);
        __m256i is_below = _mm256_cmpgt_epi64(least, e);
        int mask = live_lanes(n, i, LANES) & _mm256_movemask_pd(_mm256_castsi256_pd(is_below));
        copied += store_named(out + copied, e, mask);
    }
    return copied;
}

TARGET static int count(const uint64_t *entry, int n, uint64_t bound) {
    const __m256i below = _mm256_set1_epi64x((long long)(bound - 1));
    __m256i counts = _mm256_setzero_si256();
    uint64_t counted[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        counts = _mm256_sub_epi64(counts, _mm256_cmpgt_epi64(load_entries(entry + i), below));
    store_entries(counted, counts);
    for (; i < n; i++)
        counted[0] += entry[i] >= bound;
    return (int)(counted[0] + counted[1] + counted[2] + counted[3]);
}

/* The low halves of 4 entries and of 4 more. */
INLINE __m256i low_halves(__m256i a, __m256i b) {
    __m256 halves = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(halves), 0xD8);
}

TARGET static void place(uint16_t *bin, const uint64_t *entry, int n,
                         const struct topk_bins *bins) {
    const __m256i high = _mm256_set1_epi64x((long long)bins->high);
    const __m128i shift = _mm_cvtsi32_si128(bins->shift);
    for (int i = 0; i < n; i += 2 * LANES) {
        __m256i a = load_live(entry, n, i), b = load_live(entry, n, i + LANES), number;
        if (bins->scale == 0)
            number = low_halves(_mm256_srl_epi64(_mm256_sub_epi64(high, a), shift),
                                _mm256_srl_epi64(_mm256_sub_epi64(high, b), shift));
        else
            number =
                bins_by_score(low_halves(_mm256_srli_epi64(a, 31), _mm256_srli_epi64(b, 31)), bins);
        __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(number), _mm256_extracti128_si256(number, 1));
        _mm_storeu_si128((__m128i *)(void *)(bin + i), packed);
    }
}

/* In each lane the last one of its half. */
INLINE __m256i last_of_half(__m256i x) {
    return _mm256_shuffle_epi8(x, _mm256_set1_epi16(0x0F0E));
}

/* Lane i of the result is the sum of lanes 0 to i. */
INLINE __m256i running_sum(__m256i x) {
    x = _mm256_add_epi16(x, _mm256_slli_si256(x, 2));
    x = _mm256_add_epi16(x, _mm256_slli_si256(x, 4));
    x = _mm256_add_epi16(x, _mm256_slli_si256(x, 8));
    __m256i of_first_half = _mm256_permute2x128_si256(x, x, 0x08); /* behind zeros */
    return _mm256_add_epi16(x, last_of_half(of_first_half));
}

TARGET static uint32_t begin(uint16_t *bin, int bins) {
    __m256i next = _mm256_setzero_si256(), most = next;
    uint16_t counts[16];
    uint32_t largest = 0;
    for (int b = 0; b < bins; b += 16) {
        __m256i n = _mm256_loadu_si256((const __m256i *)(const void *)(bin + b));
        __m256i end = running_sum(n);
        _mm256_storeu_si256((__m256i *)(void *)(bin + b),
                            _mm256_add_epi16(next, _mm256_sub_epi16(end, n)));
        next = _mm256_add_epi16(next, last_of_half(_mm256_permute2x128_si256(end, end, 0x11)));
        most = _mm256_max_epu16(most, n);
    }
    _mm256_storeu_si256((__m256i *)(void *)counts, most);
    for (int i = 0; i < 16; i++)
        largest = counts[i] > largest ? counts[i] : largest;
    return largest;
}

TARGET static void settle(uint64_t *out, const uint64_t *in, int n) {
    settle_neighbours(out, in, n);
}

const struct topk_loops lidx_topk_avx2 = {filter, range, keep, below, count, place, begin, settle};

#endif
