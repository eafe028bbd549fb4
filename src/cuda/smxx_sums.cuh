/* SPDX-License-Identifier: Apache-2.0
 *
 * What score_smxx.cu computes: products of half a slot, sums over heads in their fixed order, and
 * where the scores go.
 */
#ifndef LIDX_SMXX_SUMS_CUH
#define LIDX_SMXX_SUMS_CUH

#include "smxx_loads.cuh"

/* ---- products and sums ----------------------------------------------------------------------- */

/* Where a lane reads the keys of half a slot: chunk t of a row, of the 8 keys from 8n on. */
template <int D> struct key_reader {
    uint32_t even_chunks, odd_chunks;
    __device__ __forceinline__ key_reader(uint32_t slot_address, int half) {
        int lane = threadIdx.x % 32, odd = lane / 4 & 1;
        uint32_t from = slot_address + (half * 16 + lane / 4) * (D * 2) + lane % 4 * 16;
        even_chunks = from + odd * 64;
        odd_chunks = from - odd * 64;
    }
    __device__ __forceinline__ uint4 load(int t, int n) const {
        return load_shared_16((t % 2 ? odd_chunks : even_chunks) + t * 64 + n * 8 * D * 2);
    }
};

/* All heads times 8 keys, 16 dimensions. The first step begins the sums. */
template <typename T, int D>
static __device__ __forceinline__ void multiply_step(float (&sums)[HEAD_TILES][2][4],
                                                     const uint32_t (&a)[HEAD_TILES][D / 16][4],
                                                     int step, int n, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    const float zero[4] = {0, 0, 0, 0};
#pragma unroll
    for (int m = 0; m < HEAD_TILES; m++)
        if (step == 0)
            matrix_multiply<T>(sums[m][n], a[m][0], b, zero);
        else
            matrix_multiply<T>(sums[m][n], a[m][step], b, sums[m][n]);
}

/* Half a slot: sums[m][n] has heads 16m + lane / 4 (+ 8 for elements 2, 3) and keys 16 half + 8n +
 * lane % 4 * 2 + {0, 1}. `before` is called when the first keys have been read, `late` before the
 * last products. */
template <typename T, int D, typename Before, typename Late>
static __device__ __forceinline__ void
multiply_half(float (&sums)[HEAD_TILES][2][4], const uint32_t (&a)[HEAD_TILES][D / 16][4],
              uint32_t slot_address, int half, Before before, Late late) {
    key_reader<D> keys(slot_address, half);
#pragma unroll
    for (int t = 0; t < D / 32; t++) {
        uint4 x[2];
#pragma unroll
        for (int n = 0; n < 2; n++)
            x[n] = keys.load(t, n);
        if (t == 0)
            before();
#pragma unroll
        for (int n = 0; n < 2; n++)
            multiply_step<T, D>(sums, a, 2 * t, n, x[n].x, x[n].y);
        if (t == D / 32 - 1)
            late();
#pragma unroll
        for (int n = 0; n < 2; n++)
            multiply_step<T, D>(sums, a, 2 * t + 1, n, x[n].z, x[n].w);
    }
}

/* The same sums in an order that wants fewer registers. */
template <typename T, int D>
static __device__ __forceinline__ void multiply_half(float (&sums)[HEAD_TILES][2][4],
                                                     const uint32_t (&a)[HEAD_TILES][D / 16][4],
                                                     uint32_t slot_address, int half) {
    key_reader<D> keys(slot_address, half);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int t = 0; t < D / 32; t++) {
            uint4 x = keys.load(t, n);
            multiply_step<T, D>(sums, a, 2 * t, n, x.x, x.y);
            multiply_step<T, D>(sums, a, 2 * t + 1, n, x.z, x.w);
        }
}

/* Warps w and w + 4 have one scheduler, and take turns at its matrix unit, the one with the lower
 * number first: left to themselves they run in step, multiply at the same time and then add at the
 * same time. */
static __device__ __forceinline__ void await_turn(void) {
    named_barrier(BARRIER_TURN + thread_of_block() / 32, 64);
}

static __device__ __forceinline__ void give_turn(void) {
    named_barrier_arrive(BARRIER_TURN + (thread_of_block() / 32 ^ WARPS / 2), 64);
}

