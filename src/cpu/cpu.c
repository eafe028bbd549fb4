/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU backend: OpenMP threads take the plan's blocks, call one kernel, keep the k best of each
 * row and write them. A thread that finds no block left joins one that others are at: cores differ
 * in speed and come late. All memory comes from one allocation made with the context.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

#include "../backend.h"
#include "../dtype.h"
#include "../error.h"
#include "environment.h"
#include "features.h"
#include "kernels.h"
#include "plan.h"
#include "topk.h"

enum {
    TILE_KEYS = 960,  /* keys of one score() call: 60 key blocks, 20 tiles of 48, 240 KiB */
    AHEAD_KEYS = 384, /* how far ahead of a tile a kernel may prefetch */
    LIST_BLOCKS = (TILE_KEYS + AHEAD_KEYS) / KEY_BLOCK,
    ROW_BYTES = 3 << 19,  /* of a worker, for packed queries and candidates: 1.5 MiB */
    SLOT_BYTES = 9 << 18, /* of a worker, for what it brings to blocks of many: 2.25 MiB */
    WORKER_BYTES = ROW_BYTES + SLOT_BYTES,
    SPLITS_PER_WORKER = 64, /* cut blocks; each has at least two pieces and so two slots */
    SLOTS_PER_WORKER = 2 * SPLITS_PER_WORKER,
};

/* A cut block. Workers that take its pieces each keep one selection over all of theirs; these meet
 * when the last piece is done. All 0 when a run begins. */
struct split {
    /* For each row an entry that k entries reach, or 0. What is below it need not be looked at. It
     * only saves work; the answer is the same without. */
    _Atomic uint64_t bound[PLAN_ROWS];
    _Atomic int32_t taken;  /* pieces */
    _Atomic int32_t joined; /* workers that have left their selection in a slot */
    _Atomic int32_t done;   /* pieces in slots */
};

struct cpu {
    const struct kernel *kernel;
    unsigned char *memory; /* n_workers x ROW_BYTES, then the slots */
    struct split *splits;
    int n_workers;
};

/* What a worker holds of one row of its block. */
struct row {
    void *packed;
    struct topk topk;
    int64_t visible;
};

struct run {
    const struct cpu *cpu;
    const struct problem *p;
    const struct kernel_path *path;
    const struct topk_loops *loops;
    struct plan plan;
    size_t packed_bytes;
    size_t entry_bytes;
    unsigned char *slots;
    size_t slot_bytes;
    _Atomic int64_t next_item;
};

struct worker {
    struct run *run;
    struct row row[PLAN_ROWS];
    const void *list[LIST_BLOCKS];
    _Alignas(64) float score[2][TILE_KEYS]; /* of two rows where the kernel takes two at once */
    float weights[MAX_HEADS];
};

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static int count_workers(int asked) {
#ifdef _OPENMP
    int n = asked ? asked : omp_get_max_threads();
    return n < LIDX_MAX_THREADS ? n : LIDX_MAX_THREADS;
#else
    (void)asked;
    return 1;
#endif
}

static void cpu_destroy(void *state) {
    struct cpu *cpu = state;
    free(cpu->memory);
    free(cpu->splits);
    free(cpu);
}

static int cpu_create(void **state, const struct lidx_options *options) {
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for the CPU's part of a context");
    cpu->n_workers = count_workers(options->n_threads);
    const struct kernel *forced = options->kernel ? lidx_kernel_choose(options->kernel) : NULL;
    cpu->kernel = forced ? forced : lidx_kernel_choose(NULL);
    size_t bytes = (size_t)cpu->n_workers * WORKER_BYTES;
    cpu->memory = aligned_alloc(4096, bytes);
    cpu->splits = calloc((size_t)cpu->n_workers * SPLITS_PER_WORKER, sizeof *cpu->splits);
    if (!cpu->memory || !cpu->splits) {
        int n = cpu->n_workers;
        cpu_destroy(cpu);
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for %d threads of %d bytes", n, WORKER_BYTES);
    }
    *state = cpu;
    return LIDX_OK;
}

