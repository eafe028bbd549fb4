/* SPDX-License-Identifier: Apache-2.0
 *
 * The work of a run, cut into blocks that threads take one after the other. Pure arithmetic on
 * lengths: no threads, no ISA, no data.
 *
 * A block is up to `rows` consecutive query tokens of one batch; its keys are those its last
 * token sees. A block with much work is cut along the keys into pieces, so that several threads can
 * share it. Blocks of a batch run from its last to its first, so that with causal masks the heavy
 * ones start first. Which thread takes what does not matter to the result.
 */
#ifndef LIDX_PLAN_H
#define LIDX_PLAN_H

#include "../visible.h"

enum {
    PLAN_ROWS = 8,   /* most rows of a block */
    PLAN_ALIGN = 48, /* pieces begin at multiples of it: whole key blocks, whole register tiles */
};

struct plan_block {
    int64_t batch;
    struct extent extent; /* of the batch */
    int64_t row;          /* first query token of the block, counted in its batch */
    int64_t n_keys;
    int64_t piece_keys;
    int n_rows;
    int n_pieces;  /* 1 when the block is not cut, and where there is no key */
    int64_t split; /* number of this block among the cut ones; -1 when it is not cut */
    int64_t slot;  /* first partial row of the block, which has n_rows of them for each worker, or
                    * for each piece if these are fewer */
};

struct plan_limits {
    int n_workers;
    int rows;        /* most rows of a block that a worker has buffers for, <= PLAN_ROWS */
    int64_t slots;   /* rows of partial results that can be kept */
    int rows_wanted; /* of a block, even where it must then be cut for all to have work */
    int keys_per_us; /* that a thread scores for a row, about; at least 1 */
};

struct plan {
    const struct problem *p;
    struct plan_block *cut; /* blocks that are cut, by their number; the caller's */
    int64_t piece_work;     /* keys x rows of a piece, about */
    int64_t n_blocks;
    int64_t blocks_at_once; /* that a worker takes, one behind the other */
    int64_t n_pieces;       /* of all blocks */
    int64_t n_slots;        /* partial rows of all who may share cut blocks */
    int64_t n_splits;       /* blocks that are cut */
    int rows;
    int n_workers;      /* for whom there is work; 1 where others are not worth waking */
    int block_is_batch; /* each batch is one block */
};

/* `cut` has room for half as many blocks as limits->slots: each needs at least two. */
void lidx_plan_build(struct plan *plan, const struct problem *p, const struct plan_limits *limits,
                     struct plan_block *cut);

/* Where the keys of a piece begin, counted in the batch; those of the last end at n_keys. */
static inline int64_t lidx_plan_key(const struct plan_block *block, int64_t piece) {
    int64_t key = piece * block->piece_keys;
    return key < block->n_keys ? key : block->n_keys;
}

/* A walk over blocks in ascending order. */
struct plan_cursor {
    const struct plan *plan;
    int64_t index; /* of the block that comes next */
    int64_t left;  /* blocks still to come in this batch */
    int64_t split;
    int64_t slot;
    int64_t batch;
    struct extent extent;
};

void lidx_plan_start(struct plan_cursor *cursor, const struct plan *plan);

/* Block `index`, which must be above the last one asked for and below n_blocks. */
void lidx_plan_seek(struct plan_cursor *cursor, int64_t index, struct plan_block *block);

#endif
