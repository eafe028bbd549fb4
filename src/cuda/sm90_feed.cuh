/* SPDX-License-Identifier: Apache-2.0
 *
 * The producer warps of the Hopper score kernel: along the CTA's run they bring queries, keys,
 * weights and the description of each item into shared memory.
 */
#ifndef LIDX_SM90_FEED_CUH
#define LIDX_SM90_FEED_CUH

#include "sm90_shape.cuh"
#include "sm90_walk.cuh"

namespace {

/* ---- Producers ----------------------------------------------------------------------------- */

template <class S>
__device__ __forceinline__ void load_query(const struct arguments &a, struct shared_memory<S> &s,
                                           const CUtensorMap *map, const struct walk &w,
                                           int place) {
    uint32_t full = smem_address(&s.query_full[place]);
    int32_t batch = a.p.query_packed ? 0 : w.next.batch;
    if (!elect_one())
        return;
    mbarrier_expect(full, S::QUERY_BYTES);
    for (int half = 0; half < S::HALVES; half++)
        for (int group = 0; group < S::GROUPS; group++)
            tma_load_5d(
                smem_address(s.query[place]) + (half * S::COLUMNS + group * S::GROUP_ROWS) * 128,
                map, full, half * 64, 0, w.part.query_begin + w.query + 4 * group, 0, batch);
}

/* Log2 of the keys that one TMA box brings. */
template <class S> __device__ __forceinline__ int32_t piece_shift(const struct arguments &a) {
    return S::LEAN ? TILE_SHIFT : a.piece_shift;
}

/* Whether keys are divided into pages without division, which takes long at the head of decode. */
template <class S> __device__ __forceinline__ bool has_page_shift(const struct arguments &a) {
    return S::LEAN || (S::DECODE && a.page_shift >= 0);
}

/* Which page of its batch holds a key. */
template <class S>
__device__ __forceinline__ int32_t page_of_key(const struct arguments &a, int32_t key) {
    return has_page_shift<S>(a) ? key >> (a.page_shift + piece_shift<S>(a)) : key / a.p.page_size;
}

/* Brings the page table into L2, as far as 4 KiB a CTA reach: ids are then there a trip to memory
 * sooner when the lengths say which ones are wanted. None is read here. */
template <class S> __device__ __forceinline__ void prefetch_table(const struct arguments &a) {
    const uint32_t LINE = 128;
    uint32_t row_bytes =
        (uint32_t)page_of_key<S>(a, (int32_t)a.p.n_key) * (uint32_t)sizeof(int32_t);
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
    int64_t key = (int64_t)(piece + (threadIdx.x & 31)) << piece_shift<S>(a);
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
    int32_t key = (piece + (threadIdx.x & 31)) << piece_shift<S>(a);
    bool wrong = id < 0 || id >= (int32_t)a.p.n_pages;
    int32_t row = has_page_shift<S>(a) ? key & (a.p.page_size - 1)
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
        mbarrier_await(smem_address(&s.key_empty[keys.place]), keys.phase ^ 1);
        if (elect_one()) {
            mbarrier_expect(full, S::KEY_BYTES);
            tma_load_4d<S::KEEP_KEYS>(smem_address(s.key[keys.place]), map, full, 0, row, 0, batch,
                                      policy);
        }
        __syncwarp();
        ring_step<S::STAGES, 1>(keys);
    }
}

template <class S>
__device__ __forceinline__ int32_t first_piece(const struct arguments &a, const struct walk &w) {
    return w.begin << (TILE_SHIFT - piece_shift<S>(a));
}

/* A lane's way along the page table of an item. */
struct page_walk {
    struct pages pages; /* 32 of them */
    int32_t slot;       /* the next tile's first */
    int32_t next;       /* the lane's page of the next 32 */
};

/* PIECES of a tile; a page id and a row for each. One lane issues all boxes of a tile at once. */
template <class S, int PIECES>
__device__ __forceinline__ void
load_paged_tile(const struct arguments &a, struct shared_memory<S> &s, const CUtensorMap *map,
                const struct walk &w, struct ring &keys, struct page_walk &p, int32_t tile,
                uint64_t policy) {
    constexpr int BOXES = PIECES == 1 ? 1 : S::HALVES; /* of a piece */
    uint32_t full = smem_address(&s.key_full[keys.place]);
    uint32_t destination = smem_address(s.key[keys.place]);
    if (p.slot == 32) {
        p.slot = 0;
        p.pages = place_pages<S>(a, tile * PIECES, p.next);
        p.next = load_page<S>(a, w, tile * PIECES + 32);
    }
    int32_t id[PIECES], row[PIECES];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        id[piece] = __shfl_sync(0xffffffffu, p.pages.id, p.slot + piece);
        row[piece] = __shfl_sync(0xffffffffu, p.pages.row, p.slot + piece);
    }
    mbarrier_await(smem_address(&s.key_empty[keys.place]), keys.phase ^ 1);
    if (elect_one()) {
        s.masked[keys.place] = spread_mask<PIECES>(p.pages.masked >> p.slot);
        mbarrier_expect(full, S::KEY_BYTES);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int box = 0; box < BOXES; box++)
                tma_load_4d<S::KEEP_KEYS>(
                    destination + (box * TILE_KEYS + piece * (TILE_KEYS / PIECES)) * 128, map, full,
                    0, row[piece], box, id[piece], policy);
    }
    __syncwarp();
    p.slot += PIECES;
    ring_step<S::STAGES, 1>(keys);
}

/* `next` is the lane's page of the item's first 32 pieces. */
template <class S, int PIECES>
__device__ __forceinline__ void
load_paged_keys(const struct arguments &a, struct shared_memory<S> &s, const CUtensorMap *map,
                const struct walk &w, struct ring &keys, int32_t next) {
    uint64_t policy = cache_policy<S::KEEP_KEYS>();
    struct page_walk p;
    p.slot = 32;
    p.next = next;
    if constexpr (S::LEAN) {
#pragma unroll 1 /* what is read first comes from memory */
        for (int32_t tile = w.begin; tile < w.end; tile++)
            load_paged_tile<S, PIECES>(a, s, map, w, keys, p, tile, policy);
    } else {
        for (int32_t tile = w.begin; tile < w.end; tile++)
            load_paged_tile<S, PIECES>(a, s, map, w, keys, p, tile, policy);
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
        mbarrier_await(smem_address(&s.query_empty[queries.place]), queries.phase ^ 1);
        if (!more) {
            if (elect_one())
                mbarrier_arrive(smem_address(&s.query_full[queries.place]));
            break;
        }
        int32_t page = S::LEAN || a.p.page_size ? load_page<S>(a, w, first_piece<S>(a, w)) : 0;
        load_query<S>(a, s, query_map, w, queries.place);
        __syncwarp();
        if constexpr (S::LEAN)
            load_paged_keys<S, 1>(a, s, key_map, w, keys, page);
        else if (!a.p.page_size)
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
        mbarrier_await(smem_address(&s.query_empty[place]), queries.phase ^ 1);
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
        mbarrier_arrive(smem_address(&s.query_full[place]));
        ring_step<2, 1>(queries);
    } while (more);
    if (S::LEAN)
        allow_next_kernel();
}

} // namespace

#endif
