/* SPDX-License-Identifier: Apache-2.0
 *
 * The producer warps of the Hopper score kernel: they find the CTA's run, and bring queries, keys,
 * weights and the description of each item into shared memory.
 */
#ifndef LIDX_SM90_FEED_CUH
#define LIDX_SM90_FEED_CUH

#include "sm90_shape.cuh"

namespace {

/* ---- Schedule ------------------------------------------------------------------------------ */

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

/* The same for large chunks, by all warps. */
template <class S>
__device__ __forceinline__ void sum_chunks(const struct arguments &a, struct shared_memory<S> &s) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    for (int32_t chunk = threadIdx.x / 32; chunk < 32; chunk += THREADS / 32) {
        int32_t begin = a.batch_begin + chunk * size;
        int32_t end = begin + size < a.batch_end ? begin + size : a.batch_end;
        uint32_t sum = 0;
        for (int32_t b = begin + lane; b < end; b += 32)
            sum = add_places(sum, places_of_batch<false>(a, b, end));
        sum = warp_scan(sum);
        if (lane == 31)
            s.chunks[chunk] = sum;
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
                                                const struct shared_memory<S> &s) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    uint32_t x =
        !ONE_ITEM && size > LANE_BATCHES ? s.chunks[lane] : places_of_chunk<ONE_ITEM>(a, size);
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

/* ---- Producers ----------------------------------------------------------------------------- */

template <class S>
__device__ __forceinline__ void load_query(const struct arguments &a, struct shared_memory<S> &s,
                                           const CUtensorMap *map, const struct walk &w,
                                           int place) {
    uint32_t full = smem_address(&s.query_full[place]);
    int32_t batch = a.p.query_packed ? 0 : w.next.batch;
    if (!elect_one())
        return;
    barrier_expect(full, S::QUERY_BYTES);
    for (int half = 0; half < S::HALVES; half++)
        for (int group = 0; group < S::GROUPS; group++)
            tma_load_5d(
                smem_address(s.query[place]) + (half * S::COLUMNS + group * S::GROUP_ROWS) * 128,
                map, full, half * 64, 0, w.part.query_begin + w.query + 4 * group, 0, batch);
}

/* Which page of its batch holds a key. Division takes long at the head of a decode launch. */
template <class S>
__device__ __forceinline__ int32_t page_of_key(const struct arguments &a, int32_t key) {
    if (S::DECODE && a.page_shift >= 0)
        return key >> (a.page_shift + a.piece_shift);
    return key / a.p.page_size;
}

/* Brings the page table into L2, as far as 4 KiB a CTA reach: ids are then there a trip to memory
 * sooner when the lengths say which ones are wanted. None is read here. */
__device__ __forceinline__ void prefetch_table(const struct arguments &a) {
    const uint32_t LINE = 128;
    uint32_t row_bytes = (uint32_t)(a.p.n_key / a.p.page_size) * (uint32_t)sizeof(int32_t);
    uint32_t lines = (row_bytes + LINE - 1) / LINE, which = blockIdx.x * 32 + (threadIdx.x & 31);
    if (!lines || a.batch_begin + which / lines >= (uint32_t)a.batch_end)
        return;
    const unsigned char *row = (const unsigned char *)a.p.page_table +
                               (a.batch_begin + which / lines) * a.p.page_table_stride;
    prefetch_l2(row + which % lines * LINE);
}

/* A lane's one of the 32 page ids from `piece` on. For a piece that no tile of the item needs the
 * table is not read: its page is -1, which TMA takes as out of range and fills with zeros. */
template <class S>
__device__ __forceinline__ int32_t load_page(const struct arguments &a, const struct walk &w,
                                             int32_t piece) {
    int64_t key = (int64_t)(piece + (threadIdx.x & 31)) << a.piece_shift;
    if (key >= w.part.n_key || key >= (int64_t)w.end << TILE_SHIFT)
        return -1;
    const void *table =
        (const unsigned char *)a.p.page_table + w.next.batch * a.p.page_table_stride;
    return ((const int32_t *)table)[page_of_key<S>(a, (int32_t)key)];
}

/* Where 32 pieces lie, one to a lane. */
struct pages {
    int32_t id;
    int32_t row;
    uint32_t masked; /* bit of each lane whose id is out of range */
};

template <class S>
__device__ __forceinline__ struct pages place_pages(const struct arguments &a, int32_t piece,
                                                    int32_t id) {
    int32_t key = (piece + (threadIdx.x & 31)) << a.piece_shift;
    bool wrong = id < 0 || id >= (int32_t)a.p.n_pages;
    int32_t row = S::DECODE && a.page_shift >= 0
                      ? key & (a.p.page_size - 1)
                      : (int32_t)((uint32_t)key % (uint32_t)a.p.page_size);
    return {id, row, __ballot_sync(0xffffffffu, wrong)};
}

/* The bits of shared_memory.masked for a tile whose PIECES are `bits`. */
template <int PIECES> __device__ __forceinline__ uint32_t spread_mask(uint32_t bits) {
    if (PIECES == 4)
        return bits & 15;
    if (PIECES == 2)
        return (bits & 1) * 3 | (bits & 2) * 6;
    return (bits & 1) * 15;
}

template <class S>
__device__ __forceinline__ void load_dense_keys(const struct arguments &a,
                                                struct shared_memory<S> &s, const CUtensorMap *map,
                                                const struct walk &w, struct ring &keys) {
    int32_t batch = a.p.key_packed ? 0 : w.next.batch;
    int32_t row = w.part.key_begin + w.begin * TILE_KEYS;
    uint64_t policy = cache_policy<S::KEEP_KEYS>();
    for (int32_t tile = w.begin; tile < w.end; tile++, row += TILE_KEYS) {
        uint32_t full = smem_address(&s.key_full[keys.place]);
        barrier_wait(smem_address(&s.key_empty[keys.place]), keys.phase ^ 1);
        if (elect_one()) {
            barrier_expect(full, S::KEY_BYTES);
            tma_load_4d<S::KEEP_KEYS>(smem_address(s.key[keys.place]), map, full, 0, row, 0, batch,
                                      policy);
        }
        __syncwarp();
        ring_step<S::STAGES, 1>(keys);
    }
}

__device__ __forceinline__ int32_t first_piece(const struct arguments &a, const struct walk &w) {
    return w.begin << (TILE_SHIFT - a.piece_shift);
}

/* PIECES of a tile; a page id and a row for each. One lane issues all boxes of a tile at once.
 * `next` is the lane's page of the item's first 32 pieces. */
template <class S, int PIECES>
__device__ __forceinline__ void
load_paged_keys(const struct arguments &a, struct shared_memory<S> &s, const CUtensorMap *map,
                const struct walk &w, struct ring &keys, int32_t next) {
    constexpr int BOXES = PIECES == 1 ? 1 : S::HALVES; /* of a piece */
    uint64_t policy = cache_policy<S::KEEP_KEYS>();
    struct pages pages;
    int32_t slot = 32;
    for (int32_t tile = w.begin; tile < w.end; tile++) {
        uint32_t full = smem_address(&s.key_full[keys.place]);
        uint32_t destination = smem_address(s.key[keys.place]);
        if (slot == 32) {
            slot = 0;
            pages = place_pages<S>(a, tile * PIECES, next);
            next = load_page<S>(a, w, tile * PIECES + 32);
        }
        int32_t id[PIECES], row[PIECES];
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            id[piece] = __shfl_sync(0xffffffffu, pages.id, slot + piece);
            row[piece] = __shfl_sync(0xffffffffu, pages.row, slot + piece);
        }
        barrier_wait(smem_address(&s.key_empty[keys.place]), keys.phase ^ 1);
        if (elect_one()) {
            s.masked[keys.place] = spread_mask<PIECES>(pages.masked >> slot);
            barrier_expect(full, S::KEY_BYTES);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int box = 0; box < BOXES; box++)
                    tma_load_4d<S::KEEP_KEYS>(
                        destination + (box * TILE_KEYS + piece * (TILE_KEYS / PIECES)) * 128, map,
                        full, 0, row[piece], box, id[piece], policy);
        }
        __syncwarp();
        slot += PIECES;
        ring_step<S::STAGES, 1>(keys);
    }
}

