/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores on any GPU from SM80 on, by the matrix instruction that all of them have (m16n8k16).
 *
 * Work. Heads of queries are the rows of a product (M), keys its columns (N). A warp owns 64
 * rows: one query of 64 heads, 2 of 32, 4 of 16, 8 of 8 (other head counts are padded with heads
 * that count nothing), or half a query of more than 64. It holds their 64 x D elements in
 * registers for as long as it stays with them, so keys are all that the inner loop reads, and what
 * a 16-byte read of a key brings is the instruction's operand as it stands. (Keys as rows would
 * need two keys' words side by side: a move for every word.)
 *
 *     registers per thread, D 128     heads 128 | sums of 64 heads x 32 keys 64 | keys 16 to 32 |
 *                                     weights 8 | the rest about 20
 *
 * A block is 8 warps; an item of work is the block of queries that they hold (8 groups of 64
 * heads) against a run of keys, found by schedule.h from lengths on the device. Keys stream
 * through a ring of slots of 32 in shared memory; every warp fills every 8th slot. With 8 groups
 * every warp reads every slot; with fewer (decode has 1 or 2) the slots are dealt out: a warp
 * reads every 8th, 4th or 2nd. A barrier says when a slot is full, another when it has been read,
 * so that warps may be several slots apart and one's sums hide behind another's products.
 *
 * Order of summation, the same for a pair of query and key whatever else is in the launch:
 * products by the instruction over k-steps in order; then in thread g of 8 the heads g, 8 + g,
 * 16 + g ... ascending; then the 8 threads, as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)); for more
 * than 64 heads, lower half + upper half.
 *
 * The elements of a head are permuted alike for queries and keys: in a pair of k-steps lane l of
 * a quad has the 8 neighbours 32t + 8l + {0..7}, so that one 16-byte load serves two steps. A dot
 * product does not mind.
 */
#include <cuda_runtime.h>

#include "device.cuh"
#include "launch.h"
#include "schedule.h"

enum {
    WARPS = 8,
    THREADS = 32 * WARPS,
    SLOT_KEYS = 32,
    GROUP = 64,            /* heads of a warp */
    OCTETS = GROUP / 8,
    HEAD_TILES = GROUP / 16,
    KEY_TILES = SLOT_KEYS / 8,
    SLOTS_MAX = 24,
    SLOTS_MIN = 12,
    SLOT_SLACK = WARPS,    /* slots not filled ahead: how far apart warps may be */
    SWITCH_CHARGE = 2,     /* tiles of 64 keys that changing queries costs */
    PAGE_SHIFT = 36,
};

/* What a launch adds to the slab. */
struct plan {
    struct line line;
    uint64_t page_magic; /* key / page_size = (key / 16 * page_magic) >> PAGE_SHIFT */
    uint32_t n_slots;
    int32_t head_shift;  /* log2 of a query's heads, padded, up to 6 */
    int32_t split;       /* a query has two groups of 64 heads */
    uint32_t zero;       /* 0, which the compiler does not know: see load_heads */
};

/* One item, as every thread of the block sees it. */
struct item {
    const unsigned char *keys; /* key 0 of the batch; page 0 of the cache when paged */
    const int32_t *table;      /* the batch's pages */
    const unsigned char *query;
    const unsigned char *weights;
    float *out;            /* row of the first query, key 0 */
    int32_t rows;          /* queries */
    int32_t visible;       /* keys that the first query sees; may be negative */
    int32_t visible_step;  /* how many more each next one sees */
    int32_t last_visible;  /* what the last query sees: keys beyond are not touched */
    int32_t slot_begin;
    int32_t slot_end;
};

/* Where a warp's scores go. */
struct sink {
    float *out;            /* row of the group's first query, key 0 */
    int64_t row_stride;
    int32_t rows;          /* queries of the group that exist */
    int32_t visible;       /* keys that its first query sees; may be negative */
    int32_t visible_step;  /* how many more each next one sees */
};

