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

/* The rows, keys and pieces of a batch's block `index`, counted from its first token on. */
static void measure_block(struct plan_block *b, const struct plan *plan, const struct extent *e,
                          int64_t index) {
    b->extent = *e;
    b->row = index * plan->rows;
    b->n_rows = (int)smaller(plan->rows, e->n_query - b->row);
    b->n_keys = lidx_visible(plan->p, e, b->row + b->n_rows - 1);
    b->n_pieces = 1;
    b->piece_keys = b->n_keys;
    int64_t work = b->n_keys * b->n_rows;
    if (work > plan->piece_work) {
        int64_t keys = divide_up(b->n_keys, divide_up(work, plan->piece_work));
        b->piece_keys = divide_up(keys, PLAN_ALIGN) * PLAN_ALIGN;
        b->n_pieces = (int)divide_up(b->n_keys, b->piece_keys);
    }
}

static int64_t block_slots(const struct plan *plan, const struct plan_block *b) {
    return b->n_pieces > 1 ? smaller(b->n_pieces, plan->n_workers) * b->n_rows : 0;
}

static int64_t block_count(const struct plan *plan, const struct extent *e) {
    return e->n_query > plan->rows ? divide_up(e->n_query, plan->rows) : e->n_query > 0;
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

/* Walks over all blocks; notes those that are cut as long as there is room. */
static void count(struct plan *plan, int64_t room) {
    struct plan_cursor cursor;
    struct plan_block block;
    plan->n_pieces = plan->n_slots = plan->n_splits = 0;
    lidx_plan_start(&cursor, plan);
    for (int64_t i = 0; i < plan->n_blocks; i++) {
        lidx_plan_seek(&cursor, i, &block);
        plan->n_pieces += block.n_pieces;
        if (block.n_pieces > 1 && plan->n_splits < room)
            plan->cut[plan->n_splits] = block;
        plan->n_splits += block.n_pieces > 1;
        plan->n_slots += block_slots(plan, &block);
    }
}

static int64_t count_blocks(const struct plan *plan) {
    int64_t blocks = 0;
    for (int64_t b = 0; b < plan->p->n_batch; b++) {
        struct extent e = lidx_extent(plan->p, b);
        blocks += block_count(plan, &e);
    }
    return blocks;
}

void lidx_plan_build(struct plan *plan, const struct problem *p, const struct plan_limits *limits,
                     struct plan_block *cut) {
    int64_t tokens, work, workers = limits->n_workers;
    measure(p, &tokens, &work);
    int64_t rows = larger(tokens / (BLOCKS_PER_WORKER * workers), limits->rows_wanted);
    plan->p = p;
    plan->cut = cut;
    plan->rows = (int)smaller(rows, limits->rows);
    plan->n_workers = limits->n_workers;
    plan->n_blocks = count_blocks(plan);
    plan->piece_work = INT64_MAX / 2;
    if (workers > 1 && work > SERIAL_WORK)
        plan->piece_work =
            larger(work / (PIECES_PER_WORKER * workers),
                   tokens == 1 ? PIECE_ROW_KEYS : PIECE_KEYS * smaller(plan->rows, tokens));
    /* With piece_work above all work nothing is cut and no slot is needed, so this ends. */
    for (count(plan, limits->slots / 2); plan->n_slots > limits->slots;
         count(plan, limits->slots / 2))
        plan->piece_work *= 2;
}

static void enter_batch(struct plan_cursor *c, int64_t batch) {
    c->batch = batch;
    c->left = 0;
    if (batch < c->plan->p->n_batch) {
        c->extent = lidx_extent(c->plan->p, batch);
        c->left = block_count(c->plan, &c->extent);
    }
}

void lidx_plan_start(struct plan_cursor *cursor, const struct plan *plan) {
    *cursor = (struct plan_cursor){.plan = plan};
    enter_batch(cursor, 0);
}

void lidx_plan_seek(struct plan_cursor *c, int64_t index, struct plan_block *block) {
    do {
        while (c->left == 0)
            enter_batch(c, c->batch + 1);
        c->left--;
        measure_block(block, c->plan, &c->extent, c->left);
        int is_cut = block->n_pieces > 1;
        block->batch = c->batch;
        block->split = is_cut ? c->split : -1;
        block->slot = c->slot;
        c->split += is_cut;
        c->slot += block_slots(c->plan, block);
    } while (c->index++ < index);
}
