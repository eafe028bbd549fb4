/* SPDX-License-Identifier: Apache-2.0
 *
 * A producer warp's way along its CTA's run of the line (schedule.h): the run is found from the
 * lengths, then its items come one after the other. Nothing here but operations of a warp, so that
 * a test can do it without a GPU. S is a kernel's shape, of which BLOCK, CHARGE and DECODE matter.
 */
#ifndef LIDX_SM90_WALK_CUH
#define LIDX_SM90_WALK_CUH

#include "launch.h"
#include "sm90_arguments.cuh"

namespace {

/* Until a producer has found its run nothing is loaded, and every instruction up to there comes
 * from a cold cache. So: one copy of the code for both producers, no block-wide barrier if it can
 * be avoided, 32 lanes at a time, 32 bits. */

enum { LANE_BATCHES = 8 }; /* batches of a chunk that a lane may sum up by itself */

__device__ __forceinline__ uint32_t places_of_batch(const struct arguments &a, int32_t batch,
                                                    int32_t end) {
    if (batch >= end)
        return 0;
    struct batch_part part = part_of_batch(&a.p, &a.line, batch);
    return (uint32_t)places_before(&a.p, &a.line, &part, part.n_items);
}

/* Batches of a chunk: as many as make at most 32 chunks. */
__device__ __forceinline__ int32_t chunk_size(const struct arguments &a) {
    return (a.batch_end - a.batch_begin + 31) / 32;
}

/* Prefix sums that fall give rows to several batches, and then there is no limit to places. */
__device__ __forceinline__ uint32_t add_places(uint32_t x, uint32_t y) {
    return x + y < x ? UINT32_MAX : x + y;
}

__device__ __forceinline__ uint32_t warp_scan(uint32_t x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, x, step);
        x = add_places(x, (threadIdx.x & 31) >= step ? other : 0);
    }
    return x;
}

/* The most places that rows of one batch each can take: more than these are not scored. */
template <class S> __device__ __forceinline__ uint32_t most_places(const struct arguments &a) {
    return (uint32_t)(a.line.row_end - a.line.row_begin) *
           ((uint32_t)(a.scores_stride / TILE_KEYS) + 1 + S::CHARGE);
}

/* The places of each chunk, one to a lane. The lengths of a chunk share a sector or two. */
__device__ __forceinline__ uint32_t places_of_chunk(const struct arguments &a, int32_t size) {
    int32_t first = a.batch_begin + (threadIdx.x & 31) * size;
    uint32_t sum = 0;
#pragma unroll 1
    for (int32_t i = 0; i < size; i++)
        sum = add_places(sum, places_of_batch(a, first + i, a.batch_end));
    return sum;
}

/* The same for large chunks, by all warps of the CTA. */
template <int WARPS>
__device__ __forceinline__ void sum_chunks(const struct arguments &a, uint32_t chunks[32]) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    for (int32_t chunk = threadIdx.x / 32; chunk < 32; chunk += WARPS) {
        int32_t begin = a.batch_begin + chunk * size;
        int32_t end = begin + size < a.batch_end ? begin + size : a.batch_end;
        uint32_t sum = 0;
        for (int32_t b = begin + lane; b < end; b += 32)
            sum = add_places(sum, places_of_batch(a, b, end));
        sum = warp_scan(sum);
        if (lane == 31)
            chunks[chunk] = sum;
    }
}

/* Lanes have `x` places each, up to `upto` with those before. Returns the lane that has `place`,
 * and makes `place` count from that lane's first. */
__device__ __forceinline__ int32_t lane_of_place(uint32_t x, uint32_t upto, uint32_t *place) {
    int32_t lane = __ffs(__ballot_sync(0xffffffffu, *place < upto)) - 1;
    *place -= __shfl_sync(0xffffffffu, upto - x, lane);
    return lane;
}

