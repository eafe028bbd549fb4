/* SPDX-License-Identifier: Apache-2.0
 *
 * fp32 FMA on widened keys, for CPUs without a 16-bit product instruction, or keys in fp16. Lanes
 * are heads. The keys of a block are widened once into a scratch of 8 KiB and from there
 * broadcast one element at a time.
 *
 * Packed query: weights[16 * groups], zero beyond n_heads, then panels of 2 groups of 16 heads (1
 * in the last, when odd). A panel is [head_dim][groups of the panel][16] floats: 16 KiB for 32
 * heads of 128, which stay in L1 beside the scratch.
 *
 * Registers of a panel of P groups against K = 16 / P keys: 16 sums, up to 2 query vectors, the
 * broadcasts. Sixteen chains cover the latency of FMA (4 cycles, one or two started in each).
 */
#if defined(__x86_64__)

#include "avx512.h"

#include <string.h>

#include "features.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    STEPS = 8,       /* elements in one round of the dot loop */
    FETCH_AHEAD = 3, /* blocks from the one in work to the one fetched into L1 */
};

static int panel_groups(int left) {
    return left >= 2 ? 2 : 1;
}

size_t lidx_avx512_packed_size(int n_heads, int head_dim) {
    int steps = head_dim / lanes_of_head(n_heads);
    return (size_t)group_count(n_heads) * LANES * sizeof(float) * (size_t)(1 + steps);
}

