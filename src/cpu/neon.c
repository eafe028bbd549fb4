/* SPDX-License-Identifier: Apache-2.0
 *
 * Two kernels for aarch64: FMLA on widened keys, which every one has, and BFMMLA where there is
 * FEAT_BF16. Keys of a block are first brought into a scratch in L1, once for all heads; rows
 * that a last block lacks are zeros there, so every block is computed alike.
 *
 * neon: fp32. Lanes are heads. Packed query: [panels of 16 heads][head_dim][16], the weights and
 * the lane masks. Registers of a panel against 4 keys:
 *
 *     16 sums (4 vectors of heads x 4 keys), 4 vectors of 4 key elements, 4 of query
 *
 * so that 20 loads serve 64 FMLA, each of which takes its key element from a lane.
 *
 * neon_bf16: BFMMLA multiplies 2 heads x 4 dimensions by 2 keys x 4 dimensions into a 2 x 2 sum.
 * Packed query: [panels of 8 heads][head_dim / 4][4 pairs of heads][2][4]; the scratch holds pairs
 * of keys in the same form. Registers of a panel against 8 keys:
 *
 *     16 sums (4 pairs of heads x 4 pairs of keys), 4 vectors of keys, 4 of query
 *
 * so that 8 loads serve 16 BFMMLA. BFMMLA reads bf16 denormals as zero and rounds its fp32 sums to
 * odd, not to nearest: a last bit, the same everywhere. Its fp16 path is that of neon: FMLAL, the
 * widening product of two fp16 vectors, does no more products in an instruction than FMLA.
 */
#if defined(__aarch64__)

#include "kernel.h"

#include <arm_neon.h>
#include <string.h>

#include "features.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define TARGET_BF16 __attribute__((target("bf16")))
#else
#define TARGET_BF16 __attribute__((target("arch=armv8.2-a+bf16")))
#endif

enum {
    PANEL = 16,     /* heads of a panel of neon */
    PAIR_PANEL = 8, /* heads of a panel of neon_bf16 */
    GROUP = 4,      /* keys that neon computes together */
    PAIR_GROUP = 8, /* keys that neon_bf16 computes together */
    AHEAD = 2,      /* blocks from the one in work to the fetch into L1 */
};

static int panels_of(int n_heads, int panel) {
    return (n_heads + panel - 1) / panel;
}

/* Row r of a block, or NULL where the run has ended. */
INLINE const void *row_of(const struct key_run *run, int block, int r) {
    if (block * KEY_BLOCK + r >= run->n_keys)
        return NULL;
    return (const unsigned char *)run->block[block] + run->row_stride * r;
}

/* One row of the block AHEAD, 64 bytes at a time. */
INLINE void fetch_row(const struct key_run *run, int block, int r, int head_dim) {
    int listed = panels_of(run->n_keys, KEY_BLOCK) + run->n_ahead;
    if (block + AHEAD >= listed)
        return;
    const unsigned char *row = run->block[block + AHEAD];
    for (int byte = 0; byte < head_dim * 2; byte += 64)
        __builtin_prefetch(row + run->row_stride * r + byte);
}

static void store_scores(float *score, const float *block_score, const struct key_run *run,
                         int block) {
    int left = run->n_keys - block * KEY_BLOCK;
    int n = left < KEY_BLOCK ? left : KEY_BLOCK;
    memcpy(score + block * KEY_BLOCK, block_score, sizeof(float) * (size_t)n);
}

/* A ReLU that keeps a NaN (FMAX does, FMAXNM would not), cut to the heads that exist: inf * 0 has
 * made a NaN of the others. */
INLINE float32x4_t relu(float32x4_t x, uint32x4_t heads) {
    float32x4_t positive = vmaxq_f32(x, vdupq_n_f32(0));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(positive), heads));
}

/* ---- fp32 ------------------------------------------------------------------------------------ */

static size_t packed_size_f32(int n_heads, int head_dim) {
    size_t heads = (size_t)panels_of(n_heads, PANEL) * PANEL;
    return heads * (size_t)head_dim * sizeof(float) + heads * (sizeof(float) + sizeof(uint32_t));
}

