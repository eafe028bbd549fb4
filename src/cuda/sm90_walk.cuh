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

/* part_of_batch where the batch is one item at most, and whole in the slab. */
__device__ __forceinline__ struct batch_part whole_batch(const struct arguments &a, int32_t batch) {
    int32_t begin, n_query, n_key;
    segment32(a.p.query_lengths, 0, (int32_t)a.p.n_query, batch, &begin, &n_query);
    segment32(a.p.key_lengths, 0, (int32_t)a.p.n_key, batch, &begin, &n_key);
    return {0, 0, n_query, n_key, 0, n_query, n_query > 0 && n_key > 0};
}

template <bool ONE_ITEM>
__device__ __forceinline__ uint32_t places_of_batch(const struct arguments &a, int32_t batch,
                                                    int32_t end) {
    if (batch >= end)
        return 0;
    if (ONE_ITEM) {
        struct batch_part whole = whole_batch(a, batch);
        return whole.n_items ? (uint32_t)item_places(&a.p, &a.line, &whole, 0) : 0;
    }
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
template <bool ONE_ITEM>
__device__ __forceinline__ uint32_t places_of_chunk(const struct arguments &a, int32_t size) {
    int32_t first = a.batch_begin + (threadIdx.x & 31) * size;
    uint32_t sum = 0;
#pragma unroll 1
    for (int32_t i = 0; i < size; i++)
        sum = add_places(sum, places_of_batch<ONE_ITEM>(a, first + i, a.batch_end));
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
            sum = add_places(sum, places_of_batch<false>(a, b, end));
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

/* Finds the CTA's run on the line: the chunk of its first place, the batch, the item. With ONE_ITEM
 * (arguments.one_item) the same with a fraction of the instructions. */
template <class S, bool ONE_ITEM>
__device__ __forceinline__ struct walk find_run(const struct arguments &a,
                                                const uint32_t chunks[32]) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    uint32_t x =
        !ONE_ITEM && size > LANE_BATCHES ? chunks[lane] : places_of_chunk<ONE_ITEM>(a, size);
    uint32_t upto = warp_scan(x), total = __shfl_sync(0xffffffffu, upto, 31);
    if (total > most_places<S>(a))
        total = 0;
    uint32_t place = (uint32_t)run_begin(total, blockIdx.x, gridDim.x);
    int32_t span = (int32_t)((uint32_t)run_begin(total, blockIdx.x + 1, gridDim.x) - place);
    struct walk w;
    w.next = {0, 0, 0, 0};
    if (span == 0)
        return w;
    int32_t batch = a.batch_begin + lane_of_place(x, upto, &place) * size;
    if (size > 1) {
        int32_t end = batch + size < a.batch_end ? batch + size : a.batch_end;
        for (;; batch += 32) {
            x = places_of_batch<ONE_ITEM>(a, batch + lane, end);
            upto = warp_scan(x);
            total = __shfl_sync(0xffffffffu, upto, 31);
            if (place < total)
                break;
            place -= total;
        }
        batch += lane_of_place(x, upto, &place);
    }
    if (ONE_ITEM) {
        w.part = whole_batch(a, batch);
        w.next = {batch, 0, -(int32_t)place, span};
        return w;
    }
    w.part = part_of_batch(&a.p, &a.line, batch);
    int32_t item = warp_item_at(a, w.part, (int32_t)place);
    int32_t at = (int32_t)places_before(&a.p, &a.line, &w.part, item) - (int32_t)place;
    w.next = {batch, item, at, span};
    return w;
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
        if (w.next.item >= w.part.n_items) {
            w.next.batch = next_batch(a, w.next.batch);
            if (w.next.batch >= a.batch_end)
                return false;
            w.part = part_of_batch(&a.p, &a.line, w.next.batch);
            w.next.item = first_item(&a.p, &a.line, &w.part);
            continue;
        }
        int32_t item = w.next.item++;
        tiles_of_cursor(&a.line, &w.next, item_tiles(&a.p, &a.line, &w.part, item), &w.begin,
                        &w.end);
        w.next.at += item_places(&a.p, &a.line, &w.part, item);
        w.query = w.part.first + item * S::BLOCK;
        if (w.begin < w.end)
            return true;
    }
    return false;
}

/* Whether each batch is one item at most, whole in the slab, and a warp can look at all of them. */
template <class S> bool one_item_each(const struct slab *slab, int32_t n_batch) {
    const struct problem *p = &slab->p;
    return S::DECODE && !p->query_packed && !p->key_packed && p->n_query <= S::BLOCK &&
           slab->row_begin % p->n_query == 0 && slab->row_end % p->n_query == 0 &&
           n_batch <= 32 * LANE_BATCHES;
}

} // namespace

#endif
