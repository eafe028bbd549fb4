/* SPDX-License-Identifier: Apache-2.0
 *
 * Hopper: scores of a slab by TMA, wgmma and specialised warps. docs/kernel-sm90.md has the whole
 * story; in short:
 *
 * A CTA, one to an SM, walks its run of the line (schedule.h). Warpgroups 0 and 1 compute
 * tiles of 64 keys (A) x N query columns (B) in turns, so that one's multiplications hide the
 * other's head sum. In warpgroup 2 one warp feeds queries and keys by TMA, another the weights
 * and what the consumers must know of an item.
 *
 * The score of one (query, key) is summed in one fixed order whatever N: head h belongs to
 * chain (h % 8), a chain adds its products in ascending h, and with P(l) = chain(2l) +
 * chain(2l + 1) the score is (P(0) + P(2)) + (P(1) + P(3)). Columns are arranged (by the
 * query's tensor map) so that each lane of a quad holds whole chains: a lane has whole queries
 * where N >= 4 heads, and 2 or 4 lanes share a query otherwise. With LANES of them,
 * column 8g + 2l + b is query l / LANES, head 2 LANES g + 2 (l % LANES) + b.
 */
#include <cuda.h>
#include <cuda_runtime.h>

#include "hopper.cuh"
#include "launch.h"
#include "schedule.h"

namespace {

enum {
    WARPGROUP = 128,
    CONSUMERS = 2,
    THREADS = (CONSUMERS + 1) * WARPGROUP,
    MAX_SHARED = 232448, /* what a CTA of an SM90 may have */
    SPARE_SHARED = 8192, /* of it, for all but queries and keys */
    BARRIER_TURN = 1,    /* named barriers 1 and 2 */
};

/* What an instance fixes: heads, head_dim, columns of an item. */
template <int HEADS_, int DIM_, int COLUMNS_> struct shape {
    static constexpr int HEADS = HEADS_;
    static constexpr int DIM = DIM_;
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int BLOCK = COLUMNS / HEADS; /* query rows of an item */
    static constexpr int LANES = 4 * HEADS > COLUMNS ? 4 * HEADS / COLUMNS : 1;
    static constexpr int GROUPS = COLUMNS > 4 * HEADS ? COLUMNS / (4 * HEADS) : 1;
    static constexpr int GROUP_ROWS = COLUMNS / GROUPS; /* columns that one query box fills */
    static constexpr int HALVES = DIM / 64;             /* 128-byte pieces of a row */
    static constexpr int QUERY_BYTES = COLUMNS * DIM * 2;
    static constexpr int KEY_BYTES = TILE_KEYS * DIM * 2;
    static constexpr int ROOM = (MAX_SHARED - SPARE_SHARED - 2 * QUERY_BYTES) / KEY_BYTES;
    /* Two consumers of 128 accumulators need the tensor cores in turns; with fewer the memory
     * is the limit and they may run as they come. */
    static constexpr bool TURNS = COLUMNS == 256;
    /* Without turns a stage must always serve the same consumer, so their number is even: one
     * that was not there when a stage's last phase completed could take that phase's parity
     * for the next one's. */
    static constexpr int STAGES = ROOM >= 16 ? 16 : TURNS ? ROOM : ROOM / 2 * 2;
    /* Twice the consumers' and once the producers' are 3 x 168, the registers at launch. */
    static constexpr int CONSUMER_REGISTERS = COLUMNS == 256 ? 216 : 208;
    static constexpr int PRODUCER_REGISTERS = COLUMNS == 256 ? 72 : 88;
    static constexpr int CHARGE = COLUMNS == 256 ? 2 : COLUMNS / 64;
    static constexpr int LANE_COLUMNS = COLUMNS / 4;
    static constexpr int WEIGHT_PITCH = LANE_COLUMNS + 4; /* no bank conflict between lanes */
};

struct arguments {
    struct problem p;
    struct line line;
    float *scores;
    int64_t scores_stride;
    int32_t batch_begin; /* batches that have rows in the slab */
    int32_t batch_end;
    int32_t piece_shift; /* log2 of the keys that one TMA box brings */
    unsigned long long *cycles;
};

struct item {
    int64_t scores; /* where in the slab the score of its first query and first key lies */
    int32_t key;    /* first key */
    int32_t n_tiles;
};

template <class S> struct shared_memory {
    uint8_t query[2][S::QUERY_BYTES];
    uint8_t key[S::STAGES][S::KEY_BYTES];
    float weights[2][4][S::WEIGHT_PITCH];
    int32_t limits[2][S::BLOCK]; /* keys that each query sees */
    struct item items[2];
    uint32_t masked[S::STAGES]; /* bit w: keys 16w .. 16w + 15 have no valid page */
    uint64_t query_full[2];
    uint64_t query_empty[2];
    uint64_t key_full[S::STAGES];
    uint64_t key_empty[S::STAGES];
    uint32_t chunks[32]; /* places of the batches, in 32 chunks */
};

/* A ring of places: consumers and producers step through it alike. */
struct ring {
    int place;
    uint32_t phase;
};

template <int PLACES, int STEP> __device__ __forceinline__ void ring_step(struct ring &r) {
    r.place += STEP;
    if (r.place >= PLACES) {
        r.place -= PLACES;
        r.phase ^= 1;
    }
}

/* ---- Schedule ------------------------------------------------------------------------------ */

/* Until a producer has found its run nothing is loaded, and every instruction up to there comes
 * from a cold cache. So: no more than one block-wide barrier, 32 lanes at a time, 32 bits. */

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

/* Sums the places of each chunk, by all warps; not needed for chunks of one batch. */
template <class S>
__device__ __forceinline__ void sum_chunks(const struct arguments &a, struct shared_memory<S> &s) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    for (int32_t chunk = threadIdx.x / 32; chunk < 32; chunk += THREADS / 32) {
        int32_t begin = a.batch_begin + chunk * size;
        int32_t end = begin + size < a.batch_end ? begin + size : a.batch_end;
        uint32_t sum = 0;
        for (int32_t b = begin + lane; b < end; b += 32)
            sum += places_of_batch(a, b, end);
        sum = __reduce_add_sync(0xffffffffu, sum);
        if (lane == 0)
            s.chunks[chunk] = sum;
    }
}

