/* SPDX-License-Identifier: Apache-2.0
 *
 * The normalised view of one run: what every room below check.c works from. Plain data, compiled
 * by C and by nvcc, passed by value to CUDA kernels. No layout names below this line: a tensor is
 * a pointer, a batch stride and lengths. All strides are in bytes, all offsets 64 bits wide.
 */
#ifndef LIDX_PROBLEM_H
#define LIDX_PROBLEM_H

#include <stdint.h>

enum dtype { DTYPE_BF16 = 0, DTYPE_FP16 = 1, DTYPE_F32 = 2, DTYPE_COUNT = 3 };
enum { KEY_DTYPES = 2 }; /* DTYPE_BF16 and DTYPE_FP16 may be a query's and a key's type */

struct problem {
    int32_t dtype;         /* of query and key */
    int32_t weights_dtype; /* dtype, or DTYPE_F32 */
    int32_t values_dtype;  /* dtype, or DTYPE_F32 */
    int32_t n_heads;
    int32_t head_dim;
    int32_t top_k;
    int32_t sparse_mode;
    int32_t page_size; /* keys of a page; 0 = keys are not paged */

    int64_t n_batch;
    int64_t n_query; /* query rows: of one batch, or of all when query_packed */
    int64_t n_key;   /* keys: of one batch at most, or of all when key_packed */
    int64_t n_pages;
    int32_t query_packed; /* batches follow each other; query_lengths are prefix sums */
    int32_t key_packed;   /* likewise for key_lengths */

    const int32_t *query_lengths; /* [n_batch], or NULL: all of them n_query */
    const int32_t *key_lengths;   /* [n_batch], or NULL: all of them n_key */
    const int32_t *page_table;    /* [n_batch][n_key / page_size], or NULL */
    int64_t page_table_stride;    /* from batch to batch */

    const void *query;   /* [n_heads][head_dim] of dtype, a row */
    const void *key;     /* [head_dim] of dtype, a row */
    const void *weights; /* [n_heads] of weights_dtype, a row */
    int32_t *indices;    /* [top_k], a row */
    void *values;        /* [top_k] of values_dtype, a row; or NULL */

    /* From batch to batch (0 when packed), and for a paged key from page to page. Rows of one
     * batch or page are contiguous. */
    int64_t query_batch_stride;
    int64_t key_batch_stride;
    int64_t weights_batch_stride;
    int64_t indices_batch_stride;
    int64_t values_batch_stride;

    uint32_t *error_word; /* device memory, or NULL */
};

#endif
