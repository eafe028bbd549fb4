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
    STEPS = 8,            /* elements in one round of the dot loop */
    TILE = 24,            /* keys: a multiple of 6 and 12 */
    PITCH = MAX_HEAD_DIM, /* floats from key to key in the scratch */
    FETCH_AHEAD = 48,     /* keys from the tile in work to the one fetched into L1 */
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

/* n rows of 8 floats, and zeros for those that are missing, written as columns. */
INLINE void transpose(float *out, int out_stride, const unsigned char *rows, int row_bytes, int n,
                      int dtype) {
    __m256 r[LANES], t[LANES];
    UNROLL
    for (int i = 0; i < LANES; i++)
        r[i] = i < n ? widen(rows + i * row_bytes, dtype) : _mm256_setzero_ps();
    UNROLL
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    UNROLL
    for (int c = 0; c < 4; c++) {
        _mm256_store_ps(out + c * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
        _mm256_store_ps(out + (4 + c) * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
}

INLINE void pack(void *packed, const struct query_row *row, int dtype) {
    const int groups = group_count(row->n_heads), D = row->head_dim;
    float *weights = packed, *masks = weights + groups * LANES, *out = masks + groups * LANES;
    memset(weights, 0, 2 * sizeof(float) * (size_t)(groups * LANES));
    memcpy(weights, row->weights, sizeof(float) * (size_t)row->n_heads);
    memset(masks, 0xFF, sizeof(float) * (size_t)row->n_heads);
    for (int first = 0, P; first < groups; first += P, out += D * P * LANES) {
        P = panel_groups(groups - first);
        for (int g = 0; g < P; g++) {
            int head = (first + g) * LANES, left = row->n_heads - head;
            for (int d = 0; d < D; d += LANES)
                transpose(out + (d * P + g) * LANES, P * LANES,
                          (const unsigned char *)row->query + 2 * (head * D + d), 2 * D,
                          left < LANES ? left : LANES, dtype);
        }
    }
}

static const unsigned char *row_at(const struct key_run *run, int key) {
    return (const unsigned char *)run->block[key / KEY_BLOCK] + key % KEY_BLOCK * run->row_stride;
}

/* n keys of a run as fp32. */
INLINE void widen_rows(float *wide, const struct key_run *run, int key, int n, int head_dim,
                       int dtype) {
    for (int end = key + n; key < end; key++, wide += PITCH) {
        const unsigned char *row = row_at(run, key);
        for (int d = 0; d < head_dim; d += 4 * LANES) {
            UNROLL
            for (int i = 0; i < 4 * LANES; i += LANES)
                _mm256_store_ps(wide + d + i, widen(row + 2 * (d + i), dtype));
        }
    }
}

/* The keys to fetch while a tile is scored: a walk over the blocks that hold them. */
struct ahead {
    const void *const *block;
    int left;       /* blocks behind it */
    int step;       /* bytes from one fetch to the next; 0 where there is nothing to fetch */
    int64_t offset; /* in the block */
    int64_t block_bytes;
};

/* The line to begin with when fetches for `bytes` are next, which this counts. */
static const unsigned char *take_ahead(struct ahead *a, int bytes) {
    const unsigned char *line = (const unsigned char *)*a->block + a->offset;
    a->offset += bytes;
    if (a->offset >= a->block_bytes) {
        a->offset -= a->block_bytes;
        a->step = a->left > 0 ? a->step : 0;
        a->block += a->left > 0;
        a->left--;
    }
    return line;
}

/* The intrinsic leaves gcc free to let sums wander between registers; with 15 of 16 in use it then
 * spills some in every round. This form adds in place. */
INLINE void multiply_add(__m256 *sum, __m256 a, __m256 b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(b));
}

/* The dot products of P groups with K keys, dot[i * P + g] for key i. Meanwhile what lies at `line`
 * and behind it is fetched. */
INLINE void dots(float dot[CHAINS][LANES], const float *query, const float *keys, int head_dim,
                 const unsigned char *line, int64_t step, int P) {
    const int K = CHAINS / P;
    const float *end = keys + head_dim;
    __m256 sum[CHAINS];
    UNROLL
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm256_setzero_ps();
    for (; keys < end; keys += STEPS, query += STEPS * P * LANES) {
        UNROLL
        for (int s = 0; s < STEPS; s++) {
            __m256 q[2];
            UNROLL
            for (int g = 0; g < P; g++)
                q[g] = _mm256_load_ps(query + (s * P + g) * LANES);
            UNROLL
            for (int i = 0; i < K; i++) {
                __m256 k = _mm256_broadcast_ss(keys + i * PITCH + s);
                UNROLL
                for (int g = 0; g < P; g++)
                    multiply_add(&sum[i * P + g], q[g], k);
            }
            if (s % (2 * P) == 0) {
                _mm_prefetch((const char *)line, _MM_HINT_T0);
                line += step;
            }
        }
    }
    UNROLL
    for (int i = 0; i < CHAINS; i++)
        _mm256_store_ps(dot[i], sum[i]);
}

/* Functions of their own, so that nothing around them competes for registers. */
TARGET __attribute__((noinline)) static void dots_1(float dot[CHAINS][LANES], const float *query,
                                                    const float *keys, int head_dim,
                                                    const unsigned char *line, int64_t step) {
    dots(dot, query, keys, head_dim, line, step, 1);
}

TARGET __attribute__((noinline)) static void dots_2(float dot[CHAINS][LANES], const float *query,
                                                    const float *keys, int head_dim,
                                                    const unsigned char *line, int64_t step) {
    dots(dot, query, keys, head_dim, line, step, 2);
}

/* The same of one key alone, for which a whole group would take half as long again. */
INLINE void dots_of_one(float dot[CHAINS][LANES], const float *query, const float *key,
                        int head_dim, int P) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int d = 0; d < head_dim; d++, query += P * LANES) {
        __m256 k = _mm256_broadcast_ss(key + d);
        UNROLL
        for (int g = 0; g < P; g++)
            multiply_add(&sum[g], _mm256_load_ps(query + g * LANES), k);
    }
    UNROLL
    for (int g = 0; g < P; g++)
        _mm256_store_ps(dot[g], sum[g]);
}