__device__ __forceinline__ uint32_t warp_scan(uint32_t x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        uint32_t other = __shfl_up_sync(0xffffffffu, x, step);
        x += (threadIdx.x & 31) >= step ? other : 0;
    }
    return x;
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

/* Finds the CTA's run on the line: the chunk of its first place, the batch, the item. */
template <class S>
__device__ __forceinline__ struct walk find_run(const struct arguments &a,
                                                const struct shared_memory<S> &s) {
    int32_t size = chunk_size(a), lane = threadIdx.x & 31;
    uint32_t x = size > 1 ? s.chunks[lane]
                          : places_of_batch(a, a.batch_begin + lane, a.batch_end);
    uint32_t upto = warp_scan(x), total = __shfl_sync(0xffffffffu, upto, 31);
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
    uint32_t full = shared_address(&s.query_full[place]);
    int32_t batch = a.p.query_packed ? 0 : w.next.batch;
    if (!elect_one())
        return;
    barrier_expect(full, S::QUERY_BYTES);
    for (int half = 0; half < S::HALVES; half++)
        for (int group = 0; group < S::GROUPS; group++)
            tma_load_5d(shared_address(s.query[place]) +
                            (half * S::COLUMNS + group * S::GROUP_ROWS) * 128,
                        map, full, half * 64, 0, w.part.query_begin + w.query + 4 * group, 0,
                        batch);
}

/* A lane's one of the 32 page ids from `piece` on. For a piece that no tile of the item needs the
 * table is not read: its page is -1, which TMA takes as out of range and fills with zeros. */