/* item_at, by the 32 lanes of a warp together. */
__device__ __forceinline__ int32_t warp_item_at(const struct arguments &a,
                                                const struct batch_part &part, int32_t place) {
    int32_t low = 0, high = part.n_items;
#pragma unroll 1
    while (high - low > 1) {
        int32_t step = (high - low + 31) / 32, probe = low + ((threadIdx.x & 31) + 1) * step;
        bool begun = probe < high && places_before(&a.p, &a.line, &part, probe) <= place;
        low += __popc(__ballot_sync(0xffffffffu, begun)) * step;
        high = high < low + step ? high : low + step;
    }
    return low;
}

/* A producer warp's way along the run; all its lanes do the same. */
struct walk {
    struct cursor next; /* its batch is the item's until the next step */
    struct batch_part part;
    int32_t query; /* the item's first query in its batch */
    int32_t begin; /* its tiles [begin, end) */
    int32_t end;
};

/* The CTA's share of `total` places; `place` is its first. */
__device__ __forceinline__ int32_t span_of_cta(uint32_t total, uint32_t *place) {
    *place = (uint32_t)run_begin(total, blockIdx.x, gridDim.x);
    return (int32_t)((uint32_t)run_begin(total, blockIdx.x + 1, gridDim.x) - *place);
}

/* Finds the CTA's run on the line: the chunk of its first place, the batch, the item. */
template <class S>
__device__ __forceinline__ struct walk find_run(const struct arguments &a,
                                                const uint32_t chunks[32]) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    uint32_t x = size > LANE_BATCHES ? chunks[lane] : places_of_chunk(a, size);
    uint32_t upto = warp_scan(x), total = __shfl_sync(0xffffffffu, upto, 31);
    if (total > most_places<S>(a))
        total = 0;
    uint32_t place;
    int32_t span = span_of_cta(total, &place);
    struct walk w;
    w.next = {0, 0, 0, 0};
    if (span == 0)
        return w;
    int32_t batch = a.batch_begin + lane_of_place(x, upto, &place) * size;
    if (size > 1) {
        int32_t end = batch + size < a.batch_end ? batch + size : a.batch_end;
        for (;; batch += 32) {
            x = places_of_batch(a, batch + lane, end);
            upto = warp_scan(x);
            total = __shfl_sync(0xffffffffu, upto, 31);
            if (place < total)
                break;
            place -= total;
        }
        batch += lane_of_place(x, upto, &place);
    }
    w.part = part_of_batch(&a.p, &a.line, batch);
    int32_t item = warp_item_at(a, w.part, (int32_t)place);
    int32_t at = (int32_t)places_before(&a.p, &a.line, &w.part, item) - (int32_t)place;
    w.next = {batch, item, at, span};
    return w;
}

/* part_of_batch where a batch is one item at most: none, if no query of it sees a key. */
__device__ __forceinline__ struct batch_part whole_batch(const struct arguments &a, int32_t batch) {
    int32_t begin, n_query, n_key;
    if (batch >= a.batch_end)
        return {0, 0, 0, 0, 0, 0, 0};
    segment32(a.p.query_lengths, 0, (int32_t)a.p.n_query, batch, &begin, &n_query);
    segment32(a.p.key_lengths, 0, (int32_t)a.p.n_key, batch, &begin, &n_key);
    struct batch_part part = {0, 0, n_query, n_key, 0, n_query, 0};
    part.n_items = n_query > 0 && n_key > 0 && item_places(&a.p, &a.line, &part, 0) > 0;
    return part;
}

__device__ __forceinline__ uint32_t places_of_whole(const struct arguments &a,
                                                    const struct batch_part &part) {
    return part.n_items ? (uint32_t)item_places(&a.p, &a.line, &part, 0) : 0;
}

/* A lane's whole batch, for all lanes. */
__device__ __forceinline__ struct batch_part whole_of_lane(const struct batch_part &mine,
                                                           int32_t lane) {
    int32_t n_query = __shfl_sync(0xffffffffu, mine.n_query, lane);
    int32_t n_key = __shfl_sync(0xffffffffu, mine.n_key, lane);
    return {0, 0, n_query, n_key, 0, n_query, 1};
}

/* find_run where each batch is one item at most, with a fraction of the instructions. */
__device__ __forceinline__ struct walk find_lean_run(const struct arguments &a) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31, batch = a.batch_begin + lane * size;
    struct batch_part mine;
    uint32_t x = 0;