/* A warp's way along its block's run: where the next item begins, once it is known which. */
struct walk {
    int64_t begin; /* places of the line */
    int64_t end;
    int64_t at;
    int64_t batch;
    int32_t number; /* of the item in the batch; -1: not known yet, `at` is where the batch begins */
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

/* Sets the walk of every warp to this block's run of the line. */
static __device__ void find_run(const struct problem *p, const struct line *line,
                                struct shared_state *state) {
    int64_t total = 0;
    for (int64_t b = threadIdx.x; b < p->n_batch; b += THREADS)
        total += batch_places(p, line, b);
    total = block_scan(state, &total);
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

static __device__ __forceinline__ struct item make_item(const struct slab *s,
                                                        const struct line *line,
                                                        const struct batch_part *part,
                                                        int64_t batch, int32_t number,
                                                        int32_t tile_begin, int32_t tile_end) {
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

/* ---- keys: global memory to the ring --------------------------------------------------------- */

static __device__ __forceinline__ int32_t page_of(int32_t key, uint64_t magic) {
    return (int32_t)(((uint64_t)((uint32_t)key / 16) * magic) >> PAGE_SHIFT);
}

/* 16 bytes from an address that is aligned to 2. */
static __device__ __forceinline__ uint4 load_global_halves(const unsigned char *source) {
    const uint16_t *h = (const uint16_t *)source;
    uint4 x;
    x.x = h[0] | (uint32_t)h[1] << 16;
    x.y = h[2] | (uint32_t)h[3] << 16;
    x.z = h[4] | (uint32_t)h[5] << 16;
    x.w = h[6] | (uint32_t)h[7] << 16;
    return x;
}

/* Row r of a slot is at r * row bytes; its 16-byte chunk c is at c ^ 4 in odd rows, so that the 8
 * lanes that a 16-byte read serves at once (2 rows x 4 chunks) meet all 32 banks. Each half of a
 * slot lies on one page, pages being multiples of 16 keys. */
template <int D, bool ALIGNED>
static __device__ __forceinline__ void fill_slot(const struct slab *s, const struct plan *plan,
                                                 const struct item *item, int32_t slot_number,
                                                 uint32_t slot_address, uint32_t full) {
    constexpr int CHUNKS = D / 8, ROWS_AT_ONCE = 32 / CHUNKS, HALF = SLOT_KEYS / 2;
    const struct problem *p = &s->p;
    int lane = threadIdx.x % 32, in = lane / CHUNKS, chunk = lane % CHUNKS;
    int32_t key = slot_number * SLOT_KEYS, last_visible = item->last_visible;
    int32_t page[2] = {0, 0}, id[2] = {0, 0};
    if (p->page_size) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            page[half] = page_of(key + half * HALF, plan->page_magic);
            id[half] = key + half * HALF < last_visible ? __ldg(item->table + page[half]) : -1;
        }
    }
    uint32_t to = slot_address + in * (D * 2) + (chunk ^ (in & 1) * 4) * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool there = !p->page_size || (id[half] >= 0 && id[half] < p->n_pages);
        int32_t left = last_visible - (key + half * HALF) - in;
        const unsigned char *source =
            item->keys + id[half] * p->key_batch_stride +
            (int64_t)(key + half * HALF + in - page[half] * p->page_size) * (D * 2) + chunk * 16;
#pragma unroll
        for (int r = 0; r < HALF; r += ROWS_AT_ONCE)
            if (there && r < left) {
                if (ALIGNED)
                    copy_async_16(to + (half * HALF + r) * D * 2, source + r * D * 2);
                else
                    store_shared_16(to + (half * HALF + r) * D * 2,
                                    load_global_halves(source + r * D * 2));
            }
    }
    if (ALIGNED)
        mbarrier_arrive_after_copies(full);
    else
        mbarrier_arrive(full);
}

/* ---- queries and weights: global memory to registers ----------------------------------------- */