/* A slot's products, in this warp's turn. The turn is over with some left to issue, which take
 * about as long as the other warp needs to begin. */
template <typename T, int D, bool THRIFTY>
static __device__ __forceinline__ void
multiply_slot(float (&left)[HEAD_TILES][2][4], float (&right)[HEAD_TILES][2][4],
              const uint32_t (&a)[HEAD_TILES][D / 16][4], uint32_t slot_address) {
    if (THRIFTY) {
        await_turn();
        multiply_half<T, D>(left, a, slot_address, 0);
        multiply_half<T, D>(right, a, slot_address, 1);
        give_turn();
    } else {
        multiply_half<T, D>(
            left, a, slot_address, 0, [&] { await_turn(); }, [] {});
        multiply_half<T, D>(
            right, a, slot_address, 1, [] {}, [&] { give_turn(); });
    }
}

/* Weighted sums of a thread's heads, for the queries of a group of N_OCTETS octets each and the
 * keys of lane % 4. Adds octets [first, last) of half a slot. PADDED: bit o of `heads` says whether
 * the thread's head in octet o exists. The product of a pad head is not always 0, since 0 * inf is
 * NaN. */
template <int N_OCTETS, bool PADDED>
static __device__ __forceinline__ void
add_heads(float (&part)[OCTETS / N_OCTETS][8], const float (&sums)[HEAD_TILES][2][4], int half,
          const float (&w)[OCTETS], uint32_t heads, int first, int last) {
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
template <int N> static __device__ __forceinline__ void share_out(float (&part)[8], int distance) {
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
    named_barrier(BARRIER_SPLIT + warp / 2, 64);
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
static __device__ __forceinline__ void
store_slot(const struct plan *plan, struct shared_state *state, float (&part)[OCTETS / N_OCTETS][8],
           const struct sink *sink, struct lane_target target, int turn) {
    if (N_OCTETS == OCTETS && plan->split)
        store_split(state, sink, target, sum_over_threads(part[0]), turn);
    else
        store_scores<N_OCTETS>(part, sink, target);
}

/* A slot's products, both halves, to scores. sum_slot below picks the instance. */
template <int N_OCTETS, bool PADDED>
static __device__ __forceinline__ void
sum_slot_of(const struct plan *plan, struct shared_state *state,
            const float (&left)[HEAD_TILES][2][4], const float (&right)[HEAD_TILES][2][4],
            const float (&w)[OCTETS], uint32_t heads, const struct sink *sink,
            struct lane_target target, int turn) {
    float part[OCTETS / N_OCTETS][8];
    add_heads<N_OCTETS, PADDED>(part, left, 0, w, heads, 0, OCTETS);
    add_heads<N_OCTETS, PADDED>(part, right, 1, w, heads, 0, OCTETS);
    store_slot<N_OCTETS>(plan, state, part, sink, target, turn);
}

template <bool PADDED>
static __device__ __forceinline__ void
sum_slot_as(const struct plan *plan, struct shared_state *state,
            const float (&left)[HEAD_TILES][2][4], const float (&right)[HEAD_TILES][2][4],
            const float (&w)[OCTETS], uint32_t heads, const struct sink *sink,
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

/* N_OCTETS as the kernel instance has it: 0 where it knows nothing of the head count. */
template <int N_OCTETS>
static __device__ __forceinline__ void
sum_slot(const struct plan *plan, struct shared_state *state, const float (&left)[HEAD_TILES][2][4],
         const float (&right)[HEAD_TILES][2][4], const float (&w)[OCTETS], uint32_t heads,
         bool padded, const struct sink *sink, struct lane_target target, int turn) {
    if constexpr (N_OCTETS != 0)
        sum_slot_of<N_OCTETS, false>(plan, state, left, right, w, heads, sink, target, turn);
    else if (padded)
        sum_slot_as<true>(plan, state, left, right, w, heads, sink, target, turn);
    else
        sum_slot_as<false>(plan, state, left, right, w, heads, sink, target, turn);
}

static __device__ __forceinline__ struct sink
make_sink(const struct slab *s, const struct plan *plan, const struct item *item, int group) {
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

#endif
