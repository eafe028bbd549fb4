/* SPDX-License-Identifier: Apache-2.0
 *
 * A few rows of up to 131,072 keys: a cluster of eight blocks holds a row in its registers. Each
 * block counts its part and adds its counts to those of all; then all know the bin of the threshold
 * and how many candidates lie before each bin. A candidate's expected rank says which block will
 * write it; it is put into that block's inbox, where each sender has room of its own and counts by
 * itself, so that nothing is asked back over the cluster. Each block then orders and writes its
 * share, in buckets of its own. No sample, no second reading, no list that one block orders alone,
 * nothing through global memory.
 *
 * Data whose first digit leaves too many candidates, or too many for an inbox, take feed_cluster:
 * as many digits as it takes, counted and summed in the same way, and the candidates in the first
 * block's list, which it orders as it would any.
 */
#ifndef LIDX_TOPK_CLUSTER_CUH
#define LIDX_TOPK_CLUSTER_CUH

#include "cluster.cuh"
#include "topk_row.cuh"

enum {
    CLUSTER = 8,                 /* the most that every GPU with clusters takes */
    CLUSTER_GROUPS = 4,          /* of four scores of a thread, at most */
    CLUSTER_KEYS = 131072,       /* that its registers hold: 8 x 1024 threads x 16 */
    PLACES = 2048,               /* buckets of a block */
    MOST = PLACES * CLUSTER / 2, /* candidates, two buckets each */
    SHARE = 512,                 /* candidates that a block can send to another */
    SENDER_THREADS = 128,        /* 1024 / CLUSTER: they see to what one block has sent */
};

template <class Z> struct cluster_shared {
    struct shared<Z> row;            /* hist: the sums over the cluster */
    uint32_t count[BINS];            /* of this block's part */
    uint32_t base;                   /* where in the list this block's candidates go */
    uint32_t dealt[CLUSTER];         /* candidates that this block has for each */
    uint32_t sent[CLUSTER][CLUSTER]; /* the same of all blocks: [from][to] */
    uint64_t inbox[CLUSTER][SHARE];  /* what each block has sent to this one */
    uint32_t slot[CLUSTER][SHARE];   /* its bucket and arrival, then the bucket's place and size */
};

/* ---- the row --------------------------------------------------------------------------------- */

/* Counts the digit at `shift` of the part's keys whose earlier digits are `prefix`. */
template <class Z, int GROUPS>
static __device__ __forceinline__ void count_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                  uint32_t part, uint32_t prefix, int shift) {
    const int above = shift ? 21 : 10;
    const uint32_t mask = shift ? 2047 : 1023;
#pragma unroll
    for (uint32_t i = 0; i < 4 * GROUPS; i++)
        if (i / 4 * 4 * Z::THREADS < part && (shift == 21 || key[i] >> above == prefix))
            atomicAdd(&c->count[key[i] >> shift & mask], 1u);
}

/* How many of this thread's keys are up to `edge`. */
template <int GROUPS>
static __device__ __forceinline__ uint32_t count_to_edge(const uint32_t *key, uint32_t edge) {
    uint32_t n = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4 * GROUPS; i++)
        n += key[i] <= edge;
    return n;
}

