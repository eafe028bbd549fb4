/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* posix_memalign */
#endif

#include "workload.h"

#include <stdlib.h>
#include <string.h>

#include "message.h"
#include "numbers.h"

static void *allocate(int64_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 4096, (size_t)bytes + 4096) == 0 ? memory : NULL;
}

/* Slices have streams of their own, so the numbers do not depend on the thread count. */
static void fill(const struct workload *w, uint16_t *to, int64_t n, uint64_t stream) {
    const int64_t slice = 1 << 16;
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
    for (int64_t s = 0; s < (n + slice - 1) / slice; s++) {
        struct random seeds = {stream ^ (uint64_t)s << 32};
        struct random random = {random_bits(&seeds)};
        int64_t end = (s + 1) * slice < n ? (s + 1) * slice : n;
        for (int64_t i = s * slice; i < end; i++) {
            float x = random_normal(&random);
            to[i] = w->is_fp16 ? float_to_f16(x) : float_to_bf16(x);
        }
    }
}

static int64_t pages_of(const struct workload *w, int64_t n_key) {
    return (n_key + w->block_size - 1) / w->block_size;
}

int workload_create(struct workload *w) {
    int64_t n_query = w->max_query * w->n_heads * w->head_dim;
    int64_t n_key = pages_of(w, w->max_key) * w->block_size * w->head_dim;
    int64_t n_out = w->max_query * w->sparse_count;
    w->query = allocate(n_query * 2);
    w->key = allocate(n_key * 2);
    w->weights = allocate(w->max_query * w->n_heads * 4);
    w->table = allocate(pages_of(w, w->max_key) * 4);
    w->indices = allocate(n_out * 4);
    w->values = allocate(n_out * 4);
    if (!w->query || !w->key || !w->weights || !w->table || !w->indices || !w->values)
        return refuse("no memory for tensors of %lld MiB",
                      (long long)((n_query * 2 + n_key * 2 + n_out * 8) >> 20));
    fill(w, w->query, n_query, 2 * w->seed);
    fill(w, w->key, n_key, 2 * w->seed + 1);
    struct random random = {w->seed};
    for (int64_t i = 0; i < w->max_query * w->n_heads; i++)
        w->weights[i] = random_normal(&random);
    memset(w->indices, 0, (size_t)n_out * 4); /* resident before memory is measured */
    memset(w->values, 0, (size_t)n_out * 4);
    return EXIT_FINE;
}

void workload_destroy(struct workload *w) {
    free(w->query);
    free(w->key);
    free(w->weights);
    free(w->table);
    free(w->indices);
    free(w->values);
    memset(w, 0, sizeof *w);
}

/* View number `v` of a shape whose first dimension, the batch, is left out where `skip` is 1. */
static const struct lidx_tensor *view(struct workload *w, int v, void *data, struct lidx_dtype type,
                                      int ndim, const int64_t *shape, int skip) {
    memcpy(w->shapes[v], shape + skip, (size_t)(ndim - skip) * sizeof *shape);
    w->views[v] = (struct lidx_tensor){.data = data,
                                       .device = {LIDX_CPU, 0},
                                       .ndim = ndim - skip,
                                       .dtype = type,
                                       .shape = w->shapes[v]};
    return &w->views[v];
}

static void shuffle_pages(struct workload *w, int64_t pages) {
    struct random random = {w->seed + 7};
    for (int64_t p = 0; p < pages; p++)
        w->table[p] = (int32_t)p;
    random_shuffle(&random, w->table, pages);
}

void workload_view(struct workload *w, int64_t n_query, int64_t n_key, int layout_key) {
    const struct lidx_dtype half = {w->is_fp16 ? LIDX_FLOAT : LIDX_BFLOAT, 16, 1};
    const struct lidx_dtype f32 = {LIDX_FLOAT, 32, 1}, i32 = {LIDX_INT, 32, 1};
    int packed = layout_key == LIDX_TND, paged = layout_key == LIDX_PA_BSND;
    int64_t pages = pages_of(w, n_key);
    const int64_t query[] = {1, n_query, w->n_heads, w->head_dim};
    const int64_t key[] = {paged ? pages : 1, paged ? w->block_size : n_key, 1, w->head_dim};
    const int64_t out[] = {1, n_query, 1, w->sparse_count}, table[] = {1, pages}, one = 1;
    struct lidx_args *args = &w->args;
    w->query_length = (int32_t)n_query;
    w->key_length = (int32_t)n_key;
    *args = (struct lidx_args)LIDX_ARGS_INIT;
    args->layout_query = packed ? LIDX_TND : LIDX_BSND;
    args->layout_key = layout_key;
    args->sparse_count = (int32_t)w->sparse_count;
    args->query = view(w, 0, w->query, half, 4, query, packed);
    args->key = view(w, 1, w->key, half, 4, key, packed);
    args->weights = view(w, 2, w->weights, f32, 3, query, packed);
    args->sparse_indices = view(w, 3, w->indices, i32, 4, out, packed);
    args->sparse_values = view(w, 4, w->values, f32, 4, out, packed);
    if (packed)
        args->actual_seq_lengths_query = view(w, 5, &w->query_length, i32, 1, &one, 0);
    if (packed || paged)
        args->actual_seq_lengths_key = view(w, 6, &w->key_length, i32, 1, &one, 0);
    if (paged) {
        args->block_table = view(w, 7, w->table, i32, 2, table, 0);
        shuffle_pages(w, pages);
    }
}
