/* SPDX-License-Identifier: Apache-2.0
 *
 * The plan: each visible (query, key) pair lies in exactly one piece, pieces meet the limits and
 * begin where kernels can begin, slots of cut blocks do not overlap, cut blocks are noted as a walk
 * meets them, and walks that skip blocks see the same as a walk over all.
 */
#include "test.h"

#include "../src/cpu/plan.h"

enum { MOST_BATCH = 200 };

struct layout {
    struct problem p;
    int32_t query_lengths[MOST_BATCH];
    int32_t key_lengths[MOST_BATCH];
};

static void random_layout(struct layout *l, struct rng *rng, int64_t most_query, int64_t most_key) {
    memset(l, 0, sizeof *l);
    struct problem *p = &l->p;
    p->sparse_mode = rng_below(rng, 3) ? 3 : 0;
    p->n_batch = rng_between(rng, 0, 9);
    p->query_packed = (int32_t)rng_below(rng, 2);
    p->key_packed = p->query_packed && rng_below(rng, 2);
    p->query_lengths = l->query_lengths;
    p->key_lengths = l->key_lengths;
    p->top_k = 1;
    int64_t query_sum = 0, key_sum = 0;
    for (int b = 0; b < p->n_batch; b++) {
        int64_t n_query = rng_below(rng, 5) ? rng_between(rng, 0, most_query) : 0;
        int64_t n_key = rng_below(rng, 5) ? rng_between(rng, 0, most_key) : 0;
        query_sum += n_query;
        key_sum += n_key;
        l->query_lengths[b] = (int32_t)(p->query_packed ? query_sum : n_query);
        l->key_lengths[b] = (int32_t)(p->key_packed ? key_sum : n_key);
    }
    p->n_query = p->query_packed ? query_sum + rng_between(rng, 0, 3) : most_query;
    p->n_key = p->key_packed ? key_sum : most_key;
}

/* How often each pair of a batch was scored. */
struct cover {
    unsigned char *count[MOST_BATCH];
    struct extent extent[MOST_BATCH];
};

static void cover_start(struct cover *c, const struct problem *p) {
    for (int b = 0; b < p->n_batch; b++) {
        c->extent[b] = lidx_extent(p, b);
        c->count[b] = calloc((size_t)(c->extent[b].n_query * c->extent[b].n_key) + 1, 1);
    }
}

static void cover_add(struct cover *c, const struct problem *p, const struct plan_block *block,
                      int piece) {
    const struct extent *e = &c->extent[block->batch];
    int64_t end = lidx_plan_key(block, piece + 1);
    for (int r = 0; r < block->n_rows; r++) {
        int64_t visible = lidx_visible(p, e, block->row + r);
        for (int64_t j = lidx_plan_key(block, piece); j < end && j < visible; j++)
            c->count[block->batch][(block->row + r) * e->n_key + j]++;
    }
}

static void cover_end(struct cover *c, const struct problem *p, const char *what) {
    int64_t missing = 0, twice = 0, hidden = 0;
    for (int b = 0; b < p->n_batch; b++) {
        const struct extent *e = &c->extent[b];
        for (int64_t i = 0; i < e->n_query; i++)
            for (int64_t j = 0; j < e->n_key; j++) {
                int seen = c->count[b][i * e->n_key + j];
                missing += seen == 0 && j < lidx_visible(p, e, i);
                twice += seen > 1;
                hidden += seen > 0 && j >= lidx_visible(p, e, i);
            }
        free(c->count[b]);
    }
    CHECK(missing == 0 && twice == 0 && hidden == 0,
          "%s: %lld pairs missing, %lld scored twice, %lld hidden ones scored", what,
          (long long)missing, (long long)twice, (long long)hidden);
}

static int same_block(const struct plan_block *a, const struct plan_block *b) {
    return a->batch == b->batch && a->extent.query_begin == b->extent.query_begin &&
           a->extent.key_begin == b->extent.key_begin && a->row == b->row &&
           a->n_keys == b->n_keys && a->piece_keys == b->piece_keys && a->n_rows == b->n_rows &&
           a->n_pieces == b->n_pieces && a->split == b->split && a->slot == b->slot;
}

static void check_pieces(const struct plan_block *block, const char *what) {
    CHECK_INT(lidx_plan_key(block, 0), 0, what);
    CHECK_INT(lidx_plan_key(block, block->n_pieces), block->n_keys, what);
    for (int i = 0; i < block->n_pieces; i++) {
        int64_t begin = lidx_plan_key(block, i);
        CHECK(begin < lidx_plan_key(block, i + 1) || block->n_keys == 0, "%s: an empty piece",
              what);
        CHECK(begin % PLAN_ALIGN == 0, "%s: a piece begins at key %lld", what, (long long)begin);
    }
}