#pragma unroll 1
    for (int32_t i = 0; i < size; i++) {
        mine = whole_batch(a, batch + i);
        x += places_of_whole(a, mine);
    }
    uint32_t upto = warp_scan(x), total = __shfl_sync(0xffffffffu, upto, 31);
    uint32_t place;
    int32_t span = span_of_cta(total, &place);
    struct walk w;
    w.next = {0, 0, 0, 0};
    if (span == 0)
        return w;
    int32_t found = lane_of_place(x, upto, &place);
    batch = a.batch_begin + found * size;
    if (size > 1) {
        mine = whole_batch(a, lane < size ? batch + lane : a.batch_end);
        x = places_of_whole(a, mine);
        found = lane_of_place(x, warp_scan(x), &place);
        batch += found;
    }
    w.part = whole_of_lane(mine, found);
    w.next = {batch, 0, -(int32_t)place, span};
    return w;
}

/* The next batch with an item becomes the walk's; false if there is none. Looks at 32 batches at a
 * time. */
__device__ __forceinline__ bool next_whole(const struct arguments &a, struct walk &w) {
    for (int32_t batch = w.next.batch + 1; batch < a.batch_end; batch += 32) {
        struct batch_part mine = whole_batch(a, batch + (threadIdx.x & 31));
        uint32_t found = __ballot_sync(0xffffffffu, mine.n_items > 0);
        if (found) {
            w.part = whole_of_lane(mine, __ffs(found) - 1);
            w.next.batch = batch + __ffs(found) - 1;
            w.next.item = 0;
            return true;
        }
    }
    return false;
}

/* The next batch with an item, or batch_end. Looks at 32 batches at a time. */
__device__ __forceinline__ int32_t next_batch(const struct arguments &a, int32_t batch) {
    for (batch++; batch < a.batch_end; batch += 32) {
        int32_t mine = batch + (threadIdx.x & 31);
        bool some = mine < a.batch_end && part_of_batch(&a.p, &a.line, mine).n_items > 0;
        uint32_t found = __ballot_sync(0xffffffffu, some);
        if (found)
            return batch + __ffs(found) - 1;
    }
    return a.batch_end;
}

template <class S>
__device__ __forceinline__ bool walk_next(const struct arguments &a, struct walk &w) {
    while (w.next.at < w.next.span) {
        if (S::LEAN && w.next.item > 0 && !next_whole(a, w))
            return false;
        if (!S::LEAN && w.next.item >= w.part.n_items) {
            w.next.batch = next_batch(a, w.next.batch);
            if (w.next.batch >= a.batch_end)
                return false;
            w.part = part_of_batch(&a.p, &a.line, w.next.batch);
            w.next.item = first_item(&a.p, &a.line, &w.part);
            continue;
        }
        int32_t item = S::LEAN ? 0 : w.next.item;
        w.next.item = item + 1;
        tiles_of_cursor(&a.line, &w.next, item_tiles(&a.p, &a.line, &w.part, item), &w.begin,
                        &w.end);
        w.next.at += item_places(&a.p, &a.line, &w.part, item);
        w.query = w.part.first + item * S::BLOCK;
        if (w.begin < w.end)
            return true;
    }
    return false;
}

/* Whether decode is as it mostly is: each batch is one item at most, whole in the slab, a warp can
 * look at all of them, and tiles do not cross pages, of which there are 2^n to one. */
template <class S> bool is_lean(const struct slab *slab) {
    const struct problem *p = &slab->p;
    int32_t tiles = p->page_size / TILE_KEYS;
    return !p->query_packed && !p->key_packed && p->n_query <= S::BLOCK &&
           slab->row_begin % p->n_query == 0 && slab->row_end % p->n_query == 0 &&
           (slab->row_end - slab->row_begin) / p->n_query <= 32 * LANE_BATCHES &&
           p->page_size % TILE_KEYS == 0 && tiles > 0 && !(tiles & (tiles - 1));
}

} // namespace

#endif
