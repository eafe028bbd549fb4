/* SPDX-License-Identifier: Apache-2.0
 *
 * The reference: plain C that defines what is right. It runs anywhere, stays as simple as this,
 * and every other kernel is held against it.
 */
#include "kernel.h"

#include <string.h>

#include "../dtype.h"

/* Packed form: weights, then the heads, all as fp32. */
static size_t packed_size(int n_heads, int head_dim) {
    return sizeof(float) * (size_t)n_heads * (size_t)(1 + head_dim);
}

static void pack(float *packed, const struct query_row *row, int dtype) {
    int n = row->n_heads * row->head_dim;
    memcpy(packed, row->weights, sizeof(float) * (size_t)row->n_heads);
    for (int i = 0; i < n; i++)
        packed[row->n_heads + i] = lidx_load(row->query, i, dtype);
}

static float score_one(const float *weights, const float *query, const float *key, int n_heads,
                       int head_dim) {
    float sum = 0;
    for (int h = 0; h < n_heads; h++) {
        float dot = 0;
        for (int d = 0; d < head_dim; d++)
            dot += query[h * head_dim + d] * key[d];
        float relu = !(dot <= 0) ? dot : 0; /* keeps a NaN */
        sum += weights[h] * relu;
    }
    return sum;
}

static void score(float *out, const float *packed, int n_heads, int head_dim,
                  const struct key_run *run, int dtype) {
    for (int j = 0; j < run->n_keys; j++) {
        const unsigned char *block = run->block[j / KEY_BLOCK];
        const void *row = block + run->row_stride * (j % KEY_BLOCK);
        float key[MAX_HEAD_DIM];
        for (int d = 0; d < head_dim; d++)
            key[d] = lidx_load(row, d, dtype);
        out[j] = score_one(packed, packed + n_heads, key, n_heads, head_dim);
    }
}

static void pack_bf16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_BF16);
}

static void pack_fp16(void *packed, const struct query_row *row) {
    pack(packed, row, DTYPE_FP16);
}

static void score_bf16(float *out, const void *packed, int n_heads, int head_dim,
                       const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_BF16);
}

static void score_fp16(float *out, const void *packed, int n_heads, int head_dim,
                       const struct key_run *run) {
    score(out, packed, n_heads, head_dim, run, DTYPE_FP16);
}

const struct kernel lidx_kernel_scalar = {
    .name = "scalar",
    .path = {[DTYPE_BF16] = {packed_size, pack_bf16, score_bf16},
             [DTYPE_FP16] = {packed_size, pack_fp16, score_fp16}},
};