static void check_block(const struct plan *plan, const struct plan_limits *limits,
                        const struct plan_block *block, int64_t *slot_owner, const char *what) {
    struct extent e = lidx_extent(plan->p, block->batch);
    CHECK(block->n_rows >= 1 && block->n_rows <= limits->rows && block->n_rows <= plan->rows,
          "%s: %d rows", what, block->n_rows);
    CHECK(block->row >= 0 && block->row + block->n_rows <= e.n_query, "%s: rows out of range",
          what);
    CHECK(block->n_keys >= 0 && block->n_keys <= e.n_key, "%s: keys out of range", what);
    CHECK((block->split >= 0) == (block->n_pieces > 1), "%s: split %lld with %d pieces", what,
          (long long)block->split, block->n_pieces);
    check_pieces(block, what);
    if (block->n_pieces == 1 || !CHECK(block->split < plan->n_splits, "%s: split %lld of %lld",
                                       what, (long long)block->split, (long long)plan->n_splits))
        return;
    CHECK(same_block(block, &plan->cut[block->split]), "%s: cut block %lld is noted otherwise",
          what, (long long)block->split);
    int members = block->n_pieces < limits->n_workers ? block->n_pieces : limits->n_workers;
    for (int i = 0; i < members * block->n_rows; i++) {
        int64_t slot = block->slot + i;
        if (CHECK(slot >= 0 && slot < plan->n_slots, "%s: slot %lld of %lld", what, (long long)slot,
                  (long long)plan->n_slots))
            CHECK(slot_owner[slot]++ == 0, "%s: slot %lld used twice", what, (long long)slot);
    }
}

static void check_plan(const struct problem *p, struct rng *rng, const char *what) {
    struct plan_limits limits = {(int)rng_between(rng, 1, 40), (int)rng_between(rng, 1, PLAN_ROWS),
                                 rng_below(rng, 4) ? rng_between(rng, 2, 400) : 0,
                                 (int)rng_between(rng, 1, 4), (int)rng_between(rng, 1, 100)};
    struct guard cut = guard_after(sizeof(struct plan_block) * (size_t)(limits.slots / 2));
    struct plan plan;
    struct plan_cursor all, some;
    struct cover cover;
    int64_t blocks = 0, pieces = 0, splits = 0;
    lidx_plan_build(&plan, p, &limits, (struct plan_block *)(void *)cut.data);
    int64_t *slot_owner = calloc((size_t)plan.n_slots + 1, sizeof *slot_owner);
    CHECK(plan.n_slots <= limits.slots, "%s: %lld slots of %lld", what, (long long)plan.n_slots,
          (long long)limits.slots);
    cover_start(&cover, p);
    lidx_plan_start(&all, &plan);
    lidx_plan_start(&some, &plan);
    for (int64_t i = 0; i < plan.n_blocks; i++) {
        struct plan_block block, again;
        lidx_plan_seek(&all, i, &block);
        check_block(&plan, &limits, &block, slot_owner, what);
        for (int piece = 0; piece < block.n_pieces; piece++)
            cover_add(&cover, p, &block, piece);
        pieces += block.n_pieces;
        splits += block.n_pieces > 1;
        if (rng_below(rng, 3) == 0) {
            lidx_plan_seek(&some, i, &again);
            CHECK(same_block(&block, &again), "%s: block %lld depends on the walk", what,
                  (long long)i);
        }
    }
    cover_end(&cover, p, what);
    for (int b = 0; b < p->n_batch; b++)
        blocks += (lidx_extent(p, b).n_query + plan.rows - 1) / plan.rows;
    CHECK_INT(plan.n_blocks, blocks, what);
    CHECK_INT(plan.n_pieces, pieces, what);
    CHECK_INT(plan.n_splits, splits, what);
    free(slot_owner);
    guard_free(&cut);
}

/* Decode: a token for each batch, so that blocks are found without a walk, cut or not. */
static void check_decode(struct rng *rng) {
    int32_t query_lengths[MOST_BATCH], key_lengths[MOST_BATCH];
    int64_t n_batch = rng_between(rng, 1, MOST_BATCH), most_key = rng_below(rng, 2) ? 3000 : 300;
    struct problem p = {.n_batch = n_batch,
                        .n_query = n_batch,
                        .n_key = most_key,
                        .query_packed = 1,
                        .sparse_mode = 3,
                        .query_lengths = query_lengths,
                        .key_lengths = key_lengths};
    for (int b = 0; b < n_batch; b++) {
        query_lengths[b] = b + 1;
        key_lengths[b] = (int32_t)rng_between(rng, 0, rng_below(rng, 9) ? 300 : most_key);
    }
    check_plan(&p, rng, "decode");
}