INLINE float32x4_t widen(uint16x4_t half, int dtype) {
    if (dtype == DTYPE_FP16)
        return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

static void pack_f32(float *packed, const struct query_row *row, int dtype) {
    int heads = panels_of(row->n_heads, PANEL) * PANEL;
    const uint16_t *query = row->query;
    float *weights = packed + (size_t)heads * (size_t)row->head_dim;
    uint32_t *masks = (uint32_t *)(void *)(weights + heads);
    for (int h = 0; h < heads; h++) {
        float *out = packed + (h / PANEL) * row->head_dim * PANEL + h % PANEL;
        int exists = h < row->n_heads;
        for (int d = 0; d < row->head_dim; d += 4) {
            float four[4] = {0};
            if (exists)
                vst1q_f32(four, widen(vld1_u16(query + h * row->head_dim + d), dtype));
            for (int i = 0; i < 4; i++)
                out[(d + i) * PANEL] = four[i];
        }
        weights[h] = exists ? row->weights[h] : 0;
        masks[h] = exists ? 0xFFFFFFFFu : 0;
    }
}

/* The keys of a block as floats, [KEY_BLOCK][head_dim]. */
INLINE void widen_block(float *keys, const struct key_run *run, int block, int head_dim,
                        int dtype) {
    for (int r = 0; r < KEY_BLOCK; r++, keys += head_dim) {
        const uint16_t *row = row_of(run, block, r);
        fetch_row(run, block, r, head_dim);
        for (int d = 0; d < head_dim; d += 8) {
            uint16x8_t half = row ? vld1q_u16(row + d) : vdupq_n_u16(0);
            vst1q_f32(keys + d, widen(vget_low_u16(half), dtype));
            vst1q_f32(keys + d + 4, widen(vget_high_u16(half), dtype));
        }
    }
}

/* Adds to sum[key] what one panel of heads makes of GROUP keys. */
INLINE void add_panel_f32(float32x4_t *sum, const float *query, const float *keys, int head_dim,
                          const float *weights, const uint32_t *masks) {
    float32x4_t dot[GROUP][4];
    UNROLL
    for (int i = 0; i < GROUP * 4; i++)
        dot[i / 4][i % 4] = vdupq_n_f32(0);
    for (int d = 0; d < head_dim; d += 4) {
        float32x4_t key[GROUP];
        UNROLL
        for (int k = 0; k < GROUP; k++)
            key[k] = vld1q_f32(keys + k * head_dim + d);
        UNROLL
        for (int i = 0; i < 4; i++) {
            float32x4_t q[4];
            UNROLL
            for (int v = 0; v < 4; v++)
                q[v] = vld1q_f32(query + (d + i) * PANEL + v * 4);
            UNROLL
            for (int k = 0; k < GROUP; k++) {
                UNROLL
                for (int v = 0; v < 4; v++)
                    dot[k][v] = vfmaq_n_f32(dot[k][v], q[v], key[k][i]);
            }
        }
    }
    UNROLL
    for (int v = 0; v < 4; v++) {
        float32x4_t weight = vld1q_f32(weights + v * 4);
        uint32x4_t heads = vld1q_u32(masks + v * 4);
        UNROLL
        for (int k = 0; k < GROUP; k++)
            sum[k] = vfmaq_f32(sum[k], relu(dot[k][v], heads), weight);
    }
}

INLINE void score_f32(float *score, const float *packed, int n_heads, int head_dim,
                      const struct key_run *run, int dtype) {
    float keys[KEY_BLOCK * MAX_HEAD_DIM], block_score[KEY_BLOCK];
    int n_panels = panels_of(n_heads, PANEL), n_blocks = panels_of(run->n_keys, KEY_BLOCK);
    const float *weights = packed + (size_t)n_panels * PANEL * (size_t)head_dim;
    const uint32_t *masks = (const uint32_t *)(const void *)(weights + n_panels * PANEL);
    for (int block = 0; block < n_blocks; block++) {
        widen_block(keys, run, block, head_dim, dtype);
        for (int k = 0; k < KEY_BLOCK; k += GROUP) {
            float32x4_t sum[GROUP];
            UNROLL
            for (int i = 0; i < GROUP; i++)
                sum[i] = vdupq_n_f32(0);
            for (int panel = 0; panel < n_panels; panel++)
                add_panel_f32(sum, packed + panel * PANEL * head_dim, keys + k * head_dim, head_dim,
                              weights + panel * PANEL, masks + panel * PANEL);
            /* Pairwise, so that every key's lanes are added in the same order. */
            float32x4_t low = vpaddq_f32(sum[0], sum[1]), high = vpaddq_f32(sum[2], sum[3]);
            vst1q_f32(block_score + k, vpaddq_f32(low, high));
        }
        store_scores(score, block_score, run, block);
    }
}

static void pack_bf16_f32(void *packed, const struct query_row *row) {
    pack_f32(packed, row, DTYPE_BF16);
}

static void pack_fp16_f32(void *packed, const struct query_row *row) {
    pack_f32(packed, row, DTYPE_FP16);
}

static void score_bf16_f32(float *score, const void *packed, int n_heads, int head_dim,
                           const struct key_run *run) {
    score_f32(score, packed, n_heads, head_dim, run, DTYPE_BF16);
}

static void score_fp16_f32(float *score, const void *packed, int n_heads, int head_dim,
                           const struct key_run *run) {
    score_f32(score, packed, n_heads, head_dim, run, DTYPE_FP16);
}

const struct kernel lidx_kernel_neon = {
    .name = "neon",
    .needs = FEATURE_NEON,
    .path = {[DTYPE_BF16] = {packed_size_f32, pack_bf16_f32, score_bf16_f32},
             [DTYPE_FP16] = {packed_size_f32, pack_fp16_f32, score_fp16_f32}},
};

/* ---- BFMMLA ---------------------------------------------------------------------------------- */

/* Weights and masks of a pair of heads h and h + 1 stand as h, h, h + 1, h + 1, like the sums. */
static size_t packed_size_pairs(int n_heads, int head_dim) {
    size_t heads = (size_t)panels_of(n_heads, PAIR_PANEL) * PAIR_PANEL;
    return heads * (size_t)head_dim * 2 + heads * 2 * (sizeof(float) + sizeof(uint32_t));
}

static void pack_pairs(void *packed, const struct query_row *row) {
    int heads = panels_of(row->n_heads, PAIR_PANEL) * PAIR_PANEL;
    const uint16_t *query = row->query;
    uint16_t *out = packed;
    float *weights = (float *)(void *)(out + (size_t)heads * (size_t)row->head_dim);
    uint32_t *masks = (uint32_t *)(void *)(weights + heads * 2);
    for (int h = 0; h < heads; h++) {
        uint16_t *head = out + h / PAIR_PANEL * PAIR_PANEL * row->head_dim + h % PAIR_PANEL * 4;
        int exists = h < row->n_heads;
        for (int d = 0; d < row->head_dim; d += 4, head += PAIR_PANEL * 4)
            vst1_u16(head, exists ? vld1_u16(query + h * row->head_dim + d) : vdup_n_u16(0));
        for (int i = 0; i < 2; i++) {
            weights[h * 2 + i] = exists ? row->weights[h] : 0;
            masks[h * 2 + i] = exists ? 0xFFFFFFFFu : 0;
        }
    }
}

/* The keys of a block in pairs, [KEY_BLOCK / PAIR_GROUP][head_dim / 4][4 pairs][2][4]. */
INLINE void pair_block(uint16_t *keys, const struct key_run *run, int block, int head_dim) {
    for (int r = 0; r < KEY_BLOCK; r += 2) {
        const uint16_t *a = row_of(run, block, r), *b = row_of(run, block, r + 1);
        uint16_t *out = keys + r / PAIR_GROUP * PAIR_GROUP * head_dim + r % PAIR_GROUP * 4;
        fetch_row(run, block, r, head_dim);
        fetch_row(run, block, r + 1, head_dim);
        for (int d = 0; d < head_dim; d += 8, out += 2 * PAIR_GROUP * 4) {
            uint64x2_t x = vreinterpretq_u64_u16(a ? vld1q_u16(a + d) : vdupq_n_u16(0));
            uint64x2_t y = vreinterpretq_u64_u16(b ? vld1q_u16(b + d) : vdupq_n_u16(0));
            vst1q_u16(out, vreinterpretq_u16_u64(vzip1q_u64(x, y)));
            vst1q_u16(out + PAIR_GROUP * 4, vreinterpretq_u16_u64(vzip2q_u64(x, y)));
        }
    }
}

/* sum[0..3] += h0 k0, h0 k1, h1 k0, h1 k1 over 4 dimensions. In assembly because the intrinsic is
 * hidden from functions with a target attribute in clang before 16. */
TARGET_BF16 INLINE float32x4_t multiply_pairs(float32x4_t sum, uint16x8_t heads, uint16x8_t keys) {
    __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(heads), "w"(keys));
    return sum;
}

