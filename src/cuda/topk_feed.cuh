/* SPDX-License-Identifier: Apache-2.0
 *
 * Finds the candidates of a row and puts them in the list: from registers, or from a stream with a
 * sampled threshold. What defeats these goes the exact way.
 */
#ifndef LIDX_TOPK_FEED_CUH
#define LIDX_TOPK_FEED_CUH

#include "topk_exact.cuh"

enum { SAMPLE = 4096, SAMPLE_REACH = 131072 }; /* scores of a row sampled, per so many keys */
enum { WIDE_BIN = 512 }; /* a last bin of more candidates is measured between its own ends */

/* ---- short rows ------------------------------------------------------------------------------ */

/* The smallest and the largest key of this thread, over the block. */
template <class Z>
static __device__ __forceinline__ void block_ends(struct shared<Z> *s, uint32_t best,
                                                  uint32_t worst) {
    best = __reduce_min_sync(ALL_LANES, best);
    worst = __reduce_max_sync(ALL_LANES, worst);
    if (lane_id() == 0) {
        atomicMin(&s->last_low, best);
        atomicMax(&s->last_high, worst);
    }
    __syncthreads();
}

/* Finds the ends of the threshold's bin from the list. */
template <class Z> static __device__ __noinline__ void measure_last_bin(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t bin = s->bin, best = KEY_MASKED, worst = 0;
    for (uint32_t j = threadIdx.x; j < s->n_list; j += Z::THREADS) {
        uint32_t key = s->list[j] >> 32;
        if (key >> 21 == bin) {
            best = min(best, key);
            worst = max(worst, key);
        }
    }
    block_ends(s, best, worst);
}

/* Where the candidates of the first digit do not fit the list: equal scores are the usual cause.
 * Reads the row again, because keys kept for this in registers would spill. */
template <class Z> static __device__ __noinline__ void narrow_short(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t bin = s->bin, best = KEY_MASKED, worst = 0, n = s->row.n;
    for (uint32_t i = 4 * threadIdx.x; i < n; i += 4 * Z::THREADS) {
        float4 x = load4(s->row.score, i, n);
        uint32_t key[4] = {key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (key[j] >> 21 == bin) {
                best = min(best, key[j]);
                worst = max(worst, key[j]);
            }
        }
    }
    __syncwarp();
    block_ends(s, best, worst);
    if (s->last_low < s->last_high) {
        exact_select<Z>(1);
        return;
    }
    collect<Z>(s->last_low, s->row.top_k - s->before); /* the table of the bins before is right */
    if (threadIdx.x == 0)
        s->last_high = 0;
    __syncthreads();
}

/* Whether group g of a short row's scores, four a thread, has none for this thread's warp. */
template <class Z> static __device__ __forceinline__ bool past_row(uint32_t g, uint32_t n) {
    return 4 * (g * Z::THREADS + warp_begin()) >= n;
}

/* The row into registers, and its histogram. */
template <class Z>
static __device__ __forceinline__ void load_short(struct shared<Z> *s, uint32_t *key) {
    const uint32_t GROUPS = SHORT / 4 / Z::THREADS;
    const float *score = s->row.score;
    uint32_t n = s->row.n;
    float4 x[GROUPS];
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        uint32_t i = 4 * (g * Z::THREADS + threadIdx.x);
        if (4 * (g * Z::THREADS + warp_begin() + LANES) <= n)
            x[g] = __ldcg((const float4 *)(score + i));
        else if (!past_row<Z>(g, n))
            x[g] = load4(score, i, n);
    }
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        if (past_row<Z>(g, n)) {
            key[4 * g] = key[4 * g + 1] = key[4 * g + 2] = key[4 * g + 3] = KEY_MASKED;
            continue;
        }
        key[4 * g] = key_of(x[g].x);
        key[4 * g + 1] = key_of(x[g].y);
        key[4 * g + 2] = key_of(x[g].z);
        key[4 * g + 3] = key_of(x[g].w);
#pragma unroll
        for (int i = 0; i < 4; i++)
            atomicAdd(&s->hist[key[4 * g + i] >> 21], 1u);
    }
    __syncthreads();
}

