/* SPDX-License-Identifier: Apache-2.0
 *
 * Random tensors for a benchmark: made once for the largest case, each case views a first part.
 */
#ifndef LIDX_WORKLOAD_H
#define LIDX_WORKLOAD_H

#include <stdint.h>

#include "lightning_indexer.h"

enum { N_VIEWS = 8, MAX_BATCHES = 256 };

/* One run: batches of n_query causal tokens at the end of n_key keys. */
struct workload_shape {
    int64_t n_batch, n_query, n_key; /* more than one batch: with LIDX_TND only */
    int is_lognormal;                /* unequal lengths, n_key is their mean */
    int layout_key;
    int64_t block_size; /* LIDX_PA_BSND; pages are shuffled, alike for the same number of pages */
};

struct workload {
    /* To be set by the caller. The most tokens and keys of a shape, all batches together. */
    int64_t n_heads, head_dim, sparse_count, max_query, max_key;
    int is_fp16;
    uint64_t seed;

    /* Filled in by workload_view(). */
    struct lidx_args args;

    struct lidx_tensor views[N_VIEWS];
    int64_t shapes[N_VIEWS][4];
    int32_t query_ends[MAX_BATCHES], key_ends[MAX_BATCHES]; /* sums over the batches so far */
    double pairs;                                           /* of a query and a key that it sees */
    uint16_t *query, *key;
    float *weights, *values;
    int32_t *table, *indices;
};

/* Returns EXIT_FINE or, after a sentence, EXIT_TROUBLE; workload_destroy() in either case. */
int workload_create(struct workload *workload);
void workload_destroy(struct workload *workload);

/* Points `args` at tensors of this shape. */
void workload_view(struct workload *workload, const struct workload_shape *shape);

#endif
