/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* posix_memalign */
#endif

#include "workload.h"

#include <math.h>
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

enum { LEAST_BLOCK = 16, LARGEST_BLOCK = 1024 };

int workload_create(struct workload *w) {
    int64_t n_query = w->max_query * w->n_heads * w->head_dim;
    int64_t n_key = (w->max_key + LARGEST_BLOCK) * w->head_dim; /* the last page is whole */
    int64_t n_out = w->max_query * w->sparse_count;
    w->query = allocate(n_query * 2);
    w->key = allocate(n_key * 2);
    w->weights = allocate(w->max_query * w->n_heads * 4);
    w->table = allocate((w->max_key / LEAST_BLOCK + 1) * 4);
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

/* exp(0.8 * normal) relative to its mean; the sum is as if all were equal. */
static void draw_lengths(struct workload *w, const struct workload_shape *shape, double *lengths) {
    struct random random = {w->seed + 9};
    double sum = 0;
    for (int64_t b = 0; b < shape->n_batch; b++) {
        lengths[b] = shape->is_lognormal ? exp(0.8 * random_normal(&random)) : 1;
        sum += lengths[b];
    }
    for (int64_t b = 0; b < shape->n_batch; b++)
        lengths[b] *= (double)(shape->n_batch * shape->n_key) / sum;
}

static void set_lengths(struct workload *w, const struct workload_shape *shape) {
    double lengths[MAX_BATCHES], sum = 0;
    int32_t end = 0;
    draw_lengths(w, shape, lengths);
    w->pairs = 0;
    for (int64_t b = 0; b < shape->n_batch; b++) {
        int32_t begin = end;
        sum += lengths[b];
        end = (int32_t)(sum + 0.5);
        w->key_ends[b] = end;
        w->query_ends[b] = (int32_t)((b + 1) * shape->n_query);
        for (int64_t i = 0; i < shape->n_query; i++) {
            int64_t visible = end - begin - shape->n_query + i + 1;
            w->pairs += visible > 0 ? (double)visible : 0;
        }
    }
}

void workload_view(struct workload *w, const struct workload_shape *shape) {
    const struct lidx_dtype half = {w->is_fp16 ? LIDX_FLOAT : LIDX_BFLOAT, 16, 1};
    const struct lidx_dtype f32 = {LIDX_FLOAT, 32, 1}, i32 = {LIDX_INT, 32, 1};
    int packed = shape->layout_key == LIDX_TND, paged = shape->layout_key == LIDX_PA_BSND;
    int64_t n_query = shape->n_batch * shape->n_query, n_key = shape->n_batch * shape->n_key;
    int64_t pages = paged ? (n_key + shape->block_size - 1) / shape->block_size : 1;
    const int64_t query[] = {1, n_query, w->n_heads, w->head_dim};
    const int64_t key[] = {pages, paged ? shape->block_size : n_key, 1, w->head_dim};
    const int64_t out[] = {1, n_query, 1, w->sparse_count}, table[] = {1, pages};
    struct lidx_args *args = &w->args;
    set_lengths(w, shape);
    *args = (struct lidx_args)LIDX_ARGS_INIT;
    args->layout_query = packed ? LIDX_TND : LIDX_BSND;
    args->layout_key = shape->layout_key;
    args->sparse_count = (int32_t)w->sparse_count;
    args->query = view(w, 0, w->query, half, 4, query, packed);
    args->key = view(w, 1, w->key, half, 4, key, packed);
    args->weights = view(w, 2, w->weights, f32, 3, query, packed);
    args->sparse_indices = view(w, 3, w->indices, i32, 4, out, packed);
    args->sparse_values = view(w, 4, w->values, f32, 4, out, packed);
    if (packed)
        args->actual_seq_lengths_query = view(w, 5, w->query_ends, i32, 1, &shape->n_batch, 0);
    if (packed || paged)
        args->actual_seq_lengths_key = view(w, 6, w->key_ends, i32, 1, &shape->n_batch, 0);
    if (paged) {
        args->block_table = view(w, 7, w->table, i32, 2, table, 0);
        shuffle_pages(w, pages);
    }
}