/* The row in registers: histogram, threshold bin, and all candidates of it and the bins before. */
template <class Z> static __device__ __noinline__ void feed_short(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const uint32_t n = s->row.n, top_k = s->row.top_k, GROUPS = SHORT / 4 / Z::THREADS;
    uint32_t key[GROUPS * 4];
    load_short(s, key);
    scan_hist(s, top_k, 1, 1);
    if (s->total == 0)
        return;
    uint32_t bin = s->bin, before = s->before, count = s->count;
    uint32_t edge = bin << 21 | 0x1FFFFFu, take = 0;
    if (before + count > Z::LIST) {
        narrow_short<Z>();
        return;
    }
#pragma unroll
    for (uint32_t g = 0; g < GROUPS && !past_row<Z>(g, n); g++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            take += key[4 * g + i] <= edge;
    uint64_t *to = s->list + reserve(s, take);
#pragma unroll
    for (uint32_t g = 0; g < GROUPS && !past_row<Z>(g, n); g++)
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            if (key[4 * g + i] <= edge)
                *to++ = pair(key[4 * g + i], 4 * (g * Z::THREADS + threadIdx.x) + i);
    __syncthreads();
    if (count > WIDE_BIN)
        measure_last_bin<Z>();
}

/* ---- long rows ------------------------------------------------------------------------------- */

/* This thread's part of a round of the sample: neighbouring scores, so that a sector serves. */
template <class Z>
static __device__ __forceinline__ void load_sample(uint32_t *key, const float *score, uint32_t n,
                                                   uint32_t round, uint32_t doublings) {
    const uint32_t EACH = SAMPLE / Z::THREADS;
    const int log_threads = Z::THREADS == 512 ? 9 : 10;
    uint32_t which = (round * Z::THREADS + threadIdx.x) << (32 - log_threads - doublings);
    const float *from = score + (uint64_t)__umulhi(which, n / EACH) * EACH;
#pragma unroll
    for (uint32_t j = 0; j < EACH; j += 4) {
        float4 x = *(const float4 *)(from + j);
        key[j] = key_of(x.x);
        key[j + 1] = key_of(x.y);
        key[j + 2] = key_of(x.z);
        key[j + 3] = key_of(x.w);
    }
}

/* A key that, by a sample spread over the row, about the top_k best and a margin reach. The margin
 * is 3.3 standard deviations of the sample's count. KEY_MASKED: the sample gives no number to
 * compare with, or more than the list would reach it. */
template <class Z>
static __device__ __forceinline__ uint32_t sampled_edge(struct shared<Z> *s, const float *score,
                                                        uint32_t n, uint32_t top_k) {
    const uint32_t EACH = SAMPLE / Z::THREADS;
    uint32_t doublings = 0;
    while (doublings < 14 && n >> doublings > SAMPLE_REACH)
        doublings++;
    uint32_t rounds = 1u << doublings;
    uint32_t key[EACH];
    for (uint32_t r = 0; r < rounds; r++) {
        load_sample<Z>(key, score, n, r, doublings);
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            atomicAdd(&s->hist[key[j] >> 21], 1u);
    }
    float mean = __fdividef((float)top_k * SAMPLE * (float)rounds, (float)n);
    uint32_t rank = (uint32_t)(mean + 3.3f * mean * rsqrtf(mean) + 4.0f);
    __syncthreads();
    scan_hist(s, rank, 1);
    uint32_t bin = s->bin, rest = rank - s->before;
    if (s->total < rank || (float)rank * (float)n > 0.97f * Z::LIST * SAMPLE * (float)rounds)
        return KEY_MASKED;
    __syncthreads();
    zero<Z, BINS>(s->hist);
    __syncthreads();
    for (uint32_t r = rounds; r-- > 0;) {
        if (r + 1 < rounds) /* the last round is still there */
            load_sample<Z>(key, score, n, r, doublings);
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            if (key[j] >> 21 == bin)
                atomicAdd(&s->hist[key[j] >> 10 & 2047], 1u);
    }
    __syncthreads();
    scan_hist(s, rest, 0);
    uint32_t edge = bin << 21 | s->bin << 10 | 1023;
    return edge < 0xFF800000u ? edge : KEY_MASKED;
}

/* Bit j: score j reaches the threshold. NaN, and so a masked key, never does. */
static __device__ __forceinline__ uint32_t reach(float4 x, float threshold) {
    return (x.x >= threshold) | (x.y >= threshold) << 1 | (x.z >= threshold) << 2 |
           (x.w >= threshold) << 3;
}

static __device__ __forceinline__ void append(uint64_t *list, uint32_t *at, uint32_t mask, float x,
                                              uint32_t position) {
    if (mask)
        list[(*at)++] = pair(__float_as_uint(x), position);
}

/* Sixteen scores a thread, neighbouring warps on neighbouring KiB: what reaches the threshold goes
 * to the list as raw scores. A list that is full loses them, but the count goes on. */
template <class Z>
static __device__ __forceinline__ void stream(struct shared<Z> *s, const float *score, uint32_t n,
                                              float threshold) {
    for (uint32_t begin = threadIdx.x / LANES * 512; begin < n; begin += 16 * Z::THREADS) {
        float4 x[4];
        uint32_t first = begin + 4 * lane_id(), mask = 0;
        load16(x, score, begin, n);
#pragma unroll
        for (int g = 0; g < 4; g++)
            mask |= reach(x[g], threshold) << 4 * g;
        uint32_t at = reserve(s, __popc(mask));
        if (__any_sync(ALL_LANES, at + __popc(mask) > Z::LIST))
            continue;
#pragma unroll
        for (int g = 0; g < 4; g++) {
            append(s->list, &at, mask & 1u << 4 * g, x[g].x, first + 128 * g);
            append(s->list, &at, mask & 2u << 4 * g, x[g].y, first + 128 * g + 1);
            append(s->list, &at, mask & 4u << 4 * g, x[g].z, first + 128 * g + 2);
            append(s->list, &at, mask & 8u << 4 * g, x[g].w, first + 128 * g + 3);
        }
    }
    __syncthreads();
}

template <class Z> static __device__ __noinline__ void feed_long(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const float *score = s->row.score;
    uint32_t n = s->row.n, top_k = s->row.top_k;
    uint32_t edge = sampled_edge(s, score, n, top_k);
    if (edge != KEY_MASKED) {
        stream(s, score, n, score_of(edge));
        uint32_t n_list = s->n_list;
        if (n_list >= top_k && n_list <= Z::LIST) {
            table_from_list<Z>(edge, 1);
            return;
        }
        if (n_list > Z::LIST) {
            table_from_list<Z>(edge, 1);
            if (plateau_select<Z>())
                return;
        }
    }
    exact_select<Z>(0);
}

#endif