/* Brings queries and keys, item after item. */
template <class S>
__device__ __forceinline__ void feed_tensors(const struct arguments &a, struct shared_memory<S> &s,
                                             const CUtensorMap *query_map,
                                             const CUtensorMap *key_map, struct walk &w) {
    struct ring queries = {0, 0}, keys = {0, 0};
    bool more;
    do {
        more = walk_next<S>(a, w);
        barrier_wait(smem_address(&s.query_empty[queries.place]), queries.phase ^ 1);
        if (!more) {
            if (elect_one())
                barrier_arrive(smem_address(&s.query_full[queries.place]));
            break;
        }
        int32_t page = a.p.page_size ? load_page<S>(a, w, first_piece(a, w)) : 0;
        load_query<S>(a, s, query_map, w, queries.place);
        __syncwarp();
        if (!a.p.page_size)
            load_dense_keys<S>(a, s, key_map, w, keys);
        else if (a.piece_shift == 6)
            load_paged_keys<S, 1>(a, s, key_map, w, keys, page);
        else if (a.piece_shift == 5)
            load_paged_keys<S, 2>(a, s, key_map, w, keys, page);
        else
            load_paged_keys<S, 4>(a, s, key_map, w, keys, page);
        ring_step<2, 1>(queries);
    } while (more);
}

