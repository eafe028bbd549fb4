/* SPDX-License-Identifier: Apache-2.0
 *
 * One call of score(): its query tokens, its keys, and where tile loads find these.
 */
#ifndef LIDX_AMX_PASS_H
#define LIDX_AMX_PASS_H

#include <string.h>

#include "amx_tiles.h"

enum {
    RING = 4,      /* tiles of sums between store and vector work */
    FLAG_RING = 8, /* key blocks from the split of keys to their score, a power of 2 */
};

struct place {
    int tile; /* head tile */
    int block;
    int token; /* of the two of score_two() */
};

/* A query token and where its scores go. */
struct token {
    const unsigned char *tiles;
    const float *weights;
    float *score;
};

struct keys {
    const unsigned char *row;
    int64_t stride;
};

struct pass {
    struct token token[2];
    struct key_run run;        /* a copy: no store can change it, so nothing of it is read again */
    unsigned char *scratch;    /* bf16: a tail of less than 16 keys; fp16: the parts of 16 keys */
    float *ring;               /* RING tiles of sums */
    unsigned flags[FLAG_RING]; /* fp16: keys that are not finite, of the last key blocks */
    int head_dim;
    int n_tiles;
    int n_tokens;
    int n_blocks;
    int n_listed;    /* with those that are there for prefetch */
    __mmask16 heads; /* of the last head tile */
    __mmask16 keys;  /* of the last key block */
};

static inline int rows_in_block(const struct key_run *run, int block) {
    int left = run->n_keys - block * KEY_BLOCK;
    return left < KEY_BLOCK ? left : KEY_BLOCK;
}

/* Where tile loads find the keys of a block. */
INLINE struct keys keys_of(const struct pass *p, int block) {
    if (rows_in_block(&p->run, block) < KEY_BLOCK)
        return (struct keys){p->scratch, (int64_t)p->head_dim * 2};
    return (struct keys){p->run.block[block], p->run.row_stride};
}

/* Copies the rows of a partial block and zeroes the others: a tile load takes 16 rows, and those
 * behind the run must not be touched. */
INLINE void copy_tail(unsigned char *scratch, const struct key_run *run, size_t key_bytes) {
    int rows = run->n_keys % KEY_BLOCK;
    if (rows == 0)
        return;
    const unsigned char *source = run->block[run->n_keys / KEY_BLOCK];
    for (int r = 0; r < rows; r++)
        memcpy(scratch + (size_t)r * key_bytes, source + r * run->row_stride, key_bytes);
    memset(scratch + (size_t)rows * key_bytes, 0, (size_t)(KEY_BLOCK - rows) * key_bytes);
    publish(scratch);
}

INLINE __mmask16 heads_of(const struct pass *p, int tile) {
    return tile == p->n_tiles - 1 ? p->heads : 0xFFFF;
}

static inline struct token token_of(float *score, const void *packed, int n_heads, int head_dim,
                                    int dtype) {
    return (struct token){packed, packed_weights(packed, n_heads, head_dim, dtype), score};
}

static inline struct pass pass_of(float *score, const void *packed, int n_heads, int head_dim,
                                  int dtype, const struct key_run *run) {
    struct pass p = {.run = *run, .head_dim = head_dim, .n_tokens = 1};
    p.token[0] = token_of(score, packed, n_heads, head_dim, dtype);
    p.n_tiles = head_tiles(n_heads);
    p.n_blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    p.n_listed = p.n_blocks + run->n_ahead;
    p.heads = (__mmask16)(0xFFFF >> (p.n_tiles * LANES - n_heads));
    p.keys = (__mmask16)(0xFFFF >> (p.n_blocks * KEY_BLOCK - run->n_keys));
    return p;
}

/* Loads the keys of the first block that are not loaded in its first slot. */
INLINE void load_first_keys(const struct pass *p, int steps) {
    const struct keys first = keys_of(p, 0);
    load_keys(0, first.row, first.stride);
    if (steps == 4)
        load_keys(1, first.row + 64, first.stride);
}

#endif