/* Head c of group g, counting all queries' heads: query and head within the item. */
static __device__ __forceinline__ void head_place(const struct plan *plan, int group, int c,
                                                  int *query, int *head) {
    if (plan->split) {
        *query = group / 2;
        *head = group % 2 * GROUP + c;
    } else {
        c += group * GROUP;
        *query = c >> plan->head_shift;
        *head = c & ((1 << plan->head_shift) - 1);
    }
}

/* Octet o of a group is its heads 8o .. 8o + 7; thread lane / 4 has the one of that number.
 * The instruction wants words of two heads in four adjacent registers, a 16-byte load leaves words
 * of one head there. Left to itself the compiler keeps the latter and moves words for every
 * product (487 moves beside 128 products); an operation on each that it cannot see through makes
 * it settle them once. */
template <int D, bool ALIGNED>
static __device__ __forceinline__ void load_heads(const struct slab *s, const struct plan *plan,
                                                  const struct item *item, int group,
                                                  uint32_t (&a)[HEAD_TILES][D / 16][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        int query, head;
        head_place(plan, group, 8 * o + lane / 4, &query, &head);
        bool there = query < item->rows && head < s->p.n_heads;
        const unsigned char *source =
            item->query + (query * s->p.n_heads + head) * (D * 2) + lane % 4 * 16;
#pragma unroll
        for (int t = 0; t < D / 32; t++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (there)
                x = ALIGNED ? __ldg((const uint4 *)(source + t * 64))
                            : load_global_halves(source + t * 64);
            a[o / 2][2 * t][o % 2] = x.x ^ plan->zero;
            a[o / 2][2 * t][2 + o % 2] = x.y ^ plan->zero;
            a[o / 2][2 * t + 1][o % 2] = x.z ^ plan->zero;
            a[o / 2][2 * t + 1][2 + o % 2] = x.w ^ plan->zero;
        }
    }
}

static __device__ __forceinline__ float load_weight(const unsigned char *weights, int i,
                                                    int dtype) {
    if (dtype == DTYPE_F32)
        return ((const float *)weights)[i];
    if (dtype == DTYPE_FP16)
        return __half2float(((const __half *)weights)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)weights)[i]);
}

/* The weights of a thread's heads, and which of them exist: bit o for octet o. */
static __device__ __forceinline__ uint32_t load_weights(const struct slab *s,
                                                        const struct plan *plan,
                                                        const struct item *item, int group,
                                                        float (&w)[OCTETS]) {
    uint32_t heads = 0;
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        int query, head;
        head_place(plan, group, 8 * o + threadIdx.x % 32 / 4, &query, &head);
        w[o] = 0;
        if (head < s->p.n_heads) {
            heads |= 1u << o;
            if (query < item->rows)
                w[o] = load_weight(item->weights, query * s->p.n_heads + head,
                                   s->p.weights_dtype);
        }
    }
    return heads;
}

/* ---- products and sums ----------------------------------------------------------------------- */

/* Half a slot: sums[m][n] has heads 16m + lane / 4 (+ 8 for elements 2, 3) and keys 16 half + 8n +
 * lane % 4 * 2 + {0, 1}. `beside(t)` is called at each of D / 32 steps: other work, which then is
 * issued between products. */