INLINE __m512 widen(__m256i half, int dtype) {
    if (dtype == DTYPE_FP16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* 4 x 4 blocks in two rounds of unpacking, then the blocks themselves in two of shuffling. */
TARGET void lidx_avx512_transpose(void *out, int64_t out_stride, const void *rows,
                                  int64_t row_stride, int n) {
    const unsigned char *from = rows;
    unsigned char *to = out;
    __m512i r[16], t[16];
    UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = i < n ? _mm512_loadu_si512(from + i * row_stride) : _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int c = 0; c < 4; c++) {
        __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);
        __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
        _mm512_store_si512(to + c * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_store_si512(to + (8 + c) * out_stride,
                           _mm512_shuffle_i32x4(even_low, even_high, 0xDD));
        _mm512_store_si512(to + (4 + c) * out_stride,
                           _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_store_si512(to + (12 + c) * out_stride,
                           _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD));
    }
}

INLINE __m512 widen_at(const unsigned char *halves, int dtype) {
    return widen(_mm256_loadu_si256((const __m256i *)halves), dtype);
}

INLINE void pack_spread(float *out, float *weights, const struct query_row *row, int dtype) {
    const unsigned char *query = row->query;
    for (int h = 0; h < row->n_heads; h++) {
        weights[2 * h] = row->weights[h];
        for (int d = 0; d < row->head_dim; d += LANES, query += 2 * LANES) {
            float wide[LANES] __attribute__((aligned(64)));
            _mm512_store_ps(wide, widen_at(query, dtype));
            for (int i = 0; i < LANES; i += 2)
                memcpy(out + (d + i) / 2 * LANES + 2 * h, wide + i, 2 * sizeof(float));
        }
    }
}

/* One group of heads; its vectors are P apart. */
INLINE void pack_group(float *out, const unsigned char *query, int n, int D, int P, int dtype) {
    float wide[LANES][LANES] __attribute__((aligned(64)));
    for (int d = 0; d < D; d += LANES) {
        for (int i = 0; i < n; i++)
            _mm512_store_ps(wide[i], widen_at(query + 2 * (i * D + d), dtype));
        lidx_avx512_transpose(out + d * P * LANES, P * 64, wide, 64, n);
    }
}

INLINE void pack(void *packed, const struct query_row *row, int dtype) {
    const int groups = group_count(row->n_heads), D = row->head_dim;
    float *weights = packed, *out = weights + groups * LANES;
    if (lanes_of_head(row->n_heads) == 2) {
        memset(packed, 0, lidx_avx512_packed_size(row->n_heads, D));
        pack_spread(out, weights, row, dtype);
        return;
    }
    memset(weights, 0, sizeof(float) * (size_t)(groups * LANES));
    memcpy(weights, row->weights, sizeof(float) * (size_t)row->n_heads);
    for (int first = 0, P; first < groups; first += P, out += D * P * LANES) {
        P = panel_groups(groups - first);
        for (int g = 0; g < P; g++) {
            int head = (first + g) * LANES, left = row->n_heads - head;
            pack_group(out + g * LANES, (const unsigned char *)row->query + 2 * head * D,
                       left < LANES ? left : LANES, D, P, dtype);
        }
    }
}

/* n rows of a block as fp32, and zeros for those that do not exist. */
INLINE void widen_rows(float *wide, const unsigned char *rows, int64_t stride, int n, int D,
                       int dtype) {
    for (int j = 0; j < n; j++, rows += stride) {
        UNROLL
        for (int d = 0; d < D; d += LANES)
            _mm512_store_ps(wide + j * D + d, widen_at(rows + 2 * d, dtype));
    }
    if (n < KEY_BLOCK)
        memset(wide + n * D, 0, sizeof(float) * (size_t)((KEY_BLOCK - n) * D));
}

/* S elements of a key, over and over. The empty statement keeps clang from loading the two elements
 * of all 16 keys before it uses the first, which spills. */
INLINE __m512 broadcast(const float *elements, int S) {
    if (S == 2) {
        double two;
        memcpy(&two, elements, sizeof two);
        __m512 both = _mm512_castpd_ps(_mm512_set1_pd(two));
        __asm__ volatile("" : "+v"(both));
        return both;
    }
    return _mm512_set1_ps(*elements);
}

/* A panel of P groups against the 16 keys of a block: sums[j] gets, or is raised by, key j's
 * weighted ReLUs, a lane for each 16th head. S lanes share a head. `last` masks the lanes of the
 * panel's last group. */
INLINE void panel(float sums[KEY_BLOCK][LANES], const float *query, const float *weights,
                  const float *keys, struct ahead *ahead, int P, int S, int D, int first,
                  __mmask16 last) {
    const int K = LANES / P;
    const unsigned char *line = ahead->line;
    const int64_t step = ahead->step;
    for (int j = 0; j < KEY_BLOCK; j += K, keys += K * D) {
        const float *q = query, *k = keys;
        __m512 dot[16];
        UNROLL
        for (int i = 0; i < 16; i++)
            dot[i] = _mm512_setzero_ps();
        for (int d = 0; d < D; d += S * STEPS, q += STEPS * P * LANES, k += STEPS * S) {
            UNROLL
            for (int s = 0; s < STEPS; s++) {
                __m512 qv[2];
                UNROLL
                for (int g = 0; g < P; g++)
                    qv[g] = _mm512_load_ps(q + (s * P + g) * LANES);
                UNROLL
                for (int i = 0; i < K; i++) {
                    __m512 kv = broadcast(k + i * D + S * s, S);
                    UNROLL
                    for (int g = 0; g < P; g++)
                        dot[i * P + g] = _mm512_fmadd_ps(kv, qv[g], dot[i * P + g]);
                }
                if (s % (2 * P / S) == 0) {
                    _mm_prefetch((const char *)line, _MM_HINT_T0);
                    line += step;
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
    ahead->line = line;
}

/* The block to fetch while block b is scored; without one, the same line again and again, which is
 * free. A panel issues a fetch every 2 P elements of every 16 / P keys: one for each line of the
 * block, so n panels advance by an nth of a line each time. */
INLINE struct ahead ahead_of(const struct key_run *run, int blocks, int b, int panels) {
    int next = b + FETCH_AHEAD;
    if (next < blocks + run->n_ahead)
        return (struct ahead){run->block[next], (64 + panels - 1) / panels};
    return (struct ahead){run->block[b], 0};
}

INLINE void score_blocks(float *score, const void *packed, int n_heads, const struct key_run *run,
                         int D, int dtype) {
    const int groups = group_count(n_heads), spread = lanes_of_head(n_heads) == 2;
    const float *weights = packed;
    const __mmask16 last = last_lanes(n_heads);
    const int blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    float sums[KEY_BLOCK][LANES] __attribute__((aligned(64)));
    float wide[KEY_BLOCK * MAX_HEAD_DIM] __attribute__((aligned(64)));
    for (int b = 0; b < blocks; b++) {
        const unsigned char *rows = run->block[b];
        const float *query = weights + groups * LANES;
        int n = run->n_keys - b * KEY_BLOCK;
        widen_rows(wide, rows, run->row_stride, n < KEY_BLOCK ? n : KEY_BLOCK, D, dtype);
        struct ahead ahead = ahead_of(run, blocks, b, (groups + 1) / 2);
        for (int g = 0; g < groups;) {
            int P = panel_groups(groups - g), first = g == 0;
            __mmask16 mask = g + P == groups ? last : (__mmask16)0xFFFF;
            const float *w = weights + g * LANES;
            if (P == 2)
                panel(sums, query, w, wide, &ahead, 2, 1, D, first, mask);
            else if (!spread)
                panel(sums, query, w, wide, &ahead, 1, 1, D, first, mask);
            else
                panel(sums, query, w, wide, &ahead, 1, 2, D, first, mask);
            query += D * P * LANES;
            g += P;
        }
        store_scores(score + b * KEY_BLOCK, n, sums);
    }
}

INLINE void score(float *out, const void *packed, int n_heads, int head_dim,
                  const struct key_run *run, int dtype) {
    if (head_dim == 128)
        score_blocks(out, packed, n_heads, run, 128, dtype);
    else
        score_blocks(out, packed, n_heads, run, 64, dtype);
}

TARGET void lidx_avx512_pack_fp16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_FP16);
}

TARGET void lidx_avx512_score_fp16(float *out, const void *packed, int n_heads, int head_dim,
                                   const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_FP16);
}

TARGET static void pack_bf16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_BF16);
}

TARGET static void score_bf16(float *out, const void *packed, int n_heads, int head_dim,
                              const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_BF16);
}

const struct kernel lidx_kernel_avx512 = {
    .name = "avx512",
    .needs = FEATURE_AVX512,
    .topk = &lidx_topk_avx512,
    .path = {[DTYPE_BF16] = {lidx_avx512_packed_size, pack_bf16, score_bf16},
             [DTYPE_FP16] = {lidx_avx512_packed_size, lidx_avx512_pack_fp16,
                             lidx_avx512_score_fp16}},
};

#endif