/* Rows without keys still need a block, which writes their -1. */
static void check_empty_rows(void) {
    struct rng rng = rng_seed(3);
    struct layout l;
    random_layout(&l, &rng, 8, 0);
    l.p.n_batch = 3;
    l.p.query_packed = l.p.key_packed = 0;
    l.p.n_query = 8;
    for (int b = 0; b < 3; b++) {
        l.query_lengths[b] = 8;
        l.key_lengths[b] = 0;
    }
    check_plan(&l.p, &rng, "rows without keys");
}

/* Sizes near the limits of the interface: arithmetic only, nothing is scored. */
static void check_large(void) {
    const struct plan_limits limits = {1024, PLAN_ROWS, 4096, 4, 100};
    int32_t query_length = 1, key_length = INT32_MAX;
    struct problem p = {.n_batch = 1,
                        .n_query = 1,
                        .n_key = INT32_MAX,
                        .sparse_mode = 3,
                        .query_lengths = &query_length,
                        .key_lengths = &key_length};
    static struct plan_block cut[2048];
    struct plan plan;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK(plan.n_pieces >= 1024, "a row of 2^31 - 1 keys makes %lld pieces",
          (long long)plan.n_pieces);
    CHECK_INT(plan.n_splits, 1, "a cut row");
    check_pieces(&cut[0], "a row of 2^31 - 1 keys");
    p.sparse_mode = 0;
    p.n_query = query_length = 1 << 20;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK(plan.n_blocks >= (1 << 20) / PLAN_ROWS, "2^20 rows make %lld blocks",
          (long long)plan.n_blocks);
}

/* Threads are woken for as much work as is worth it, and for nothing that one piece holds. */
static void check_workers(void) {
    struct plan_limits limits = {16, PLAN_ROWS, 4096, 1, 100};
    int32_t query_length = 4, key_length = 50;
    struct problem p = {.n_batch = 1,
                        .n_query = 4096,
                        .n_key = 1 << 20,
                        .sparse_mode = 0,
                        .query_lengths = &query_length,
                        .key_lengths = &key_length};
    static struct plan_block cut[2048];
    struct plan plan;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 1, "threads for 4 x 50 keys");
    CHECK_INT(plan.n_splits, 0, "blocks cut of 4 x 50 keys");
    limits.keys_per_us = 1;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 16, "threads for 4 x 50 slow keys");
    limits.keys_per_us = 100;
    query_length = 4096, key_length = 0;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 16, "threads for many rows without keys");
    query_length = 1, key_length = 1 << 20;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 16, "threads for 2^20 keys");
    limits.n_workers = 1;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 1, "threads where there is one");
    CHECK_INT(plan.n_pieces, 1, "pieces for one thread");
    limits.n_workers = 16;
    limits.slots = 0;
    lidx_plan_build(&plan, &p, &limits, cut);
    CHECK_INT(plan.n_workers, 1, "threads for a piece that cannot be cut");
}

/* Several blocks are taken at once where they are many, and not so many that some wait for one. */
static void check_blocks_at_once(void) {
    enum { TOKENS = 4 * 64 * 16 };
    const struct plan_limits limits = {16, PLAN_ROWS, 4096, 1, 100};
    struct problem p = {.n_batch = 1, .n_key = 3, .sparse_mode = 0};
    int32_t query_lengths[TOKENS], key_lengths[TOKENS];
    static struct plan_block cut[2048];
    struct plan plan;
    for (int b = 0; b < TOKENS; b++)
        query_lengths[b] = 1, key_lengths[b] = 3;
    p.query_lengths = query_lengths, p.key_lengths = key_lengths;
    for (p.n_batch = 1; p.n_batch <= TOKENS; p.n_batch *= 2) {
        p.n_query = p.n_batch;
        lidx_plan_build(&plan, &p, &limits, cut);
        CHECK_INT(plan.blocks_at_once, p.n_batch < TOKENS / 2 ? 1 : p.n_batch / (TOKENS / 4),
                  "blocks taken at once");
    }
}

int main(void) {
    const char *text = getenv("LIDX_TEST_CASES");
    long cases = text ? atol(text) : 2000;
    for (long c = 0; c < cases; c++) {
        struct rng rng = rng_seed((uint64_t)c + 1);
        struct layout l;
        char what[64];
        int64_t most_key = rng_below(&rng, 2) ? 3000 : 100;
        random_layout(&l, &rng, rng_below(&rng, 2) ? 40 : 1, most_key);
        snprintf(what, sizeof what, "plan %ld", c);
        check_plan(&l.p, &rng, what);
        if (c % 10 == 0)
            check_decode(&rng);
    }
    check_empty_rows();
    check_large();
    check_workers();
    check_blocks_at_once();
    return test_end();
}
