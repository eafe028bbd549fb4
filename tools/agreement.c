/* SPDX-License-Identifier: Apache-2.0 */
#include "agreement.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"
#include "reference.h"

/* What is known of the row that is being compared. */
struct row {
    struct agreement *agreement;
    const struct operation *operation;
    int64_t index, batch, visible;
    int64_t k, filled; /* slots, and how many of them should hold an index */
    const int32_t *indices;
    const double *values;
    double value_epsilon;
    double *scores;
    struct ranked *ranked;
    int64_t *rank; /* of each position */
    unsigned char *chosen;
    double kth, largest, tolerance;
    int64_t found; /* things wrong */
};

PRINTF_LIKE(3, 4)
static void report(struct row *row, int64_t slot, const char *format, ...) {
    struct agreement *agreement = row->agreement;
    row->found++;
    if (agreement->n_findings++ >= FINDINGS)
        return;
    struct finding *finding = &agreement->findings[agreement->n_findings - 1];
    va_list arguments;
    va_start(arguments, format);
    finding->row = row->index;
    finding->slot = slot;
    vsnprintf(finding->text, sizeof finding->text, format, arguments);
    va_end(arguments);
}

static int same(double a, double b) {
    return a == b || (a != a && b != b);
}

static int near(double a, double b, double tolerance) {
    return same(a, b) || fabs(a - b) <= tolerance; /* false when one is infinite or NaN */
}

/* a ranks behind b by more than the tolerance. */
static int is_worse(double a, double b, double tolerance) {
    if (near(a, b, tolerance))
        return 0;
    return a != a || a < b;
}

/* 1e-4 of the score, or 1e-6 of the largest. */
static double tolerance_at(const struct row *row, double score) {
    double relative = isfinite(score) ? 1e-4 * fabs(score) : 0;
    return fmax(relative, 1e-6 * row->largest);
}

static int allocate(struct row *row) {
    size_t n = (size_t)row->visible + 1;
    row->scores = malloc(n * sizeof *row->scores);
    row->ranked = malloc(n * sizeof *row->ranked);
    row->rank = malloc(n * sizeof *row->rank);
    row->chosen = calloc(n, 1);
    return row->scores && row->ranked && row->rank && row->chosen;
}

static int prepare(struct row *row) {
    if (!allocate(row) ||
        !reference_scores(row->operation, row->index, row->batch, row->visible, row->scores))
        return refuse("no memory to check a row of %" PRId64 " keys", row->visible);
    reference_rank(row->ranked, row->scores, row->visible);
    for (int64_t r = 0; r < row->visible; r++) {
        row->rank[row->ranked[r].position] = r;
        double size = fabs(row->ranked[r].score);
        if (isfinite(size) && size > row->largest)
            row->largest = size;
    }
    if (row->filled > 0)
        row->kth = row->ranked[row->filled - 1].score;
    row->tolerance = tolerance_at(row, row->kth);
    return EXIT_FINE;
}

/* -1 and -inf behind the last index. */
static void compare_padding(struct row *row) {
    for (int64_t s = row->filled; s < row->k; s++) {
        if (row->indices[s] != -1)
            report(row, s, "got key %d, should be -1: the row sees %" PRId64 " keys",
                   (int)row->indices[s], row->visible);
        else if (row->values && row->values[s] != -INFINITY)
            report(row, s, "got value %.9g, should be -inf beside a -1", row->values[s]);
    }
}

/* Every filled slot has a visible key, none of them twice. Returns 0 if not. */
static int compare_range(struct row *row) {
    int64_t before = row->found;
    for (int64_t s = 0; s < row->filled; s++) {
        int64_t j = row->indices[s];
        const struct ranked *should = &row->ranked[s];
        if (j < 0 || j >= row->visible)
            report(row, s,
                   "got key %" PRId64 ", which is none of the %" PRId64 " it sees; should "
                   "be key %" PRId64 " (score %.9g)",
                   j, row->visible, should->position, should->score);
        else if (row->chosen[j])
            report(row, s,
                   "got key %" PRId64 " a second time; should be key %" PRId64 " (score %.9g)", j,
                   should->position, should->score);
        else
            row->chosen[j] = 1;
    }
    return row->found == before;
}

/* Chosen and left-out keys against the true k-th score. NaN have no distance: among them it is
 * the position that decides. */
