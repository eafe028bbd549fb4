/* SPDX-License-Identifier: Apache-2.0 */
#include "worker.h"

#include "../dtype.h"
#include "answer.h"

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

/* The keys of a block's batch from `key` on; *n of them lie in a row, or more. */
static const unsigned char *keys_at(const struct problem *p, const struct plan_block *block,
                                    int64_t key, int64_t *n) {
    int64_t row_bytes = (int64_t)p->head_dim * lidx_dtype_bytes(p->dtype);
    if (!p->page_size) {
        *n = INT64_MAX;
        int64_t row = block->extent.key_begin + key;
        return offset(p->key, block->batch * p->key_batch_stride + row * row_bytes);
    }
    const void *table = offset(p->page_table, block->batch * p->page_table_stride);
    int64_t index = key / p->page_size, from = key - index * p->page_size;
    *n = p->page_size - from;
    int64_t page = ((const int32_t *)table)[index];
    return offset(p->key, page * p->key_batch_stride + from * row_bytes);
}

void lidx_worker_start(struct worker *w, struct run *run, int index) {
    unsigned char *memory = run->memory + (size_t)index * run->row_bytes;
    w->run = run;
    w->index = index;
    w->score[0] = (float *)(void *)(run->scores + (size_t)index * SCORE_BYTES);
    w->score[1] = w->score[0] + MAX_TILE_KEYS;
    for (int r = 0; r < run->plan.rows; r++) {
        w->row[r].packed = memory;
        memory += run->packed_bytes;
        w->row[r].topk.entry = (uint64_t *)(void *)memory;
        memory += run->entry_bytes;
    }
}

void lidx_worker_load(struct worker *w, const struct plan_block *block) {
    const struct problem *p = w->run->p;
    for (int r = 0; r < block->n_rows; r++) {
        int64_t row = block->extent.query_begin + block->row + r;
        const void *weights = weights_at(p, block->batch, row);
        for (int h = 0; h < p->n_heads; h++)
            w->weights[h] = lidx_load(weights, h, p->weights_dtype);
        const struct query_row query = {query_at(p, block->batch, row), w->weights, p->n_heads,
                                        p->head_dim};
        w->run->path->pack(w->row[r].packed, &query);
        w->row[r].visible = lidx_visible(p, &block->extent, block->row + r);
        lidx_topk_reset(&w->row[r].topk, p->top_k, w->row[r].topk.entry, w->run->loops);
    }
}

/* Lists the key blocks of [begin, end) and, for prefetch, of what follows up to `limit`; returns
 * how many follow. */
static int list_blocks(struct worker *w, const struct plan_block *block, int64_t begin, int64_t end,
                       int64_t limit) {
    const struct problem *p = w->run->p;
    int64_t block_bytes = (int64_t)KEY_BLOCK * p->head_dim * lidx_dtype_bytes(p->dtype);
    limit = limit < end + AHEAD_KEYS ? limit : end + AHEAD_KEYS;
    int n = 0;
    for (int64_t key = begin, in_row; key < limit; key += in_row) {
        const unsigned char *rows = keys_at(p, block, key, &in_row);
        in_row = in_row < limit - key ? in_row : limit - key;
        for (int64_t i = 0; i < in_row; i += KEY_BLOCK, rows += block_bytes)
            w->list[n++] = rows;
    }
    return (int)((limit - end + KEY_BLOCK - 1) / KEY_BLOCK);
}

/* Fetches the first line of each page of [begin, end), so that the kernel finds the translations of
 * their addresses. Scattered pages miss the TLB each, and the core waits for one miss after the
 * other unless they are asked for together. */
static void touch_pages(struct worker *w, const struct plan_block *block, int64_t begin,
                        int64_t end) {
    if (!w->run->p->page_size)
        return;
    for (int64_t key = begin, in_row; key < end; key += in_row)
        __builtin_prefetch(keys_at(w->run->p, block, key, &in_row));
}

/* How many keys of [begin, end) a row sees. */
static int keys_seen(const struct row *row, int64_t begin, int64_t end) {
    int64_t n = (row->visible < end ? row->visible : end) - begin;
    return n > 0 ? (int)n : 0;
}