static int cpu_workspace_size(void *state, const struct problem *p, int32_t device_id,
                              size_t *bytes) {
    (void)state;
    (void)p;
    (void)device_id;
    *bytes = 0;
    return LIDX_OK;
}

static const unsigned char *offset(const void *base, int64_t bytes) {
    return (const unsigned char *)base + bytes;
}

static const unsigned char *query_at(const struct problem *p, int64_t batch, int64_t row) {
    int64_t row_bytes = (int64_t)p->n_heads * p->head_dim * lidx_dtype_bytes(p->dtype);
    return offset(p->query, batch * p->query_batch_stride + row * row_bytes);
}

static const unsigned char *weights_at(const struct problem *p, int64_t batch, int64_t row) {
    int64_t row_bytes = (int64_t)p->n_heads * lidx_dtype_bytes(p->weights_dtype);
    return offset(p->weights, batch * p->weights_batch_stride + row * row_bytes);
}

/* The keys of a batch from `key` on; *n of them lie in a row, or more. */
static const unsigned char *keys_at(const struct problem *p, const struct extent *e, int64_t batch,
                                    int64_t key, int64_t *n) {
    int64_t row_bytes = (int64_t)p->head_dim * lidx_dtype_bytes(p->dtype);
    if (!p->page_size) {
        *n = INT64_MAX;
        return offset(p->key, batch * p->key_batch_stride + (e->key_begin + key) * row_bytes);
    }
    const void *table = offset(p->page_table, batch * p->page_table_stride);
    int64_t index = key / p->page_size, from = key - index * p->page_size;
    *n = p->page_size - from;
    int64_t page = ((const int32_t *)table)[index];
    return offset(p->key, page * p->key_batch_stride + from * row_bytes);
}

/* The scores of a row's entries, then -inf. */
static void write_values(void *values, int dtype, const uint64_t *entry, int n, int top_k) {
    if (dtype == DTYPE_F32) { /* without a branch an element */
        float *to = values;
        for (int i = 0; i < n; i++)
            to[i] = lidx_topk_score(entry[i]);
    } else {
        for (int i = 0; i < n; i++)
            lidx_store(values, i, dtype, lidx_topk_score(entry[i]));
    }
    for (int i = n; i < top_k; i++)
        lidx_store(values, i, dtype, -__builtin_inff());
}

/* Writes a row: the sorted entries, then -1 and -inf. */
static void write_row(const struct problem *p, int64_t batch, int64_t row, const uint64_t *entry,
                      int n) {
    int32_t *indices =
        (int32_t *)((unsigned char *)p->indices + batch * p->indices_batch_stride) + row * p->top_k;
    for (int i = 0; i < n; i++)
        indices[i] = lidx_topk_position(entry[i]);
    memset(indices + n, 0xFF, sizeof *indices * (size_t)(p->top_k - n)); /* -1 */
    if (p->values)
        write_values((unsigned char *)p->values + batch * p->values_batch_stride +
                         row * p->top_k * lidx_dtype_bytes(p->values_dtype),
                     p->values_dtype, entry, n, p->top_k);
}

/* Rows of a batch past its real length. */
static void write_empty_rows(const struct problem *p, int64_t batch) {
    struct extent e = lidx_extent(p, batch);
    for (int64_t i = e.n_query; i < e.n_slots; i++)
        write_row(p, batch, e.query_begin + i, NULL, 0);
}

/* Rows of a packed query past the last batch. */
static void write_rows_past_end(const struct problem *p) {
    if (!p->query_packed)
        return;
    int64_t end = 0;
    if (p->n_batch) {
        struct extent last = lidx_extent(p, p->n_batch - 1);
        end = last.query_begin + last.n_query;
    }
    for (int64_t i = end; i < p->n_query; i++)
        write_row(p, 0, i, NULL, 0);
}

