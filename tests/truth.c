/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include "truth.h"

#include <float.h>

/* ---- elements -------------------------------------------------------------------------------- */

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

struct element truth_element(const unsigned char *array, int64_t i, struct lidx_dtype dtype) {
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
        struct element e = truth_element(data, i, dtype);
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

/* ---- layouts --------------------------------------------------------------------------------- */

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
        batch.n_key =
            a->actual_seq_lengths_key ? list_at(a->actual_seq_lengths_key, b) : a->key->shape[1];
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

unsigned char *truth_row(const struct lidx_args *a, const struct lidx_tensor *t, int64_t b,
                         int64_t i) {
    int64_t inner = 1;
    int packed = a->layout_query == LIDX_TND;
    for (int d = packed ? 1 : 2; d < t->ndim; d++)
        inner *= t->shape[d];
    return packed ? at(t, 0, i, inner) : at(t, b, i, inner);
}

/* ---- scores ---------------------------------------------------------------------------------- */

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
    if (magnitude != 0 &&
        (products < -126 || terms < -126 || terms > 60 || !(ldexp(magnitude, -terms) <= 0x1p24)))
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

/* ---- order ----------------------------------------------------------------------------------- */

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
    int order =
        memcmp(sort_key[a].value, sort_key[b].value, sizeof(double) * (size_t)sort_key[a].n);
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

/* ---- the truth of a run ---------------------------------------------------------------------- */

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
        int64_t visible =
            a->sparse_mode == LIDX_MODE_FULL ? batch.n_key : batch.n_key - batch.n_query + i + 1;
        row->batch = b;
        row->visible = visible < 0 ? 0 : visible;
        if (row->visible)
            score_row(row, a, key, truth_row(a, a->query, b, in_tensor),
                      truth_row(a, a->weights, b, in_tensor));
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