/* Sends the part's keys up to `edge` to the first block. */
template <class Z>
static __device__ __forceinline__ void send_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                 uint32_t begin, uint32_t edge) {
    struct shared<Z> *s = &c->row;
    uint32_t total, at = block_before(s, count_to_edge<CLUSTER_GROUPS>(key, edge), 1, &total);
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
template <class Z, int GROUPS>
static __device__ __forceinline__ void load_part(uint32_t *key, const float *score, uint32_t begin,
                                                 uint32_t end) {
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
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

/* The bucket of a candidate in the whole cluster: by expected rank, as order() does, `spread`
 * buckets a candidate. */
template <class Z>
static __device__ __forceinline__ uint32_t place_in_cluster(const struct shared<Z> *s,
                                                            uint64_t item, uint32_t spread) {
    uint32_t key = item >> 32, bin = key >> 21, before = s->hist[bin];
    return spread * before + __umulhi(key << 11, spread * (s->hist[bin + 1] - before));
}

/* Brings the part's keys up to `edge` to the block's own list, then each to the inbox of the block
 * that has its bucket, and tells all blocks how many went where: more than SHARE, if some did not.
 */
template <class Z, int GROUPS>
static __device__ __forceinline__ void deal_part(struct cluster_shared<Z> *c, const uint32_t *key,
                                                 uint32_t begin, uint32_t edge, uint32_t spread,
                                                 uint32_t rank) {
    struct shared<Z> *s = &c->row;
    uint32_t take = count_to_edge<GROUPS>(key, edge), at = reserve(s, take);
    if (at + take <= Z::LIST) {
        uint64_t *to = s->list + at;
#pragma unroll
        for (uint32_t i = 0; i < 4 * GROUPS; i++)
            if (key[i] <= edge)
                *to++ = pair(key[i], begin + 4 * (i / 4 * Z::THREADS + threadIdx.x) + i % 4);
    }
    __syncthreads();
    uint32_t n_list = s->n_list;
#pragma unroll 1
    for (uint32_t j = threadIdx.x; j < n_list && n_list <= Z::LIST; j += Z::THREADS) {
        uint64_t item = s->list[j];
        uint32_t owner = place_in_cluster(s, item, spread) / PLACES;
        uint32_t number = atomicAdd(&c->dealt[owner], 1u);
        if (number < SHARE)
            remote_store(remote(&c->inbox[rank][number], owner), item);
    }
    __syncthreads();
    if (threadIdx.x < CLUSTER * CLUSTER) {
        uint32_t owner = threadIdx.x / CLUSTER;
        uint32_t number = n_list <= Z::LIST ? c->dealt[owner] : SHARE + 1;
        remote_count(remote(&c->sent[rank][owner], threadIdx.x % CLUSTER), number);
    }
}

/* Counts in buckets what is in the inbox, of which this thread's sender has put in `count`. */
template <class Z>
static __device__ __forceinline__ void enter_inbox(struct cluster_shared<Z> *c, uint32_t count,
                                                   uint32_t spread) {
    struct shared<Z> *s = &c->row;
    uint32_t from = threadIdx.x / SENDER_THREADS, worst = 0;
#pragma unroll 1
    for (uint32_t j = threadIdx.x % SENDER_THREADS; j < count; j += SENDER_THREADS) {
        uint32_t bucket = place_in_cluster(s, c->inbox[from][j], spread) % PLACES;
        uint32_t slot = enter_bucket(s, bucket);
        c->slot[from][j] = slot;
        worst = max(worst, slot);
    }
    if (worst >= Z::CROWD << 16)
        s->crowded = 1;
}

/* Writes the block's share, the first of which is number `first` of the row: a candidate that has a
 * bucket for itself at once, the others when all of their bucket are in the list. */
template <class Z>
static __device__ __forceinline__ void write_share(struct cluster_shared<Z> *c, uint32_t count,
                                                   uint32_t first, int dtype) {
    struct shared<Z> *s = &c->row;
    const struct row *r = &s->row;
    const uint32_t from = threadIdx.x / SENDER_THREADS, own = threadIdx.x % SENDER_THREADS;
    bool has_word = threadIdx.x < PLACES / 4;
    uint32_t total, sum = has_word ? sum_bytes(s->counter[threadIdx.x]) : 0;
    uint32_t before = block_before(s, sum, 1, &total);
    if (has_word)
        c->count[threadIdx.x] = before;
    __syncthreads();
#pragma unroll 1
    for (uint32_t j = own; j < count; j += SENDER_THREADS) {
        uint32_t slot = c->slot[from][j], bucket = slot & 0xFFFF, word = s->counter[bucket / 4];
        uint32_t earlier = word & ~byte_up(ALL_BITS, bucket);
        uint32_t begin = __dp4a(earlier, EACH_BYTE, c->count[bucket / 4]);
        uint32_t members = byte_down(word, bucket) & 255;
        uint64_t item = c->inbox[from][j];
        if (members == 1)
            write_slot(r, dtype, first + begin, item);
        else
            s->list[begin + (slot >> 16)] = item;
        c->slot[from][j] = begin | members << 16;
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t j = own; j < count; j += SENDER_THREADS) {
        uint32_t slot = c->slot[from][j], begin = slot & 0xFFFF, members = slot >> 16;
        if (members == 1)
            continue;
        uint64_t item = c->inbox[from][j];
        uint32_t to = first + begin;
#pragma unroll 1
        for (uint32_t k = begin; k < begin + members; k++)
            to += s->list[k] < item;
        write_slot(r, dtype, to, item);
    }
}

/* The same where a bucket is crowded: the share becomes the list, which is ordered by splitters. */
template <class Z> static __device__ __noinline__ void write_crowded(uint32_t first, int dtype) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    const uint32_t rank = cluster_rank();
    uint32_t total = 0;
#pragma unroll 1
    for (uint32_t from = 0; from < CLUSTER; from++) {
        uint32_t count = c->sent[from][rank];
        for (uint32_t j = threadIdx.x; j < count; j += Z::THREADS)
            s->list[total + j] = c->inbox[from][j];
        total += count;
    }
    if (threadIdx.x == 0)
        s->n_list = total;
    __syncthreads();
    order_crowded<Z>();
    for (uint32_t j = threadIdx.x; j < total; j += Z::THREADS)
        write_slot(&s->row, dtype, first + j, s->list[j]);
}

/* Orders and writes what is in the inbox. False, in all blocks alike, if something did not fit into
 * one. */
template <class Z>
static __device__ __forceinline__ bool write_dealt(struct cluster_shared<Z> *c, uint32_t rank,
                                                   uint32_t found, uint32_t spread, int dtype) {
    struct shared<Z> *s = &c->row;
    uint32_t owner = lane_id() % CLUSTER, first = 0, most = 0;
#pragma unroll
    for (uint32_t from = 0; from < CLUSTER; from++) {
        uint32_t number = c->sent[from][owner];
        first += number;
        most = max(most, number);
    }
    if (__any_sync(ALL_LANES, most > SHARE))
        return false;
    first = __reduce_add_sync(ALL_LANES, lane_id() < rank ? first : 0);
    uint32_t count = c->sent[threadIdx.x / SENDER_THREADS][rank];
    enter_inbox(c, count, spread);
    __syncthreads();
    if (s->crowded)
        write_crowded<Z>(first, dtype);
    else
        write_share(c, count, first, dtype);
    if (rank == 0)
#pragma unroll 1
        for (uint32_t j = found + threadIdx.x; j < s->row.top_k; j += Z::THREADS)
            write_slot(&s->row, dtype, j, NOTHING);
    return true;
}

/* The whole row, by all blocks alike, if the first digit narrows it enough and its candidates
 * spread over the blocks. Returns whether it was so; all blocks agree. */
template <class Z, int GROUPS>
static __device__ __forceinline__ bool deal_row(struct cluster_shared<Z> *c, int dtype) {
    struct shared<Z> *s = &c->row;
    const uint32_t rank = cluster_rank(), n = s->row.n;
    const uint32_t part = n ? ((n - 1) / CLUSTER + 64) / 64 * 64 : 0, begin = min(rank * part, n);
    uint32_t key[4 * GROUPS];
    load_part<Z, GROUPS>(key, s->row.score, begin, min(begin + part, n));
    count_part<Z, GROUPS>(c, key, part, 0, 21);
    __syncthreads();
    cluster_wait(); /* all have zeroed their memory */
    spread_counts(c, rank);
    cluster_sync();
    scan_hist(s, s->row.top_k, 1);
    uint32_t found = s->total ? s->before + s->count : 0;
    if (found > MOST)
        return false;
    /* Rounded down by more than the division's error, so that no bucket lies past the last. */
    uint32_t spread = (uint32_t)__fdividef(PLACES * CLUSTER - 1, (float)max(found, 1u));
    if (found)
        deal_part<Z, GROUPS>(c, key, begin, s->bin << 21 | 0x1FFFFF, spread, rank);
    cluster_sync();
    return write_dealt(c, rank, found, spread, dtype);
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
    load_part<Z, CLUSTER_GROUPS>(key, s->row.score, begin, end);
    int shift = 21;
    for (;; shift = shift == 21 ? 10 : 0) {
        count_part<Z, CLUSTER_GROUPS>(c, key, part, prefix, shift);
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
    static_assert(CLUSTER * SENDER_THREADS == Z::THREADS, "every thread sees to one sender");
    static_assert(CLUSTER * SHARE <= Z::LIST, "all that a block is sent fits its list");
    static_assert(PLACES / 4 <= Z::WORDS, "a byte counter for each bucket");
    static_assert(sizeof(struct shared<Z>) % 16 == 0, "count is zeroed in vectors");
    struct shared<Z> *s = &c->row;
    zero<Z, BINS>(s->hist);
    zero<Z, BINS>(c->count);
    zero<Z, PLACES / 4>(s->counter);
    if (threadIdx.x < CLUSTER * CLUSTER)
        c->sent[threadIdx.x / CLUSTER][threadIdx.x % CLUSTER] = 0;
    if (threadIdx.x < CLUSTER)
        c->dealt[threadIdx.x] = 0;
    if (threadIdx.x == 0)
        s->n_list = s->crowded = 0;
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

template <class Z, int GROUPS>
static __global__ void __launch_bounds__(Z::THREADS, 1)
cluster_kernel(const __grid_constant__ struct launch l) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    begin_cluster(c, &l.slab);
    if (deal_row<Z, GROUPS>(c, l.slab.p.values_dtype) || !feed_uneven<Z>())
        return;
    finish_row(s, &l.slab.p);
#endif
}

#endif