static struct split *split_of(const struct worker *w, const struct plan_item *item) {
    return &w->run->cpu->splits[item->split];
}

/* What other pieces of the row have found out; 0 is no bound. */
static uint64_t known_threshold(const struct worker *w, const struct plan_item *item, int r) {
    if (item->n_pieces == 1)
        return 0;
    uint64_t bound = atomic_load_explicit(&split_of(w, item)->bound[r], memory_order_relaxed);
    return bound ? bound - 1 : 0;
}

static void publish_bound(const struct worker *w, const struct plan_item *item, int r,
                          uint64_t bound) {
    _Atomic uint64_t *shared = &split_of(w, item)->bound[r];
    uint64_t known = atomic_load_explicit(shared, memory_order_relaxed);
    while (known < bound && !atomic_compare_exchange_weak_explicit(
                                shared, &known, bound, memory_order_relaxed, memory_order_relaxed))
        continue;
}

/* After a piece: what this worker knows, and what others have found out meanwhile. */
static void share_thresholds(struct worker *w, const struct plan_item *item) {
    for (int r = 0; r < item->n_rows; r++) {
        struct topk *t = &w->row[r].topk;
        uint64_t known = known_threshold(w, item, r);
        if (known > t->threshold)
            t->threshold = known;
        else if (t->threshold > known)
            publish_bound(w, item, r, t->threshold + 1);
    }
}

static void load_rows(struct worker *w, const struct plan_item *item) {
    const struct problem *p = w->run->p;
    for (int r = 0; r < item->n_rows; r++) {
        int64_t row = item->extent.query_begin + item->row + r;
        const void *weights = weights_at(p, item->batch, row);
        for (int h = 0; h < p->n_heads; h++)
            w->weights[h] = lidx_load(weights, h, p->weights_dtype);
        const struct query_row query = {query_at(p, item->batch, row), w->weights, p->n_heads,
                                        p->head_dim};
        w->run->path->pack(w->row[r].packed, &query);
        w->row[r].visible = lidx_visible(p, &item->extent, item->row + r);
        lidx_topk_reset(&w->row[r].topk, p->top_k, w->row[r].topk.entry, w->run->loops);
        w->row[r].topk.threshold = known_threshold(w, item, r);
    }
}

/* Lists the key blocks of [begin, end) and, for prefetch, of what follows; returns how many
 * follow. */
static int list_blocks(struct worker *w, const struct plan_item *item, int64_t begin, int64_t end) {
    const struct problem *p = w->run->p;
    int64_t limit = item->key_end < end + AHEAD_KEYS ? item->key_end : end + AHEAD_KEYS;
    int64_t block_bytes = (int64_t)KEY_BLOCK * p->head_dim * lidx_dtype_bytes(p->dtype);
    int n = 0;
    for (int64_t key = begin, in_row; key < limit; key += in_row) {
        const unsigned char *block = keys_at(p, &item->extent, item->batch, key, &in_row);
        in_row = in_row < limit - key ? in_row : limit - key;
        for (int64_t i = 0; i < in_row; i += KEY_BLOCK, block += block_bytes)
            w->list[n++] = block;
    }
    return (int)((limit - end + KEY_BLOCK - 1) / KEY_BLOCK);
}

/* Fetches the first line of each page of [begin, end), so that the kernel finds the translations of
 * their addresses. Scattered pages miss the TLB each, and the core waits for one miss after the
 * other unless they are asked for together. */
static void touch_pages(struct worker *w, const struct plan_item *item, int64_t begin,
                        int64_t end) {
    if (!w->run->p->page_size)
        return;
    end = item->key_end < end ? item->key_end : end;
    for (int64_t key = begin, in_row; key < end; key += in_row)
        __builtin_prefetch(keys_at(w->run->p, &item->extent, item->batch, key, &in_row));
}

/* How many keys of [begin, end) a row sees. */
static int keys_seen(const struct row *row, int64_t begin, int64_t end) {
    int64_t n = (row->visible < end ? row->visible : end) - begin;
    return n > 0 ? (int)n : 0;
}

