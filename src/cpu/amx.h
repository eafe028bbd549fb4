/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the AMX kernel share: the form of a packed query, and its two paths.
 *
 *     amx_tiles.h   the tile instructions            amx_bf16.c    the bf16 path
 *     amx_pass.h    what a call of score() knows     amx_fp16.c    the fp16 path
 *     amx_parts.h   fp16 numbers as bf16 parts       amx.c         the row of the table
 *     amx_slots.h   the pipeline of both paths
 *
 * A packed query is, for each head tile and each step of 32 dimensions, the 1 KiB tile that
 * TDPBF16PS wants as its second operand: row p holds a pair of dimensions of 16 heads. Behind the
 * tiles come the weights and, for fp16, a word that says whether all is finite.
 */
#ifndef LIDX_AMX_H
#define LIDX_AMX_H

#include "avx512.h"
#include "kernel.h"

#include <immintrin.h>

#include "../dtype.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* A tile has LANES heads or keys as rows. */
enum {
    STEP_DIMS = 32, /* dimensions of one tile instruction */
    TILE_BYTES = 1024,
};

/* What TDPBF16PS multiplies: 2 bf16 numbers in a lane. */
typedef __m512i pairs;

static inline int head_tiles(int n_heads) {
    return (n_heads + LANES - 1) / LANES;
}

/* Tiles that TDPBF16PS reads for one step: fp16 has two parts. */
static inline int parts_of(int dtype) {
    return dtype == DTYPE_FP16 ? 2 : 1;
}

static inline size_t tiles_bytes(int n_heads, int head_dim, int dtype) {
    return (size_t)head_tiles(n_heads) * (size_t)(head_dim / STEP_DIMS) * (size_t)parts_of(dtype) *
           TILE_BYTES;
}

static inline const float *packed_weights(const void *packed, int n_heads, int head_dim,
                                          int dtype) {
    return (const float *)((const unsigned char *)packed + tiles_bytes(n_heads, head_dim, dtype));
}

static inline void pack_weights(float *weights, const struct query_row *row) {
    int padded = head_tiles(row->n_heads) * LANES;
    for (int h = 0; h < padded; h++)
        weights[h] = h < row->n_heads ? row->weights[h] : 0;
}

/* The trio of kernel.h for each type, and score_two. */
size_t lidx_amx_packed_size_bf16(int n_heads, int head_dim);
size_t lidx_amx_packed_size_fp16(int n_heads, int head_dim);
void lidx_amx_pack_bf16(void *packed, const struct query_row *row);
void lidx_amx_pack_fp16(void *packed, const struct query_row *row);
void lidx_amx_score_bf16(float *score, const void *packed, int n_heads, int head_dim,
                         const struct key_run *run);
void lidx_amx_score_fp16(float *score, const void *packed, int n_heads, int head_dim,
                         const struct key_run *run);
void lidx_amx_score_two_bf16(float *const score[2], const void *const packed[2], int n_heads,
                             int head_dim, const struct key_run *run);

#endif
