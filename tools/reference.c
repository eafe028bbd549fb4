/* SPDX-License-Identifier: Apache-2.0 */
#include "reference.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

/* ---- who sees what --------------------------------------------------------------------------- */

/* The batch whose part of the prefix sums holds row `row`; n when none does. */
static int64_t batch_of_row(const int32_t *prefix, int64_t n, int64_t row) {
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (prefix[middle] > row)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static const int32_t *list_of(const struct lidx_tensor *t) {
    return t ? t->data : NULL;
}

int64_t reference_visible(const struct operation *operation, int64_t row, int64_t *batch) {
    const struct lidx_args *args = &operation->args;
    const int32_t *queries = list_of(args->actual_seq_lengths_query);
    const int32_t *keys = list_of(args->actual_seq_lengths_key);
    int64_t b, i, n_query, n_key;
    *batch = -1;
    if (args->layout_query == LIDX_TND) {
        int64_t n = args->actual_seq_lengths_query->shape[0];
        b = batch_of_row(queries, n, row);
        if (b == n)
            return 0;
        int64_t first = b ? queries[b - 1] : 0;
        i = row - first;
        n_query = queries[b] - first;
    } else {
        int64_t width = args->query->shape[1];
        b = row / width;
        i = row % width;
        n_query = queries ? queries[b] : width;
        if (i >= n_query)
            return 0;
    }
    if (args->layout_key == LIDX_TND)
        n_key = keys[b] - (b ? keys[b - 1] : 0);
    else
        n_key = keys ? keys[b] : args->key->shape[1];
    *batch = b;
    if (args->sparse_mode == LIDX_MODE_FULL)
        return n_key;
    int64_t visible = n_key - n_query + i + 1;
    return visible < 0 ? 0 : visible > n_key ? n_key : visible;
}

const uint16_t *reference_key(const struct operation *operation, int64_t b, int64_t j) {
    const struct lidx_args *args = &operation->args;
    const uint16_t *keys = args->key->data;
    int64_t dim = operation_dim(operation), row;
    if (args->layout_key == LIDX_PA_BSND) {
        const int32_t *table = args->block_table->data;
        int64_t block = args->key->shape[1];
        row = table[b * args->block_table->shape[1] + j / block] * block + j % block;
    } else if (args->layout_key == LIDX_TND) {
        row = (b ? list_of(args->actual_seq_lengths_key)[b - 1] : 0) + j;
    } else {
        row = b * args->key->shape[1] + j;
    }
    return keys + row * dim;
}

double reference_pairs(const struct operation *operation) {
    double pairs = 0;
    int64_t batch;
    for (int64_t row = 0; row < operation->n_rows; row++)
        pairs += (double)reference_visible(operation, row, &batch);
    return pairs;
}

/* ---- scores ---------------------------------------------------------------------------------- */

static double element(const struct lidx_tensor *t, int64_t index) {
    if (t->dtype.bits == 32)
        return (double)((const float *)t->data)[index];
    uint16_t bits = ((const uint16_t *)t->data)[index];
    return (double)(t->dtype.code == LIDX_BFLOAT ? bf16_to_float(bits) : f16_to_float(bits));
}

/* Sums are kept in fp32 by the operator: what does not fit there is infinite. */
static double as_fp32_range(double x) {
    return x > FLT_MAX ? INFINITY : x < -FLT_MAX ? -INFINITY : x;
}

/* One query token, [dim][heads]: heads are innermost so that the loop over them has no sum. */
struct token {
    int heads, dim;
    double *query, *weights;
};

static int read_token(const struct operation *operation, int64_t row, struct token *token) {
    const struct lidx_args *args = &operation->args;
    int heads = operation_heads(operation), dim = operation_dim(operation);
    token->heads = heads;
    token->dim = dim;
    token->query = malloc((size_t)heads * (size_t)(dim + 1) * sizeof(double));
    if (!token->query)
        return 0;
    token->weights = token->query + (size_t)heads * (size_t)dim;
    for (int h = 0; h < heads; h++) {
        token->weights[h] = element(args->weights, row * heads + h);
        for (int d = 0; d < dim; d++)
            token->query[d * heads + h] = element(args->query, (row * heads + h) * dim + d);
    }
    return 1;
}

static double score(const struct token *token, const double *key, double *dot) {
    int heads = token->heads;
    memset(dot, 0, (size_t)heads * sizeof *dot);
    for (int d = 0; d < token->dim; d++)
        for (int h = 0; h < heads; h++)
            dot[h] += key[d] * token->query[d * heads + h];
    double sum = 0;
    for (int h = 0; h < heads; h++) {
        double relu = as_fp32_range(dot[h]);
        if (relu <= 0) /* a NaN stays */
            relu = 0;
        sum += as_fp32_range(token->weights[h] * relu);
    }
    return as_fp32_range(sum);
}

static void read_key(const struct operation *operation, int64_t b, int64_t j, double *key) {
    struct lidx_tensor one = *operation->args.key;
    one.data = (void *)(uintptr_t)reference_key(operation, b, j);
    for (int d = 0; d < operation_dim(operation); d++)
        key[d] = element(&one, d);
}

int reference_scores(const struct operation *operation, int64_t row, int64_t batch, int64_t visible,
                     double *scores) {
    struct token token;
    if (!read_token(operation, row, &token))
        return 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
    for (int64_t j = 0; j < visible; j++) {
        double key[128], dot[LIDX_MAX_HEADS];
        read_key(operation, batch, j, key);
        scores[j] = score(&token, key, dot);
    }
    free(token.query);
    return 1;
}

int reference_spread(const struct operation *operation, int64_t row, int64_t batch,
                     const int32_t *positions, int64_t n, double *spread) {
    struct token token;
    if (!read_token(operation, row, &token))
        return 0;
    for (int64_t s = 0; s < n; s++) {
        double key[128];
        read_key(operation, batch, positions[s], key);
        spread[s] = 0;
        for (int d = 0; d < token.dim; d++)
            for (int h = 0; h < token.heads; h++)
                spread[s] += fabs(token.weights[h] * key[d] * token.query[d * token.heads + h]);
    }
    free(token.query);
    return 1;
}

int reference_plain_zero(const struct operation *operation, int64_t row, int64_t batch, int64_t j) {
    struct token token;
    double key[128];
    if (!read_token(operation, row, &token))
        return 0;
    read_key(operation, batch, j, key);
    int plain = 1;
    for (int h = 0; h < token.heads; h++) {
        double dot = 0, size = 0;
        for (int d = 0; d < token.dim; d++) {
            double product = key[d] * token.query[d * token.heads + h];
            dot += product;
            size += fabs(product);
        }
        plain = plain && dot <= -(double)token.dim * 0x1p-22 * size && isfinite(token.weights[h]);
    }
    free(token.query);
    return plain;
}

/* ---- order ----------------------------------------------------------------------------------- */

static int by_rank(const void *a, const void *b) {
    const struct ranked *x = a, *y = b;
    int x_nan = x->score != x->score, y_nan = y->score != y->score;
    if (x_nan != y_nan)
        return x_nan - y_nan;
    if (!x_nan && x->score != y->score)
        return x->score > y->score ? -1 : 1;
    return (x->position > y->position) - (x->position < y->position);
}

void reference_rank(struct ranked *ranked, const double *scores, int64_t n) {
    for (int64_t j = 0; j < n; j++)
        ranked[j] = (struct ranked){scores[j], j};
    qsort(ranked, (size_t)n, sizeof *ranked, by_rank);
}
