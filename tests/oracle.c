/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include "oracle.h"

#include <float.h>

static const double RELATIVE = 1e-4, ABSOLUTE = 1e-6;

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

/* ---- elements --------------------------------------------------------------------------------- */

/* value = significand * 2^exponent; a denormal is one by the type's own rules. */
struct element {
    double value;
    int lowest; /* exponent of the lowest set bit; INT_MAX of sorts for 0 and non-finite */
    int is_denormal;
};

enum { NO_BIT = 100000 };

static struct element decode(uint32_t bits, int exponent_bits, int fraction_bits) {
    struct element e = {0, NO_BIT, 0};
    uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    int exponent = (int)(bits >> fraction_bits & ((1u << exponent_bits) - 1));
    int negative = (int)(bits >> (fraction_bits + exponent_bits) & 1u);
    int bias = (1 << (exponent_bits - 1)) - 1;
    if (exponent == (1 << exponent_bits) - 1) {
        e.value = fraction ? (double)NAN : negative ? -(double)INFINITY : (double)INFINITY;
        return e;
    }
    e.is_denormal = exponent == 0 && fraction != 0;
    uint32_t significand = exponent ? fraction | 1u << fraction_bits : fraction;
    int power = (exponent ? exponent : 1) - bias - fraction_bits;
    e.value = ldexp((double)significand, power);
    if (negative)
        e.value = -e.value;
    while (significand && !(significand & 1u)) {
        significand >>= 1;
        power++;
    }
    e.lowest = significand ? power : NO_BIT;
    return e;
}

static struct element table_bf16[65536], table_fp16[65536];

static void fill_tables(void) {
    static int filled;
    for (uint32_t i = 0; i < 65536 && !filled; i++) {
        table_bf16[i] = decode(i, 8, 7);
        table_fp16[i] = decode(i, 5, 10);
    }
    filled = 1;
}

static struct element element_at(const unsigned char *array, int64_t i, struct lidx_dtype dtype) {
    if (dtype.bits == 16) {
        uint16_t half;
        memcpy(&half, array + 2 * i, sizeof half);
        return dtype.code == LIDX_BFLOAT ? table_bf16[half] : table_fp16[half];
    }
    uint32_t word;
    memcpy(&word, array + 4 * i, sizeof word);
    return decode(word, 8, 23);
}

/* A row of elements, decoded once. */
struct vector {
    double *value;
    unsigned char *is_denormal;
    int n;
    int lowest;
    int is_plain; /* all finite, no denormals that matter */
};

static void load_vector(struct vector *v, const unsigned char *data, int n,
                        struct lidx_dtype dtype) {
    v->value = malloc(sizeof *v->value * (size_t)n);
    v->is_denormal = malloc((size_t)n);
    v->n = n;
    v->lowest = NO_BIT;
    v->is_plain = 1;
    for (int i = 0; i < n; i++) {
        struct element e = element_at(data, i, dtype);
        v->value[i] = e.value;
        v->is_denormal[i] = (unsigned char)(e.is_denormal && dtype.code == LIDX_BFLOAT);
        v->lowest = e.lowest < v->lowest ? e.lowest : v->lowest;
        if (!isfinite(e.value) || v->is_denormal[i])
            v->is_plain = 0;
    }
}

static void free_vector(struct vector *v) {
    free(v->value);
    free(v->is_denormal);
}

/* ---- layouts ---------------------------------------------------------------------------------- */

static unsigned char *base(const struct lidx_tensor *t) {
    return (unsigned char *)t->data + t->byte_offset;
}

/* Address of t[first][second], `inner` elements from one second index to the next. */
static unsigned char *at(const struct lidx_tensor *t, int64_t first, int64_t second,
                         int64_t inner) {
    int64_t stride = t->ndim > 1 ? 1 : 0;
    for (int i = 1; i < t->ndim; i++)
        stride *= t->shape[i];
    if (t->strides && t->shape[0] > 1)
        stride = t->strides[0];
    return base(t) + (first * stride + second * inner) * (t->dtype.bits / 8);
}

static int64_t list_at(const struct lidx_tensor *t, int64_t i) {
    int32_t x;
    memcpy(&x, base(t) + 4 * i, sizeof x);
    return x;
}