/* Scores the n keys of a run for one or two rows that see them all, and pushes the scores. */
static void score_rows(struct worker *w, int r, int n_rows, const struct key_run *keys,
                       int64_t begin) {
    const struct problem *p = w->run->p;
    if (n_rows == 2) {
        float *const score[2] = {w->score[0], w->score[1]};
        const void *const packed[2] = {w->row[r].packed, w->row[r + 1].packed};
        w->run->cpu->kernel->score_two[p->dtype](score, packed, p->n_heads, p->head_dim, keys);
    } else {
        w->run->path->score(w->score[0], w->row[r].packed, p->n_heads, p->head_dim, keys);
    }
    for (int i = 0; i < n_rows; i++)
        lidx_topk_push(&w->row[r + i].topk, w->score[i], keys->n_keys, begin);
}

/* Scores the item's keys for each of its rows, a tile of keys at a time: the tile stays in cache
 * while the rows pass over it. */
static void score_item(struct worker *w, const struct plan_item *item) {
    const struct problem *p = w->run->p;
    int row_stride = p->head_dim * lidx_dtype_bytes(p->dtype);
    int two_at_once = w->run->cpu->kernel->score_two[p->dtype] != NULL;
    touch_pages(w, item, item->key_begin, item->key_begin + TILE_KEYS);
    for (int64_t begin = item->key_begin; begin < item->key_end; begin += TILE_KEYS) {
        int64_t end = begin + TILE_KEYS < item->key_end ? begin + TILE_KEYS : item->key_end;
        touch_pages(w, item, end, end + TILE_KEYS);
        int ahead = list_blocks(w, item, begin, end);
        for (int r = 0, rows; r < item->n_rows; r += rows) {
            int n = keys_seen(&w->row[r], begin, end);
            rows = two_at_once && r + 1 < item->n_rows &&
                           keys_seen(&w->row[r + 1], begin, end) == n
                       ? 2
                       : 1;
            /* What comes next is fetched once, while the last row, which sees it all, passes. */
            int is_last = r + rows == item->n_rows;
            const struct key_run keys = {w->list, row_stride, n, is_last ? ahead : 0};
            if (n > 0)
                score_rows(w, r, rows, &keys, begin);
        }
    }
}

/* One row of one worker's pieces: up to k entries, best first, and a 0. */
struct slot {
    int32_t n;
    int32_t share; /* of k: as the worker's keys are to all */
    uint64_t entry[];
};

static struct slot *slot_at(const struct run *run, const struct plan_item *block, int member,
                            int r) {
    int64_t index = block->slot + (int64_t)member * block->n_rows + r;
    return (struct slot *)(void *)(run->slots + (size_t)index * run->slot_bytes);
}

static void store_selections(struct worker *w, const struct plan_item *block, int64_t n_keys) {
    int64_t all = lidx_visible(w->run->p, &block->extent, block->row + block->n_rows - 1);
    int member = atomic_fetch_add_explicit(&split_of(w, block)->joined, 1, memory_order_relaxed);
    for (int r = 0; r < block->n_rows; r++) {
        struct topk *t = &w->row[r].topk;
        struct slot *slot = slot_at(w->run, block, member, r);
        lidx_topk_sort(t);
        if (t->n == t->k)
            publish_bound(w, block, r, t->entry[t->k - 1]);
        slot->n = t->n;
        slot->share = (int32_t)((n_keys * t->k + all - 1) / all);
        memcpy(slot->entry, t->entry, sizeof *t->entry * (size_t)t->n);
        slot->entry[t->n] = 0;
    }
}

/* An entry that k entries of all slots together reach, or 0: each vouches for its share of k. Where
 * scores do not depend on the place, few more than k reach it. */