/* A panel of P groups against the first n keys of a tile, rounded up to whole groups of K: sums[j]
 * is raised by key j's weighted ReLUs, a lane for each 8th head; the first panel begins it. */
INLINE void panel(float sums[TILE][LANES], const float *query, const float *weights,
                  const float *masks, const float *keys, struct ahead *ahead, int n, int head_dim,
                  int is_first, int P) {
    const int K = CHAINS / P;
    const int fetches = head_dim / (2 * P);
    float dot[CHAINS][LANES] __attribute__((aligned(64)));
    for (int j = 0; j < n; j += K) {
        const int64_t step = ahead->step;
        const unsigned char *line = take_ahead(ahead, fetches * ahead->step);
        if (n - j == 1)
            dots_of_one(dot, query, keys + j * PITCH, head_dim, P);
        else if (P == 2)
            dots_2(dot, query, keys + j * PITCH, head_dim, line, step);
        else
            dots_1(dot, query, keys + j * PITCH, head_dim, line, step);
        UNROLL
        for (int i = 0; i < K; i++) {
            __m256 sum = is_first ? _mm256_setzero_ps() : _mm256_load_ps(sums[j + i]);
            UNROLL
            for (int g = 0; g < P; g++) {
                /* The second operand is what MAX returns beside a NaN. */
                __m256 relu = _mm256_max_ps(_mm256_setzero_ps(), _mm256_load_ps(dot[i * P + g]));
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

/* What to fetch while the tile at `key` is scored. A panel issues a fetch every 2 P elements of
 * every 12 / P keys: one for 48 bytes of the tile, so n panels advance by 48 / n each time. */
static struct ahead ahead_of(const struct key_run *run, int key, int panels) {
    int next = key + FETCH_AHEAD, block = next / KEY_BLOCK;
    int last = (run->n_keys - 1) / KEY_BLOCK + run->n_ahead;
    struct ahead ahead = {.block = run->block, .block_bytes = KEY_BLOCK * run->row_stride};
    if (block <= last) {
        ahead.block += block;
        ahead.left = last - block;
        ahead.step = (48 + panels - 1) / panels;
        ahead.offset = next % KEY_BLOCK * run->row_stride;
    }
    return ahead;
}

/* Keys of a run, widened. */
struct tile {
    float wide[TILE * PITCH] __attribute__((aligned(64)));
    int key; /* the first */
    int n;   /* up to TILE */
};

INLINE void widen_tile(struct tile *t, const struct key_run *run, int key, int head_dim,
                       int dtype) {
    const int left = run->n_keys - key, n = left < TILE ? left : TILE;
    const int whole = n + CHAINS < TILE ? n + CHAINS : TILE; /* panels work on groups of keys */
    t->key = key;
    t->n = n;
    widen_rows(t->wide, run, key, n, head_dim, dtype);
    for (int j = n; j < whole && n % CHAINS != 1; j++) /* 1: then a key is left alone */
        memset(t->wide + j * PITCH, 0, sizeof(float) * (size_t)head_dim);
}

/* The scores of a tile's keys, at their places in `score`; of the run `fetched` what follows them
 * is fetched meanwhile. */
INLINE void score_tile(float *score, const void *packed, int n_heads, int head_dim,
                       const struct tile *t, const struct key_run *fetched) {
    const int groups = group_count(n_heads), n = t->n;
    const float *weights = packed, *masks = weights + groups * LANES;
    const float *query = masks + groups * LANES;
    struct ahead ahead = ahead_of(fetched, t->key, (groups + 1) / 2);
    float sums[TILE][LANES] __attribute__((aligned(64)));
    float last[LANES] __attribute__((aligned(64)));
    for (int g = 0; g < groups; g += 2) {
        if (groups - g >= 2)
            panel(sums, query, weights + g * LANES, masks + g * LANES, t->wide, &ahead, n, head_dim,
                  g == 0, 2);
        else
            panel(sums, query, weights + g * LANES, masks + g * LANES, t->wide, &ahead, n, head_dim,
                  g == 0, 1);
        query += 2 * head_dim * LANES;
    }
    int j = 0;
    for (score += t->key; j + LANES <= n; j += LANES)
        _mm256_store_ps(score + j, add_lanes(sums + j));
    if (j < n) {
        _mm256_store_ps(last, add_lanes(sums + j));
        memcpy(score + j, last, sizeof(float) * (size_t)(n - j));
    }
}

INLINE void score(float *out, const void *packed, int n_heads, int head_dim,
                  const struct key_run *run, int dtype) {
    struct tile tile;
    for (int key = 0; key < run->n_keys; key += TILE) {
        widen_tile(&tile, run, key, head_dim, dtype);
        score_tile(out, packed, n_heads, head_dim, &tile, run);
    }
}

/* Keys are widened once for both tokens. */
INLINE void score_two(float *const out[2], const void *const packed[2], int n_heads, int head_dim,
                      const struct key_run *run, int dtype) {
    const struct key_run nothing = {run->block, run->row_stride, 1, 0};
    struct tile tile;
    for (int key = 0; key < run->n_keys; key += TILE) {
        widen_tile(&tile, run, key, head_dim, dtype);
        score_tile(out[0], packed[0], n_heads, head_dim, &tile, &nothing);
        score_tile(out[1], packed[1], n_heads, head_dim, &tile, run);
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

TARGET static void score_two_bf16(float *const out[2], const void *const packed[2], int n_heads,
                                  int head_dim, const struct key_run *run) {
    score_two(out, packed, n_heads, head_dim, run, DTYPE_BF16);
}

TARGET static void score_two_fp16(float *const out[2], const void *const packed[2], int n_heads,
                                  int head_dim, const struct key_run *run) {
    score_two(out, packed, n_heads, head_dim, run, DTYPE_FP16);
}

const struct kernel lidx_kernel_avx2 = {
    .name = "avx2",
    .needs = FEATURE_AVX2 | FEATURE_FMA | FEATURE_F16C,
    .topk = &lidx_topk_avx2,
    .path = {[DTYPE_BF16] = {packed_size, pack_bf16, score_bf16},
             [DTYPE_FP16] = {packed_size, pack_fp16, score_fp16}},
    .score_two = {[DTYPE_BF16] = score_two_bf16, [DTYPE_FP16] = score_two_fp16},
};

#endif