struct batch {
    int64_t first_query, n_query; /* in TND counted from the first token of all */
    int64_t first_key, n_key;
};

static struct batch batch_at(const struct lidx_args *a, int64_t b) {
    struct batch batch = {0, 0, 0, 0};
    if (a->layout_query == LIDX_TND) {
        batch.first_query = b ? list_at(a->actual_seq_lengths_query, b - 1) : 0;
        batch.n_query = list_at(a->actual_seq_lengths_query, b) - batch.first_query;
    } else {
        batch.n_query = a->actual_seq_lengths_query ? list_at(a->actual_seq_lengths_query, b)
                                                    : a->query->shape[1];
    }
    if (a->layout_key == LIDX_TND) {
        batch.first_key = b ? list_at(a->actual_seq_lengths_key, b - 1) : 0;
        batch.n_key = list_at(a->actual_seq_lengths_key, b) - batch.first_key;
    } else {
        batch.n_key = a->actual_seq_lengths_key ? list_at(a->actual_seq_lengths_key, b)
                                                : a->key->shape[1];
    }
    return batch;
}

static const unsigned char *key_at(const struct lidx_args *a, int64_t b, const struct batch *batch,
                                   int64_t j) {
    int64_t dim = a->key->shape[a->key->ndim - 1];
    if (a->layout_key == LIDX_TND)
        return at(a->key, 0, batch->first_key + j, dim);
    if (a->layout_key == LIDX_BSND)
        return at(a->key, b, j, dim);
    int64_t block_size = a->key->shape[1];
    int32_t page;
    memcpy(&page, at(a->block_table, b, j / block_size, 1), sizeof page);
    return at(a->key, page, j % block_size, dim);
}

/* Row i of batch b in a tensor shaped like the query; i may also run over all rows of TND. */
static unsigned char *row_at(const struct lidx_args *a, const struct lidx_tensor *t, int64_t b,
                             int64_t i) {
    int64_t inner = 1;
    int packed = a->layout_query == LIDX_TND;
    for (int d = packed ? 1 : 2; d < t->ndim; d++)
        inner *= t->shape[d];
    return packed ? at(t, 0, i, inner) : at(t, b, i, inner);
}

/* ---- scores ----------------------------------------------------------------------------------- */

struct dot {
    double sum, magnitude; /* of finite products */
    double flushed;        /* magnitude of products with a bf16 denormal */
    int is_open;
};

static struct dot dot_plain(const double *q, const double *k, int n) {
    struct dot dot = {0, 0, 0, 0};
    for (int d = 0; d < n; d++) {
        double x = q[d] * k[d];
        dot.sum += x;
        dot.magnitude += fabs(x);
    }
    return dot;
}

static struct dot dot_special(const struct vector *query, int first, const struct vector *key) {
    struct dot dot = {0, 0, 0, 0};
    for (int d = 0; d < key->n; d++) {
        double x = query->value[first + d] * key->value[d];
        int denormal = query->is_denormal[first + d] || key->is_denormal[d];
        dot.sum += x;
        if (isfinite(x))
            dot.magnitude += fabs(x);
        if (denormal && isfinite(x))
            dot.flushed += fabs(x);
        if (denormal && !isfinite(x) && !isnan(key->value[d]) && !isnan(query->value[first + d]))
            dot.is_open = 1; /* a flushed denormal times inf is NaN */
    }
    return dot;
}

static double relu(double x) {
    return x < 0 ? 0 : x; /* a NaN stays */
}

