/* SPDX-License-Identifier: Apache-2.0
 *
 * A few rows of up to 131,072 keys: a cluster of eight blocks holds a row in its registers. Each
 * block counts its part and adds its counts to those of all; then all know the bin of the threshold
 * and how many candidates lie before each bin. A candidate's expected rank says which block will
 * write it, and in which of that block's buckets it goes; the blocks sum the buckets' sizes, order
 * the few members of each and write them. No sample, no second reading, no list that one block
 * orders alone, nothing through global memory.
 *
 * Data whose first digit leaves too many candidates, or crowds a bucket, take feed_cluster: as many
 * digits as it takes, counted and summed in the same way, and the candidates in the first block's
 * list, which it orders as it would any.
 */
#ifndef LIDX_TOPK_CLUSTER_CUH
#define LIDX_TOPK_CLUSTER_CUH

#include "cluster.cuh"
#include "topk_row.cuh"

enum {
    CLUSTER = 8,            /* the most that every GPU with clusters takes */
    CLUSTER_GROUPS = 4,     /* of four scores of a thread */
    CLUSTER_KEYS = 131072,  /* that its registers hold: 8 x 1024 threads x 16 */
    PLACES = 2048,          /* buckets of a block */
    ROOM = 8,               /* members that a bucket holds */
    MOST = PLACES * CLUSTER / 2, /* candidates, two buckets each */
};

template <class Z> struct cluster_shared {
    struct shared<Z> row;  /* hist: the sums over the cluster */
    uint32_t count[BINS];  /* of this block's part */
    uint32_t base;         /* where in the list this block's candidates go */
    uint32_t crowded;      /* somewhere in the cluster a bucket got more than it holds */
    alignas(16) uint32_t filled[PLACES / 4]; /* members of each bucket, a byte each */
    alignas(16) uint32_t first[PLACES / 4];  /* rank of the first member of four buckets */
    uint64_t bucket[ROOM][PLACES];
};

/* ---- the row --------------------------------------------------------------------------------- */

/* Counts the digit at `shift` of the part's keys whose earlier digits are `prefix`. */
template <class Z>
static __device__ __forceinline__ void count_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                  uint32_t part, uint32_t prefix, int shift) {
    const int above = shift ? 21 : 10;
    const uint32_t mask = shift ? 2047 : 1023;
#pragma unroll
    for (uint32_t i = 0; i < 4 * CLUSTER_GROUPS; i++)
        if (i / 4 * 4 * Z::THREADS < part && (shift == 21 || key[i] >> above == prefix))
            atomicAdd(&c->count[key[i] >> shift & mask], 1u);
}

/* Sends the part's keys up to `edge` to the first block. */
template <class Z>
static __device__ __forceinline__ void send_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                 uint32_t begin, uint32_t edge) {
    struct shared<Z> *s = &c->row;
    uint32_t take = 0, total;
#pragma unroll
    for (uint32_t i = 0; i < 4 * CLUSTER_GROUPS; i++)
        take += key[i] <= edge;
    uint32_t at = block_before(s, take, 1, &total);
    if (threadIdx.x == 0)
        c->base = remote_add(remote(&s->n_list, 0), total);
    __syncthreads();
    uint32_t to = remote(s->list, 0) + (c->base + at) * (uint32_t)sizeof(uint64_t);
#pragma unroll
    for (uint32_t i = 0; i < 4 * CLUSTER_GROUPS; i++)
        if (key[i] <= edge) {
            remote_store(to, pair(key[i], begin + 4 * (i / 4 * Z::THREADS + threadIdx.x) + i % 4));
            to += sizeof(uint64_t);
        }
}

/* This thread's keys of the part [begin, end). */
template <class Z>
static __device__ __forceinline__ void load_part(uint32_t *key, const float *score, uint32_t begin,
                                                 uint32_t end) {
#pragma unroll
    for (uint32_t g = 0; g < CLUSTER_GROUPS; g++) {
        float4 x = load4(score, begin + 4 * (g * Z::THREADS + threadIdx.x), end);
        key[4 * g] = key_of(x.x);
        key[4 * g + 1] = key_of(x.y);
        key[4 * g + 2] = key_of(x.z);
        key[4 * g + 3] = key_of(x.w);
    }
}

/* Counts of all blocks -> row.hist of all blocks, which is zero: each adds its own everywhere. */
template <class Z>
static __device__ __forceinline__ void spread_counts(struct cluster_shared<Z> *c, uint32_t rank) {
    static_assert(BINS == 2 * Z::THREADS, "two bins to a thread");
    uint32_t bin = 2 * threadIdx.x, x = c->count[bin], y = c->count[bin + 1];
    if (x | y) {
#pragma unroll
        for (uint32_t i = 0; i < CLUSTER; i++) {
            uint32_t to = remote(&c->row.hist[bin], (rank + i) % CLUSTER);
            if (x)
                remote_count(to, x);
            if (y)
                remote_count(to + sizeof(uint32_t), y);
        }
    }
}

