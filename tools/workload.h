/* SPDX-License-Identifier: Apache-2.0
 *
 * Random tensors for a benchmark: made once for the largest case, each case views a first part.
 */
#ifndef LIDX_WORKLOAD_H
#define LIDX_WORKLOAD_H

#include <stdint.h>

#include "lightning_indexer.h"

enum { N_VIEWS = 8 };

struct workload {
    /* To be set by the caller. */
    int64_t n_heads, head_dim, sparse_count, block_size, max_query, max_key;
    int is_fp16;
    uint64_t seed;

    /* Filled in by workload_view(). */
    struct lidx_args args;

    struct lidx_tensor views[N_VIEWS];
    int64_t shapes[N_VIEWS][4];
    int32_t query_length, key_length;
    uint16_t *query, *key;
    float *weights, *values;
    int32_t *table, *indices;
};

/* Returns EXIT_FINE or, after a sentence, EXIT_TROUBLE; workload_destroy() in either case. */
int workload_create(struct workload *workload);
void workload_destroy(struct workload *workload);

/* Points `args` at one batch of n_query causal tokens and n_key keys. The pages of a PA_BSND key
 * are shuffled, the same way for the same number of keys. */
void workload_view(struct workload *workload, int64_t n_query, int64_t n_key, int layout_key);

#endif