/* score of one key, its flags and its slack. */
static double score_key(const struct vector *query, const struct vector *weights,
                        const struct vector *key, unsigned char *flag, float *slack) {
    double score = 0, magnitude = 0;
    int open = 0, zero = 1, exact = 1, nan_in = 0;
    int products = query->lowest + key->lowest, terms = products + weights->lowest;
    double flushed = weights->n * 0x1p-126;
    for (int h = 0; h < weights->n; h++) {
        int first = h * key->n;
        struct dot dot = query->is_plain && key->is_plain
                             ? dot_plain(query->value + first, key->value, key->n)
                             : dot_special(query, first, key);
        double w = weights->value[h], size = fabs(w) * dot.magnitude;
        score += w * relu(dot.sum);
        magnitude += isfinite(size) ? size : 0;
        open |= dot.is_open || dot.magnitude > (double)FLT_MAX / 4;
        nan_in |= isnan(w);
        if (isfinite(w))
            flushed += fabs(w) * (dot.flushed + key->n * 0x1p-126);
        if (!isfinite(w) || !isfinite(dot.sum) ||
            (w != 0 && dot.magnitude != 0 && !(dot.sum + dot.flushed < -0x1p-20 * dot.magnitude)))
            zero = 0;
        if (dot.magnitude != 0 && !(ldexp(dot.magnitude, -products) <= 0x1p24))
            exact = 0;
    }
    if (magnitude != 0 && (products < -126 || terms < -126 || terms > 60 ||
                           !(ldexp(magnitude, -terms) <= 0x1p24)))
        exact = 0;
    if (!query->is_plain || !key->is_plain || !weights->is_plain || products < -126)
        exact = 0;
    open |= magnitude > (double)FLT_MAX / 4;
    *slack = open ? 0 : (float)(magnitude * 0x1p-23 + flushed * 1.001);
    for (int d = 0; !key->is_plain && d < key->n; d++)
        nan_in |= isnan(key->value[d]);
    for (int d = 0; !query->is_plain && d < query->n; d++)
        nan_in |= isnan(query->value[d]);
    if (nan_in)
        open = 0, zero = 0; /* one NaN makes the score NaN, whatever overflows beside it */
    *flag = (unsigned char)((open ? KEY_OPEN : 0) | (zero && !open ? KEY_ZERO : 0) |
                            (exact && !open ? KEY_EXACT : 0));
    return score;
}

/* ---- order ------------------------------------------------------------------------------------ */

static const double *sort_score;

/* score descending, NaN below all, then position */
static int before(const void *left, const void *right) {
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    double x = sort_score[a], y = sort_score[b];
    if (isnan(x) != isnan(y))
        return isnan(x) ? 1 : -1;
    if (!isnan(x) && x != y)
        return x > y ? -1 : 1;
    return a < b ? -1 : 1;
}

static const struct vector *sort_key;

static int by_bytes(const void *left, const void *right) {
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    int order = memcmp(sort_key[a].value, sort_key[b].value,
                       sizeof(double) * (size_t)sort_key[a].n);
    return order ? order : a < b ? -1 : 1;
}

/* Numbers keys by their values' bytes; NaN payloads are alike, which is fine: all score NaN. */
static int32_t *classify(const struct vector *key, int64_t n, int64_t *n_class) {
    int32_t *order = malloc(sizeof *order * (size_t)(n + 1));
    int32_t *class_of = malloc(sizeof *class_of * (size_t)(n + 1));
    for (int64_t j = 0; j < n; j++)
        order[j] = (int32_t)j;
    sort_key = key;
    qsort(order, (size_t)n, sizeof *order, by_bytes);
    *n_class = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i && memcmp(key[order[i]].value, key[order[i - 1]].value,
                        sizeof(double) * (size_t)key->n) != 0)
            ++*n_class;
        class_of[order[i]] = (int32_t)*n_class;
    }
    *n_class += n > 0;
    free(order);
    return class_of;
}

/* ---- the truth of a run ----------------------------------------------------------------------- */

static void score_row(struct oracle_row *row, const struct lidx_args *a, const struct vector *key,
                      const unsigned char *q, const unsigned char *w) {
    int n_heads = (int)a->weights->shape[a->weights->ndim - 1];
    int dim = (int)a->key->shape[a->key->ndim - 1];
    struct vector query, weights;
    load_vector(&query, q, n_heads * dim, a->query->dtype);
    load_vector(&weights, w, n_heads, a->weights->dtype);
    row->score = malloc(sizeof *row->score * (size_t)row->visible);
    row->flag = malloc((size_t)row->visible);
    row->slack = malloc(sizeof *row->slack * (size_t)row->visible);
    row->best = malloc(sizeof *row->best * (size_t)row->visible);
    row->is_exact = 1;
    for (int64_t j = 0; j < row->visible; j++) {
        row->score[j] = score_key(&query, &weights, &key[j], &row->flag[j], &row->slack[j]);
        row->best[j] = (int32_t)j;
        row->is_open |= row->flag[j] & KEY_OPEN;
        row->is_exact &= (row->flag[j] & KEY_EXACT) != 0;
        if (!(row->flag[j] & KEY_OPEN) && isfinite(row->score[j]))
            row->largest = fmax(row->largest, fabs(row->score[j]));
    }
    sort_score = row->score;
    qsort(row->best, (size_t)row->visible, sizeof *row->best, before);
    free_vector(&query);
    free_vector(&weights);
}

