/* SPDX-License-Identifier: Apache-2.0
 *
 * What a run's threads share, what each has for itself, and how one of them scores a block's keys
 * and keeps the k best of each row.
 */
#ifndef LIDX_WORKER_H
#define LIDX_WORKER_H

#include <stdatomic.h>

#include "kernel.h"
#include "plan.h"
#include "topk.h"

enum {
    AHEAD_KEYS = 384, /* how far ahead of a tile a kernel may prefetch */
    LIST_BLOCKS = (MAX_TILE_KEYS + AHEAD_KEYS) / KEY_BLOCK,
    SCORE_BYTES = 24 << 10, /* of a worker, for a tile's scores of two rows */
};

_Static_assert(2 * MAX_TILE_KEYS * sizeof(float) <= SCORE_BYTES, "two rows of a tile's scores");

struct split;

struct run {
    const struct problem *p;
    const struct kernel *kernel;
    const struct kernel_path *path;
    const struct topk_loops *loops;
    struct plan plan;
    int n_workers;
    unsigned char *memory; /* of the workers, row_bytes each */
    size_t row_bytes;
    unsigned char *scores; /* of the workers, SCORE_BYTES each */
    size_t packed_bytes;
    size_t entry_bytes;
    struct split *splits; /* by number of the cut block */
    unsigned char *slots;
    size_t slot_bytes;
    _Atomic int64_t next_block;
};

/* What a worker holds of one row of its block. */
struct row {
    void *packed;
    struct topk topk;
    int64_t visible;
};

struct worker {
    struct run *run;
    int index;
    struct row row[PLAN_ROWS];
    const void *list[LIST_BLOCKS];
    float *score[2]; /* of two rows where the kernel takes two at once; a small stack has no room */
    float weights[MAX_HEADS];
};

/* The worker's part of the run's memory. */
void lidx_worker_start(struct worker *w, struct run *run, int index);

/* Packs the block's rows and empties their selections. */
void lidx_worker_load(struct worker *w, const struct plan_block *block);

/* Scores the keys [begin, end) of the block for each of its rows and pushes the scores. */
void lidx_worker_score(struct worker *w, const struct plan_block *block, int64_t begin,
                       int64_t end);

/* The selection of row r, in which no score waits: it stays until the next row's is asked for,
 * which must come after it, since both may lie in the buffer of the first. */
struct topk lidx_worker_candidates(struct worker *w, int r);

/* Orders and writes the rows of a block that the worker has had alone. */
void lidx_worker_finish(struct worker *w, const struct plan_block *block);

#endif
