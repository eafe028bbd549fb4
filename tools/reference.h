/* SPDX-License-Identifier: Apache-2.0
 *
 * The operator in double precision, from the definition and nothing else: plain loops that share
 * no code with the library. To be asked after operation_run(), which has checked the lengths.
 */
#ifndef LIDX_REFERENCE_H
#define LIDX_REFERENCE_H

#include <stdint.h>

#include "operation.h"

struct ranked {
    double score;
    int64_t position;
};

/* Keys that row `row` of the outputs may see, and the batch it belongs to; 0 and -1 for a row of
 * none. */
int64_t reference_visible(const struct operation *operation, int64_t row, int64_t *batch);

/* Pairs of a query token and a key that it sees. */
double reference_pairs(const struct operation *operation);

/* Where key `j` of batch `b` is. */
const uint16_t *reference_key(const struct operation *operation, int64_t b, int64_t j);

/* Scores of the first `visible` keys of the batch. Returns 0 when memory is short. */
int reference_scores(const struct operation *operation, int64_t row, int64_t batch, int64_t visible,
                     double *scores);

/* For each position, the sum of |weight * query * key| over heads and dimensions: rounding errors
 * of its score are some multiple of this. Returns 0 when memory is short. */
int reference_spread(const struct operation *operation, int64_t row, int64_t batch,
                     const int32_t *positions, int64_t n, double *spread);

/* 1 when key `j` scores 0 in any precision: each of its dots is below 0 by more than fp32 can err
 * over, or all products are 0. Such keys are equal, and only their position ranks them. */
int reference_plain_zero(const struct operation *operation, int64_t row, int64_t batch, int64_t j);

/* Score descending, equal ones by position, NaN behind all numbers. */
void reference_rank(struct ranked *ranked, const double *scores, int64_t n);

#endif
