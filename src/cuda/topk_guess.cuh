/* SPDX-License-Identifier: Apache-2.0
 *
 * What a sample of a row says of it: which keys are likely to hold the winners, and how far on in
 * the row's order each of these is likely to be. No answer rests on that, only the time it takes.
 */
#ifndef LIDX_TOPK_GUESS_CUH
#define LIDX_TOPK_GUESS_CUH

#include "topk_feed.cuh"

enum {
    SAMPLE_BINS = 1024,
    BEYOND = 4,                /* of the sample, for whose parts there may be better keys */
    ROW_PARTS = 8 * 256 * 512, /* that a row is cut into: blocks, buckets, parts of a bucket */
};

static const uint32_t KEY_LEAST = 0xFF800000u; /* of -inf; what is less is not a number */

/* What a sample of the row says of its keys. All blocks take the same, and so agree. */
struct guess {
    uint32_t edge;        /* candidates are the keys up to here; 0: none */
    uint32_t best, range; /* the keys in bins are best .. best + range */
    uint32_t shift;       /* bins of 2^shift keys, from best on */
    uint32_t join;        /* 2^join of these bins are looked at as one */
    uint32_t spread;      /* fine parts of the row that a key of the sample stands for */
    float beyond;         /* what takes a key better than all of the sample towards the first */
};

/* This thread's part of the sample: of every so many keys of the row eight, a sector. */
static __device__ __forceinline__ float4 load_sampled(const float *score, uint32_t n) {
    uint32_t group = __umulhi(threadIdx.x / 2 << 23, n / 8);
    return load4(score, 8 * group + threadIdx.x % 2 * 4, n);
}

/* How many of the sample are to be candidates: top_k's part of it, five standard deviations and
 * some. */
static __device__ __forceinline__ uint32_t sample_rank(uint32_t n, uint32_t top_k) {
    float mean = __fdividef((float)top_k * SAMPLE, (float)n);
    return (uint32_t)(mean + 5.0f * mean * rsqrtf(mean) + 8.0f);
}

/* The bins: from the best key of the sample to at least one that the wanted number of them reach,
 * which is the worst in some warp of what is the best of a thread's four, so for the better four to
 * six tenths of all. */
template <class Z>
static __device__ __forceinline__ void find_range(struct shared<Z> *s, const uint32_t *key,
                                                  uint32_t wanted, struct guess *g) {
    uint32_t best = min(min(key[0], key[1]), min(key[2], key[3]));
    uint32_t worst = __reduce_max_sync(ALL_LANES, 3 * wanted < SAMPLE ? best : KEY_LEAST);
    best = __reduce_min_sync(ALL_LANES, best);
    if (lane_id() == 0) {
        atomicMin(&s->last_low, best);
        atomicMin(&s->last_high, worst);
    }
    __syncthreads();
    g->best = s->last_low;
    g->shift = max(22 - (int)__clz(s->last_high - min(g->best, s->last_high)), 1);
    g->range = (SAMPLE_BINS << g->shift) - 1;
}

/* Counts the thread's four of the sample in bins, all beyond the range in one more. */
template <class Z>
static __device__ __forceinline__ void count_sample(struct shared<Z> *s, const uint32_t *key,
                                                    const struct guess *g) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        atomicAdd(&s->hist[min((key[i] - g->best) >> g->shift, (uint32_t)SAMPLE_BINS)], 1u);
    __syncthreads();
}

/* How many keys of the sample are before the key that lies `past` the best, times `scale`; two more
 * are taken to be in each bin, so that none is without. */
template <class Z>
static __device__ __forceinline__ uint32_t before_in_sample(const struct shared<Z> *s,
                                                            const struct guess *g, uint32_t past,
                                                            uint32_t scale) {
    const uint32_t shift = g->shift + g->join, bin = past >> shift;
    uint32_t before = s->hist[bin << g->join], count = s->hist[(bin + 1) << g->join] - before;
    return scale * (before + 2 * bin) + __umulhi(past << (32 - shift), scale * (count + 2));
}

/* The key that `rank` of the sample reach, or half as many more of its bin, within which keys may
 * lie anyhow; all, if the sample has fewer. Bins are joined until fewer than 16 of them reach up to
 * there, since between single keys of the sample nothing is known. */
template <class Z>
static __device__ __forceinline__ void take_guess(const struct shared<Z> *s, uint32_t rank,
                                                  struct guess *g) {
    uint32_t before = s->before, count = s->count, upto = min((rank - before) * 3 / 2, count);
    uint32_t width = 1u << g->shift;
    uint32_t part = (uint32_t)(__fdividef((float)upto, (float)max(count, 1u)) * (float)width);
    g->edge = min(g->best + (s->bin << g->shift) + min(part, width - 1), KEY_LEAST);
    if (s->total < rank)
        g->edge = s->total ? KEY_LEAST : 0;
    uint32_t past = min(g->edge - min(g->best, g->edge), g->range);
    g->join = max(28 - (int)__clz(past >> g->shift), 0);
    uint32_t all = before_in_sample(s, g, past, 1) + BEYOND + 1;
    g->spread = (uint32_t)__fdividef((float)ROW_PARTS, (float)all);
    g->beyond = __fdividef((float)(BEYOND * g->spread), (float)past + 1.0f);
}

/* The part of the row to which a candidate belongs: by expected rank, as order() has it. Blocks
 * and their buckets are so many parts each. What is better than all of the sample may be as far
 * before its best as the edge is behind. */
template <class Z>
static __device__ __forceinline__ uint32_t fine_place(const struct shared<Z> *s, uint32_t key,
                                                      const struct guess *g) {
    uint32_t past = min(key - min(key, g->best), g->range);
    uint32_t ahead = (uint32_t)((float)(max(key, g->best) - key) * g->beyond);
    return before_in_sample(s, g, past, g->spread) + BEYOND * g->spread -
           min(ahead, BEYOND * g->spread);
}

#endif
