/* SPDX-License-Identifier: Apache-2.0
 *
 * Inside of the oracle: truth.c works it out, oracle.c holds answers against it.
 */
#ifndef LIDX_TRUTH_H
#define LIDX_TRUTH_H

#include "oracle.h"

enum key_flag {
    KEY_OPEN = 1,  /* fp32 may overflow on the way: the score is not determined */
    KEY_ZERO = 2,  /* certainly scores exactly 0 */
    KEY_EXACT = 4, /* every partial sum is exact in fp32 */
};

struct oracle_row {
    int64_t batch;
    int64_t visible;
    double *score;       /* [visible] */
    unsigned char *flag; /* [visible] */
    double largest;      /* |score| of determined, finite keys */
    float *slack;        /* [visible]: what cancellation and flushed denormals may cost */
    int is_open;         /* some key is */
    int is_exact;        /* all keys are */
    int32_t *best;       /* positions in the contract's order */
};

struct oracle {
    int64_t n_rows;
    struct oracle_row *row;
    int64_t n_batch;
    int32_t **class_of; /* by batch: keys with equal bytes have equal numbers */
    int64_t *n_class;
    int32_t top_k;
};

/* value = significand * 2^exponent; a denormal is one by the type's own rules. */
struct element {
    double value;
    int lowest; /* exponent of the lowest set bit; INT_MAX of sorts for 0 and non-finite */
    int is_denormal;
};

struct element truth_element(const unsigned char *array, int64_t i, struct lidx_dtype dtype);

/* Row i of batch b in a tensor shaped like the query; i may also run over all rows of TND. */
unsigned char *truth_row(const struct lidx_args *a, const struct lidx_tensor *t, int64_t b,
                         int64_t i);

#endif