__device__ __forceinline__ int32_t load_page(const struct arguments &a, const struct walk &w,
                                             int32_t piece) {
    int64_t key = (int64_t)(piece + (threadIdx.x & 31)) << a.piece_shift;
    if (key >= w.part.n_key || key >= (int64_t)w.end << TILE_SHIFT)
        return -1;
    return a.p.page_table[w.next.batch * a.p.page_table_stride + (int32_t)key / a.p.page_size];
}

/* Where 32 pieces lie, one to a lane. */
struct pages {
    int32_t id;
    int32_t row;
    uint32_t masked; /* bit of each lane whose id is out of range */
};

__device__ __forceinline__ struct pages place_pages(const struct arguments &a, int32_t piece,
                                                    int32_t id) {
    int32_t key = (piece + (threadIdx.x & 31)) << a.piece_shift;
    bool wrong = id < 0 || id >= (int32_t)a.p.n_pages;
    return {id, (int32_t)((uint32_t)key % (uint32_t)a.p.page_size),
            __ballot_sync(0xffffffffu, wrong)};
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
                                                struct shared_memory<S> &s,
                                                const CUtensorMap *map, const struct walk &w,
                                                struct ring &keys) {
    int32_t batch = a.p.key_packed ? 0 : w.next.batch;
    int32_t row = w.part.key_begin + w.begin * TILE_KEYS;
    for (int32_t tile = w.begin; tile < w.end; tile++, row += TILE_KEYS) {
        uint32_t full = shared_address(&s.key_full[keys.place]);
        barrier_wait(shared_address(&s.key_empty[keys.place]), keys.phase ^ 1);
        if (elect_one()) {
            barrier_expect(full, S::KEY_BYTES);
            tma_load_4d(shared_address(s.key[keys.place]), map, full, 0, row, 0, batch);
        }
        __syncwarp();
        ring_step<S::STAGES, 1>(keys);
    }
}

/* PIECES of a tile; a page id and a row for each. One lane issues all boxes of a tile at once. */
template <class S, int PIECES>
__device__ __forceinline__ void load_paged_keys(const struct arguments &a,
                                                struct shared_memory<S> &s,
                                                const CUtensorMap *map, const struct walk &w,
                                                struct ring &keys) {
    constexpr int BOXES = PIECES == 1 ? 1 : S::HALVES; /* of a piece */
    struct pages pages;
    int32_t next = load_page(a, w, w.begin * PIECES); /* for the next 32 pieces */
    int32_t slot = 32;
    for (int32_t tile = w.begin; tile < w.end; tile++) {
        uint32_t full = shared_address(&s.key_full[keys.place]);
        uint32_t destination = shared_address(s.key[keys.place]);
        if (slot == 32) {
            slot = 0;
            pages = place_pages(a, tile * PIECES, next);
            next = load_page(a, w, tile * PIECES + 32);
        }
        int32_t id[PIECES], row[PIECES];
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            id[piece] = __shfl_sync(0xffffffffu, pages.id, slot + piece);
            row[piece] = __shfl_sync(0xffffffffu, pages.row, slot + piece);
        }
        barrier_wait(shared_address(&s.key_empty[keys.place]), keys.phase ^ 1);
        if (elect_one()) {
            s.masked[keys.place] = spread_mask<PIECES>(pages.masked >> slot);
            barrier_expect(full, S::KEY_BYTES);
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int box = 0; box < BOXES; box++)
                    tma_load_4d(destination +
                                    (box * TILE_KEYS + piece * (TILE_KEYS / PIECES)) * 128,
                                map, full, 0, row[piece], box, id[piece]);
        }
        __syncwarp();
        slot += PIECES;
        ring_step<S::STAGES, 1>(keys);
    }
}

