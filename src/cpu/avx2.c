/* SPDX-License-Identifier: Apache-2.0
 *
 * fp32 FMA on widened keys in 16 registers of 8 lanes. Lanes are heads. The keys of a block are
 * widened into a scratch while those of the block before are scored, and from there broadcast one
 * element at a time.
 *
 * Packed query: weights[8 * groups] and lane masks[8 * groups], both zero beyond n_heads, then
 * panels of 3 groups of 8 heads, or fewer at the end. A panel is [head_dim][groups of the panel][8]
 * floats: 12 KiB for 24 heads of 128.
 *
 * Registers of a panel of 3 groups against 4 keys: 12 sums, 3 query vectors, a broadcast. Twelve
 * chains cover the latency of FMA (4 cycles, two started in each). A step loads 7 vectors for its
 * 12 products, one fewer than 2 groups against 6 keys would: where the other thread of a core is
 * busy, instructions are what counts.
 */
#if defined(__x86_64__)

#include "avx2_multiply.h"

#include <string.h>

#include "features.h"

enum {
    PANEL_GROUPS = 3, /* most groups of a panel */
    FETCH_AHEAD = 3,  /* blocks from the one in work to the one fetched into L1 */
};

static int group_count(int n_heads) {
    return (n_heads + LANES - 1) / LANES;
}

/* Of 4, 2 and 2: a panel of one group loads more than it multiplies. */
static int panel_groups(int left) {
    return left == 4 ? 2 : left < PANEL_GROUPS ? left : PANEL_GROUPS;
}

