/* SPDX-License-Identifier: Apache-2.0
 *
 * Problems that the tests of the CUDA backend make on the device: one dtype for elements and
 * weights, normal numbers, outputs of both kinds.
 */
#ifndef LIDX_CUDA_PROBLEM_H
#define LIDX_CUDA_PROBLEM_H

#include "cuda_device.h"

struct setup {
    struct lidx_args args;
    struct lidx_tensor query, key, weights, query_lengths, key_lengths, table, indices, values;
    int64_t query_shape[4], key_shape[4], weights_shape[3], batches[1], table_shape[2];
    int64_t out_shape[4];
    int64_t rows, n_batch;
};

/* `page_size` 0: keys as the queries are, packed or by batch. `width` is the table's. */
void setup_make(struct setup *s, int packed, int is_bf16, int64_t n_batch, int64_t n_query,
                int64_t n_key, int n_heads, int head_dim, int top_k, int64_t page_size,
                int64_t n_pages, int64_t width);
void set_lengths(const struct setup *s, const int32_t *query, const int32_t *key);
void shuffled_table(int32_t *table, int64_t entries, int64_t n_pages, struct rng *rng);

/* Normal numbers as 16-bit elements, quickly: at full size there are half a billion. */
void fill_halves(uint16_t *to, size_t n, int is_bf16, uint64_t seed);

/* Of the indices, and as much again of the values. */
size_t output_bytes(const struct setup *s);

/* Indices, then values, of a run into poisoned outputs; NULL when the kernel refuses. */
unsigned char *answer(struct setup *s, struct kernel *kernel);

/* Row and slot of the first difference, for a sentence; 1 when there is none. */
int same_answers(const struct setup *s, const unsigned char *a, const unsigned char *b,
                 char text[TEXT]);

#endif