/* Brings the part's keys up to `edge` to the block's own list, then each to its bucket, in the
 * block that has it: by expected rank, as order() does, `spread` buckets a candidate. */
template <class Z>
static __device__ __forceinline__ void deal_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                 uint32_t begin, uint32_t edge, uint32_t spread) {
    struct shared<Z> *s = &c->row;
    uint32_t take = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4 * CLUSTER_GROUPS; i++)
        take += key[i] <= edge;
    uint32_t at = reserve(s, take);
#pragma unroll
    for (uint32_t i = 0; i < 4 * CLUSTER_GROUPS; i++) {
        if (key[i] <= edge && at < Z::LIST)
            s->list[at] = pair(key[i], begin + 4 * (i / 4 * Z::THREADS + threadIdx.x) + i % 4);
        at += key[i] <= edge;
    }
    bool fits = at <= Z::LIST;
    __syncthreads();
    uint32_t n_list = min(s->n_list, Z::LIST);
    for (uint32_t j = threadIdx.x; j < n_list; j += Z::THREADS) {
        uint64_t item = s->list[j];
        uint32_t word = item >> 32, bin = word >> 21, before = s->hist[bin];
        uint32_t number = spread * before +
                          __umulhi(word << 11, spread * (s->hist[bin + 1] - before));
        uint32_t place = number % PLACES, owner = number / PLACES, bit = 8 * (place % 4);
        uint32_t old = remote_add(remote(&c->filled[place / 4], owner), 1u << bit);
        uint32_t slot = old >> bit & 255;
        fits = fits && slot < ROOM;
        if (slot < ROOM)
            remote_store(remote(&c->bucket[slot][place], owner), item);
    }
    if (!fits)
        for (uint32_t i = 0; i < CLUSTER; i++)
            remote_count(remote(&c->crowded, i), 1);
}

/* What an output slot without a key gets, as an item: index -1 and value -inf. */
static const uint64_t NOTHING = 0xFF800000FFFFFFFFull;

static __device__ __forceinline__ void write_slot(const struct row *r, int dtype, uint32_t j,
                                                  uint64_t item) {
    r->indices[j] = (int32_t)item;
    if (r->values)
        store_value(r->values, j, dtype, score_of(item >> 32));
}

/* Each block writes the members of its buckets where they belong. Every block sums all buckets of
 * the cluster, 16 of a block to a thread, so that it knows the ranks of its own. */
template <class Z>
static __device__ __forceinline__ void write_buckets(struct cluster_shared<Z> *c, uint32_t rank,
                                                     int dtype) {
    static_assert(PLACES * CLUSTER == 16 * Z::THREADS, "16 buckets to a thread");
    const uint32_t SUMMERS = PLACES / 16;
    struct shared<Z> *s = &c->row;
    const struct row *r = &s->row;
    uint32_t block = threadIdx.x / SUMMERS, four = threadIdx.x % SUMMERS * 4, total;
    uint4 x = remote_load4(remote(&c->filled[four], block));
    uint32_t a = sum_bytes(x.x), b = sum_bytes(x.y), d = sum_bytes(x.z), e = sum_bytes(x.w);
    uint32_t before = block_before(s, a + b + d + e, 1, &total);
    cluster_arrive(); /* this block has read all that it will of the others */
    if (block == rank)
        *(uint4 *)&c->first[four] = make_uint4(before, before + a, before + a + b,
                                               before + a + b + d);
    __syncthreads();
#pragma unroll 1
    for (uint32_t place = threadIdx.x; place < PLACES; place += Z::THREADS) {
        uint32_t word = c->filled[place / 4], count = byte_down(word, place) & 255;
        uint32_t begin = __dp4a(word & ~byte_up(ALL_BITS, place), EACH_BYTE, c->first[place / 4]);
#pragma unroll 1
        for (uint32_t i = 0; i < count; i++) {
            uint64_t item = c->bucket[i][place];
            uint32_t j = begin;
#pragma unroll 1
            for (uint32_t other = 0; other < count; other++)
                j += c->bucket[other][place] < item;
            if (j < r->top_k)
                write_slot(r, dtype, j, item);
        }
    }
    if (rank == 0)
#pragma unroll 1
        for (uint32_t j = total + threadIdx.x; j < r->top_k; j += Z::THREADS)
            write_slot(r, dtype, j, NOTHING);
    cluster_wait();
}

