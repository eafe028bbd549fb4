/* SPDX-License-Identifier: Apache-2.0
 *
 * Whether a row of results is right. Two answers agree when every index in which they differ has
 * a true score near the true k-th: within 1e-4 of it, or 1e-6 of the row's largest |score|. All
 * else is exact: which slots are -1 and -inf, no index twice, values in order, equal values by
 * position.
 */
#ifndef LIDX_AGREEMENT_H
#define LIDX_AGREEMENT_H

#include <stdint.h>

#include "operation.h"

enum { FINDINGS = 10, FINDING_TEXT = 256 };

/* One thing that is wrong: at most FINDINGS are kept, the rest are counted. */
struct finding {
    int64_t row, slot;
    char text[FINDING_TEXT];
};

struct agreement {
    int64_t rows, rows_wrong;
    int64_t slots;  /* that should hold an index */
    int64_t within; /* indices that differ from the reference's, but are as good */
    int64_t n_findings;
    double worst_value; /* the largest error of a value, relative to the row's largest |score| */
    struct finding findings[FINDINGS];
};

/* Compares one row. `values` may be NULL; `value_epsilon` is the rounding of their type, 0 for
 * float32. Returns EXIT_FINE, or EXIT_TROUBLE after a sentence when memory is short. */
int agreement_row(struct agreement *agreement, const struct operation *operation, int64_t row,
                  const int32_t *indices, const double *values, double value_epsilon);

#endif