/* Brings queries and keys, item after item. */
template <class S>
__device__ void feed_tensors(const struct arguments &a, struct shared_memory<S> &s,
                             const CUtensorMap *query_map, const CUtensorMap *key_map) {
    struct ring queries = {0, 0}, keys = {0, 0};
    struct walk w = find_run<S>(a, s);
    bool more;
    do {
        more = walk_next<S>(a, w);
        barrier_wait(shared_address(&s.query_empty[queries.place]), queries.phase ^ 1);
        if (!more) {
            if (elect_one())
                barrier_arrive(shared_address(&s.query_full[queries.place]));
            break;
        }
        load_query<S>(a, s, query_map, w, queries.place);
        __syncwarp();
        if (!a.p.page_size)
            load_dense_keys<S>(a, s, key_map, w, keys);
        else if (a.piece_shift == 6)
            load_paged_keys<S, 1>(a, s, key_map, w, keys);
        else if (a.piece_shift == 5)
            load_paged_keys<S, 2>(a, s, key_map, w, keys);
        else
            load_paged_keys<S, 4>(a, s, key_map, w, keys);
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
__device__ void feed_items(const struct arguments &a, struct shared_memory<S> &s) {
    struct ring queries = {0, 0};
    struct walk w = find_run<S>(a, s);
    int lane = threadIdx.x & 31;
    bool more;
    do {
        more = walk_next<S>(a, w);
        int place = queries.place;
        barrier_wait(shared_address(&s.query_empty[place]), queries.phase ^ 1);
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
        barrier_arrive(shared_address(&s.query_full[place]));
        ring_step<2, 1>(queries);
    } while (more);
}

/* ---- Consumers ----------------------------------------------------------------------------- */

/* max(x, 0) as IEEE 754-2019 has it: a NaN stays. */
__device__ __forceinline__ float relu(float x) {
    float result;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
    return result;
}

/* The lane's share of the head sum of its query in `group`, for key row 0 or 1 of its two. */
template <class S>
__device__ __forceinline__ float lane_sum(const float (&dot)[S::COLUMNS / 2],
                                          const float (&weight)[S::LANE_COLUMNS], int group,
                                          int row) {
    constexpr int PAIRS = 4 / S::LANES;               /* of chains */
    constexpr int STEPS = S::HEADS / (2 * S::LANES); /* head pairs of the lane */
    float chain[PAIRS][2];
#pragma unroll
    for (int g = 0; g < STEPS; g++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float w = weight[2 * (group * STEPS + g) + b];
            float x = dot[4 * (group * STEPS + g) + 2 * row + b];
            float &sum = chain[g % PAIRS][b];
            sum = __fmaf_rn(w, relu(x), g < PAIRS ? 0.0f : sum);
        }
    float pair[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        pair[i] = __fadd_rn(chain[i][0], chain[i][1]);
    if (PAIRS == 4)
        return __fadd_rn(__fadd_rn(pair[0], pair[2 % PAIRS]),
                         __fadd_rn(pair[1 % PAIRS], pair[3 % PAIRS]));
    return PAIRS == 2 ? __fadd_rn(pair[0], pair[1 % PAIRS]) : pair[0];
}

/* Adds the shares of the lanes that have one query. Lanes give away one key row's share with
 * each exchange over two rows, so that each ends with one row: row l % 2 or l / 2. */
template <class S> __device__ __forceinline__ float share_sum(const float (&sum)[2]) {
    int lane = threadIdx.x & 3;
    bool upper = S::LANES == 2 ? lane & 1 : lane >> 1;
    float keep = upper ? sum[1] : sum[0], give = upper ? sum[0] : sum[1];
    if (S::LANES == 4)
        keep = __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, give, 2));
    return __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, S::LANES == 4 ? keep : give, 1));
}

/* Keeps a finished sum in front of the branch that may not store it: the compiler would else
 * sink the whole sum into the branch, behind the next wait. */
__device__ __forceinline__ void pin(float &x) {
    asm volatile("" : "+f"(x));
}

