/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection on the device: each output row of a slab becomes its top_k indices, best first. The
 * method, its costs and what limits it are in docs/kernel-topk.md.
 *
 * A score becomes a 32-bit key in which smaller is better; with the position below it, the pair is
 * a 64-bit number that no two keys of a row share. All that follows works on these numbers, so the
 * order in which threads arrive anywhere never shows in the result.
 *
 * Every path but two ends the same way: a list of at most LIST candidates in shared memory that
 * contains the winners (feed_*), ordered by expected rank (order), written (write_row). The paths
 * differ in how the list is found:
 *   feed_short   rows of up to SHORT keys: held in registers, read once, threshold by histogram
 *   feed_long    longer rows: threshold from a sample of the row, then one streaming pass
 *   feed_cluster few rows, SM90 to 110, of uneven data: as feed_short, with a cluster of blocks
 *   split_kernel few long rows: as feed_long, but several blocks per row; the last to arrive orders
 *   exact_select any row, any data: up to three histogram passes and one that collects
 * The last is where the others go when the data defeats them. The two are for few rows of even
 * data: several blocks order and write a part of the row each. In part_kernel, rows of up to SHORT
 * keys, every block reads the whole row; in deal_row, SM90 to 110, a cluster's blocks deal it out.
 *
 * topk_block.cuh holds what a block works with, topk_order.cuh the ordering, topk_feed.cuh and
 * topk_exact.cuh what fills the list, topk_guess.cuh and topk_deal.cuh how a cluster deals a row
 * out, topk_cluster.cuh what else it does, topk_parts.cuh what the parts of short rows are,
 * topk_row.cuh how a row begins and ends; the other kernels and what launches them are here.
 */
#include <cuda_runtime.h>

#include "allow_shared.cuh"
#include "topk_cluster.cuh"
#include "topk_parts.cuh"

/* ---- kernels --------------------------------------------------------------------------------- */

/* One block, one row. Causal rows grow, so the last comes first. */
template <class Z, int PER_SM>
static __global__ void __launch_bounds__(Z::THREADS, PER_SM)
    row_kernel(const __grid_constant__ struct launch l) {
    struct shared<Z> *s = shared_memory<Z>();
    const struct problem *p = &l.slab.p;
    begin_row(s, &l.slab, l.slab.row_end - 1 - blockIdx.x);
    uint32_t n = s->row.n;
    if (n > SHORT)
        feed_long<Z>();
    else if (n)
        feed_short<Z>();
    finish_row(s, p);
}

/* This block's part of a row: what reaches the threshold goes to its region, raw. The first four
 * scores of each thread have been read ahead. */
template <class Z>
static __device__ __forceinline__ void filter_part(struct shared<Z> *s, uint64_t *region,
                                                   const float *score, uint32_t begin, uint32_t end,
                                                   float4 x, float threshold) {
    for (uint32_t b = begin; b < end; b += 4 * Z::THREADS) {
        uint32_t i = b + 4 * threadIdx.x;
        if (b != begin)
            x = load4(score, i, end);
        uint32_t mask = reach(x, threshold);
        uint32_t at = reserve(s, __popc(mask));
        if (at + 4 > SPLIT_ROOM)
            continue;
        append(region, &at, mask & 1, x.x, i);
        append(region, &at, mask & 2, x.y, i + 1);
        append(region, &at, mask & 4, x.z, i + 2);
        append(region, &at, mask & 8, x.w, i + 3);
    }
    __syncthreads();
}

enum { EARLY = 4 };

/* Warps that read one region: several where regions are few. */
template <class Z> static __device__ __forceinline__ uint32_t sharing_warps(uint32_t blocks) {
    return max(Z::WARPS / blocks, 1u);
}

/* Lists a raw score as its key. The key, if it lies in the last bin; else the edge. */
template <class Z>
static __device__ __forceinline__ uint32_t take_raw(struct shared<Z> *s, uint32_t at, uint64_t raw,
                                                    uint32_t edge) {
    uint32_t key = key_of(__uint_as_float((uint32_t)(raw >> 32)));
    if (at < Z::LIST) {
        s->list[at] = pair(key, (uint32_t)raw);
        atomicAdd(&s->hist[key >> 21], 1u);
    }
    return key >> 21 == edge >> 21 ? key : edge;
}

