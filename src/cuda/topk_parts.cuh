/* SPDX-License-Identifier: Apache-2.0
 *
 * A few rows of up to SHORT keys: every one of PARTS blocks reads the whole row and counts all its
 * keys, and so knows without a word to the others between which keys its part of the winners lies
 * and how many come before. It lists these, and each of them counts those before it.
 */
#ifndef LIDX_TOPK_PARTS_CUH
#define LIDX_TOPK_PARTS_CUH

#include "topk_row.cuh"

enum {
    PARTS = 32,
    PART_ROOM = 256, /* winners of a part that are few enough to be compared with one another */
};

template <class Z> struct part_shared {
    struct shared<Z> row;
    uint32_t low, high; /* the part's keys are these: low <= key < high */
    uint32_t earlier;   /* keys below low */
};

/* The key that as many of its bin's `count` are below, if these are spread evenly. */
static __device__ __forceinline__ uint32_t bound_in_bin(uint32_t bin, uint32_t below,
                                                        uint32_t count) {
    return (bin << 21) + (uint32_t)(__fdividef((float)below, (float)count) * 2097152.0f);
}

/* Cuts the row's best into PARTS at keys that all blocks find alike, and takes the part's bounds.
 * A few more than top_k are wanted, since where the last part ends is a guess too. Returns how many
 * keys are not masked. */
template <class Z>
static __device__ __forceinline__ uint32_t find_part(struct part_shared<Z> *c, uint32_t part) {
    const int N = BINS / Z::THREADS;
    struct shared<Z> *s = &c->row;
    uint32_t count[N], sum = 0, total, top_k = s->row.top_k;
    load_words<N>(count, s->hist + threadIdx.x * N);
    if (threadIdx.x == Z::THREADS - 1)
        count[N - 1] = 0; /* masked */
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += count[i];
    uint32_t before = block_before(s, sum, 0, &total);
    uint32_t wanted = min(top_k + top_k / 32 + 16, total);
    uint32_t begin = wanted * part / PARTS, end = wanted * (part + 1) / PARTS;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (begin - before < count[i])
            c->low = bound_in_bin(threadIdx.x * N + i, begin - before, count[i]);
        if (end - before < count[i])
            c->high = bound_in_bin(threadIdx.x * N + i, end - before, count[i]);
        before += count[i];
    }
    __syncthreads();
    return total;
}

/* Lists the part's keys, and counts those before it. */
template <class Z, int KEYS>
static __device__ __forceinline__ void list_part(struct part_shared<Z> *c, const uint32_t *key) {
    struct shared<Z> *s = &c->row;
    const uint32_t low = c->low, size = c->high - low;
    uint32_t earlier = 0, take = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        earlier += key[i] < low;
        take += key[i] - low < size;
    }
    earlier = __reduce_add_sync(ALL_LANES, earlier);
    if (lane_id() == 0)
        atomicAdd(&c->earlier, earlier);
    uint32_t at = reserve(s, take);
    if (at + take <= Z::LIST) {
        uint64_t *to = s->list + at;
        const uint32_t position = kept(4 * threadIdx.x);
#pragma unroll
        for (uint32_t i = 0; i < KEYS; i++)
            if (key[i] - low < size)
                *to++ = pair(key[i], position + i / 4 * 4 * Z::THREADS + i % 4);
    }
    __syncthreads();
}

/* Writes the listed candidates, the first of which is number `first` of the row. Some threads share
 * one: each compares it with some of the others. */
template <class Z, uint32_t ROOM>
static __device__ __forceinline__ void write_part(const struct shared<Z> *s, uint32_t first,
                                                  int dtype) {
    const uint32_t n_list = s->n_list, SHARING = Z::THREADS / ROOM;
    const struct row r = s->row;
    uint32_t mine = threadIdx.x / SHARING, to = 0;
    uint64_t item = mine < n_list ? s->list[mine] : 0;
    if ((threadIdx.x - lane_id()) / SHARING >= n_list)
        return; /* the warp has none */
#pragma unroll 4
    for (uint32_t j = threadIdx.x % SHARING; j < n_list; j += SHARING)
        to += s->list[j] < item;
#pragma unroll
    for (uint32_t d = 1; d < SHARING; d *= 2)
        to += __shfl_sync(ALL_LANES, to, lane_id() ^ d);
    if (mine < n_list && threadIdx.x % SHARING == 0)
        write_slot(&r, dtype, first + to, item);
}

/* One block, one part of a row. Where too many keys are a part's, or the last one's too few, the
 * block orders the whole row and writes of it what would have been its part. */
template <class Z>
static __global__ void __launch_bounds__(Z::THREADS, 1)
    part_kernel(const __grid_constant__ struct launch l) {
    const uint32_t KEYS = SHORT / Z::THREADS;
    struct shared<Z> *s = shared_memory<Z>();
    struct part_shared<Z> *c = (struct part_shared<Z> *)s;
    const struct problem *p = &l.slab.p;
    const uint32_t part = blockIdx.x % PARTS;
    if (threadIdx.x == 0) {
        c->low = c->earlier = 0;
        c->high = KEY_MASKED;
    }
    begin_row(s, &l.slab, l.slab.row_begin + blockIdx.x / PARTS);
    const uint32_t top_k = s->row.top_k;
    uint32_t key[KEYS];
    load_short<Z>(s, key);
    uint32_t total = min(find_part(c, part), top_k);
    list_part<Z, KEYS>(c, key);
    const uint32_t first = c->earlier, n_list = s->n_list;
    const uint32_t end = part == PARTS - 1 ? top_k : min(first + n_list, top_k);
    if (n_list > PART_ROOM || first + n_list < min(end, total)) {
        __syncthreads();
        clear_row(s);
        __syncthreads();
        feed_short<Z>();
        if (s->n_list)
            order(s, s->n_list);
        write_row(s, p, first, end);
        return;
    }
    if (n_list <= PART_ROOM / 2)
        write_part<Z, PART_ROOM / 2>(s, first, p->values_dtype);
    else
        write_part<Z, PART_ROOM>(s, first, p->values_dtype);
    if (part == PARTS - 1)
        for (uint32_t j = total + threadIdx.x; j < top_k; j += Z::THREADS)
            write_slot(&s->row, p->values_dtype, j, NOTHING);
}

#endif
