/* SPDX-License-Identifier: Apache-2.0
 *
 * VDPBF16PS: 32 products an instruction. Lanes are heads, so a key is broadcast two elements at a
 * time and never rearranged.
 *
 * Packed query: weights[16 * groups], zero beyond n_heads, then panels of 4, 2 or 1 groups of 16
 * heads. A panel is [head_dim / 2][groups of the panel][16] pairs of bf16: 16 KiB for 64 heads of
 * 128, half of L1.
 *
 * Registers of a panel of P groups against K = 16 / P keys: 16 sums, up to 4 query vectors, a
 * broadcast. Sixteen chains cover the latency of VDPBF16PS (6 cycles, one or two started in each).
 */
#if defined(__x86_64__)

#include "avx512.h"

#include <string.h>

#include "features.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    STEPS = 8,       /* steps of two elements in one round of the dot loop */
    FETCH_AHEAD = 4, /* blocks from the one in work to the one fetched into L1 */
};

/* Of the groups that are left, how many the next panel takes. */
static int panel_groups(int left) {
    return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static size_t packed_size(int n_heads, int head_dim) {
    int steps = head_dim / 2 / lanes_of_head(n_heads);
    return (size_t)group_count(n_heads) * LANES * sizeof(float) * (size_t)(1 + steps);
}

static void pack_spread(unsigned char *out, float *weights, const struct query_row *row) {
    const unsigned char *query = row->query;
    for (int h = 0; h < row->n_heads; h++) {
        weights[2 * h] = row->weights[h];
        for (int s = 0; s < row->head_dim / 4; s++, query += 8)
            memcpy(out + s * 64 + h * 8, query, 8);
    }
}

static void pack(void *packed, const struct query_row *row) {
    const int groups = group_count(row->n_heads), steps = row->head_dim / 2;
    const int row_bytes = 2 * row->head_dim;
    float *weights = packed;
    unsigned char *out = (unsigned char *)(weights + groups * LANES);
    if (lanes_of_head(row->n_heads) == 2) {
        memset(packed, 0, packed_size(row->n_heads, row->head_dim));
        pack_spread(out, weights, row);
        return;
    }
    memset(weights, 0, sizeof(float) * (size_t)(groups * LANES));
    memcpy(weights, row->weights, sizeof(float) * (size_t)row->n_heads);
    for (int first = 0, P; first < groups; first += P, out += steps * P * 64) {
        P = panel_groups(groups - first);
        for (int g = 0; g < P; g++) {
            int head = (first + g) * LANES, left = row->n_heads - head;
            for (int s = 0; s < steps; s += LANES)
                lidx_avx512_transpose(out + (s * P + g) * 64, P * 64,
                                      (const unsigned char *)row->query + head * row_bytes + 4 * s,
                                      row_bytes, left < LANES ? left : LANES);
        }
    }
}

/* The keys of a block that are not 16 consecutive rows, made so. */
INLINE const unsigned char *gather(unsigned char *copy, const unsigned char *block, int64_t stride,
                                   int n, int row_bytes) {
    for (int j = 0; j < n; j++)
        memcpy(copy + j * row_bytes, block + j * stride, (size_t)row_bytes);
    memset(copy + n * row_bytes, 0, (size_t)((KEY_BLOCK - n) * row_bytes));
    return copy;
}

/* S pairs of a key, over and over. The empty statement keeps clang from loading the two pairs of
 * all 16 keys before it uses the first, which spills. */
INLINE __m512bh broadcast(const unsigned char *pairs, int S) {
    if (S == 2) {
        long long two;
        memcpy(&two, pairs, 8);
        __m512i both = _mm512_set1_epi64(two);
        __asm__ volatile("" : "+v"(both));
        return (__m512bh)both;
    }
    int one;
    memcpy(&one, pairs, 4);
    return (__m512bh)_mm512_set1_epi32(one);
}

/* A panel of P groups against the 16 keys of a block: sums[j] gets, or is raised by, key j's
 * weighted ReLUs, a lane for each 16th head. S lanes share a head. `last` masks the lanes of the
 * panel's last group. */
INLINE void panel(float sums[KEY_BLOCK][LANES], const unsigned char *query, const float *weights,
                  const unsigned char *keys, struct ahead ahead, int P, int S, int D, int first,
                  __mmask16 last) {
    const int K = LANES / P, row_bytes = 2 * D;
    for (int j = 0; j < KEY_BLOCK; j += K, keys += K * row_bytes) {
        const unsigned char *q = query, *k = keys;
        __m512 dot[16];
        UNROLL
        for (int i = 0; i < 16; i++)
            dot[i] = _mm512_setzero_ps();
        for (int d = 0; d < D; d += 2 * S * STEPS, q += STEPS * P * 64, k += STEPS * 4 * S) {
            UNROLL
            for (int s = 0; s < STEPS; s++) {
                __m512bh qv[4];
                UNROLL
                for (int g = 0; g < P; g++)
                    qv[g] = (__m512bh)_mm512_load_si512(q + (s * P + g) * 64);
                UNROLL
                for (int i = 0; i < K; i++) {
                    __m512bh kv = broadcast(k + i * row_bytes + 4 * S * s, S);
                    UNROLL
                    for (int g = 0; g < P; g++)
                        dot[i * P + g] = _mm512_dpbf16_ps(dot[i * P + g], qv[g], kv);
                }
                /* K rows of 2 D bytes in D / 2 / S steps: S lines every 16 / K = P steps. */
                if (s % P == 0) {
                    _mm_prefetch((const char *)ahead.line, _MM_HINT_T0);
                    ahead.line += ahead.step;
                }
                if (s % P == 0 && S == 2) {
                    _mm_prefetch((const char *)ahead.line, _MM_HINT_T0);
                    ahead.line += ahead.step;
                }
            }
        }
        UNROLL
        for (int i = 0; i < K; i++) {
            __m512 sum = first ? _mm512_setzero_ps() : _mm512_load_ps(sums[j + i]);
            UNROLL
            for (int g = 0; g < P; g++) {
                __m512 x = dot[i * P + g];
                if (S == 2) /* the neighbour's half; the mask keeps the even lanes */
                    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
                /* The second operand is what MAX returns beside a NaN. */
                __m512 relu = _mm512_maskz_max_ps(g == P - 1 ? last : (__mmask16)0xFFFF,
                                                  _mm512_setzero_ps(), x);
                sum = _mm512_fmadd_ps(relu, _mm512_load_ps(weights + g * LANES), sum);
            }
            _mm512_store_ps(sums[j + i], sum);
        }
    }
}

/* The block to fetch while block b is scored; without one, the same line again and again, which is
 * free. */
INLINE struct ahead ahead_of(const struct key_run *run, int blocks, int b, const void *here) {
    int next = b + FETCH_AHEAD;
    if (next < blocks + run->n_ahead)
        return (struct ahead){run->block[next], 64};
    return (struct ahead){here, 0};
}

INLINE void score_blocks(float *score, const void *packed, int n_heads, const struct key_run *run,
                         int D) {
    const int groups = group_count(n_heads), spread = lanes_of_head(n_heads) == 2;
    const float *weights = packed;
    const __mmask16 last = last_lanes(n_heads);
    const int blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    float sums[KEY_BLOCK][LANES] __attribute__((aligned(64)));
    unsigned char copy[KEY_BLOCK * 2 * MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int b = 0; b < blocks; b++) {
        const unsigned char *keys = run->block[b];
        const unsigned char *query = (const unsigned char *)(weights + groups * LANES);
        int n = run->n_keys - b * KEY_BLOCK;
        if (n < KEY_BLOCK || run->row_stride != 2 * D)
            keys = gather(copy, keys, run->row_stride, n < KEY_BLOCK ? n : KEY_BLOCK, 2 * D);
        struct ahead ahead = ahead_of(run, blocks, b, keys);
        for (int g = 0; g < groups;) {
            int P = panel_groups(groups - g), first = g == 0;
            __mmask16 mask = g + P == groups ? last : (__mmask16)0xFFFF;
            const float *w = weights + g * LANES;
            if (P == 4)
                panel(sums, query, w, keys, ahead, 4, 1, D, first, mask);
            else if (P == 2)
                panel(sums, query, w, keys, ahead, 2, 1, D, first, mask);
            else if (!spread)
                panel(sums, query, w, keys, ahead, 1, 1, D, first, mask);
            else
                panel(sums, query, w, keys, ahead, 1, 2, D, first, mask);
            query += D / 2 * P * 64;
            g += P;
            ahead = (struct ahead){keys, 0}; /* the first panel has fetched all */
        }
        store_scores(score + b * KEY_BLOCK, n, sums);
    }
}

TARGET static void score(float *out, const void *packed, int n_heads, int head_dim,
                         const struct key_run *run) {
    if (head_dim == 128)
        score_blocks(out, packed, n_heads, run, 128);
    else
        score_blocks(out, packed, n_heads, run, 64);
}

const struct kernel lidx_kernel_avx512_bf16 = {
    .name = "avx512_bf16",
    .needs = FEATURE_AVX512 | FEATURE_AVX512_BF16,
    .topk = &lidx_topk_avx512,
    .path = {[DTYPE_BF16] = {packed_size, pack, score},
             [DTYPE_FP16] = {lidx_avx512_packed_size, lidx_avx512_pack_fp16,
                             lidx_avx512_score_fp16}},
};

#endif
