/* SPDX-License-Identifier: Apache-2.0
 *
 * The consumer warpgroups of the Hopper score kernel: multiply a tile, sum its heads, store what is
 * visible.
 */
#ifndef LIDX_SM90_CONSUME_CUH
#define LIDX_SM90_CONSUME_CUH

#include "sm90_shape.cuh"

namespace {

/* The lane's share of the head sum of its query in `group`, for key row 0 or 1 of its two. */
template <class S>
__device__ __forceinline__ float lane_sum(const float (&dot)[S::COLUMNS / 2],
                                          const float (&weight)[S::LANE_COLUMNS], int group,
                                          int row) {
    constexpr int PAIRS = 4 / S::LANES;              /* of chains */
    constexpr int STEPS = S::HEADS / (2 * S::LANES); /* head pairs of the lane */
    float chain[PAIRS][2];
#pragma unroll
    for (int g = 0; g < STEPS; g++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float w = weight[2 * (group * STEPS + g) + b];
            float x = dot[4 * (group * STEPS + g) + 2 * row + b];
            float &sum = chain[g % PAIRS][b];
            sum = __fmaf_rn(w, relu_keep_nan(x), g < PAIRS ? 0.0f : sum);
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
                *scores = score;
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
    item.scores = a.scores + (s.items[place].scores + in_tile + lane / S::LANES * a.scores_stride);
}

template <class T, class S>
__device__ void consume(const struct arguments &a, struct shared_memory<S> &s, int group) {
    int thread = threadIdx.x & (WARPGROUP - 1), warp = thread >> 5, lane = thread & 31;
    int64_t group_stride = 4 * a.scores_stride;
    bool paged = S::LEAN || a.p.page_size != 0;
    uint32_t warp_bit = 1u << warp;
    struct ring queries = {0, 0}, keys = {group, 0};
    int32_t turn = 0; /* whose is the next tile */
    if (S::TURNS && group == 1)
        named_barrier_arrive(BARRIER_TURN, CONSUMERS * WARPGROUP);
    for (;; ring_step<2, 1>(queries)) {
        mbarrier_await(smem_address(&s.query_full[queries.place]), queries.phase);
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
            uint32_t query = smem_address(s.query[queries.place]);
            for (; tile < n_tiles; tile += CONSUMERS) {
                float dot[S::COLUMNS / 2];
                if (S::TURNS)
                    named_barrier(BARRIER_TURN + group, CONSUMERS * WARPGROUP);
                mbarrier_await(smem_address(&s.key_full[keys.place]), keys.phase);
                bool masked = paged && s.masked[keys.place] & warp_bit;
                multiply<T, S>(dot, smem_address(s.key[keys.place]), query);
                if (S::TURNS)
                    named_barrier_arrive(BARRIER_TURN + (group ^ 1), CONSUMERS * WARPGROUP);
                wgmma_wait();
                if (lane == 0)
                    mbarrier_arrive(smem_address(&s.key_empty[keys.place]));
                ring_step<S::STAGES, CONSUMERS>(keys);
                finish_tile<S>(item, dot, masked, group_stride);
                item.key += CONSUMERS * TILE_KEYS;
                item.scores += CONSUMERS * TILE_KEYS;
            }
        }
        __syncwarp();
        if (lane == 0)
            mbarrier_arrive(smem_address(&s.query_empty[queries.place]));
    }
}

} // namespace

#endif
