/* SPDX-License-Identifier: Apache-2.0
 *
 * The work of a run, cut into items that threads take one after the other. Pure arithmetic on
 * lengths: no threads, no ISA, no data.
 *
 * A block is up to `rows` consecutive query tokens of one batch; its keys are those its last
 * token sees. A block with much work is cut along the keys into pieces, so that several threads can
 * share it. An item is one piece. Items of a batch run from its last block to its first, so that
 * with causal masks the heavy ones start first. Which thread takes an item does not matter to the
 * result.
 */
#ifndef LIDX_PLAN_H
#define LIDX_PLAN_H

#include "../visible.h"

enum {
    PLAN_ROWS = 8,   /* most rows of a block */
    PLAN_ALIGN = 48, /* pieces begin at multiples of it: whole key blocks, whole register tiles */
};

struct plan_limits {
    int n_workers;
    int rows;        /* most rows of a block that a worker has buffers for, <= PLAN_ROWS */
    int64_t slots;   /* rows of partial results that can be kept */
    int rows_wanted; /* of a block, even where it must then be cut for all to have work */
};

struct plan {
    const struct problem *p;
    int64_t piece_work; /* keys x rows of a piece, about */
    int64_t n_items;
    int64_t n_slots;  /* partial rows of all who may share cut blocks */
    int64_t n_splits; /* blocks that are cut */
    int rows;
    int n_workers;
};

struct plan_item {
    int64_t batch;
    struct extent extent; /* of the batch */
    int64_t row;          /* first query token of the block, counted in its batch */
    int n_rows;
    int n_pieces;
    int piece;
    int64_t key_begin; /* keys of this piece, counted in the batch */
    int64_t key_end;
    int64_t split; /* number of this block among the cut ones; -1 when n_pieces is 1 */
    int64_t slot;  /* first partial row of the block, which has n_rows of them for each worker, or
                    * for each piece if these are fewer */
};

void lidx_plan_build(struct plan *plan, const struct problem *p, const struct plan_limits *limits);

/* A walk over items in ascending order. */
struct plan_cursor {
    const struct plan *plan;
    int64_t first_item; /* number of the current block's piece 0 */
    int64_t block;      /* blocks still to come in this batch, this one included */
    int64_t split;
    int64_t slot;
    int64_t batch;
    struct extent extent;
};

void lidx_plan_start(struct plan_cursor *cursor, const struct plan *plan);

/* Item `index`, which must not be below the last one asked for and must be below n_items. */
void lidx_plan_seek(struct plan_cursor *cursor, int64_t index, struct plan_item *item);

#endif
