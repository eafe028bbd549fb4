/* SPDX-License-Identifier: Apache-2.0
 *
 * fp32 FMA on widened keys in 16 registers of 8 lanes. Lanes are heads. The keys of a tile are
 * widened once into a scratch and from there broadcast one element at a time.
 *
 * Packed query: weights[8 * groups] and lane masks[8 * groups], both zero beyond n_heads, then
 * panels of 2 groups of 8 heads (1 in the last, when odd). A panel is [head_dim][groups of the
 * panel][8] floats: 8 KiB for 16 heads of 128.
 *
 * Registers of a panel of P groups against K = 12 / P keys: 12 sums, P query vectors, a broadcast.
 * Twelve chains cover the latency of FMA (4 cycles, two started in each); a step of 2 x 6 loads 8
 * vectors for its 12 products, which two load ports deliver in less time than two FMA ports take.
 */
#if defined(__x86_64__)

#include "kernel.h"

#include <immintrin.h>
#include <string.h>

#include "features.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum {
    LANES = 8,
    CHAINS = 12,
    STEPS = 8,                      /* elements in one round of the dot loop */
    TILE_BLOCKS = 3,
    TILE = TILE_BLOCKS * KEY_BLOCK, /* 48 keys: a multiple of 6, 12 and 16 */
    NEAR = 1,                       /* tiles of 128-element keys to the fetch into L1 */
    FAR = 5,                        /* and into L2 */
};

static int group_count(int n_heads) {
    return (n_heads + LANES - 1) / LANES;
}

static int panel_groups(int left) {
    return left >= 2 ? 2 : 1;
}

static size_t packed_size(int n_heads, int head_dim) {
    return (size_t)group_count(n_heads) * LANES * sizeof(float) * (size_t)(2 + head_dim);
}