template <typename T, int D, typename Beside>
static __device__ __forceinline__ void multiply_half(float (&sums)[HEAD_TILES][2][4],
                                                     const uint32_t (&a)[HEAD_TILES][D / 16][4],
                                                     uint32_t slot_address, int half,
                                                     Beside beside) {
    int lane = threadIdx.x % 32, odd = lane / 4 & 1;
    uint32_t from = slot_address + (half * 16 + lane / 4) * (D * 2) + lane % 4 * 16;
    uint32_t even_chunks = from + odd * 64, odd_chunks = from - odd * 64;
    const float zero[4] = {0, 0, 0, 0};
#pragma unroll
    for (int t = 0; t < D / 32; t++) {
        uint4 x[2];
#pragma unroll
        for (int n = 0; n < 2; n++)
            x[n] = load_shared_16((t % 2 ? odd_chunks : even_chunks) + t * 64 + n * 8 * D * 2);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint32_t b[2] = {x[n].x, x[n].y};
#pragma unroll
            for (int m = 0; m < HEAD_TILES; m++)
                if (t == 0)
                    matrix_multiply<T>(sums[m][n], a[m][0], b, zero);
                else
                    matrix_multiply<T>(sums[m][n], a[m][2 * t], b, sums[m][n]);
        }
        beside(t);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint32_t b[2] = {x[n].z, x[n].w};
#pragma unroll
            for (int m = 0; m < HEAD_TILES; m++)
                matrix_multiply<T>(sums[m][n], a[m][2 * t + 1], b, sums[m][n]);
        }
    }
}

/* Weighted sums of a thread's heads, for the queries of a group of N_OCTETS octets each and the
 * keys of lane % 4. Adds octets [first, last) of half a slot. PADDED: bit o of `heads` says whether
 * the thread's head in octet o exists. The product of a pad head is not always 0, since 0 * inf is
 * NaN. */
template <int N_OCTETS, bool PADDED>
static __device__ __forceinline__ void add_heads(float (&part)[OCTETS / N_OCTETS][8],
                                                 const float (&sums)[HEAD_TILES][2][4], int half,
                                                 const float (&w)[OCTETS], uint32_t heads,
                                                 int first, int last) {
#pragma unroll
    for (int o = first; o < last; o++)
#pragma unroll
        for (int key = 0; key < 4; key++) {
            float x = relu_keep_nan(sums[o / 2][key / 2][o % 2 * 2 + key % 2]);
            if (PADDED)
                x = heads >> o & 1 ? x : 0;
            float &sum = part[o / N_OCTETS][4 * half + key];
            sum = fmaf(w[o], x, o % N_OCTETS ? sum : 0);
        }
}

/* One step of sum_over_threads: lanes that differ in bit `distance` share N sums out between them,
 * the one without the bit keeping the first half. */
template <int N>
static __device__ __forceinline__ void share_out(float (&part)[8], int distance) {
    bool second = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float given = second ? part[i] : part[i + N / 2];
        float kept = second ? part[i + N / 2] : part[i];
        part[i] = kept + __shfl_xor_sync(~0u, given, distance);
    }
}

/* The threads lane / 4 = 0 .. 7 with one lane % 4 each have parts of the same 8 sums. Returns the
 * whole of sum number lane / 4. */
static __device__ __forceinline__ float sum_over_threads(float (&part)[8]) {
    share_out<8>(part, 16);
    share_out<4>(part, 8);
    share_out<2>(part, 4);
    return part[0];
}

/* The key of its slot whose score a lane has after sum_over_threads. */
static __device__ __forceinline__ int lane_key() {
    int lane = threadIdx.x % 32;
    return lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
}

/* A slot's key of a lane, and whether it lies on a page that is not there. */
struct lane_target {
    int32_t key;
    bool masked;
};

/* More than 64 heads: warps 2i and 2i + 1 have the lower and the upper of one query. `turn`
 * alternates, so that one barrier a slot is enough. */
static __device__ __forceinline__ void store_split(struct shared_state *state,
                                                   const struct sink *sink,
                                                   struct lane_target target, float score,
                                                   int turn) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *half = &state->upper_half[turn][warp / 2][lane];
    if (warp % 2)
        *half = score;
    named_barrier(1 + warp / 2, 64);
    if (warp % 2 == 0 && target.key < sink->visible)
        *(uint32_t *)(sink->out + target.key) =
            target.masked ? SCORE_MASKED : __float_as_uint(score + *half);
}