static uint64_t common_bound(const struct worker *w, const struct plan_item *block, int members,
                             int r) {
    uint64_t bound = UINT64_MAX;
    for (int m = 0; m < members; m++) {
        const struct slot *slot = slot_at(w->run, block, m, r);
        uint64_t reached = slot->n < slot->share ? 0 : slot->entry[slot->share - 1];
        bound = reached < bound ? reached : bound;
    }
    return bound;
}

/* The best of the slots, in order, to the row's buffer; two lists are merged, more are sorted. */
static void gather_row(struct worker *w, const struct plan_item *block, int members, int r) {
    struct topk *t = &w->row[r].topk;
    if (members == 2) {
        const struct slot *a = slot_at(w->run, block, 0, r), *b = slot_at(w->run, block, 1, r);
        t->n = lidx_topk_merge(t->entry, t->k, a->entry, a->n, b->entry, b->n);
        return;
    }
    uint64_t bound = common_bound(w, block, members, r);
    lidx_topk_reset(t, t->k, t->entry, w->run->loops);
    t->threshold = known_threshold(w, block, r);
    if (bound > t->threshold)
        t->threshold = bound - 1;
    for (int m = 0; m < members; m++) {
        const struct slot *slot = slot_at(w->run, block, m, r);
        lidx_topk_add(t, slot->entry, slot->n);
    }
    lidx_topk_sort(t);
}

static void write_block_row(struct worker *w, const struct plan_item *block, int r) {
    const struct topk *t = &w->row[r].topk;
    write_row(w->run->p, block->batch, block->extent.query_begin + block->row + r, t->entry, t->n);
}

static void finish_block(struct worker *w, const struct plan_item *block) {
    for (int r = 0; r < block->n_rows; r++) {
        lidx_topk_sort(&w->row[r].topk);
        write_block_row(w, block, r);
    }
}

static void gather_selections(struct worker *w, const struct plan_item *block) {
    int members = atomic_load_explicit(&split_of(w, block)->joined, memory_order_relaxed);
    for (int r = 0; r < block->n_rows; r++) {
        gather_row(w, block, members, r);
        write_block_row(w, block, r);
    }
}

/* Whether these pieces are the last of the block to be done. */
static int is_last(struct worker *w, const struct plan_item *block, int n_pieces) {
    _Atomic int32_t *done = &split_of(w, block)->done;
    return atomic_fetch_add_explicit(done, n_pieces, memory_order_acq_rel) + n_pieces ==
           block->n_pieces;
}

/* Takes pieces of a cut block in a row: half of an equal share of those that are left, so that
 * runs are long at first and short in the end, but never so many that others could end long before
 * this worker. Returns how many. */
static int take_run(const struct worker *w, const struct plan_item *block, int sharers,
                    int32_t *first) {
    _Atomic int32_t *taken = &split_of(w, block)->taken;
    int64_t most = w->run->plan.n_items / (8 * (int64_t)w->run->cpu->n_workers);
    int32_t n;
    *first = atomic_load_explicit(taken, memory_order_relaxed);
    do {
        int32_t left = block->n_pieces - *first;
        if (left <= 0)
            return 0;
        n = left / (2 * sharers);
        n = n > most ? (int32_t)most : n;
        n = n > 1 ? n : 1;
    } while (!atomic_compare_exchange_weak_explicit(taken, first, *first + n, memory_order_relaxed,
                                                    memory_order_relaxed));
    return n;
}

/* Takes pieces of a cut block, whose first item is `first`, as long as there are any; about
 * `sharers` workers are to be expected there. Nobody waits: the worker that is done last brings the
 * selections together. */
static void take_pieces(struct worker *w, struct plan_cursor *cursor, int64_t first,
                        const struct plan_item *block, int sharers) {
    int64_t n_keys = 0;
    int n_pieces = 0, n;
    int32_t piece;
    while ((n = take_run(w, block, sharers, &piece)) > 0) {
        struct plan_item item, last;
        lidx_plan_seek(cursor, first + piece, &item);
        lidx_plan_seek(cursor, first + piece + n - 1, &last);
        item.key_end = last.key_end;
        if (n_pieces == 0)
            load_rows(w, &item);
        score_item(w, &item);
        share_thresholds(w, &item);
        n_keys += item.key_end - item.key_begin;
        n_pieces += n;
    }
    if (n_pieces == 0)
        return;
    if (n_pieces == block->n_pieces) {
        finish_block(w, block);
        return;
    }
    store_selections(w, block, n_keys);
    if (is_last(w, block, n_pieces))
        gather_selections(w, block);
}