static void make_batch(struct oracle *o, const struct lidx_args *a, int64_t b) {
    struct batch batch = batch_at(a, b);
    int dim = (int)a->key->shape[a->key->ndim - 1];
    struct vector *key = NULL;
    int packed = a->layout_query == LIDX_TND;
    if (batch.n_query > 0) {
        key = malloc(sizeof *key * (size_t)(batch.n_key + 1));
        for (int64_t j = 0; j < batch.n_key; j++)
            load_vector(&key[j], key_at(a, b, &batch, j), dim, a->key->dtype);
        o->class_of[b] = classify(key, batch.n_key, &o->n_class[b]);
    }
    for (int64_t i = 0; i < batch.n_query; i++) {
        int64_t in_tensor = batch.first_query + i;
        struct oracle_row *row = &o->row[packed ? in_tensor : b * a->query->shape[1] + i];
        int64_t visible = a->sparse_mode == LIDX_MODE_FULL
                              ? batch.n_key
                              : batch.n_key - batch.n_query + i + 1;
        row->batch = b;
        row->visible = visible < 0 ? 0 : visible;
        if (row->visible)
            score_row(row, a, key, row_at(a, a->query, b, in_tensor),
                      row_at(a, a->weights, b, in_tensor));
    }
    for (int64_t j = 0; key && j < batch.n_key; j++)
        free_vector(&key[j]);
    free(key);
}

struct oracle *oracle_make(const struct lidx_args *a) {
    int packed = a->layout_query == LIDX_TND;
    struct oracle *o = calloc(1, sizeof *o);
    fill_tables();
    o->n_batch = packed ? a->actual_seq_lengths_query->shape[0] : a->query->shape[0];
    o->n_rows = packed ? a->query->shape[0] : a->query->shape[0] * a->query->shape[1];
    o->top_k = a->sparse_count;
    o->row = calloc((size_t)o->n_rows + 1, sizeof *o->row);
    o->class_of = calloc((size_t)o->n_batch + 1, sizeof *o->class_of);
    o->n_class = calloc((size_t)o->n_batch + 1, sizeof *o->n_class);
    for (int64_t b = 0; b < o->n_batch; b++)
        make_batch(o, a, b);
    return o;
}

void oracle_free(struct oracle *o) {
    for (int64_t r = 0; r < o->n_rows; r++) {
        free(o->row[r].score);
        free(o->row[r].flag);
        free(o->row[r].slack);
        free(o->row[r].best);
    }
    for (int64_t b = 0; b < o->n_batch; b++)
        free(o->class_of[b]);
    free(o->row);
    free(o->class_of);
    free(o->n_class);
    free(o);
}

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

/* ---- the check of a row ----------------------------------------------------------------------- */

struct answer {
    const int32_t *index;
    const unsigned char *value; /* or NULL */
    struct lidx_dtype value_dtype;
    int k, n; /* slots, and how many of them hold keys */
    unsigned char *taken;
    char *why;
    size_t why_size;
};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int wrong(const struct answer *a, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(a->why, a->why_size, format, arguments);
    va_end(arguments);
    return 1;
}

static double value_at(const struct answer *a, int64_t i) {
    return element_at(a->value, i, a->value_dtype).value;
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
        a.index = (const int32_t *)(void *)row_at(args, args->sparse_indices, b, i);
        a.n = (int)(row->visible < o->top_k ? row->visible : o->top_k);
        if (args->sparse_values) {
            a.value = row_at(args, args->sparse_values, b, i);
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