/* Brings the regions of all blocks of a row into the list, as keys, and counts these into an empty
 * histogram. Warps that share a region take its groups of 32 in turn. The first EARLY groups are
 * read before their number is known, to wait once and not twice. */
template <class Z>
static __device__ __forceinline__ void gather(struct shared<Z> *s, const uint64_t *region,
                                              const uint32_t *found, uint32_t blocks,
                                              uint32_t edge) {
    const uint32_t lane = lane_id(), share = sharing_warps<Z>(blocks);
    uint32_t low = edge;
    for (uint32_t w = threadIdx.x / LANES; w < blocks * share; w += Z::WARPS) {
        uint32_t block = w % blocks, first = w / blocks, at = 0;
        const unsigned long long *from = (const unsigned long long *)region + block * SPLIT_ROOM;
        uint64_t raw[EARLY];
#pragma unroll
        for (uint32_t g = 0; g < EARLY; g++)
            raw[g] = __ldcg(from + (first + g * share) * LANES + lane);
        uint32_t count = __ldcg(found + block), kept = min(count, (uint32_t)SPLIT_ROOM - 4);
        uint32_t full = kept / LANES, groups = (full + share - 1 - first) / share;
        uint32_t mine = groups * LANES + (full % share == first ? kept % LANES : 0);
        if (lane == 0) {
            at = atomicAdd(&s->n_list, mine);
            if (kept < count)
                s->flag = 1; /* the region lost some */
        }
        at = __shfl_sync(ALL_LANES, at, 0);
        for (uint32_t done = 0; done * LANES < mine && at + done * LANES < Z::LIST;) {
#pragma unroll
            for (uint32_t g = 0; g < EARLY; g++)
                if ((done + g) * LANES + lane < mine)
                    low = min(low, take_raw(s, at + (done + g) * LANES + lane, raw[g], edge));
            done += EARLY;
#pragma unroll
            for (uint32_t g = 0; g < EARLY; g++)
                if ((done + g) * LANES + lane < mine)
                    raw[g] = __ldcg(from + (first + (done + g) * share) * LANES + lane);
        }
    }
    __syncwarp();
    low = __reduce_min_sync(ALL_LANES, low);
    if (lane == 0)
        atomicMin(&s->last_low, low);
    __syncthreads();
}

/* Tells how many candidates this block's region holds. True in the last of a row's `busy` blocks to
 * do so, which sees what all have written. */
template <class Z>
static __device__ __forceinline__ bool arrive(struct shared<Z> *s, uint64_t *region,
                                              uint32_t *found, uint32_t *arrived, uint32_t busy) {
    /* What gather reads early is written in any case. */
    for (uint32_t j = s->n_list + threadIdx.x; j < EARLY * LANES * sharing_warps<Z>(busy);
         j += Z::THREADS)
        region[j] = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        *found = s->n_list;
        __threadfence();
        s->flag = atomicAdd(arrived, 1u) + 1 == busy;
        __threadfence();
    }
    __syncthreads();
    return s->flag;
}

/* An empty list and histogram for gather, and the row's counter as the next launch wants it. */
template <class Z>
static __device__ __forceinline__ void begin_gather(struct shared<Z> *s, uint32_t *arrived,
                                                    uint32_t edge) {
    __syncthreads();
    zero<Z, BINS>(s->hist);
    if (threadIdx.x == 0) {
        *arrived = 0;
        s->n_list = 0;
        s->flag = 0;
        s->last_low = s->last_high = edge;
    }
    __syncthreads();
}

/* Several blocks, one row: each takes the same sample, so they agree on the threshold without a
 * word; the last to arrive, whichever it is, orders what all have found. Nobody waits. */