static void assign_memory(struct worker *w, struct run *run, int index) {
    unsigned char *memory = run->cpu->memory + (size_t)index * ROW_BYTES;
    w->run = run;
    for (int r = 0; r < run->plan.rows; r++) {
        w->row[r].packed = memory;
        memory += run->packed_bytes;
        w->row[r].topk.entry = (uint64_t *)(void *)memory;
        memory += run->entry_bytes;
    }
}

/* Takes blocks that nobody has begun, each with all its items. */
static void take_blocks(struct worker *w) {
    struct run *run = w->run;
    struct plan_cursor cursor;
    int sharers = run->cpu->n_workers / (int)(run->plan.n_splits ? run->plan.n_splits : 1);
    int64_t i = atomic_load_explicit(&run->next_item, memory_order_relaxed);
    lidx_plan_start(&cursor, &run->plan);
    while (i < run->plan.n_items) {
        struct plan_item block;
        lidx_plan_seek(&cursor, i, &block);
        if (!atomic_compare_exchange_weak_explicit(&run->next_item, &i, i + block.n_pieces,
                                                   memory_order_relaxed, memory_order_relaxed))
            continue;
        if (block.n_pieces > 1) {
            take_pieces(w, &cursor, i, &block, sharers ? sharers : 1);
        } else {
            load_rows(w, &block);
            score_item(w, &block);
            finish_block(w, &block);
        }
        i = atomic_load_explicit(&run->next_item, memory_order_relaxed);
    }
}

/* The first item of the block with most pieces to take, or -1. */
static int64_t find_pieces(const struct worker *w) {
    const struct plan *plan = &w->run->plan;
    struct plan_cursor cursor;
    struct plan_item block;
    int64_t found = -1;
    int most = 0;
    lidx_plan_start(&cursor, plan);
    for (int64_t i = 0; i < plan->n_items; i += block.n_pieces) {
        lidx_plan_seek(&cursor, i, &block);
        if (block.n_pieces == 1)
            continue;
        int left = block.n_pieces -
                   atomic_load_explicit(&split_of(w, &block)->taken, memory_order_relaxed);
        if (left > most) {
            most = left;
            found = i;
        }
    }
    return found;
}

static void help_others(struct worker *w) {
    int64_t first;
    while (w->run->plan.n_splits && (first = find_pieces(w)) >= 0) {
        struct plan_cursor cursor;
        struct plan_item block;
        lidx_plan_start(&cursor, &w->run->plan);
        lidx_plan_seek(&cursor, first, &block);
        take_pieces(w, &cursor, first, &block, w->run->cpu->n_workers);
    }
}

/* What one thread does. The caller's rounding mode and flush-to-zero bits hold for its own thread
 * only, so every thread works in the default environment: bits must not depend on who works. */
static void work(struct run *run, int index, int n_threads) {
    struct worker w;
    const struct kernel *kernel = run->cpu->kernel;
    const struct float_environment callers = lidx_enter_default_environment();
    assign_memory(&w, run, index);
    if (kernel->enter)
        kernel->enter();
    take_blocks(&w);
    help_others(&w);
    if (kernel->leave)
        kernel->leave();
    lidx_leave_default_environment(&callers);
    for (int64_t b = index; b < run->p->n_batch; b += n_threads)
        write_empty_rows(run->p, b);
    if (index == 0)
        write_rows_past_end(run->p);
}

