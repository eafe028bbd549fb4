/* SPDX-License-Identifier: Apache-2.0
 *
 * A few rows of up to 131,072 keys: a cluster of eight blocks holds a row in its registers. Each
 * block counts its part; the counts are summed through the cluster's shared memory; then all know
 * the bin of the threshold, and send what reaches it to the first block's list. As feed_short, but
 * for the sum and the sending: no sample, no second reading, nothing through global memory.
 */
#ifndef LIDX_TOPK_CLUSTER_CUH
#define LIDX_TOPK_CLUSTER_CUH

#include "topk_row.cuh"

enum {
    CLUSTER = 8,            /* the most that every GPU with clusters takes */
    CLUSTER_GROUPS = 4,     /* of four scores of a thread */
    CLUSTER_KEYS = 131072,  /* that its registers hold: 8 x 1024 threads x 16 */
    SHARE = BINS / CLUSTER, /* bins that a block sums */
};

template <class Z> struct cluster_shared {
    struct shared<Z> row;  /* hist: the sums over the cluster */
    uint32_t count[BINS];  /* of this block's part */
    uint32_t sum[SHARE];
    uint32_t base;         /* where in the list this block's candidates go */
};

/* ---- the cluster ----------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* Barrier over the cluster; what was written before it, in whichever block, can be read after. */
static __device__ __forceinline__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\t"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The address, in block `rank`, of what has this address here. */
static __device__ __forceinline__ uint32_t remote(const void *here, uint32_t rank) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(here), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

static __device__ __forceinline__ uint2 remote_load(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}

static __device__ __forceinline__ void remote_store(uint32_t address, uint64_t x) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
}

static __device__ __forceinline__ uint32_t remote_add(uint32_t address, uint32_t x) {
    uint32_t old;
    asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(address), "r"(x)
                 : "memory");
    return old;
}

/* ---- the row --------------------------------------------------------------------------------- */

/* Counts of all blocks -> row.hist of all blocks. Each block sums its share of the bins, a source
 * to 128 threads, and tells the others. */
template <class Z>
static __device__ __forceinline__ void sum_counts(struct cluster_shared<Z> *c, uint32_t rank) {
    static_assert(Z::THREADS == CLUSTER * SHARE / 2, "two bins of one source to a thread");
    uint32_t block = threadIdx.x / (SHARE / 2), bin = threadIdx.x % (SHARE / 2) * 2;
    if (threadIdx.x < SHARE)
        c->sum[threadIdx.x] = 0;
    cluster_sync();
    uint2 x = remote_load(remote(&c->count[rank * SHARE + bin], block));
    if (x.x)
        atomicAdd(&c->sum[bin], x.x);
    if (x.y)
        atomicAdd(&c->sum[bin + 1], x.y);
    __syncthreads();
    uint64_t both = (uint64_t)c->sum[bin + 1] << 32 | c->sum[bin];
    remote_store(remote(&c->row.hist[rank * SHARE + bin], block), both);
    cluster_sync();
}

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

/* The list of the first block, from the parts of all. Digits of 11, 11 and 10 bits, as many as it
 * takes until the candidates fit: one or two, unless more keys are equal than fit. True in the
 * first block alone. */
template <class Z> static __device__ __noinline__ bool feed_cluster(void) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    const uint32_t rank = cluster_rank(), n = s->row.n;
    const uint32_t part = ((n - 1) / CLUSTER + 64) / 64 * 64, begin = rank * part;
    const uint32_t end = min(begin + part, n);
    static_assert(CLUSTER_KEYS == 4 * CLUSTER_GROUPS * CLUSTER * Z::THREADS, "room in registers");
    uint32_t key[4 * CLUSTER_GROUPS], prefix = 0, better = 0, edge;
#pragma unroll
    for (uint32_t g = 0; g < CLUSTER_GROUPS; g++) {
        float4 x = load4(s->row.score, begin + 4 * (g * Z::THREADS + threadIdx.x), end);
        key[4 * g] = key_of(x.x);
        key[4 * g + 1] = key_of(x.y);
        key[4 * g + 2] = key_of(x.z);
        key[4 * g + 3] = key_of(x.w);
    }
    int shift = 21;
    for (;; shift = shift == 21 ? 10 : 0) {
        count_part(c, key, part, prefix, shift);
        sum_counts(c, rank);
        scan_hist(s, s->row.top_k - better, shift == 21, shift == 21);
        if (s->total == 0) /* all are masked */
            return rank == 0;
        prefix = prefix << (shift ? 11 : 10) | s->bin;
        better += s->before;
        edge = prefix << shift | ((1u << shift) - 1);
        if (better + s->count <= Z::LIST || shift == 0)
            break;
        zero<Z, BINS>(c->count);
        __syncthreads();
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

template <class Z>
static __global__ void __launch_bounds__(Z::THREADS, 1)
cluster_kernel(const __grid_constant__ struct launch l) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    struct shared<Z> *s = shared_memory<Z>();
    zero<Z, BINS>(((struct cluster_shared<Z> *)s)->count);
    begin_row(s, &l.slab, l.slab.row_begin + blockIdx.x / CLUSTER);
    if (s->row.n > SHORT) {
        if (!feed_cluster<Z>())
            return;
    } else {
        if (cluster_rank())
            return;
        if (s->row.n)
            feed_short<Z>();
    }
    finish_row(s, &l.slab.p);
#endif
}

#endif
