/* SPDX-License-Identifier: Apache-2.0
 *
 * Which keys a query may see, and where a batch begins: the one rule that the CPU and the CUDA
 * side share. Lengths are clamped here. On the CPU check.c has already refused bad ones, so the
 * clamps change nothing; on CUDA they are the only guard, since lengths live on the device.
 */
#ifndef LIDX_VISIBLE_H
#define LIDX_VISIBLE_H

#include "problem.h"

#ifdef __CUDACC__
#define LIDX_INLINE static __host__ __device__ __forceinline__
#else
#define LIDX_INLINE static inline
#endif

/* One batch: its real lengths and where its rows begin. Query row i of the batch is row
 * query_begin + i of query + batch * query_batch_stride, and the same for weights and outputs;
 * key j likewise when keys are not paged. */
struct extent {
    int64_t query_begin;
    int64_t key_begin;
    int64_t n_query; /* L1 */
    int64_t n_key;   /* L2 */
    int64_t n_slots; /* output rows that belong to the batch; those past n_query are empty */
};

LIDX_INLINE int64_t lidx_clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

/* Where batch b begins in a list that is packed (prefix sums) or not, and how long it is. */
LIDX_INLINE void lidx_segment(const int32_t *lengths, int packed, int64_t limit, int64_t b,
                              int64_t *begin, int64_t *length) {
    if (!packed) {
        *begin = 0;
        *length = lengths ? lidx_clamp(lengths[b], 0, limit) : limit;
        return;
    }
    int64_t first = b ? lidx_clamp(lengths[b - 1], 0, limit) : 0;
    int64_t last = lidx_clamp(lengths[b], first, limit);
    *begin = first;
    *length = last - first;
}

LIDX_INLINE struct extent lidx_extent(const struct problem *p, int64_t b) {
    struct extent e;
    lidx_segment(p->query_lengths, p->query_packed, p->n_query, b, &e.query_begin, &e.n_query);
    lidx_segment(p->key_lengths, p->key_packed, p->n_key, b, &e.key_begin, &e.n_key);
    e.n_slots = p->query_packed ? e.n_query : p->n_query;
    return e;
}

/* How many keys, counted from the first, query i of a batch sees; 0 for a row past n_query. */
LIDX_INLINE int64_t lidx_visible(const struct problem *p, const struct extent *e, int64_t i) {
    if (i >= e->n_query)
        return 0;
    if (p->sparse_mode == 0)
        return e->n_key;
    return lidx_clamp(e->n_key - e->n_query + i + 1, 0, e->n_key);
}

#endif