static int panel_count(int groups) {
    int n = 0;
    for (; groups > 0; groups -= panel_groups(groups))
        n++;
    return n;
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

/* ---- panels ---------------------------------------------------------------------------------- */

/* P groups against the first n keys of a block, rounded up to as many as are taken at once: sums[j]
 * is raised by key j's weighted ReLUs, a lane for each 8th head. As many keys of another block are
 * widened meanwhile, unless `widened` is NOTHING. */
INLINE void pass(float sums[KEY_BLOCK][LANES], const struct panel *p, int n, int P, int widened) {
    static const float zeros[KEY_BLOCK][LANES] __attribute__((aligned(64)));
    struct place at = p->begin;
    const float(*before)[LANES] = p->is_first ? zeros : (const float(*)[LANES])sums;
    const int K = P == 1 ? 8 : 4;
    const float *weights = p->weights, *masks = p->masks;
    for (int j = 0; j < n; j += K) {
        __m256 sum[PANEL_SUMS];
        multiply(sum, &at, p, P, widened);
        at.keys += K * PITCH - p->head_dim;
        at.wide += K * PITCH - p->head_dim;
        at.row += K * p->row_stride - 2 * p->head_dim;
        if (p->is_padded) {
            UNROLL
            for (int i = 0; i < K * P; i++)
                sum[i] = _mm256_and_ps(sum[i], _mm256_load_ps(masks + i % P * LANES));
        }
        UNROLL
        for (int i = 0; i < K; i++) {
            __m256 total = _mm256_load_ps(before[j + i]);
            UNROLL
            for (int g = 0; g < P; g++) {
                /* The second operand is what MAX returns beside a NaN. */
                __m256 relu = _mm256_max_ps(_mm256_setzero_ps(), sum[i * P + g]);
                total = _mm256_fmadd_ps(relu, _mm256_load_ps(weights + g * LANES), total);
            }
            _mm256_store_ps(sums[j + i], total);
        }
    }
}

typedef void pass_fn(float sums[KEY_BLOCK][LANES], const struct panel *p, int n);

/* Functions of their own, so that nothing around them competes for registers. */
#define PASS(name, P, widened)                                                                     \
    TARGET __attribute__((noinline)) static void name(float sums[KEY_BLOCK][LANES],                \
                                                      const struct panel *p, int n) {              \
        pass(sums, p, n, P, widened);                                                              \
    }
PASS(pass_1, 1, NOTHING)
PASS(pass_2, 2, NOTHING)
PASS(pass_3, 3, NOTHING)
PASS(pass_1_bf16, 1, DTYPE_BF16)
PASS(pass_2_bf16, 2, DTYPE_BF16)
PASS(pass_3_bf16, 3, DTYPE_BF16)
PASS(pass_1_fp16, 1, DTYPE_FP16)
PASS(pass_2_fp16, 2, DTYPE_FP16)
PASS(pass_3_fp16, 3, DTYPE_FP16)

/* By what is widened and P - 1. */
static pass_fn *const passes[KEY_DTYPES + 1][PANEL_GROUPS] = {
    [DTYPE_BF16] = {pass_1_bf16, pass_2_bf16, pass_3_bf16},
    [DTYPE_FP16] = {pass_1_fp16, pass_2_fp16, pass_3_fp16},
    [NOTHING] = {pass_1, pass_2, pass_3},
};

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

/* ---- blocks ---------------------------------------------------------------------------------- */

/* A block of keys, widened, and what else is done while it is scored. */
struct block {
    const float *keys;
    int n;                      /* up to KEY_BLOCK */
    const unsigned char *fetch; /* keys to fetch */
    int64_t fetch_bytes;        /* of them, for each panel */
    const unsigned char *row;   /* a whole block of keys to widen */
    int64_t row_stride;
    float *wide; /* where to */
    int widened; /* their dtype, or NOTHING: then none are, after all */
};

/* The scores of a block's keys. The last panel widens: what it writes is then still in L1 when the
 * first one comes to it. */
INLINE void score_block(float *score, const void *packed, int n_heads, int head_dim,
                        const struct block *b) {
    const int groups = group_count(n_heads);
    const float *weights = packed, *masks = weights + groups * LANES;
    struct panel p = {.query = masks + groups * LANES,
                      .weights = weights,
                      .masks = masks,
                      .head_dim = head_dim,
                      .is_first = 1,
                      .step = b->fetch_bytes * 2 / head_dim,
                      .row_stride = b->row_stride,
                      .begin = {b->keys, b->fetch, b->row, b->wide}};
    float sums[KEY_BLOCK][LANES] __attribute__((aligned(64)));
    float last[LANES] __attribute__((aligned(64)));
    for (int left = groups, P; left > 0; left -= P) {
        P = panel_groups(left);
        const int is_last = P == left;
        p.is_padded = is_last && n_heads % LANES != 0;
        passes[is_last ? b->widened : NOTHING][P - 1](sums, &p, b->n);
        p.query += P * head_dim * LANES;
        p.weights += P * LANES;
        p.masks += P * LANES;
        p.is_first = 0;
        p.begin.line += b->fetch_bytes;
    }
    int j = 0;
    for (; j + LANES <= b->n; j += LANES)
        _mm256_store_ps(score + j, add_lanes(sums + j));
    if (j < b->n) {
        _mm256_store_ps(last, add_lanes(sums + j));
        memcpy(score + j, last, sizeof(float) * (size_t)(b->n - j));
    }
}

/* The first n keys of a block as fp32, and zeros for those that are missing. */
INLINE void widen_block(float *wide, const unsigned char *row, int64_t stride, int n, int head_dim,
                        int dtype) {
    for (int j = 0; j < KEY_BLOCK; j++, row += stride, wide += PITCH) {
        if (j >= n)
            memset(wide, 0, sizeof(float) * (size_t)head_dim);
        for (int d = 0; d < head_dim && j < n; d += LANES)
            _mm256_store_ps(wide + d, widen(row + 2 * d, dtype));
    }
}

INLINE void score(float *out, const void *packed, int n_heads, int head_dim,
                  const struct key_run *run, int dtype) {
    float wide[2][KEY_BLOCK * PITCH] __attribute__((aligned(64)));
    const int64_t stride = run->row_stride;
    const int n_blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    const int last = n_blocks - 1 + run->n_ahead, panels = panel_count(group_count(n_heads));
    const int64_t fetch_bytes = (KEY_BLOCK * stride / panels + 63) / 64 * 64;
    struct block b = {.row_stride = stride};
    widen_block(wide[0], run->block[0], stride, run->n_keys, head_dim, dtype);
    for (int i = 0; i < n_blocks; i++) {
        const int left = run->n_keys - i * KEY_BLOCK, after = left - KEY_BLOCK;
        const int ahead = i + FETCH_AHEAD;
        b.keys = wide[i % 2];
        b.n = left < KEY_BLOCK ? left : KEY_BLOCK;
        b.fetch = run->block[ahead < last ? ahead : last];
        b.fetch_bytes = ahead <= last ? fetch_bytes : 0;
        b.row = run->block[after > 0 ? i + 1 : i];
        b.wide = wide[(i + 1) % 2];
        b.widened = after >= KEY_BLOCK ? dtype : NOTHING;
        score_block(out + i * KEY_BLOCK, packed, n_heads, head_dim, &b);
        if (after > 0 && after < KEY_BLOCK)
            widen_block(b.wide, b.row, stride, after, head_dim, dtype);
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
    .topk = &lidx_topk_avx2,
    .path = {[DTYPE_BF16] = {packed_size, pack_bf16, score_bf16},
             [DTYPE_FP16] = {packed_size, pack_fp16, score_fp16}},
};

#endif