__device__ __forceinline__ float load_weight(const struct arguments &a, const void *row, int head) {
    if (a.p.weights_dtype == DTYPE_F32)
        return ((const float *)row)[head];
    if (a.p.weights_dtype == DTYPE_BF16)
        return __bfloat162float(((const __nv_bfloat16 *)row)[head]);
    return __half2float(((const __half *)row)[head]);
}

/* Weights in the order in which a consumer lane holds its columns: lane l of a quad reads
 * weights[l][2g + b] for column 8g + 2l + b. Rows that the item lacks get zeros. */
template <class S>
__device__ __forceinline__ void feed_weights(const struct arguments &a, struct shared_memory<S> &s,
                                             const struct walk &w, int place) {
    int32_t bytes = S::HEADS * (a.p.weights_dtype == DTYPE_F32 ? 4 : 2);
    const char *rows = (const char *)a.p.weights + w.next.batch * a.p.weights_batch_stride +
                       (int64_t)(w.part.query_begin + w.query) * bytes;
    float weight[S::COLUMNS / 32];
#pragma unroll
    for (int i = 0; i < S::COLUMNS / 32; i++) {
        int column = 32 * i + (threadIdx.x & 31);
        int in_group = column % S::GROUP_ROWS, l = column >> 1 & 3;
        int query = column / S::GROUP_ROWS * 4 + l / S::LANES;
        int head = 2 * S::LANES * (in_group >> 3) + 2 * (l % S::LANES) + (column & 1);
        weight[i] = w.query + query < w.part.last ? load_weight(a, rows + query * bytes, head) : 0;
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS / 32; i++) {
        int column = 32 * i + (threadIdx.x & 31);
        s.weights[place][column >> 1 & 3][2 * (column >> 3) + (column & 1)] = weight[i];
    }
}

/* Tells the consumers of each item: weights, limits, where its scores go; last, that no more
 * comes (an item without tiles). */
template <class S>
__device__ __forceinline__ void feed_items(const struct arguments &a, struct shared_memory<S> &s,
                                           struct walk &w) {
    struct ring queries = {0, 0};
    int lane = threadIdx.x & 31;
    bool more;
    do {
        more = walk_next<S>(a, w);
        int place = queries.place;
        barrier_wait(smem_address(&s.query_empty[place]), queries.phase ^ 1);
        if (!more) {
            s.items[place].n_tiles = 0;
        } else {
            feed_weights<S>(a, s, w, place);
            if (lane < S::BLOCK) {
                int32_t query = w.query + lane;
                s.limits[place][lane] =
                    query < w.part.last ? part_visible(&a.p, &w.part, query) : 0;
            }
            if (lane == 0) {
                int64_t row = w.query + (a.p.query_packed ? (int64_t)w.part.query_begin
                                                          : w.next.batch * a.p.n_query);
                int32_t key = w.begin * TILE_KEYS;
                s.items[place] = {(row - a.line.row_begin) * a.scores_stride + key, key,
                                  w.end - w.begin};
            }
        }
        barrier_arrive(smem_address(&s.query_full[place]));
        ring_step<2, 1>(queries);
    } while (more);
}

} // namespace

#endif