template <class S> struct lane_item {
    static constexpr int GROUPS = S::GROUPS;
    float weight[S::LANE_COLUMNS];
    int32_t limit[GROUPS];
    int32_t key;   /* of the lane's first key row in the tile */
    float *scores; /* of that key and the lane's first query */
};

/* Sums, and stores what is visible. */
template <class S>
__device__ __forceinline__ void finish_tile(const struct lane_item<S> &item,
                                            const float (&dot)[S::COLUMNS / 2], bool masked,
                                            int64_t group_stride) {
    float *scores = item.scores;
#pragma unroll
    for (int group = 0; group < S::GROUPS; group++) {
        float sum[2];
        sum[0] = lane_sum<S>(dot, item.weight, group, 0);
        sum[1] = lane_sum<S>(dot, item.weight, group, 1);
        if (S::LANES == 1) {
            pin(sum[0]);
            pin(sum[1]);
            if (masked)
                sum[0] = sum[1] = __uint_as_float(SCORE_MASKED);
            if (item.key < item.limit[group])
                scores[0] = sum[0];
            if (item.key + 8 < item.limit[group])
                scores[8] = sum[1];
        } else {
            float score = share_sum<S>(sum);
            pin(score);
            if (masked)
                score = __uint_as_float(SCORE_MASKED);
            if (item.key < item.limit[group])
                scores[0] = score;
        }
        scores += group_stride;
    }
}

template <class T, class S>
__device__ __forceinline__ void multiply(float (&dot)[S::COLUMNS / 2], uint32_t key,
                                         uint32_t query) {
    uint32_t a = operand_start(key), b = operand_start(query);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < S::HALVES; half++)
#pragma unroll
        for (int step = 0; step < 4; step++)
            wgmma<T>::step(dot, a + (half * TILE_KEYS * 128 + step * 32) / 16,
                           b + (half * S::COLUMNS * 128 + step * 32) / 16, half + step);
    wgmma_commit();
}

template <class S>
__device__ __forceinline__ void load_item(const struct arguments &a,
                                          const struct shared_memory<S> &s, int place, int row,
                                          struct lane_item<S> &item) {
    int lane = threadIdx.x & 3;
    const float4 *weights = (const float4 *)s.weights[place][lane];
#pragma unroll
    for (int i = 0; i < S::LANE_COLUMNS / 4; i++) {
        float4 w = weights[i];
        item.weight[4 * i] = w.x;
        item.weight[4 * i + 1] = w.y;
        item.weight[4 * i + 2] = w.z;
        item.weight[4 * i + 3] = w.w;
    }
#pragma unroll
    for (int group = 0; group < S::GROUPS; group++)
        item.limit[group] = s.limits[place][4 * group + lane / S::LANES];
    if (S::LANES == 4 && lane & 1) /* lane - 1 stores this score */
        item.limit[0] = 0;
    int in_tile = row + (S::LANES == 2 ? 8 * (lane & 1) : S::LANES == 4 ? 8 * (lane >> 1) : 0);
    item.key = s.items[place].key + in_tile;
    item.scores =
        a.scores + (s.items[place].scores + in_tile + lane / S::LANES * a.scores_stride);
}