static void prepare_run(struct run *run, const struct cpu *cpu, const struct problem *p) {
    run->cpu = cpu;
    run->p = p;
    run->path = &cpu->kernel->path[p->dtype];
    run->loops = cpu->kernel->topk ? cpu->kernel->topk : &lidx_topk_portable;
    run->packed_bytes = round_up(run->path->packed_size(p->n_heads, p->head_dim), 64);
    run->entry_bytes = round_up(sizeof(uint64_t) * (size_t)lidx_topk_capacity(p->top_k), 64);
    run->slots = cpu->memory + (size_t)cpu->n_workers * ROW_BYTES;
    run->slot_bytes = sizeof(struct slot) + sizeof(uint64_t) * (size_t)(p->top_k + 1);
    atomic_init(&run->next_item, 0);
    size_t rows = ROW_BYTES / (run->packed_bytes + run->entry_bytes);
    int64_t slots = (int64_t)((size_t)cpu->n_workers * SLOT_BYTES / run->slot_bytes);
    int64_t most = (int64_t)cpu->n_workers * SLOTS_PER_WORKER;
    /* Kernels bound by arithmetic gain nothing from rows that share keys: there each row is a block
     * of its own where tokens are few, and its answer needs no bringing together. */
    const struct plan_limits limits = {cpu->n_workers, rows < PLAN_ROWS ? (int)rows : PLAN_ROWS,
                                       slots < most ? slots : most,
                                       cpu->kernel->score_two[p->dtype] ? 4 : 1};
    lidx_plan_build(&run->plan, p, &limits);
    memset(cpu->splits, 0, sizeof *cpu->splits * (size_t)run->plan.n_splits);
}

#ifdef _OPENMP
/* OpenMP's threads do not survive a fork, and a child that asks GNU's runtime for them waits for
 * ever: the child of a process that has had a team works on one thread. */
static atomic_int has_had_team, works_alone;

static void remember_team(void) {
    if (atomic_load(&has_had_team))
        atomic_store(&works_alone, 1);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, remember_team);
}

/* Always the whole team, even for fewer items: OpenMP runtimes end and restart threads when the
 * size of a team changes from call to call. */
static void work_in_team(struct run *run, int n_threads) {
    if (atomic_load_explicit(&works_alone, memory_order_relaxed)) {
        work(run, 0, 1);
        return;
    }
    atomic_store_explicit(&has_had_team, 1, memory_order_relaxed);
#pragma omp parallel num_threads(n_threads)
    work(run, omp_get_thread_num(), omp_get_num_threads());
}
#else
static void work_in_team(struct run *run, int n_threads) {
    (void)n_threads;
    work(run, 0, 1);
}
#endif

static int cpu_run(void *state, const struct problem *p, const struct run_resources *resources) {
    struct cpu *cpu = state;
    struct run run;
    (void)resources;
    if (p->n_query == 0)
        return LIDX_OK;
    prepare_run(&run, cpu, p);
    if (run.plan.n_items <= 1 || cpu->n_workers == 1)
        work(&run, 0, 1);
    else
        work_in_team(&run, cpu->n_workers);
    return LIDX_OK;
}

static int cpu_kernel_count(void) {
    int count = 0;
    while (lidx_kernels[count])
        count++;
    return count;
}

static void cpu_kernel_info(int index, struct lidx_kernel_info *info) {
    const struct kernel *kernel = lidx_kernels[index];
    int chosen = kernel == lidx_kernel_choose(NULL);
    info->name = kernel->name;
    info->available = lidx_kernel_usable(kernel);
    info->chosen_bf16 = info->chosen_fp16 = chosen;
    info->reason = lidx_kernel_reason(kernel);
}

const char *lidx_cpu_features(void) {
    return lidx_features_names();
}

const struct backend lidx_backend_cpu = {
    .name = "cpu",
    .device_type = LIDX_CPU,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .workspace_size = cpu_workspace_size,
    .run = cpu_run,
    .kernel_count = cpu_kernel_count,
    .kernel_info = cpu_kernel_info,
};