INLINE __m256 widen(const unsigned char *halves, int dtype) {
    __m128i half = _mm_loadu_si128((const __m128i *)halves);
    if (dtype == DTYPE_FP16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void pack(void *packed, const struct query_row *row, int dtype) {
    int groups = group_count(row->n_heads), D = row->head_dim;
    float *weights = packed, *masks = weights + groups * LANES, *out = masks + groups * LANES;
    const unsigned char *query = row->query;
    memset(packed, 0, packed_size(row->n_heads, D));
    memcpy(weights, row->weights, sizeof(float) * (size_t)row->n_heads);
    memset(masks, 0xFF, sizeof(float) * (size_t)row->n_heads);
    for (int first = 0; first < groups; first += panel_groups(groups - first)) {
        int lanes = panel_groups(groups - first) * LANES;
        for (int lane = 0; lane < lanes && first * LANES + lane < row->n_heads; lane++) {
            const unsigned char *head = query + (size_t)(first * LANES + lane) * 2 * (size_t)D;
            for (int d = 0; d < D; d += LANES) {
                float wide[LANES] __attribute__((aligned(32)));
                _mm256_store_ps(wide, widen(head + 2 * d, dtype));
                for (int i = 0; i < LANES; i++)
                    out[(d + i) * lanes + lane] = wide[i];
            }
        }
        out += D * lanes;
    }
}

/* n rows of a block as fp32. */
INLINE void widen_rows(float *wide, const unsigned char *rows, int64_t stride, int n, int D,
                       int dtype) {
    for (int j = 0; j < n; j++, rows += stride) {
        UNROLL
        for (int d = 0; d < D; d += LANES)
            _mm256_store_ps(wide + j * D + d, widen(rows + 2 * d, dtype));
    }
}

/* Where the next lines to fetch are; a step is 0 where there is nothing to fetch. */
struct ahead {
    const unsigned char *near, *far;
    int64_t near_step, far_step;
};

/* A panel of P groups against the first n keys of a tile, rounded up to whole groups of K: sums[j]
 * gets, or is raised by, key j's weighted ReLUs, a lane for each 8th head. */
INLINE void panel(float sums[TILE][LANES], const float *query, const float *weights,
                  const float *masks, const float *keys, struct ahead ahead, int n, int P, int D,
                  int first) {
    const int K = CHAINS / P;
    for (int j = 0; j < n; j += K, keys += K * D) {
        const float *q = query, *k = keys;
        __m256 dot[CHAINS];
        UNROLL
        for (int i = 0; i < CHAINS; i++)
            dot[i] = _mm256_setzero_ps();
        for (int d = 0; d < D; d += STEPS) {
            UNROLL
            for (int s = 0; s < STEPS; s++) {
                __m256 qv[2];
                UNROLL
                for (int g = 0; g < P; g++)
                    qv[g] = _mm256_load_ps(q + (s * P + g) * LANES);
                UNROLL
                for (int i = 0; i < K; i++) {
                    __m256 kv = _mm256_broadcast_ss(k + i * D + s);
                    UNROLL
                    for (int g = 0; g < P; g++)
                        dot[i * P + g] = _mm256_fmadd_ps(kv, qv[g], dot[i * P + g]);
                }
                if (s % (2 * P) == 0) {
                    _mm_prefetch((const char *)ahead.near, _MM_HINT_T0);
                    _mm_prefetch((const char *)ahead.far, _MM_HINT_T1);
                    ahead.near += ahead.near_step;
                    ahead.far += ahead.far_step;
                }
            }
            q += STEPS * P * LANES;
            k += STEPS;
        }
        UNROLL
        for (int i = 0; i < K; i++) {
            __m256 sum = first ? _mm256_setzero_ps() : _mm256_load_ps(sums[j + i]);
            UNROLL
            for (int g = 0; g < P; g++) {
                /* The second operand is what MAX returns beside a NaN. */
                __m256 relu = _mm256_max_ps(_mm256_setzero_ps(), dot[i * P + g]);
                relu = _mm256_and_ps(relu, _mm256_load_ps(masks + g * LANES));
                sum = _mm256_fmadd_ps(relu, _mm256_load_ps(weights + g * LANES), sum);
            }
            _mm256_store_ps(sums[j + i], sum);
        }
    }
}

/* The 8 lanes of each of 8 keys, added in one order for all: a transposing tree. */
INLINE __m256 add_lanes(float sums[][LANES]) {
    __m256 quads[2];
    UNROLL
    for (int i = 0; i < 2; i++) {
        __m256 pairs[2];
        UNROLL
        for (int k = 0; k < 2; k++) {
            __m256 a = _mm256_load_ps(sums[4 * i + 2 * k]);
            __m256 b = _mm256_load_ps(sums[4 * i + 2 * k + 1]);
            pairs[k] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        }
        __m256d a = _mm256_castps_pd(pairs[0]), b = _mm256_castps_pd(pairs[1]);
        quads[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                 _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                         _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

/* block[i], or `here` with a step of 0 where the list has no such entry. A step of 48 bytes every
 * 2 P elements walks through the 2 D bytes of each of 12 / P keys in D elements. */
INLINE const unsigned char *listed(const struct key_run *run, int total, int i, const void *here,
                                   int64_t *step) {
    *step = i < total ? 48 : 0;
    return i < total ? run->block[i] : here;
}

/* The keys of up to three blocks from block b on. */
INLINE void score_tile(float *score, const void *packed, int n_heads, const struct key_run *run,
                       int b, int D, int dtype) {
    const int groups = group_count(n_heads);
    const float *weights = packed, *masks = weights + groups * LANES;
    const float *query = masks + groups * LANES;
    const int total = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK + run->n_ahead;
    const int left = run->n_keys - b * KEY_BLOCK, n = left < TILE ? left : TILE;
    float wide[TILE * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float sums[TILE][LANES] __attribute__((aligned(64)));
    float scores[TILE] __attribute__((aligned(64)));
    for (int j = 0; j < n; j += KEY_BLOCK)
        widen_rows(wide + j * D, run->block[b + j / KEY_BLOCK], run->row_stride,
                   n - j < KEY_BLOCK ? n - j : KEY_BLOCK, D, dtype);
    if (n < TILE) { /* panels work on whole groups, and the tree on 8 keys */
        int spare = TILE - n < CHAINS ? TILE - n : CHAINS;
        memset(wide + n * D, 0, sizeof(float) * (size_t)(spare * D));
        memset(sums, 0, sizeof sums);
    }
    struct ahead ahead;
    const void *here = run->block[b];
    ahead.near = listed(run, total, b + NEAR * TILE_BLOCKS * 128 / D, here, &ahead.near_step);
    ahead.far = listed(run, total, b + FAR * TILE_BLOCKS * 128 / D, here, &ahead.far_step);
    for (int g = 0; g < groups;) {
        int P = panel_groups(groups - g), first = g == 0;
        if (P == 2)
            panel(sums, query, weights + g * LANES, masks + g * LANES, wide, ahead, n, 2, D, first);
        else
            panel(sums, query, weights + g * LANES, masks + g * LANES, wide, ahead, n, 1, D, first);
        query += D * P * LANES;
        g += P;
        ahead = (struct ahead){here, here, 0, 0};
    }
    for (int j = 0; j < n; j += LANES)
        _mm256_store_ps(scores + j, add_lanes(sums + j));
    memcpy(score, scores, sizeof(float) * (size_t)n);
}

INLINE void score(float *out, const void *packed, int n_heads, int head_dim,
                  const struct key_run *run, int dtype) {
    for (int b = 0; b * KEY_BLOCK < run->n_keys; b += TILE_BLOCKS) {
        if (head_dim == 128)
            score_tile(out + b * KEY_BLOCK, packed, n_heads, run, b, 128, dtype);
        else
            score_tile(out + b * KEY_BLOCK, packed, n_heads, run, b, 64, dtype);
    }
}

TARGET static void pack_bf16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_BF16);
}

TARGET static void pack_fp16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_FP16);
}

TARGET static void score_bf16(float *out, const void *packed, int n_heads, int head_dim,
                              const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_BF16);
}

TARGET static void score_fp16(float *out, const void *packed, int n_heads, int head_dim,
                              const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_FP16);
}

const struct kernel lidx_kernel_avx2 = {
    .name = "avx2",
    .needs = FEATURE_AVX2 | FEATURE_FMA | FEATURE_F16C,
    .path = {[DTYPE_BF16] = {packed_size, pack_bf16, score_bf16},
             [DTYPE_FP16] = {packed_size, pack_fp16, score_fp16}},
};

#endif
