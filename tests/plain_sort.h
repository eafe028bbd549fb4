/* SPDX-License-Identifier: Apache-2.0
 *
 * A row's positions by a plain sort, which owes nothing to src/.
 */
#ifndef LIDX_PLAIN_SORT_H
#define LIDX_PLAIN_SORT_H

#include <stdint.h>

/* Positions 0 .. n - 1 to order[] in the contract's order: score descending, NaN last, equal ones
 * by ascending position. With `negated`, as if the scores were -score[]. */
void plain_sort(int32_t *order, const float *score, int n, int negated);

#endif