template <class Z>
static __global__ void __launch_bounds__(Z::THREADS, 1)
    split_kernel(const __grid_constant__ struct launch l) {
    struct shared<Z> *s = shared_memory<Z>();
    const struct problem *p = &l.slab.p;
    uint32_t number = blockIdx.x / l.blocks, block = blockIdx.x % l.blocks;
    begin_row(s, &l.slab, l.slab.row_begin + number);
    const float *score = s->row.score;
    uint32_t n = s->row.n;
    if (n <= SHORT) {
        if (block)
            return;
        if (n)
            feed_short<Z>();
        finish_row(s, p);
        return;
    }
    uint32_t part = ((n - 1) / l.blocks + 64) / 64 * 64; /* at least n / blocks, rounded up */
    uint32_t busy = (n - 1) / part + 1;
    if (block >= busy)
        return;
    uint32_t begin = block * part, end = min(n - begin, part) + begin;
    uint64_t *region = l.region + (uint64_t)number * l.blocks * SPLIT_ROOM;
    uint32_t *found = l.found + number * l.blocks;

    float4 ahead = load4(score, begin + 4 * threadIdx.x, end);
    uint32_t edge = sampled_edge(s, score, n, p->top_k);
    if (edge != KEY_MASKED)
        filter_part(s, region + block * SPLIT_ROOM, score, begin, end, ahead, score_of(edge));
    if (!arrive(s, region + block * SPLIT_ROOM, found + block, l.arrived + number, busy))
        return;
    begin_gather(s, l.arrived + number, edge);
    if (edge != KEY_MASKED)
        gather(s, region, found, busy, edge);
    uint32_t n_list = s->n_list;
    if (n_list >= (uint32_t)p->top_k && n_list <= Z::LIST && !s->flag)
        scan_hist(s, 1, 0, 1);
    else if (n_list <= Z::LIST || !plateau_select<Z>())
        exact_select<Z>(0);
    finish_row(s, p);
}

/* ---- launching ------------------------------------------------------------------------------- */

typedef struct sizes<512, 4096, 4, 10> crowd_sizes;  /* many rows */
typedef struct sizes<1024, 4096, 4, 10> alone_sizes; /* at most a row per multiprocessor */
typedef struct sizes<1024, 8192, 1, 40> large_sizes; /* top_k above 2048 */
enum { SMALL_K = 2048 };

static const int64_t SPLIT_MIN_PART = 4096; /* keys that are worth a block */

/* Blocks that a row of max_key keys can occupy. */
static int64_t useful_blocks(int64_t max_key) {
    return (max_key + SPLIT_MIN_PART - 1) / SPLIT_MIN_PART;
}

/* Blocks per row: 1, or more where rows are so few that they leave the device idle. */
static uint32_t blocks_per_row(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm) {
    if (rows < 1 || max_key <= SHORT || top_k > SMALL_K || rows * 3 > n_sm)
        return 1;
    int64_t blocks = n_sm / rows, useful = useful_blocks(max_key);
    return (uint32_t)(blocks < useful ? blocks : useful);
}

/* Counters first. A split launch leaves them as it found them, clear. */
static size_t counter_bytes(int32_t n_sm) {
    return ((size_t)n_sm * sizeof(uint32_t) + 255) / 256 * 256;
}

size_t lidx_topk_scratch(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm) {
    if (max_key <= SHORT || top_k > SMALL_K || rows < 1)
        return 0;
    /* Slabs of fewer rows may be split where larger ones are not, but into no more blocks. */
    int64_t useful = useful_blocks(max_key);
    int64_t blocks = rows < n_sm / useful ? rows * useful : n_sm;
    return 2 * counter_bytes(n_sm) + (size_t)blocks * SPLIT_ROOM * sizeof(uint64_t);
}

