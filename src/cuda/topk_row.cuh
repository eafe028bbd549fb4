/* SPDX-License-Identifier: Apache-2.0
 *
 * Which row a block works on, how its work begins and how it ends.
 */
#ifndef LIDX_TOPK_ROW_CUH
#define LIDX_TOPK_ROW_CUH

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
        batch = p->n_query == 1 ? number : number / p->n_query;
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
        r.values +=
            out * p->values_batch_stride + slot * p->top_k * (p->values_dtype == DTYPE_F32 ? 4 : 2);
    r.n = (uint32_t)visible;
    r.top_k = (uint32_t)p->top_k;
    return r;
}

static __device__ __forceinline__ void wait_for_scores(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* An empty list, and counters at zero. */
template <class Z> static __device__ __forceinline__ void clear_row(struct shared<Z> *s) {
    zero<Z, BINS>(s->hist);
    zero<Z, Z::WORDS>(s->counter);
    if (threadIdx.x == 0) {
        s->n_list = 0;
        s->n_tied = 0;
        s->crowded = 0;
        s->last_low = 0xFFFFFFFFu;
        s->last_high = 0;
    }
}

/* Finds the row, and waits for its scores: the kernel may have been started while the score kernel
 * still runs. Lengths can be read before, since that one was not started until all ahead of it had
 * ended. (Where there are no keys, and so no score kernel, lengths decide nothing.) */
template <class Z>
static __device__ __forceinline__ void await_row(struct shared<Z> *s, const struct slab *slab,
                                                 int64_t number) {
    if (threadIdx.x == 0)
        s->row = find_row(slab, number);
    __syncthreads();
    wait_for_scores();
}

template <class Z>
static __device__ __forceinline__ void begin_row(struct shared<Z> *s, const struct slab *slab,
                                                 int64_t number) {
    clear_row(s);
    await_row(s, slab, number);
}

template <class Z>
static __device__ __forceinline__ void finish_row(struct shared<Z> *s, const struct problem *p) {
    if (s->n_list)
        order(s, s->n_list);
    write_row(s, p, 0, s->row.top_k);
}

#endif
