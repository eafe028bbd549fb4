/* SPDX-License-Identifier: Apache-2.0 */
#include "plan.h"

enum {
    BLOCKS_PER_WORKER = 4,  /* where there are as many tokens */
    PIECES_PER_WORKER = 64, /* cores differ in speed, and late ones shall not be waited for */
    PIECE_KEYS = 240,       /* fewer at a time cost the kernels more than balance brings ... */
    PIECE_ROW_KEYS = 96,    /* ... but with one row, where all threads end at once */
    SERIAL_WORK = 1024,     /* keys x rows up to which waking a thread costs more than it saves */
};

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* One block of a batch: its rows, its keys and its pieces. */
struct block {
    int64_t row;
    int64_t n_keys;
    int64_t piece_keys;
    int n_rows;
    int n_pieces;
};

static struct block block_at(const struct plan *plan, const struct extent *e, int64_t index) {
    struct block b;
    b.row = index * plan->rows;
    b.n_rows = (int)smaller(plan->rows, e->n_query - b.row);
    b.n_keys = lidx_visible(plan->p, e, b.row + b.n_rows - 1);
    int64_t wanted = divide_up(b.n_keys * b.n_rows, plan->piece_work);
    b.piece_keys = divide_up(divide_up(b.n_keys, larger(wanted, 1)), PLAN_ALIGN) * PLAN_ALIGN;
    b.n_pieces = b.n_keys ? (int)divide_up(b.n_keys, b.piece_keys) : 1;
    return b;
}

static int64_t block_slots(const struct plan *plan, const struct block *b) {
    return b->n_pieces > 1 ? smaller(b->n_pieces, plan->n_workers) * b->n_rows : 0;
}

static int64_t block_count(const struct plan *plan, const struct extent *e) {
    return divide_up(e->n_query, plan->rows);
}

/* Tokens with at least one key to score, and keys x rows over all batches. */
static void measure(const struct problem *p, int64_t *tokens, int64_t *work) {
    *tokens = *work = 0;
    for (int64_t b = 0; b < p->n_batch; b++) {
        struct extent e = lidx_extent(p, b);
        int64_t last = e.n_query ? lidx_visible(p, &e, e.n_query - 1) : 0;
        int64_t first = e.n_query ? lidx_visible(p, &e, 0) : 0;
        *tokens += last ? e.n_query : 0;
        *work += (first + last) * smaller(e.n_query, last - first + 1) / 2 +
                 (p->sparse_mode == 0 && e.n_query > 1 ? last * (e.n_query - 1) : 0);
    }
}

static void count(struct plan *plan) {
    plan->n_items = plan->n_slots = plan->n_splits = 0;
    for (int64_t b = 0; b < plan->p->n_batch; b++) {
        struct extent e = lidx_extent(plan->p, b);
        for (int64_t i = block_count(plan, &e); i-- > 0;) {
            struct block block = block_at(plan, &e, i);
            plan->n_items += block.n_pieces;
            plan->n_splits += block.n_pieces > 1;
            plan->n_slots += block_slots(plan, &block);
        }
    }
}

void lidx_plan_build(struct plan *plan, const struct problem *p, const struct plan_limits *limits) {
    int64_t tokens, work, workers = limits->n_workers;
    measure(p, &tokens, &work);
    int64_t rows = larger(tokens / (BLOCKS_PER_WORKER * workers), limits->rows_wanted);
    plan->p = p;
    plan->rows = (int)smaller(rows, limits->rows);
    plan->n_workers = limits->n_workers;
    plan->piece_work = INT64_MAX / 2;
    if (workers > 1 && work > SERIAL_WORK)
        plan->piece_work = larger(work / (PIECES_PER_WORKER * workers),
                                  tokens == 1 ? PIECE_ROW_KEYS
                                              : PIECE_KEYS * smaller(plan->rows, tokens));
    /* With piece_work above all work nothing is cut and no slot is needed, so this ends. */
    for (count(plan); plan->n_slots > limits->slots; count(plan))
        plan->piece_work *= 2;
}

static void enter_batch(struct plan_cursor *c, int64_t batch) {
    c->batch = batch;
    c->block = 0;
    if (batch < c->plan->p->n_batch) {
        c->extent = lidx_extent(c->plan->p, batch);
        c->block = block_count(c->plan, &c->extent);
    }
}

void lidx_plan_start(struct plan_cursor *cursor, const struct plan *plan) {
    *cursor = (struct plan_cursor){.plan = plan};
    enter_batch(cursor, 0);
}

void lidx_plan_seek(struct plan_cursor *c, int64_t index, struct plan_item *item) {
    for (;;) {
        if (c->block == 0) {
            enter_batch(c, c->batch + 1);
            continue;
        }
        struct block b = block_at(c->plan, &c->extent, c->block - 1);
        int cut = b.n_pieces > 1;
        if (index < c->first_item + b.n_pieces) {
            int piece = (int)(index - c->first_item);
            *item = (struct plan_item){
                .batch = c->batch,
                .extent = c->extent,
                .row = b.row,
                .n_rows = b.n_rows,
                .n_pieces = b.n_pieces,
                .piece = piece,
                .key_begin = smaller(piece * b.piece_keys, b.n_keys),
                .key_end = smaller((piece + 1) * b.piece_keys, b.n_keys),
                .split = cut ? c->split : -1,
                .slot = c->slot,
            };
            return;
        }
        c->first_item += b.n_pieces;
        c->split += cut;
        c->slot += block_slots(c->plan, &b);
        c->block--;
    }
}