template <int N_OCTETS>
static __device__ __forceinline__ void store_scores(float (&part)[OCTETS / N_OCTETS][8],
                                                    const struct sink *sink,
                                                    struct lane_target target) {
    float *out = sink->out + target.key;
#pragma unroll
    for (int q = 0; q < OCTETS / N_OCTETS; q++) {
        float score = sum_over_threads(part[q]);
        if (q < sink->rows && target.key < sink->visible + q * sink->visible_step)
            *(uint32_t *)out = target.masked ? SCORE_MASKED : __float_as_uint(score);
        out += sink->row_stride;
    }
}

template <int N_OCTETS>
static __device__ __forceinline__ void store_slot(const struct plan *plan,
                                                  struct shared_state *state,
                                                  float (&part)[OCTETS / N_OCTETS][8],
                                                  const struct sink *sink,
                                                  struct lane_target target, int turn) {
    if (N_OCTETS == OCTETS && plan->split)
        store_split(state, sink, target, sum_over_threads(part[0]), turn);
    else
        store_scores<N_OCTETS>(part, sink, target);
}

/* A slot's products, both halves, to scores, without other work beside it. */
template <int N_OCTETS, bool PADDED>
static __device__ __forceinline__ void sum_slot_of(const struct plan *plan,
                                                   struct shared_state *state,
                                                   const float (&left)[HEAD_TILES][2][4],
                                                   const float (&right)[HEAD_TILES][2][4],
                                                   const float (&w)[OCTETS], uint32_t heads,
                                                   const struct sink *sink,
                                                   struct lane_target target, int turn) {
    float part[OCTETS / N_OCTETS][8];
    add_heads<N_OCTETS, PADDED>(part, left, 0, w, heads, 0, OCTETS);
    add_heads<N_OCTETS, PADDED>(part, right, 1, w, heads, 0, OCTETS);
    store_slot<N_OCTETS>(plan, state, part, sink, target, turn);
}

template <bool PADDED>
static __device__ __forceinline__ void sum_slot(const struct plan *plan,
                                                struct shared_state *state,
                                                const float (&left)[HEAD_TILES][2][4],
                                                const float (&right)[HEAD_TILES][2][4],
                                                const float (&w)[OCTETS], uint32_t heads,
                                                const struct sink *sink,
                                                struct lane_target target, int turn) {
    if (plan->head_shift == 6)
        sum_slot_of<8, PADDED>(plan, state, left, right, w, heads, sink, target, turn);
    else if (plan->head_shift == 5)
        sum_slot_of<4, PADDED>(plan, state, left, right, w, heads, sink, target, turn);
    else if (plan->head_shift == 4)
        sum_slot_of<2, PADDED>(plan, state, left, right, w, heads, sink, target, turn);
    else
        sum_slot_of<1, PADDED>(plan, state, left, right, w, heads, sink, target, turn);
}

