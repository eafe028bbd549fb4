/* SPDX-License-Identifier: Apache-2.0
 *
 * What a cluster of blocks does with a row: deals it out, if a sample tells enough. Plateaus and
 * other data that it does not suit take feed_cluster: each block counts its part and adds its
 * counts to those of all, for as many digits as it takes; the candidates go to the first block's
 * list, which it orders as it would any.
 */
#ifndef LIDX_TOPK_CLUSTER_CUH
#define LIDX_TOPK_CLUSTER_CUH

#include "topk_deal.cuh"

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
#pragma unroll 1
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += Z::THREADS) {
        uint32_t x = c->count[bin];
        if (x)
#pragma unroll
            for (uint32_t i = 0; i < CLUSTER; i++)
                remote_count(remote(&c->row.hist[bin], (rank + i) % CLUSTER), x);
    }
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

/* Finds the way to an address, so that the first to read there does not have to. */
static __device__ __forceinline__ void prefetch(const void *address) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/* As begin_row, with what the cluster needs; what only feed_uneven needs is left to it. */
template <class Z>
static __device__ __forceinline__ void begin_cluster(struct cluster_shared<Z> *c,
                                                     const struct slab *slab) {
    static_assert(CLUSTER * SHARE <= Z::LIST, "all that a block is sent fits its list");
    static_assert(CLUSTER * SENDER_THREADS == Z::THREADS, "every thread sees to one sender");
    static_assert(SAMPLE == 4 * Z::THREADS, "four of the sample to a thread");
    static_assert(PLACES == 8 * LANES, "two words of byte counters for each lane");
    static_assert(sizeof(struct shared<Z>) % 16 == 0, "count is zeroed in vectors");
    struct shared<Z> *s = &c->row;
    if (threadIdx.x == Z::THREADS - LANES) {
        s->row = find_row(slab, slab->row_begin + blockIdx.x / CLUSTER);
    } else if (threadIdx.x == 0) {
        c->way = EVEN;
        s->last_low = KEY_MASKED;
        s->last_high = KEY_LEAST;
    }
    zero<Z, BINS>(s->hist);
    if (threadIdx.x < PLACES / 4)
        s->counter[threadIdx.x] = 0;
    if (threadIdx.x < PLACES)
        c->last[threadIdx.x] = 0;
    if (threadIdx.x < CLUSTER)
        c->dealt[threadIdx.x] = 0;
    cluster_arrive();
    __syncthreads();
    if (threadIdx.x == 0 && s->row.n)
        prefetch(s->row.score);
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
