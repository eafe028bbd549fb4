/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection on the device: each output row of a slab becomes its top_k indices, best first. The
 * method, its costs and what limits it are in docs/kernel-topk.md.
 *
 * A score becomes a 32-bit key in which smaller is better; with the position below it, the pair is
 * a 64-bit number that no two keys of a row share. All that follows works on these numbers, so the
 * order in which threads arrive anywhere never shows in the result.
 *
 * Every path ends the same way: a list of at most LIST candidates in shared memory that contains
 * the winners (feed_*), ordered by expected rank (order), written (write_row). The paths differ in
 * how the list is found:
 *   feed_short   rows of up to SHORT keys: held in registers, read once, threshold by histogram
 *   feed_long    longer rows: threshold from a sample of the row, then one streaming pass
 *   split_kernel few long rows: as feed_long, but several blocks per row; the last to arrive orders
 *   exact_select any row, any data: up to three histogram passes and one that collects
 * The last is where the first three go when the data defeats them.
 *
 * topk_block.cuh holds what a block works with, topk_order.cuh the ordering, topk_feed.cuh all
 * that fills the list; the kernels and what launches them are here.
 */
#include <cuda_runtime.h>

#include "topk_feed.cuh"

/* What a kernel gets, beyond the slab: how many blocks share a row. */
struct launch {
    struct slab slab;
    uint32_t *arrived; /* [rows], zero between launches; split_kernel only */
    uint32_t *found;   /* [rows][blocks] candidates of each block */
    uint64_t *region;  /* [rows][blocks][SPLIT_ROOM] */
    uint32_t blocks;
};
enum { SPLIT_ROOM = 4096 };

/* ---- which row ------------------------------------------------------------------------------- */

/* The batch that holds row t of packed queries: the first whose end lies beyond t. A list that
 * decreases against its contract makes this end anywhere, but it ends. */
static __device__ int64_t packed_batch(const struct problem *p, int64_t t) {
    int64_t low = 0, high = p->n_batch;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (lidx_clamp(p->query_lengths[middle], 0, p->n_query) > t)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static __device__ __forceinline__ struct row find_row(const struct slab *s, int64_t number) {
    const struct problem *p = &s->p;
    int64_t batch = 0, i = number, visible = 0, slot = number;
    if (p->query_packed) {
        batch = packed_batch(p, number);
    } else if (p->n_batch > 1) {
        batch = number / p->n_query;
        i = slot = number - batch * p->n_query;
    }
    if (batch < p->n_batch) {
        struct extent e = lidx_extent(p, batch);
        if (p->query_packed)
            i = number - e.query_begin;
        if (i >= 0)
            visible = lidx_clamp(lidx_visible(p, &e, i), 0, s->scores_stride);
    }
    int64_t out = p->query_packed ? 0 : batch;
    struct row r;
    r.score = s->scores + (number - s->row_begin) * s->scores_stride;
    r.indices = (int32_t *)((char *)p->indices + out * p->indices_batch_stride) + slot * p->top_k;
    r.values = (char *)p->values;
    if (r.values)
        r.values += out * p->values_batch_stride +
                    slot * p->top_k * (p->values_dtype == DTYPE_F32 ? 4 : 2);
    r.n = (uint32_t)visible;
    r.top_k = (uint32_t)p->top_k;
    return r;
}

/* ---- kernels --------------------------------------------------------------------------------- */

static __device__ __forceinline__ void wait_for_scores(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Zeroes what a row's work expects to be zero and finds the row. Nothing in global memory is read
 * before the wait: the kernel may have been started before those ahead of it have ended. */
template <class Z>
static __device__ __forceinline__ void begin_row(struct shared<Z> *s, const struct slab *slab,
                                                 int64_t number) {
    zero<Z, BINS>(s->hist);
    zero<Z, Z::WORDS>(s->counter);
    if (threadIdx.x == 0) {
        s->n_list = 0;
        s->n_tied = 0;
        s->crowded = 0;
        s->last_low = 0xFFFFFFFFu;
        s->last_high = 0;
        wait_for_scores();
        s->row = find_row(slab, number);
    }
    wait_for_scores();
    __syncthreads();
}

template <class Z>
static __device__ __forceinline__ void finish_row(struct shared<Z> *s, const struct problem *p) {
    if (s->n_list)
        order(s, s->n_list);
    write_row(s, p);
}

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
                                                   const float *score, uint32_t begin,
                                                   uint32_t end, float4 x, float threshold) {
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
    /* What is read early is written in any case. */
    for (uint32_t j = s->n_list + threadIdx.x; j < EARLY * LANES * sharing_warps<Z>(busy);
         j += Z::THREADS)
        region[block * SPLIT_ROOM + j] = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        found[block] = s->n_list;
        __threadfence();
        s->flag = atomicAdd(l.arrived + number, 1u) + 1 == busy;
        __threadfence();
    }
    __syncthreads();
    if (!s->flag)
        return;
    __syncthreads();
    zero<Z, BINS>(s->hist);
    if (threadIdx.x == 0) {
        l.arrived[number] = 0;
        s->n_list = 0;
        s->flag = 0;
        s->last_low = s->last_high = edge;
    }
    __syncthreads();
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

template <class Z>
static cudaError_t start(void (*kernel)(struct launch), struct launch *l, int64_t blocks,
                         cudaStream_t stream) {
    int bytes = (int)sizeof(struct shared<Z>);
    cudaError_t e = cudaFuncSetAttribute((const void *)kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return e;
    void *arguments[] = {l};
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(Z::THREADS);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = l->slab.compute >= 90;
    return cudaLaunchKernelExC(&config, (const void *)kernel, arguments);
}

/* Keys that a row can have here. */
static int64_t slab_keys(const struct slab *s) {
    return s->p.n_key < s->scores_stride ? s->p.n_key : s->scores_stride;
}

static uint32_t slab_blocks(const struct slab *s) {
    return blocks_per_row(s->row_end - s->row_begin, slab_keys(s), s->p.top_k, s->n_sm);
}

int lidx_prepare_topk(const struct slab *s, void *stream) {
    int only = s->row_end - s->row_begin >= lidx_rows(&s->p); /* the run's only slab */
    if (!s->scratch || (only && slab_blocks(s) == 1))
        return cudaSuccess;
    return cudaMemsetAsync(s->scratch, 0, counter_bytes(s->n_sm), (cudaStream_t)stream);
}

int lidx_launch_topk(const struct slab *s, void *stream) {
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
        return start<large_sizes>(row_kernel<large_sizes, 1>, &l, rows, on);
    if (l.blocks > 1) {
        cudaError_t e = s->prepared ? cudaSuccess : (cudaError_t)lidx_prepare_topk(s, stream);
        if (e != cudaSuccess)
            return e;
        return start<alone_sizes>(split_kernel<alone_sizes>, &l, rows * l.blocks, on);
    }
    if (rows <= s->n_sm)
        return start<alone_sizes>(row_kernel<alone_sizes, 1>, &l, rows, on);
    return start<crowd_sizes>(row_kernel<crowd_sizes, 3>, &l, rows, on);
}