static void compare_set(struct row *row) {
    int64_t next = 0; /* the best key that is not chosen */
    for (int64_t s = 0; s < row->filled; s++) {
        int64_t j = row->indices[s];
        double score = row->scores[j];
        if (row->rank[j] < row->filled)
            continue;
        while (row->chosen[row->ranked[next].position])
            next++;
        const struct ranked *should = &row->ranked[next++];
        int both_nan = score != score && row->kth != row->kth;
        if (both_nan || is_worse(score, row->kth, row->tolerance) ||
            is_worse(row->kth, should->score, row->tolerance))
            report(row, s,
                   "got key %" PRId64 " (true score %.9g), should be key %" PRId64
                   " (%.9g); the last that belongs has %.9g",
                   j, score, should->position, should->score, row->kth);
        else
            row->agreement->within++;
    }
}

/* ReLU makes many scores exactly 0. Where the k-th is one of them, position alone says which are
 * chosen: none may be left out before one that is in. */
static void compare_plateau(struct row *row) {
    int64_t last = -1;
    if (row->filled == 0 || row->filled == row->visible || row->kth != 0)
        return;
    for (int64_t j = row->visible - 1; j >= 0 && last < 0; j--)
        if (row->chosen[j] && row->scores[j] == 0 &&
            reference_plain_zero(row->operation, row->index, row->batch, j))
            last = j;
    for (int64_t j = 0; j < last; j++)
        if (!row->chosen[j] && row->scores[j] == 0 &&
            reference_plain_zero(row->operation, row->index, row->batch, j)) {
            report(row, row->filled - 1,
                   "got key %" PRId64 " with score 0, should be key %" PRId64
                   " with the same score, which comes first",
                   last, j);
            return;
        }
}

/* With values the order is exact in them. Without, true scores may only rise by the tolerance. */
static void compare_order(struct row *row) {
    for (int64_t s = 1; s < row->filled; s++) {
        int64_t a = row->indices[s - 1], b = row->indices[s];
        double x = row->scores[a], y = row->scores[b];
        if (!row->values) {
            if (is_worse(x, y, 2 * tolerance_at(row, y)))
                report(row, s,
                       "got key %" PRId64 " (true score %.9g) behind key %" PRId64
                       " (%.9g); should be before it",
                       b, y, a, x);
            continue;
        }
        x = row->values[s - 1];
        y = row->values[s];
        if (is_worse(x, y, 0))
            report(row, s, "got value %.9g behind %.9g; should be in descending order", y, x);
        else if (row->value_epsilon == 0 && same(x, y) && a > b)
            report(row, s,
                   "got key %" PRId64 " behind key %" PRId64 " with the same value %.9g; "
                   "should be in order of position",
                   b, a, y);
    }
}

/* An fp32 sum of n products may be off by n * 2^-24 of the sum of their sizes. */
static int compare_values(struct row *row) {
    if (!row->values || row->filled == 0)
        return EXIT_FINE;
    double *spread = malloc((size_t)row->filled * sizeof *spread);
    if (!spread || !reference_spread(row->operation, row->index, row->batch, row->indices,
                                     row->filled, spread)) {
        free(spread);
        return refuse("no memory to check the values of %" PRId64 " slots", row->filled);
    }
    double terms = operation_dim(row->operation) + operation_heads(row->operation) + 2;
    for (int64_t s = 0; s < row->filled; s++) {
        double is = row->values[s], score = row->scores[row->indices[s]];
        double tolerance = tolerance_at(row, score) + row->value_epsilon * fabs(score);
        if (isfinite(spread[s]))
            tolerance = fmax(tolerance, terms * 0x1p-24 * spread[s]);
        if (!near(is, score, isfinite(tolerance) ? tolerance : 0))
            report(row, s, "got value %.9g for key %d, should be %.9g", is, (int)row->indices[s],
                   score);
        else if (isfinite(is) && row->largest > 0)
            row->agreement->worst_value =
                fmax(row->agreement->worst_value, fabs(is - score) / row->largest);
    }
    free(spread);
    return EXIT_FINE;
}

static int compare(struct row *row) {
    int status = prepare(row);
    if (status)
        return status;
    compare_padding(row);
    if (!compare_range(row))
        return EXIT_FINE;
    compare_set(row);
    compare_plateau(row);
    compare_order(row);
    return compare_values(row);
}

int agreement_row(struct agreement *agreement, const struct operation *operation, int64_t index,
                  const int32_t *indices, const double *values, double value_epsilon) {
    struct row row = {.agreement = agreement,
                      .operation = operation,
                      .index = index,
                      .k = operation->args.sparse_count,
                      .indices = indices,
                      .values = values,
                      .value_epsilon = value_epsilon};
    row.visible = reference_visible(operation, index, &row.batch);
    row.filled = row.visible < row.k ? row.visible : row.k;
    int status = compare(&row);
    free(row.scores);
    free(row.ranked);
    free(row.rank);
    free(row.chosen);
    agreement->rows++;
    agreement->slots += row.filled;
    agreement->rows_wrong += row.found > 0;
    return status;
}
