/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include "plain_sort.h"

static const float *sorted_score;
static int is_negated;

static int before(const void *left, const void *right) {
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    float x = sorted_score[a], y = sorted_score[b];
    if (isnan(x) || isnan(y))
        return isnan(x) == isnan(y) ? (a < b ? -1 : 1) : isnan(x) ? 1 : -1;
    int larger = is_negated ? x < y : x > y;
    return x == y ? (a < b ? -1 : 1) : larger ? -1 : 1;
}

void plain_sort(int32_t *order, const float *score, int n, int negated) {
    for (int i = 0; i < n; i++)
        order[i] = i;
    sorted_score = score;
    is_negated = negated;
    qsort(order, (size_t)n, sizeof *order, before);
}
