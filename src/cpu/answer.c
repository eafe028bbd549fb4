/* SPDX-License-Identifier: Apache-2.0 */
#include "answer.h"

#include <string.h>

#include "../dtype.h"
#include "../visible.h"
#include "topk.h"

static int32_t *indices_at(const struct problem *p, int64_t batch, int64_t row) {
    unsigned char *base = (unsigned char *)p->indices + batch * p->indices_batch_stride;
    return (int32_t *)(void *)base + row * p->top_k;
}

static void *values_at(const struct problem *p, int64_t batch, int64_t row, int first) {
    return (unsigned char *)p->values + batch * p->values_batch_stride +
           (row * p->top_k + first) * lidx_dtype_bytes(p->values_dtype);
}

/* Loops of a known length become vector instructions wherever they may be used. */
enum { AT_ONCE = 16 };

static inline void positions_of(int32_t *to, const uint64_t *entry, int n) {
    for (int i = 0; i < n; i++)
        to[i] = lidx_topk_position(entry[i]);
}

static inline void scores_of(float *to, const uint64_t *entry, int n) {
    for (int i = 0; i < n; i++)
        to[i] = lidx_topk_score(entry[i]);
}

static void write_indices(int32_t *indices, const uint64_t *entry, int n) {
    int i = 0;
    for (; i + AT_ONCE <= n; i += AT_ONCE)
        positions_of(indices + i, entry + i, AT_ONCE);
    positions_of(indices + i, entry + i, n - i);
}

static void write_values(void *values, int dtype, const uint64_t *entry, int n) {
    if (dtype == DTYPE_F32) {
        float *to = values;
        int i = 0;
        for (; i + AT_ONCE <= n; i += AT_ONCE)
            scores_of(to + i, entry + i, AT_ONCE);
        scores_of(to + i, entry + i, n - i);
    } else {
        for (int i = 0; i < n; i++)
            lidx_store(values, i, dtype, lidx_topk_score(entry[i]));
    }
}

void lidx_write_entries(const struct problem *p, int64_t batch, int64_t row, int first,
                        const uint64_t *entry, int n) {
    write_indices(indices_at(p, batch, row) + first, entry, n);
    if (p->values)
        write_values(values_at(p, batch, row, first), p->values_dtype, entry, n);
}

void lidx_write_missing(const struct problem *p, int64_t batch, int64_t row, int first) {
    int n = p->top_k - first;
    memset(indices_at(p, batch, row) + first, 0xFF, sizeof(int32_t) * (size_t)n); /* -1 */
    if (!p->values)
        return;
    void *values = values_at(p, batch, row, first);
    for (int i = 0; i < n; i++)
        lidx_store(values, i, p->values_dtype, -__builtin_inff());
}

void lidx_write_empty_rows(const struct problem *p, int64_t batch) {
    struct extent e = lidx_extent(p, batch);
    for (int64_t i = e.n_query; i < e.n_slots; i++)
        lidx_write_missing(p, batch, e.query_begin + i, 0);
}

void lidx_write_rows_past_end(const struct problem *p) {
    if (!p->query_packed)
        return;
    int64_t end = 0;
    if (p->n_batch) {
        struct extent last = lidx_extent(p, p->n_batch - 1);
        end = last.query_begin + last.n_query;
    }
    for (int64_t i = end; i < p->n_query; i++)
        lidx_write_missing(p, 0, i, 0);
}