/* Adds to sum[pair of keys] what one panel of heads makes of PAIR_GROUP keys. */
TARGET_BF16 INLINE void add_panel_pairs(float32x4_t *sum, const uint16_t *query,
                                        const uint16_t *keys, int head_dim, const float *weights,
                                        const uint32_t *masks) {
    float32x4_t dot[4][4];
    UNROLL
    for (int i = 0; i < 16; i++)
        dot[i / 4][i % 4] = vdupq_n_f32(0);
    for (int d = 0; d < head_dim; d += 4, query += PAIR_PANEL * 4, keys += PAIR_GROUP * 4) {
        uint16x8_t q[4], k[4];
        UNROLL
        for (int i = 0; i < 4; i++)
            q[i] = vld1q_u16(query + i * 8);
        UNROLL
        for (int i = 0; i < 4; i++)
            k[i] = vld1q_u16(keys + i * 8);
        UNROLL
        for (int i = 0; i < 16; i++)
            dot[i / 4][i % 4] = multiply_pairs(dot[i / 4][i % 4], q[i / 4], k[i % 4]);
    }
    UNROLL
    for (int h = 0; h < 4; h++) {
        float32x4_t weight = vld1q_f32(weights + h * 4);
        uint32x4_t heads = vld1q_u32(masks + h * 4);
        UNROLL
        for (int k = 0; k < 4; k++)
            sum[k] = vfmaq_f32(sum[k], relu(dot[h][k], heads), weight);
    }
}