/* Starts `blocks` blocks, in clusters of `cluster` if that is above 1. */
template <class Z, void (*KERNEL)(struct launch)>
static cudaError_t start(struct launch *l, int64_t blocks, size_t bytes, uint32_t cluster,
                         cudaStream_t stream) {
    static uint64_t allowed; /* bit d: on device d */
    cudaError_t e = allow_shared((const void *)KERNEL, (int)bytes, &allowed);
    if (e != cudaSuccess)
        return e;
    void *arguments[] = {l};
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(Z::THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = l->slab.compute < 90 ? 0 : cluster > 1 ? 2 : 1;
    return cudaLaunchKernelExC(&config, (const void *)KERNEL, arguments);
}

/* Keys that a row can have here. */
static int64_t slab_keys(const struct slab *s) {
    return s->p.n_key < s->scores_stride ? s->p.n_key : s->scores_stride;
}

static uint32_t slab_blocks(const struct slab *s) {
    return blocks_per_row(s->row_end - s->row_begin, slab_keys(s), s->p.top_k, s->n_sm);
}

/* Whether a cluster takes each row: it must hold the longest, and all must find room at once. More
 * than half of the device is not to be had in clusters. From 12.0 on a block has 99 KiB of shared
 * memory, less than it would need. */
static bool by_cluster(const struct slab *s) {
    int64_t rows = s->row_end - s->row_begin, keys = slab_keys(s);
    return s->compute >= 90 && s->compute < 120 && keys > SHORT && keys <= CLUSTER_KEYS &&
           s->p.top_k <= SMALL_K && rows * CLUSTER * 2 <= s->n_sm;
}

/* Whether several blocks order a part of each row: it must be short, and all must find room. */
static bool by_parts(const struct slab *s) {
    int64_t rows = s->row_end - s->row_begin;
    return slab_keys(s) <= SHORT && s->p.top_k <= SMALL_K && rows * PARTS <= s->n_sm;
}

int lidx_prepare_topk(const struct slab *s, void *stream) {
    int only = s->row_end - s->row_begin >= lidx_rows(&s->p); /* the run's only slab */
    if (!s->scratch || (only && (slab_blocks(s) == 1 || by_cluster(s))))
        return cudaSuccess;
    return cudaMemsetAsync(s->scratch, 0, counter_bytes(s->n_sm), (cudaStream_t)stream);
}

template <class Z, void (*KERNEL)(struct launch)>
static cudaError_t start_blocks(struct launch *l, int64_t blocks, cudaStream_t stream) {
    return start<Z, KERNEL>(l, blocks, sizeof(struct shared<Z>), 1, stream);
}

/* GROUPS: of four scores that a thread must hold. */
template <int GROUPS>
static cudaError_t start_clusters(struct launch *l, int64_t rows, cudaStream_t stream) {
    typedef alone_sizes Z;
    return start<Z, cluster_kernel<Z, GROUPS>>(l, rows * CLUSTER, sizeof(struct cluster_shared<Z>),
                                               CLUSTER, stream);
}

int lidx_launch_topk(const struct slab *s, void *stream) {
    typedef alone_sizes alone;
    cudaStream_t on = (cudaStream_t)stream;
    int64_t rows = s->row_end - s->row_begin;
    struct launch l;
    l.slab = *s;
    l.blocks = slab_blocks(s);
    l.arrived = (uint32_t *)s->scratch;
    l.found = (uint32_t *)((char *)s->scratch + counter_bytes(s->n_sm));
    l.region = (uint64_t *)((char *)s->scratch + 2 * counter_bytes(s->n_sm));
    if (rows <= 0)
        return cudaSuccess;
    if (s->p.top_k > SMALL_K)
        return start_blocks<large_sizes, row_kernel<large_sizes, 1>>(&l, rows, on);
    if (by_parts(s))
        return start<alone, part_kernel<alone>>(&l, rows * PARTS, sizeof(struct part_shared<alone>),
                                                1, on);
    if (by_cluster(s))
        return slab_keys(s) * 2 <= CLUSTER_KEYS ? start_clusters<CLUSTER_GROUPS / 2>(&l, rows, on)
                                                : start_clusters<CLUSTER_GROUPS>(&l, rows, on);
    if (l.blocks > 1) {
        cudaError_t e = s->prepared ? cudaSuccess : (cudaError_t)lidx_prepare_topk(s, stream);
        if (e != cudaSuccess)
            return e;
        return start_blocks<alone, split_kernel<alone>>(&l, rows * l.blocks, on);
    }
    if (rows <= s->n_sm)
        return start_blocks<alone, row_kernel<alone, 1>>(&l, rows, on);
    return start_blocks<crowd_sizes, row_kernel<crowd_sizes, 3>>(&l, rows, on);
}