static __device__ __forceinline__ struct sink make_sink(const struct slab *s,
                                                        const struct plan *plan,
                                                        const struct item *item, int group) {
    int first, head;
    head_place(plan, group, 0, &first, &head);
    struct sink sink;
    sink.out = item->out + first * s->scores_stride;
    sink.row_stride = s->scores_stride;
    sink.rows = item->rows - first;
    sink.visible = item->visible + first * item->visible_step;
    sink.visible_step = item->visible_step;
    return sink;
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* One item, whose first slot has place `first` in the ring and is number `used` of the block's.
 *
 * With 2^spread groups, rounded up, a slot has as many readers, and a warp reads every `stride`th
 * slot, stride * 2^spread = 8. Each reader arrives `stride` times at the slot's barrier, which so
 * always waits for 8. A warp fills slots up to `ahead` beyond the one it reads: that is 8 less
 * than the ring has, so that it waits for readers who are 8 slots behind, if at all. The last of
 * all warps finds full what it wants to read and read what it wants to fill: no deadlock.
 *
 * N_OCTETS 8 or 4: a query has just so many octets of heads, no pad heads; then the sums over the
 * heads of half a slot are issued between the products of the next half. Two warps share an issue
 * port and tend to run in step, so that products would otherwise wait for sums: 1.6 times the time.
 * N_OCTETS 0: any number of heads. */
template <typename T, int D, bool ALIGNED, int N_OCTETS>
static __device__ __forceinline__ void run_item(const struct slab *s, const struct plan *plan,
                                                const struct item *item,
                                                struct shared_state *state, uint32_t ring_address,
                                                struct ring first, uint32_t used) {
    constexpr uint32_t SLOT_BYTES = SLOT_KEYS * D * 2;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t full = smem_address(state->full), empty = smem_address(state->empty);
    int32_t n_slots = item->slot_end - item->slot_begin, ahead = plan->n_slots - SLOT_SLACK;

    int32_t filled = (warp - used) % WARPS;
    struct ring fill = first;
    advance(&fill, filled, plan->n_slots);
    auto fill_next = [&] {
        mbarrier_wait(empty + fill.slot * 8, fill.parity ^ 1);
        fill_slot<D, ALIGNED>(s, plan, item, item->slot_begin + filled,
                              ring_address + fill.slot * SLOT_BYTES, full + fill.slot * 8);
        advance(&fill, WARPS, plan->n_slots);
        filled += WARPS;
    };
    while (filled < ahead && filled < n_slots)
        fill_next();

    int n_groups = plan->split ? item->rows * 2
                               : ((item->rows << plan->head_shift) + GROUP - 1) / GROUP;
    int spread = n_groups > 4 ? 3 : n_groups > 2 ? 2 : n_groups - 1;
    int group = warp & ((1 << spread) - 1), stride = WARPS >> spread;

    uint32_t a[HEAD_TILES][D / 16][4];
    float w[OCTETS];
    load_heads<D, ALIGNED>(s, plan, item, group, a);
    uint32_t heads = load_weights(s, plan, item, group, w);
    bool padded = s->p.n_heads != (plan->split ? 2 * GROUP : 1 << plan->head_shift);
    struct sink *sink = &state->sink[warp];
    if (lane == 0)
        *sink = make_sink(s, plan, item, group);
    __syncwarp();

    struct ring read = first;
    advance(&read, warp >> spread, plan->n_slots);
    auto begin_slot = [&](int32_t slot) {
        if (filled < n_slots && filled <= slot + ahead)
            fill_next();
        struct lane_target target = {(item->slot_begin + slot) * SLOT_KEYS + lane_key(), false};
        if (s->p.page_size && target.key < item->last_visible) {
            int32_t id = __ldg(item->table + page_of(target.key, plan->page_magic));
            target.masked = id < 0 || id >= s->p.n_pages;
        }
        mbarrier_wait(full + read.slot * 8, read.parity);
        return target;
    };
    auto end_slot = [&] {
        __syncwarp();
        if (lane < stride)
            mbarrier_arrive(empty + read.slot * 8);
        advance(&read, stride, plan->n_slots);
    };

    if (group >= n_groups) {
        for (int32_t slot = warp >> spread; slot < n_slots; slot += stride) {
            begin_slot(slot);
            end_slot();
        }
    } else if constexpr (N_OCTETS != 0) {
        constexpr int AT_ONCE = OCTETS / (D / 32);
        float left[HEAD_TILES][2][4], right[HEAD_TILES][2][4] = {};
        float part[OCTETS / N_OCTETS][8] = {};
        struct lane_target before = {INT32_MAX, false};
        int turn = 0;
        for (int32_t slot = warp >> spread; slot < n_slots; slot += stride) {
            struct lane_target target = begin_slot(slot);
            uint32_t address = ring_address + read.slot * SLOT_BYTES;
            multiply_half<T, D>(left, a, address, 0, [&](int t) {
                add_heads<N_OCTETS, false>(part, right, 1, w, 0, t * AT_ONCE, (t + 1) * AT_ONCE);
            });
            store_slot<N_OCTETS>(plan, state, part, sink, before, turn);
            multiply_half<T, D>(right, a, address, 1, [&](int t) {
                add_heads<N_OCTETS, false>(part, left, 0, w, 0, t * AT_ONCE, (t + 1) * AT_ONCE);
            });
            end_slot();
            before = target;
            turn ^= 1;
        }
        add_heads<N_OCTETS, false>(part, right, 1, w, 0, 0, OCTETS);
        store_slot<N_OCTETS>(plan, state, part, sink, before, turn);
    } else {
        int turn = 0;
        for (int32_t slot = warp >> spread; slot < n_slots; slot += stride, turn ^= 1) {
            struct lane_target target = begin_slot(slot);
            float left[HEAD_TILES][2][4], right[HEAD_TILES][2][4];
            uint32_t address = ring_address + read.slot * SLOT_BYTES;
            multiply_half<T, D>(left, a, address, 0, [](int) {});
            multiply_half<T, D>(right, a, address, 1, [](int) {});
            end_slot();
            if (padded)
                sum_slot<true>(plan, state, left, right, w, heads, sink, target, turn);
            else
                sum_slot<false>(plan, state, left, right, w, heads, sink, target, turn);
        }
    }
    while (filled < n_slots)
        fill_next();
}

template <typename T, int D, bool ALIGNED, int N_OCTETS>
__global__ void __launch_bounds__(THREADS, 1)
    score_kernel(const __grid_constant__ struct slab s, const __grid_constant__ struct plan plan) {
    extern __shared__ __align__(128) unsigned char memory[];
    struct shared_state *state =
        (struct shared_state *)(memory + plan.n_slots * (SLOT_KEYS * D * 2));
    if (threadIdx.x < plan.n_slots) {
        mbarrier_init(smem_address(&state->full[threadIdx.x]), 32);
        mbarrier_init(smem_address(&state->empty[threadIdx.x]), WARPS);
    }
    find_run(&s.p, &plan.line, state);
    struct ring first = {0, 0};
    uint32_t used = 0;
    int warp = threadIdx.x / 32;
    for (;;) {
        struct item *item = &state->item[warp];
        __syncwarp();
        bool more = false;
        if (threadIdx.x % 32 == 0)
            more = next_item(&s, &plan.line, &state->walk[warp], item);
        if (!__shfl_sync(~0u, more, 0))
            break;
        run_item<T, D, ALIGNED, N_OCTETS>(&s, &plan, item, state, smem_address(memory), first,
                                          used);
        uint32_t slots = item->slot_end - item->slot_begin, place = first.slot + slots;
        first.parity ^= place / plan.n_slots & 1;
        first.slot = place % plan.n_slots;
        used += slots;
    }
}

/* ---- the host's side ------------------------------------------------------------------------- */

static bool is_aligned(const struct problem *p) {
    uint64_t all = (uint64_t)(uintptr_t)p->query | (uint64_t)p->query_batch_stride |
                   (uint64_t)(uintptr_t)p->key | (uint64_t)p->key_batch_stride;
    return all % 16 == 0;
}

static struct plan make_plan(const struct slab *s) {
    struct plan plan;
    int heads = s->p.n_heads;
    plan.split = heads > GROUP;
    plan.head_shift = heads > 32 ? 6 : heads > 16 ? 5 : heads > 8 ? 4 : 3;
    plan.line.row_begin = s->row_begin;
    plan.line.row_end = s->row_end;
    plan.line.block_shift = plan.split ? 2 : 9 - plan.head_shift; /* 8 groups of 64 heads */
    plan.line.charge = SWITCH_CHARGE;
    plan.zero = 0;
    int64_t sixteens = s->p.page_size ? s->p.page_size / 16 : 1;
    plan.page_magic = ((uint64_t)1 << PAGE_SHIFT) / sixteens + 1;
    return plan;
}

template <typename T, int D, bool ALIGNED, int N_OCTETS>
static cudaError_t launch(const struct slab *s, cudaStream_t stream) {
    constexpr int SLOT_BYTES = SLOT_KEYS * D * 2;
    struct plan plan = make_plan(s);
    int device, most;
    cudaError_t status = cudaGetDevice(&device);
    if (!status)
        status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status)
        return status;
    int slots = (most - (int)sizeof(struct shared_state)) / SLOT_BYTES;
    if (slots < SLOTS_MIN)
        return cudaErrorInvalidDevice;
    plan.n_slots = slots < SLOTS_MAX ? slots : SLOTS_MAX;
    int bytes = plan.n_slots * SLOT_BYTES + (int)sizeof(struct shared_state);
    status = cudaFuncSetAttribute((const void *)score_kernel<T, D, ALIGNED, N_OCTETS>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status)
        return status;
    score_kernel<T, D, ALIGNED, N_OCTETS><<<s->n_sm, THREADS, bytes, stream>>>(*s, plan);
    return cudaGetLastError();
}