TARGET_BF16 static void score_pairs(float *score, const void *packed, int n_heads, int head_dim,
                                    const struct key_run *run) {
    uint16_t keys[KEY_BLOCK * MAX_HEAD_DIM];
    float block_score[KEY_BLOCK];
    int n_panels = panels_of(n_heads, PAIR_PANEL), n_blocks = panels_of(run->n_keys, KEY_BLOCK);
    const uint16_t *query = packed;
    const float *weights =
        (const float *)(const void *)(query + (size_t)n_panels * PAIR_PANEL * (size_t)head_dim);
    const uint32_t *masks = (const uint32_t *)(const void *)(weights + n_panels * PAIR_PANEL * 2);
    for (int block = 0; block < n_blocks; block++) {
        pair_block(keys, run, block, head_dim);
        for (int k = 0; k < KEY_BLOCK; k += PAIR_GROUP) {
            float32x4_t sum[4];
            UNROLL
            for (int i = 0; i < 4; i++)
                sum[i] = vdupq_n_f32(0);
            for (int panel = 0; panel < n_panels; panel++)
                add_panel_pairs(sum, query + panel * PAIR_PANEL * head_dim, keys + k * head_dim,
                                head_dim, weights + panel * PAIR_PANEL * 2,
                                masks + panel * PAIR_PANEL * 2);
            UNROLL
            for (int i = 0; i < 4; i++)
                vst1_f32(block_score + k + i * 2,
                         vadd_f32(vget_low_f32(sum[i]), vget_high_f32(sum[i])));
        }
        store_scores(score, block_score, run, block);
    }
}

const struct kernel lidx_kernel_neon_bf16 = {
    .name = "neon_bf16",
    .needs = FEATURE_NEON | FEATURE_NEON_BF16,
    .path = {[DTYPE_BF16] = {packed_size_pairs, pack_pairs, score_pairs},
             [DTYPE_FP16] = {packed_size_f32, pack_fp16_f32, score_fp16_f32}},
};

#endif
