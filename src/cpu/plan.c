/* SPDX-License-Identifier: Apache-2.0 */
#include "plan.h"

enum {
    BLOCKS_PER_WORKER = 8,  /* where there are as many tokens */
    PIECES_PER_WORKER = 64, /* cores differ in speed, and late ones shall not be waited for */
    PIECE_KEYS = 240,       /* fewer at a time cost the kernels more than balance brings ... */
    PIECE_ROW_KEYS = 96,    /* ... but with one row, where all threads end at once */
    BLOCKS_AT_ONCE = 8,     /* most; a thread that reads on in memory has it fetched ahead */
    SERIAL_US = 10,         /* what one thread does so soon is not worth waking others for */
    ROW_US = 1,             /* what a row takes besides its keys */
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

/* What one walk over all batches finds out. */
struct sums {
    int64_t rows;       /* tokens, ... */
    int64_t tokens;     /* ... with at least one key to score */
    int64_t work;       /* keys x rows */
    int64_t batches;    /* that have tokens */
    int64_t most_query; /* tokens of a batch */
    int64_t most_work;  /* keys x rows of a block, were it of PLAN_ROWS rows */
};

static struct sums measure(const struct problem *p) {
    struct sums s = {0};
    for (int64_t b = 0; b < p->n_batch; b++) {
        struct extent e = lidx_extent(p, b);
        int64_t last = e.n_query ? lidx_visible(p, &e, e.n_query - 1) : 0;
        int64_t first = e.n_query ? lidx_visible(p, &e, 0) : 0;
        s.rows += e.n_query;
        s.tokens += last ? e.n_query : 0;
        s.work += (first + last) * smaller(e.n_query, last - first + 1) / 2 +
                  (p->sparse_mode == 0 && e.n_query > 1 ? last * (e.n_query - 1) : 0);
        s.batches += e.n_query > 0;
        s.most_query = larger(s.most_query, e.n_query);
        s.most_work = larger(s.most_work, last * smaller(e.n_query, PLAN_ROWS));
    }
    return s;
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
    const struct sums all = measure(p);
    const int64_t serial_us = all.rows * ROW_US + all.work / limits->keys_per_us;
    const int64_t workers = serial_us > SERIAL_US ? limits->n_workers : 1;
    int64_t rows = larger(all.tokens / (BLOCKS_PER_WORKER * workers), limits->rows_wanted);
    plan->p = p;
    plan->cut = cut;
    plan->rows = (int)smaller(rows, limits->rows);
    plan->n_workers = (int)workers;
    plan->n_blocks = all.most_query <= plan->rows ? all.batches : count_blocks(plan);
    /* On average as much work as a piece. */
    plan->blocks_at_once =
        larger(1, smaller(plan->n_blocks / (PIECES_PER_WORKER * workers), BLOCKS_AT_ONCE));
    plan->piece_work = INT64_MAX / 2;
    if (workers > 1)
        plan->piece_work =
            larger(all.work / (PIECES_PER_WORKER * workers),
                   all.tokens == 1 ? PIECE_ROW_KEYS : PIECE_KEYS * smaller(plan->rows, all.tokens));
    plan->n_pieces = plan->n_blocks;
    plan->n_slots = plan->n_splits = plan->block_is_batch = 0;
    /* With piece_work above all work nothing is cut and no slot is needed, so this ends. */
    if (all.most_work > plan->piece_work)
        for (count(plan, limits->slots / 2); plan->n_slots > limits->slots;
             count(plan, limits->slots / 2))
            plan->piece_work *= 2;
    if (plan->n_pieces <= 1)
        plan->n_workers = 1;
    plan->block_is_batch = all.batches == p->n_batch && all.most_query <= plan->rows;
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

/* The one block of a batch, without a walk. */
static void find_block(const struct plan *plan, int64_t batch, struct plan_block *block) {
    const struct extent e = lidx_extent(plan->p, batch);
    measure_block(block, plan, &e, 0);
    block->batch = batch;
    block->split = -1;
    block->slot = 0;
    if (block->n_pieces == 1)
        return;
    int64_t low = 0;
    for (int64_t n = plan->n_splits; n > 1;) {
        int64_t half = n / 2;
        low += plan->cut[low + half].batch <= batch ? half : 0;
        n -= half;
    }
    *block = plan->cut[low];
}

void lidx_plan_seek(struct plan_cursor *c, int64_t index, struct plan_block *block) {
    if (c->plan->block_is_batch) {
        find_block(c->plan, index, block);
        return;
    }
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
