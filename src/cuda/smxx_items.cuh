/* SPDX-License-Identifier: Apache-2.0
 *
 * What a block of the score kernel for any GPU works on, and how its warps find it. The kernel and
 * the words used here are explained in score_smxx.cu.
 */
#ifndef LIDX_SMXX_ITEMS_CUH
#define LIDX_SMXX_ITEMS_CUH

#include "device.cuh"
#include "launch.h"
#include "schedule.h"

enum {
    WARPS = 8,
    THREADS = 32 * WARPS,
    SLOT_KEYS = 32,
    GROUP = 64, /* heads of a warp */
    OCTETS = GROUP / 8,
    HEAD_TILES = GROUP / 16,
    SLOTS_MAX = 24,
    SLOTS_MIN = 12,
    LEAST_SHARED = 99 << 10, /* bytes a block may have: compute capability 8.6, 8.9, 12.0 */
    SLOT_SLACK = WARPS,      /* slots not filled ahead: how far apart warps may be */
    SWITCH_CHARGE = 2,       /* tiles of 64 keys that changing queries costs */
    PAGE_SHIFT = 36,
    BARRIER_SPLIT = 1, /* named barriers 1 to 4: the halves of a query */
    BARRIER_TURN = 5,  /* 5 to 12: a warp's turn at the products */
    BARRIER_ITEM = 13, /* the end of an item whose slots are dealt out */
};

/* What a launch adds to the slab. */
struct plan {
    struct line line;
    uint64_t page_magic; /* key / page_size = (key / 16 * page_magic) >> PAGE_SHIFT */
    uint32_t n_slots;
    int32_t head_shift; /* log2 of a query's heads, padded, up to 6 */
    int32_t split;      /* a query has two groups of 64 heads */
    uint32_t zero;      /* 0, which the compiler does not know: see load_heads */
};

/* One item, as every thread of the block sees it. */
struct item {
    const unsigned char *keys; /* key 0 of the batch; page 0 of the cache when paged */
    const int32_t *table;      /* the batch's pages */
    const unsigned char *query;
    const unsigned char *weights;
    float *out;           /* row of the first query, key 0 */
    int32_t rows;         /* queries */
    int32_t visible;      /* keys that the first query sees; may be negative */
    int32_t visible_step; /* how many more each next one sees */
    int32_t last_visible; /* what the last query sees: keys beyond are not touched */
    int32_t slot_begin;
    int32_t slot_end;
};

/* Where a warp's scores go. */
struct sink {
    float *out; /* row of the group's first query, key 0 */
    int64_t row_stride;
    int32_t rows;         /* queries of the group that exist */
    int32_t visible;      /* keys that its first query sees; may be negative */
    int32_t visible_step; /* how many more each next one sees */
};

/* A warp's way along its block's run: where the next item begins, once it is known which. */
struct walk {
    int64_t begin; /* places of the line */
    int64_t end;
    int64_t at;
    int64_t batch;
    int32_t number; /* of the item in the batch; -1: not known, `at` is where the batch begins */
};

/* Shared memory behind the ring. */
struct shared_state {
    uint64_t full[SLOTS_MAX];
    uint64_t empty[SLOTS_MAX];
    struct item item[WARPS]; /* a copy a warp, since warps are not in step */
    struct sink sink[WARPS];
    float upper_half[2][WARPS / 2][32];
    int64_t warp_total[WARPS];
    struct walk walk[WARPS];
};

/* A place in the ring, and which round it is in. */
struct ring {
    uint32_t slot;
    uint32_t parity; /* of the round */
};

/* `by` is at most n_slots. */
static __device__ __forceinline__ void advance(struct ring *r, uint32_t by, uint32_t n_slots) {
    r->slot += by;
    if (r->slot >= n_slots) {
        r->slot -= n_slots;
        r->parity ^= 1;
    }
}

/* ---- which item ------------------------------------------------------------------------------ */

/* Sum over the warps of the block of the sums over their lanes; x becomes the sum of the threads
 * before this one. */
static __device__ int64_t block_scan(struct shared_state *state, int64_t *x) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t inclusive = *x;
    for (int d = 1; d < 32; d *= 2) {
        int64_t other = __shfl_up_sync(~0u, inclusive, d);
        if (lane >= d)
            inclusive += other;
    }
    __syncthreads();
    if (lane == 31)
        state->warp_total[warp] = inclusive;
    __syncthreads();
    int64_t before = 0, total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp)
            before = total;
        total += state->warp_total[w];
    }
    *x = before + inclusive - *x;
    return total;
}

static __device__ int64_t batch_places(const struct problem *p, const struct line *line,
                                       int64_t b) {
    if (b >= p->n_batch)
        return 0;
    struct batch_part part = part_of_batch(p, line, b);
    return places_before(p, line, &part, part.n_items);
}