/* Scores the keys of a run for one or two rows that see them all. Where scores can wait, no other
 * work comes between tiles. */
static void score_rows(struct worker *w, int r, int n_rows, const struct key_run *keys,
                       int64_t begin) {
    const struct problem *p = w->run->p;
    const int n = keys->n_keys;
    float *score[2] = {NULL, NULL};
    for (int i = 0; i < n_rows; i++) {
        score[i] = lidx_topk_reserve(&w->row[r + i].topk, n, begin);
        score[i] = score[i] ? score[i] : w->score[i];
    }
    if (n_rows == 2) {
        const void *const packed[2] = {w->row[r].packed, w->row[r + 1].packed};
        w->run->kernel->score_two[p->dtype](score, packed, p->n_heads, p->head_dim, keys);
    } else {
        w->run->path->score(score[0], w->row[r].packed, p->n_heads, p->head_dim, keys);
    }
    for (int i = 0; i < n_rows; i++)
        if (score[i] == w->score[i])
            lidx_topk_push(&w->row[r + i].topk, score[i], n, begin);
}

/* A tile of keys for each row of the block. */
static void score_tile(struct worker *w, const struct plan_block *block, int64_t begin, int64_t end,
                       int ahead) {
    const struct problem *p = w->run->p;
    int row_stride = p->head_dim * lidx_dtype_bytes(p->dtype);
    int two_at_once = w->run->kernel->score_two[p->dtype] != NULL;
    for (int r = 0, rows; r < block->n_rows; r += rows) {
        int n = keys_seen(&w->row[r], begin, end);
        int is_pair =
            two_at_once && r + 1 < block->n_rows && keys_seen(&w->row[r + 1], begin, end) == n;
        rows = is_pair ? 2 : 1;
        /* What comes next is fetched once, while the last row, which sees it all, passes. */
        int is_last = r + rows == block->n_rows;
        const struct key_run keys = {w->list, row_stride, n, is_last ? ahead : 0};
        if (n > 0)
            score_rows(w, r, rows, &keys, begin);
    }
}

/* Where the tile that begins at `begin` ends: no further on than the kernel wants it. For a kernel
 * that scores two rows at once it also ends where the keys that all rows see do. */
static int64_t tile_end_of(const struct worker *w, const struct plan_block *block, int64_t begin,
                           int64_t end) {
    const struct kernel *kernel = w->run->kernel;
    const int tile_keys = kernel->tile_keys ? kernel->tile_keys : TILE_KEYS;
    int64_t seen = end;
    for (int r = 0; r < block->n_rows; r++)
        seen = w->row[r].visible < seen ? w->row[r].visible : seen;
    if (seen < end && kernel->score_two[w->run->p->dtype]) {
        seen -= seen % PLAN_ALIGN;
        end = begin < seen ? seen : end;
    }
    return begin + tile_keys < end ? begin + tile_keys : end;
}

/* A tile of keys at a time: it stays in cache while the rows pass over it. */
void lidx_worker_score(struct worker *w, const struct plan_block *block, int64_t begin,
                       int64_t end) {
    int64_t tile_end = tile_end_of(w, block, begin, end), next_end;
    touch_pages(w, block, begin, tile_end);
    for (; begin < end; begin = tile_end, tile_end = next_end) {
        next_end = tile_end_of(w, block, tile_end, end);
        touch_pages(w, block, tile_end, next_end);
        int ahead = list_blocks(w, block, begin, tile_end, end);
        score_tile(w, block, begin, tile_end, ahead);
    }
}

struct topk lidx_worker_candidates(struct worker *w, int r) {
    struct topk t = w->row[r].topk;
    lidx_topk_move(&t, w->row[0].topk.entry);
    return t;
}

void lidx_worker_finish(struct worker *w, const struct plan_block *block) {
    const struct problem *p = w->run->p;
    for (int r = 0; r < block->n_rows; r++) {
        struct topk t = lidx_worker_candidates(w, r);
        lidx_topk_sort(&t);
        int64_t row = block->extent.query_begin + block->row + r;
        lidx_write_entries(p, block->batch, row, 0, t.entry, t.n);
        if (t.n < t.k)
            lidx_write_missing(p, block->batch, row, t.n);
    }
}