template <class T, class S>
__device__ void consume(const struct arguments &a, struct shared_memory<S> &s, int group) {
    int thread = threadIdx.x & (WARPGROUP - 1), warp = thread >> 5, lane = thread & 31;
    int64_t group_stride = 4 * a.scores_stride;
    bool paged = a.p.page_size != 0;
    uint32_t warp_bit = 1u << warp;
    struct ring queries = {0, 0}, keys = {group, 0};
    int32_t turn = 0; /* whose is the next tile */
    if (S::TURNS && group == 1)
        named_barrier_arrive(BARRIER_TURN, CONSUMERS * WARPGROUP);
    for (;; ring_step<2, 1>(queries)) {
        barrier_wait(shared_address(&s.query_full[queries.place]), queries.phase);
        int32_t n_tiles = s.items[queries.place].n_tiles;
        if (!n_tiles)
            break;
        int32_t tile = group ^ turn;
        turn = (turn + n_tiles) & 1;
        if (tile < n_tiles) {
            struct lane_item<S> item;
            load_item<S>(a, s, queries.place, warp * 16 + (lane >> 2), item);
            item.key += tile * TILE_KEYS;
            item.scores += tile * TILE_KEYS;
            uint32_t query = shared_address(s.query[queries.place]);
            for (; tile < n_tiles; tile += CONSUMERS) {
                float dot[S::COLUMNS / 2];
                if (S::TURNS)
                    named_barrier_sync(BARRIER_TURN + group, CONSUMERS * WARPGROUP);
                barrier_wait(shared_address(&s.key_full[keys.place]), keys.phase);
                bool masked = paged && s.masked[keys.place] & warp_bit;
                multiply<T, S>(dot, shared_address(s.key[keys.place]), query);
                if (S::TURNS)
                    named_barrier_arrive(BARRIER_TURN + (group ^ 1), CONSUMERS * WARPGROUP);
                wgmma_wait();
                if (lane == 0)
                    barrier_arrive(shared_address(&s.key_empty[keys.place]));
                ring_step<S::STAGES, CONSUMERS>(keys);
                finish_tile<S>(item, dot, masked, group_stride);
                item.key += CONSUMERS * TILE_KEYS;
                item.scores += CONSUMERS * TILE_KEYS;
            }
        }
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&s.query_empty[queries.place]));
    }
}

/* ---- Kernel -------------------------------------------------------------------------------- */

template <class S> __device__ __forceinline__ void init_barriers(struct shared_memory<S> &s) {
    for (int i = 0; i < 2; i++) {
        barrier_init(shared_address(&s.query_full[i]), 1 + 32); /* TMA warp, items warp */
        barrier_init(shared_address(&s.query_empty[i]), CONSUMERS * 4);
    }
    for (int i = 0; i < S::STAGES; i++) {
        barrier_init(shared_address(&s.key_full[i]), 1);
        barrier_init(shared_address(&s.key_empty[i]), 4);
    }
    barrier_init_fence();
}

template <class T, class S>
__global__ __launch_bounds__(THREADS, 1) void score_sm90(
    const __grid_constant__ struct arguments a, const __grid_constant__ CUtensorMap query_map,
    const __grid_constant__ CUtensorMap key_map) {
    extern __shared__ __align__(1024) uint8_t raw[];
    struct shared_memory<S> &s = *(struct shared_memory<S> *)raw;
    long long begin = clock64();
    if (threadIdx.x == THREADS - 1) {
        init_barriers<S>(s);
        tma_prefetch_map(&query_map);
        tma_prefetch_map(&key_map);
    }
    launch_dependents();
    if (chunk_size(a) > 1)
        sum_chunks<S>(a, s);
    __syncthreads();
    /* Through a shuffle, so that the compiler knows it, and all that follows from it, to be the
     * same in a warp. */
    int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        int warp = threadIdx.x / 32 % 4;
        if (warp == 0)
            feed_tensors<S>(a, s, &query_map, &key_map);
        else if (warp == 1)
            feed_items<S>(a, s);
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        consume<T, S>(a, s, group);
        if (a.cycles && threadIdx.x == 0)
            atomicAdd(a.cycles, (unsigned long long)(clock64() - begin));
    }
}

/* ---- Host ---------------------------------------------------------------------------------- */

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

encode_function tensor_map_encoder() {
    void *function = NULL;
    enum cudaDriverEntryPointQueryResult found;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_function)function
                                                                        : NULL;
}