/* The most places that rows of one batch each can take. Prefix sums that fall give rows to several
 * batches: a line longer than this is not scored, so that they cannot make a run endless. */
static __device__ int64_t most_places(const struct slab *s, const struct line *line) {
    return (line->row_end - line->row_begin) * (s->scores_stride / TILE_KEYS + 1 + line->charge);
}

/* Sets the walk of every warp to this block's run of the line. */
static __device__ void find_run(const struct slab *s, const struct line *line,
                                struct shared_state *state) {
    const struct problem *p = &s->p;
    int64_t total = 0;
    for (int64_t b = threadIdx.x; b < p->n_batch; b += THREADS)
        total += batch_places(p, line, b);
    total = block_scan(state, &total);
    if (total > most_places(s, line))
        total = 0;
    int64_t begin = run_begin(total, blockIdx.x, gridDim.x);
    int64_t end = run_begin(total, blockIdx.x + 1, gridDim.x);
    int64_t before = 0;
    for (int64_t b = threadIdx.x; before <= begin && begin < end; b += THREADS) {
        int64_t places = batch_places(p, line, b), at = places;
        int64_t all = block_scan(state, &at);
        at += before;
        before += all;
        if (at <= begin && begin < at + places)
            for (int w = 0; w < WARPS; w++)
                state->walk[w] = {begin, end, at, b, -1};
    }
    if (begin == end && threadIdx.x < WARPS)
        state->walk[threadIdx.x] = {begin, end, end, p->n_batch, -1};
    __syncthreads();
}

static __device__ __forceinline__ struct item
make_item(const struct slab *s, const struct line *line, const struct batch_part *part,
          int64_t batch, int32_t number, int32_t tile_begin, int32_t tile_end) {
    const struct problem *p = &s->p;
    int32_t first = part->first + (number << line->block_shift);
    int32_t left = part->last - first, most = 1 << line->block_shift;
    struct item item;
    item.rows = left < most ? left : most;
    item.visible_step = p->sparse_mode != 0;
    item.visible = p->sparse_mode != 0 ? part->n_key - part->n_query + first + 1 : part->n_key;
    item.last_visible = part_visible(p, part, first + item.rows - 1);
    item.slot_begin = tile_begin * (TILE_KEYS / SLOT_KEYS);
    int32_t slots = (int32_t)(((uint32_t)item.last_visible + SLOT_KEYS - 1) / SLOT_KEYS);
    item.slot_end = tile_end * (TILE_KEYS / SLOT_KEYS);
    item.slot_end = slots < item.slot_end ? slots : item.slot_end;

    int64_t key_row = p->head_dim * 2, query_row = key_row * p->n_heads;
    item.keys = (const unsigned char *)p->key;
    if (!p->page_size)
        item.keys += batch * p->key_batch_stride + part->key_begin * key_row;
    item.table =
        (const int32_t *)((const unsigned char *)p->page_table + batch * p->page_table_stride);
    int64_t query = (int64_t)part->query_begin + first;
    item.query =
        (const unsigned char *)p->query + batch * p->query_batch_stride + query * query_row;
    item.weights = (const unsigned char *)p->weights + batch * p->weights_batch_stride +
                   query * p->n_heads * (p->weights_dtype == DTYPE_F32 ? 4 : 2);
    int64_t row = (p->query_packed ? part->query_begin : batch * p->n_query) + first;
    item.out = s->scores + (row - s->row_begin) * s->scores_stride;
    return item;
}

/* The next item of the run; false at its end. */
static __device__ __forceinline__ bool next_item(const struct slab *s, const struct line *line,
                                                 struct walk *walk, struct item *item) {
    const struct problem *p = &s->p;
    for (; walk->at < walk->end && walk->batch < p->n_batch; walk->batch++, walk->number = -1) {
        struct batch_part part = part_of_batch(p, line, walk->batch);
        if (part.n_items == 0)
            continue;
        if (walk->number < 0) {
            int64_t in = walk->begin - walk->at;
            walk->number = in > 0 ? item_at(p, line, &part, in) : 0;
            walk->at += places_before(p, line, &part, walk->number);
        }
        while (walk->number < part.n_items && walk->at < walk->end) {
            int32_t number = walk->number++;
            int64_t first = walk->begin - walk->at - line->charge;
            int64_t last = walk->end - walk->at - line->charge;
            int32_t tiles = item_tiles(p, line, &part, number);
            int32_t tile_begin = first > 0 ? (int32_t)first : 0;
            int32_t tile_end = last < tiles ? (int32_t)last : tiles;
            walk->at += item_places(p, line, &part, number);
            if (tile_begin < tile_end) {
                *item = make_item(s, line, &part, walk->batch, number, tile_begin, tile_end);
                return true;
            }
        }
    }
    return false;
}

#endif