template <typename T, int D>
static cudaError_t launch_for(const struct slab *s, cudaStream_t stream) {
    int heads = s->p.n_heads;
    if (!is_aligned(&s->p))
        return launch<T, D, false, 0>(s, stream);
    if (heads == GROUP || heads == 2 * GROUP)
        return launch<T, D, true, 8>(s, stream);
    if (heads == GROUP / 2)
        return launch<T, D, true, 4>(s, stream);
    return launch<T, D, true, 0>(s, stream);
}

extern "C" int lidx_launch_score_smxx(const struct slab *s, void *stream) {
    if (s->row_begin >= s->row_end || s->p.n_key == 0)
        return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    if (s->p.dtype == DTYPE_BF16)
        return s->p.head_dim == 128 ? launch_for<__nv_bfloat16, 128>(s, on)
                                    : launch_for<__nv_bfloat16, 64>(s, on);
    return s->p.head_dim == 128 ? launch_for<__half, 128>(s, on) : launch_for<__half, 64>(s, on);
}

/* ---- bad input -------------------------------------------------------------------------------- */

static __device__ bool is_bad_length(const int32_t *lengths, int packed, int64_t limit, int64_t b) {
    if (!lengths)
        return false;
    int64_t low = packed && b ? lidx_clamp(lengths[b - 1], 0, limit) : 0;
    return lengths[b] < low || lengths[b] > limit;
}