/* The whole row, by all blocks alike, if the first digit narrows it enough and its scores spread
 * evenly over the bins. Returns whether it was so; all blocks agree. */
template <class Z>
static __device__ __forceinline__ bool deal_row(struct cluster_shared<Z> *c, int dtype) {
    struct shared<Z> *s = &c->row;
    const uint32_t rank = cluster_rank(), n = s->row.n;
    const uint32_t part = n ? ((n - 1) / CLUSTER + 64) / 64 * 64 : 0, begin = min(rank * part, n);
    uint32_t key[4 * CLUSTER_GROUPS];
    load_part<Z>(key, s->row.score, begin, min(begin + part, n));
    count_part(c, key, part, 0, 21);
    __syncthreads();
    cluster_wait(); /* all have zeroed their memory */
    spread_counts(c, rank);
    cluster_sync();
    scan_hist(s, s->row.top_k, 1);
    uint32_t found = s->total ? s->before + s->count : 0;
    if (found > MOST)
        return false;
    if (found)
        deal_part(c, key, begin, s->bin << 21 | 0x1FFFFF, PLACES * CLUSTER / found);
    cluster_sync();
    if (c->crowded)
        return false;
    write_buckets(c, rank, dtype);
    return true;
}

/* The list of the first block, from the parts of all; counts and sums are zero in all blocks.
 * Digits of 11, 11 and 10 bits, as many as it takes until the candidates fit: one or two, unless
 * more keys are equal than fit. True in the first block alone. */
template <class Z> static __device__ __noinline__ bool feed_cluster(void) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    const uint32_t rank = cluster_rank(), n = s->row.n;
    const uint32_t part = ((n - 1) / CLUSTER + 64) / 64 * 64, begin = rank * part;
    const uint32_t end = min(begin + part, n);
    static_assert(CLUSTER_KEYS == 4 * CLUSTER_GROUPS * CLUSTER * Z::THREADS, "room in registers");
    uint32_t key[4 * CLUSTER_GROUPS], prefix = 0, better = 0, edge;
    load_part<Z>(key, s->row.score, begin, end);
    int shift = 21;
    for (;; shift = shift == 21 ? 10 : 0) {
        count_part(c, key, part, prefix, shift);
        __syncthreads();
        spread_counts(c, rank);
        cluster_sync();
        scan_hist(s, s->row.top_k - better, shift == 21, shift == 21);
        if (s->total == 0) /* all are masked */
            return rank == 0;
        prefix = prefix << (shift ? 11 : 10) | s->bin;
        better += s->before;
        edge = prefix << shift | ((1u << shift) - 1);
        if (better + s->count <= Z::LIST || shift == 0)
            break;
        zero<Z, BINS>(c->count);
        zero<Z, BINS>(s->hist);
        cluster_sync();
    }
    bool fits = better + s->count <= Z::LIST;
    if (fits)
        send_part(c, key, begin, edge);
    cluster_sync();
    if (rank)
        return false;
    if (!fits)
        collect<Z>(edge, s->row.top_k - better);
    if (shift != 21)
        table_from_list<Z>(edge, 0);
    else if (s->count > WIDE_BIN)
        measure_last_bin<Z>();
    return true;
}

/* As begin_row, with what the cluster needs; what only feed_uneven needs is left to it. */
template <class Z>
static __device__ __forceinline__ void begin_cluster(struct cluster_shared<Z> *c,
                                                     const struct slab *slab) {
    struct shared<Z> *s = &c->row;
    zero<Z, BINS>(s->hist);
    zero<Z, BINS>(c->count);
    zero<Z, PLACES / 4>(c->filled);
    if (threadIdx.x == 0)
        s->n_list = c->crowded = 0;
    cluster_arrive();
    await_row(s, slab, slab->row_begin + blockIdx.x / CLUSTER);
}

/* Fills the list with what deal_row could not do. True in the first block alone. */
template <class Z> static __device__ __noinline__ bool feed_uneven(void) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    clear_row(s);
    zero<Z, BINS>(c->count);
    __syncthreads();
    if (s->row.n > SHORT) {
        cluster_sync();
        return feed_cluster<Z>();
    }
    if (cluster_rank())
        return false;
    feed_short<Z>();
    return true;
}

template <class Z>
static __global__ void __launch_bounds__(Z::THREADS, 1)
cluster_kernel(const __grid_constant__ struct launch l) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    begin_cluster(c, &l.slab);
    if (deal_row(c, l.slab.p.values_dtype) || !feed_uneven<Z>())
        return;
    finish_row(s, &l.slab.p);
#endif
}

#endif