int encode_map(CUtensorMap *map, const struct problem *p, const void *base, int rank,
               const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box) {
    static encode_function found; /* racing threads store the same */
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    encode_function encode = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (!encode) {
        encode = tensor_map_encoder();
        if (!encode)
            return cudaErrorNotSupported;
        __atomic_store_n(&found, encode, __ATOMIC_RELAXED);
    }
    CUresult result = encode(
        map, p->dtype == DTYPE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        rank, (void *)base, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/* Four queries (or 4 / LANES), all heads, 64 dims, in the order of the columns: 2 LANES heads of
 * a query, then the next query, then the next 2 LANES heads. */
template <class S> int query_tensor_map(CUtensorMap *map, const struct problem *p) {
    const cuuint64_t heads = 2 * S::LANES, row = S::DIM * 2, token = S::HEADS * row;
    cuuint64_t batches = p->query_packed ? 1 : p->n_batch;
    cuuint64_t stride = batches > 1 ? p->query_batch_stride : token * p->n_query;
    const cuuint64_t sizes[5] = {S::DIM, heads, (cuuint64_t)p->n_query, S::HEADS / heads, batches};
    const cuuint64_t strides[4] = {row, token, heads * row, stride};
    const cuuint32_t box[5] = {64, 2 * S::LANES, 4 / S::LANES, S::HEADS / (2 * S::LANES), 1};
    return encode_map(map, p, p->query, 5, sizes, strides, box);
}

int key_piece_shift(const struct problem *p) {
    return p->page_size % 64 == 0 ? 6 : p->page_size % 32 == 0 ? 5 : 4;
}

/* A piece of one batch or page; a whole tile's piece brings both halves of its rows at once. */
template <class S> int key_tensor_map(CUtensorMap *map, const struct problem *p) {
    int shift = key_piece_shift(p);
    cuuint64_t rows = p->page_size ? p->page_size : p->n_key, row = S::DIM * 2;
    cuuint64_t outer = p->page_size ? p->n_pages : p->key_packed ? 1 : p->n_batch;
    cuuint64_t stride = outer > 1 ? p->key_batch_stride : row * rows;
    const cuuint64_t sizes[4] = {64, rows, S::HALVES, outer};
    const cuuint64_t strides[3] = {row, 128, stride};
    const cuuint32_t box[4] = {64, 1u << shift, shift == TILE_SHIFT ? S::HALVES : 1u, 1};
    return encode_map(map, p, p->key, 4, sizes, strides, box);
}

unsigned long long *cycle_counter;

template <class T, class S> int launch(const struct slab *slab, cudaStream_t stream) {
    CUtensorMap query_map, key_map;
    struct arguments a;
    a.p = slab->p;
    a.line = {slab->row_begin, slab->row_end, __builtin_ctz(S::BLOCK), S::CHARGE};
    a.scores = slab->scores;
    a.scores_stride = slab->scores_stride;
    a.batch_begin = slab->p.query_packed ? 0 : (int32_t)(slab->row_begin / slab->p.n_query);
    a.batch_end = slab->p.query_packed ? (int32_t)slab->p.n_batch
                                       : (int32_t)((slab->row_end - 1) / slab->p.n_query + 1);
    a.piece_shift = key_piece_shift(&slab->p);
    a.cycles = cycle_counter;
    int error = query_tensor_map<S>(&query_map, &slab->p);
    if (!error)
        error = key_tensor_map<S>(&key_map, &slab->p);
    const int bytes = sizeof(struct shared_memory<S>);
    static_assert(bytes <= MAX_SHARED, "shared memory");
    if (!error)
        error = cudaFuncSetAttribute(score_sm90<T, S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     bytes);
    /* The schedule counts places in 32 bits. */
    double places = (double)(slab->row_end - slab->row_begin) *
                    (double)(slab->scores_stride / TILE_KEYS + 1 + S::CHARGE);
    if (!error && places > INT32_MAX)
        error = cudaErrorInvalidValue;
    if (error)
        return error;
    score_sm90<T, S><<<slab->n_sm, THREADS, bytes, stream>>>(a, query_map, key_map);
    return cudaGetLastError();
}

/* Columns of an item: the fewest that hold an average batch's queries, since a batch with few
 * queries is limited by the reading of its keys. */
int item_columns(const struct problem *p) {
    int64_t queries = p->query_packed ? (p->n_query + p->n_batch - 1) / p->n_batch : p->n_query;
    int64_t columns = queries * p->n_heads;
    if (columns <= 64)
        return 64;
    return columns <= 128 && p->n_heads >= 64 ? 128 : 256;
}

template <class T, int HEADS, int DIM>
int launch_columns(const struct slab *s, cudaStream_t stream) {
    int columns = item_columns(&s->p);
    if constexpr (HEADS <= 64)
        if (columns == 64)
            return launch<T, shape<HEADS, DIM, 64>>(s, stream);
    if constexpr (HEADS >= 64)
        if (columns == 128)
            return launch<T, shape<HEADS, DIM, 128>>(s, stream);
    return launch<T, shape<HEADS, DIM, 256>>(s, stream);
}

template <class T, int DIM> int launch_heads(const struct slab *s, cudaStream_t stream) {
    switch (s->p.n_heads) {
    case 8:
        return launch_columns<T, 8, DIM>(s, stream);
    case 16:
        return launch_columns<T, 16, DIM>(s, stream);
    case 32:
        return launch_columns<T, 32, DIM>(s, stream);
    case 128:
        return launch_columns<T, 128, DIM>(s, stream);
    case 64:
        return launch_columns<T, 64, DIM>(s, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

template <class T> int launch_dim(const struct slab *s, cudaStream_t stream) {
    if (s->p.head_dim == 64)
        return launch_heads<T, 64>(s, stream);
    return launch_heads<T, 128>(s, stream);
}

/* A dimension that TMA coordinates reach, with room for a last box that begins inside. */
bool fits_coordinate(int64_t size) {
    return size >= 0 && size <= INT32_MAX - 1024;
}

bool fits_stride(int64_t stride, int64_t count) {
    return count <= 1 || (stride > 0 && stride % 16 == 0 && stride < (int64_t)1 << 40);
}

} // namespace

extern "C" int lidx_score_sm90_accepts(const struct problem *p) {
    bool heads = p->n_heads == 8 || p->n_heads == 16 || p->n_heads == 32 || p->n_heads == 64 ||
                 p->n_heads == 128;
    bool type = p->dtype == DTYPE_BF16 || p->dtype == DTYPE_FP16;
    int64_t key_outer = p->page_size ? p->n_pages : p->key_packed ? 1 : p->n_batch;
    return heads && type && (p->head_dim == 64 || p->head_dim == 128) && p->page_size % 16 == 0 &&
           (uintptr_t)p->query % 16 == 0 && (uintptr_t)p->key % 16 == 0 &&
           fits_stride(p->query_batch_stride, p->query_packed ? 1 : p->n_batch) &&
           fits_stride(p->key_batch_stride, key_outer) && fits_coordinate(p->n_batch) &&
           fits_coordinate(p->n_query) && fits_coordinate(p->n_key) && fits_coordinate(p->n_pages);
}

extern "C" int lidx_launch_score_sm90(const struct slab *s, void *stream) {
    if (s->row_begin >= s->row_end || !s->p.n_batch || !s->p.n_key ||
        (s->p.page_size && !s->p.n_pages))
        return cudaSuccess;
    if (s->p.dtype == DTYPE_BF16)
        return launch_dim<__nv_bfloat16>(s, (cudaStream_t)stream);
    return launch_dim<__half>(s, (cudaStream_t)stream);
}

/* For the benchmark alone: from now on each CTA adds the SM cycles that it runs to *counter, in
 * device memory. NULL ends it. */
extern "C" void lidx_score_sm90_count_cycles(unsigned long long *counter) {
    cycle_counter = counter;
}