/* A block counts what was wrong with every gridDim.x-th batch. */
__global__ void __launch_bounds__(THREADS)
    count_kernel(const __grid_constant__ struct problem p) {
    uint32_t bad = 0;
    for (int64_t b = blockIdx.x; b < p.n_batch; b += gridDim.x) {
        if (threadIdx.x == 0) {
            bad += is_bad_length(p.query_lengths, p.query_packed, p.n_query, b);
            bad += is_bad_length(p.key_lengths, p.key_packed, p.n_key, b);
        }
        struct extent e = lidx_extent(&p, b);
        int64_t pages = p.page_size && e.n_query ? (e.n_key + p.page_size - 1) / p.page_size : 0;
        const int32_t *table =
            (const int32_t *)((const unsigned char *)p.page_table + b * p.page_table_stride);
        for (int64_t i = threadIdx.x; i < pages; i += THREADS)
            bad += table[i] < 0 || table[i] >= p.n_pages;
    }
    for (int d = 16; d > 0; d /= 2)
        bad += __shfl_xor_sync(~0u, bad, d);
    if (threadIdx.x % 32 == 0 && bad)
        atomicAdd(p.error_word, bad);
}

extern "C" int lidx_launch_count(const struct slab *s, void *stream) {
    if (!s->p.error_word || s->p.n_batch == 0)
        return cudaSuccess;
    int64_t most = 4 * s->n_sm;
    int blocks = (int)(s->p.n_batch < most ? s->p.n_batch : most);
    count_kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(s->p);
    return cudaGetLastError();
}
