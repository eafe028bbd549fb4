/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include "truth.h"

static const double RELATIVE = 1e-4, ABSOLUTE = 1e-6;

int64_t oracle_rows(const struct oracle *o) {
    return o->n_rows;
}

int64_t oracle_visible(const struct oracle *o, int64_t row) {
    return o->row[row].visible;
}

int64_t oracle_exact_rows(const struct oracle *o) {
    int64_t n = 0;
    for (int64_t r = 0; r < o->n_rows; r++)
        n += o->row[r].visible > 0 && o->row[r].is_exact;
    return n;
}

/* ---- the check of a row ---------------------------------------------------------------------- */

struct answer {
    const int32_t *index;
    const unsigned char *value; /* or NULL */
    struct lidx_dtype value_dtype;
    int k, n; /* slots, and how many of them hold keys */
    unsigned char *taken;
    char *why;
    size_t why_size;
};

static int wrong(const struct answer *a, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static int wrong(const struct answer *a, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(a->why, a->why_size, format, arguments);
    va_end(arguments);
    return 1;
}

static double value_at(const struct answer *a, int64_t i) {
    return truth_element(a->value, i, a->value_dtype).value;
}

/* Each slot is written, in range, and no key comes twice; behind the keys only -1 and -inf. */
static int check_slots(const struct oracle_row *row, struct answer *a) {
    memset(a->taken, 0, (size_t)row->visible);
    for (int i = 0; i < a->n; i++) {
        int32_t j = a->index[i];
        if (j < 0 || j >= row->visible)
            return wrong(a, "slot %d is %d with %lld keys visible", i, j, (long long)row->visible);
        if (a->taken[j]++)
            return wrong(a, "slot %d repeats key %d", i, j);
    }
    for (int i = a->n; i < a->k; i++) {
        if (a->index[i] != -1)
            return wrong(a, "slot %d is %d, behind the %d keys there are", i, a->index[i], a->n);
        if (a->value && value_at(a, i) != -(double)INFINITY)
            return wrong(a, "value of empty slot %d is %g", i, value_at(a, i));
    }
    return 0;
}

/* How far from `score` a number may be that belongs to key j. */
static double tolerance(const struct oracle_row *row, int32_t j, double score) {
    return fmax(fmax(RELATIVE * fabs(score), ABSOLUTE * row->largest), row->slack[j]);
}

/* Equal as scores go, or within key j's tolerance. */
static int close_to(const struct oracle_row *row, int32_t j, double x, double score) {
    if (isnan(x) || isnan(score))
        return isnan(x) && isnan(score);
    return x == score || fabs(x - score) <= tolerance(row, j, score);
}

static int check_members(const struct oracle_row *row, const struct answer *a) {
    if (row->is_open || a->n == row->visible)
        return 0;
    int32_t kth = row->best[a->n - 1];
    double last = row->score[kth];
    for (int64_t i = 0; i < row->visible; i++) {
        int32_t j = row->best[i];
        if (a->taken[j] == (i < a->n))
            continue;
        if (!close_to(row, j, row->score[j], last) && !close_to(row, kth, row->score[j], last))
            return wrong(a, "key %d with score %.9g is %s, and the k-th score is %.9g", j,
                         row->score[j], a->taken[j] ? "chosen" : "left out", last);
    }
    return 0;
}

/* What rounding to the values' own type may add. */
static double value_rounding(const struct answer *a, double score) {
    if (a->value_dtype.bits == 32)
        return 0;
    return a->value_dtype.code == LIDX_BFLOAT ? fabs(score) * 0x1p-8 + 0x1p-133
                                              : fabs(score) * 0x1p-11 + 0x1p-25;
}

static int value_fits(const struct oracle_row *row, const struct answer *a, int32_t j,
                      double value) {
    double score = row->score[j];
    int is_fp16 = a->value_dtype.bits == 16 && a->value_dtype.code == LIDX_FLOAT;
    if (is_fp16 && fabs(score) > 65400 && isinf(value) && (value > 0) == (score > 0))
        return 1;
    if (a->value_dtype.code == LIDX_BFLOAT && fabs(score) > 3.3e38 && isinf(value))
        return 1;
    if (close_to(row, j, value, score))
        return 1;
    return fabs(value - score) <= tolerance(row, j, score) + value_rounding(a, score);
}

static int check_values(const struct oracle_row *row, const struct answer *a) {
    for (int i = 0; a->value && i < a->n; i++) {
        int32_t j = a->index[i];
        double value = value_at(a, i), score = row->score[j];
        if (!(row->flag[j] & KEY_OPEN) && !value_fits(row, a, j, value))
            return wrong(a, "value of slot %d, key %d, is %.9g and its score %.9g", i, j, value,
                         score);
        if ((row->flag[j] & KEY_ZERO) && value != 0)
            return wrong(a, "value of slot %d, key %d, is %.9g and its score exactly 0", i, j,
                         value);
    }
    return 0;
}

/* Whether slot i may stand in front of slot i + 1. */
static int in_order(const struct oracle_row *row, const struct answer *a, int i) {
    int32_t left = a->index[i], right = a->index[i + 1];
    if (a->value) {
        double x = value_at(a, i), y = value_at(a, i + 1);
        int equal = x == y || (isnan(x) && isnan(y));
        if (equal && a->value_dtype.bits == 32)
            return left < right;
        return equal || x > y || (isnan(y) && !isnan(x));
    }
    if ((row->flag[left] | row->flag[right]) & KEY_OPEN)
        return 1;
    double x = row->score[left], y = row->score[right];
    return x > y || (isnan(y) && !isnan(x)) || close_to(row, left, x, y) ||
           close_to(row, right, x, y);
}

static int check_order(const struct oracle_row *row, const struct answer *a) {
    for (int i = 0; i + 1 < a->n; i++)
        if (!in_order(row, a, i))
            return wrong(a, "slots %d and %d (keys %d and %d) are out of order", i, i + 1,
                         a->index[i], a->index[i + 1]);
    return 0;
}

/* Ties: of keys for which `same` is one number the lower positions are chosen, in order. */
static int check_ties(const struct oracle_row *row, const struct answer *a, const int32_t *same,
                      int64_t n_class, const char *what) {
    int32_t *last = malloc(sizeof *last * (size_t)(n_class + 1));
    int status = 0;
    memset(last, 0, sizeof *last * (size_t)(n_class + 1));
    for (int64_t j = 0; j < row->visible && !status; j++) {
        if (same[j] < 0)
            continue;
        if (a->taken[j] && last[same[j]])
            status = wrong(a, "key %lld is chosen and key %d, which ties with it (%s), is not",
                           (long long)j, last[same[j]] - 1, what);
        if (!a->taken[j])
            last[same[j]] = (int32_t)j + 1;
    }
    memset(last, 0, sizeof *last * (size_t)(n_class + 1));
    for (int i = 0; i < a->n && !status; i++) {
        int32_t j = a->index[i], c = same[j];
        if (c < 0)
            continue;
        if (last[c] > j)
            status = wrong(a, "key %d stands in front of key %d, which ties with it (%s)",
                           last[c] - 1, j, what);
        last[c] = j + 1;
    }
    free(last);
    return status;
}

enum { TIE_ZERO, TIE_NAN, TIE_UP, TIE_DOWN, TIE_CLASSES };

static int check_special_ties(const struct oracle_row *row, const struct answer *a) {
    int32_t *same = malloc(sizeof *same * (size_t)(row->visible + 1));
    for (int64_t j = 0; j < row->visible; j++) {
        double score = row->score[j];
        same[j] = -1;
        if (row->flag[j] & KEY_ZERO)
            same[j] = TIE_ZERO;
        else if (!(row->flag[j] & KEY_OPEN) && isnan(score))
            same[j] = TIE_NAN;
        else if (!(row->flag[j] & KEY_OPEN) && isinf(score))
            same[j] = score > 0 ? TIE_UP : TIE_DOWN;
    }
    int status = check_ties(row, a, same, TIE_CLASSES, "0, NaN or inf");
    free(same);
    return status;
}

static int check_exact(const struct oracle_row *row, const struct answer *a) {
    for (int i = 0; row->is_exact && i < a->n; i++) {
        if (a->index[i] != row->best[i])
            return wrong(a, "slot %d is %d (score %.9g), exactly it is %d (%.9g)", i, a->index[i],
                         row->score[a->index[i]], row->best[i], row->score[row->best[i]]);
        if (a->value && a->value_dtype.bits == 32 && value_at(a, i) != row->score[row->best[i]])
            return wrong(a, "value of slot %d is %.9g, exactly it is %.9g", i, value_at(a, i),
                         row->score[row->best[i]]);
    }
    return 0;
}

static int check_row(const struct oracle *o, const struct oracle_row *row, struct answer *a) {
    if (check_slots(row, a))
        return 1;
    if (a->n == 0)
        return 0;
    return check_exact(row, a) || check_members(row, a) || check_values(row, a) ||
           check_order(row, a) || check_special_ties(row, a) ||
           check_ties(row, a, o->class_of[row->batch], o->n_class[row->batch], "equal keys");
}

int oracle_check(const struct oracle *o, const struct lidx_args *args, char *why, size_t size) {
    int packed = args->layout_query == LIDX_TND;
    int64_t most = 0, per_batch = packed ? o->n_rows : args->query->shape[1];
    for (int64_t r = 0; r < o->n_rows; r++)
        most = o->row[r].visible > most ? o->row[r].visible : most;
    unsigned char *taken = malloc((size_t)most + 1);
    int status = 0;
    for (int64_t r = 0; r < o->n_rows && !status; r++) {
        const struct oracle_row *row = &o->row[r];
        int64_t b = packed ? 0 : r / per_batch, i = packed ? r : r % per_batch;
        struct answer a = {.k = o->top_k, .taken = taken, .why = why, .why_size = size};
        a.index = (const int32_t *)(void *)truth_row(args, args->sparse_indices, b, i);
        a.n = (int)(row->visible < o->top_k ? row->visible : o->top_k);
        if (args->sparse_values) {
            a.value = truth_row(args, args->sparse_values, b, i);
            a.value_dtype = args->sparse_values->dtype;
        }
        status = check_row(o, row, &a);
        if (status) {
            size_t used = strlen(why);
            snprintf(why + used, size - used, " [output row %lld, %lld visible, k %d]",
                     (long long)r, (long long)row->visible, o->top_k);
        }
    }
    free(taken);
    return status;
}
