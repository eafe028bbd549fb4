/* SPDX-License-Identifier: Apache-2.0 */
#include "kernel_data.h"

struct arena arena_make(void) {
    struct arena a;
    a.query = guard_after(sizeof(uint16_t) * (MAX_HEADS * MAX_HEAD_DIM + 1));
    a.weights = guard_after(sizeof(float) * MAX_HEADS);
    a.packed = guard_after(PACKED_MAX);
    a.score = guard_after(sizeof(float) * MAX_KEYS);
    a.list = guard_after(sizeof(void *) * (MAX_BLOCKS + AHEAD));
    a.dense = guard_after((size_t)MAX_KEYS * MAX_STRIDE);
    a.front = guard_before((size_t)MAX_KEYS * MAX_STRIDE);
    for (int i = 0; i < MAX_BLOCKS; i++)
        a.block[i] = guard_after((size_t)KEY_BLOCK * MAX_STRIDE);
    return a;
}

void arena_free(struct arena *a) {
    guard_free(&a->query);
    guard_free(&a->weights);
    guard_free(&a->packed);
    guard_free(&a->score);
    guard_free(&a->list);
    guard_free(&a->dense);
    guard_free(&a->front);
    for (int i = 0; i < MAX_BLOCKS; i++)
        guard_free(&a->block[i]);
}

unsigned char *guard_tail(const struct guard *g, size_t size) {
    return g->data + g->size - size;
}

/* ---- data ------------------------------------------------------------------------------------ */

static float ordinary(struct rng *rng, enum values values, int is_bf16) {
    float x = rng_normal(rng);
    switch (values) {
    case TINY:
        return x * (is_bf16 ? 1e-8f : 1e-4f); /* fp16: down into its denormals */
    case HUGE_:
        return x * (is_bf16 ? 1e16f : 15000.0f); /* sums stay below the largest fp32 */
    case DENORMAL:
        return rng_below(rng, 2) ? x : x * (is_bf16 ? 1e-39f : 1e-6f);
    case ZEROS:
        return rng_below(rng, 3) ? x : rng_below(rng, 2) ? 0.0f : -0.0f;
    default:
        return x;
    }
}

static void draw(struct problem_data *p, struct rng *rng, enum values values) {
    int is_bf16 = p->dtype == DTYPE_BF16;
    for (int i = 0; i < p->n_heads * p->head_dim; i++)
        p->query[i] = test_to_half(ordinary(rng, values, is_bf16), is_bf16);
    for (int h = 0; h < p->n_heads; h++)
        p->weights[h] = values == ZEROS && rng_below(rng, 2) ? 0.0f : rng_normal(rng);
    for (int j = 0; j < MAX_KEYS; j++) {
        for (int d = 0; d < p->head_dim; d++)
            p->keys[j][d] = test_to_half(ordinary(rng, values, is_bf16), is_bf16);
        float sign = rng_below(rng, 2) ? 1.0f : -1.0f;
        if (values == WITH_INF)
            p->keys[j][j % p->head_dim] = test_to_half(sign * INFINITY, is_bf16);
        if (values == WITH_NAN && j % 3)
            p->keys[j][j % p->head_dim] = test_to_half(sign * NAN, is_bf16);
    }
    if (values == QUERY_BAD) {
        int at = (int)rng_below(rng, (uint64_t)(p->n_heads * p->head_dim));
        p->query[at] = test_to_half(rng_below(rng, 2) ? INFINITY : NAN, is_bf16);
    }
}

static int is_denormal(float x) {
    return x != 0 && fabsf(x) < 0x1p-126f;
}

static void widen(float *to, const uint16_t *from, int n, int dtype) {
    for (int i = 0; i < n; i++)
        to[i] = test_from_half(from[i], dtype == DTYPE_BF16);
}

/* The largest difference allowed for one key, as the header derives it. */
static float bound_of(const struct problem_data *p, const float *query, const float *key) {
    double rounding = 0, flushed = 0;
    for (int h = 0; h < p->n_heads; h++, query += p->head_dim) {
        double sum = 0, lost = p->head_dim * 0x1p-126;
        for (int d = 0; d < p->head_dim; d++) {
            double product = fabs((double)query[d] * key[d]);
            sum += product;
            lost += is_denormal(query[d]) || is_denormal(key[d]) ? product : 0;
        }
        rounding += fabs((double)p->weights[h]) * sum;
        flushed += fabs((double)p->weights[h]) * lost;
    }
    return (float)(2 * (p->head_dim + p->n_heads + 2) * 0x1p-24 * rounding + flushed);
}

static void refer(struct problem_data *p) {
    static _Alignas(64) unsigned char packed[PACKED_MAX];
    const struct kernel_path *path = &lidx_kernel_scalar.path[p->dtype];
    struct query_row row = {p->query, p->weights, p->n_heads, p->head_dim};
    const void *list[MAX_BLOCKS];
    for (int i = 0; i < MAX_BLOCKS; i++)
        list[i] = p->keys[i * KEY_BLOCK];
    struct key_run run = {list, sizeof p->keys[0], MAX_KEYS, 0};
    path->pack(packed, &row);
    path->score(p->want, packed, p->n_heads, p->head_dim, &run);
    static float query[MAX_HEADS * MAX_HEAD_DIM], key[MAX_HEAD_DIM];
    widen(query, p->query, p->n_heads * p->head_dim, p->dtype);
    for (int j = 0; j < MAX_KEYS; j++) {
        widen(key, p->keys[j], p->head_dim, p->dtype);
        p->bound[j] = bound_of(p, query, key);
    }
}

void data_fill(struct problem_data *p, struct rng *rng, enum values values) {
    draw(p, rng, values);
    refer(p);
}

/* ---- one call in guarded buffers ------------------------------------------------------------- */

static void place_row(unsigned char *to, const struct problem_data *p, int j) {
    memcpy(to, p->keys[j], sizeof(uint16_t) * (size_t)p->head_dim);
}

struct key_run data_place(struct arena *a, const struct problem_data *p, enum layout layout,
                          int first, int n, int n_ahead) {
    int64_t row = 2 * p->head_dim;
    int64_t stride = layout == STRIDED ? row + 64 : layout == STRIDED_SHIFTED ? row + 2 : row;
    int blocks = (n + KEY_BLOCK - 1) / KEY_BLOCK;
    size_t list_bytes = sizeof(void *) * (size_t)(blocks + n_ahead);
    const void **list = (const void **)(void *)guard_tail(&a->list, list_bytes);
    size_t bytes = (size_t)((n - 1) * stride + row);
    unsigned char *base = layout == DENSE && first % 2 ? a->front.data
                          : layout == DENSE_SHIFTED    ? guard_tail(&a->dense, bytes + 2)
                                                       : guard_tail(&a->dense, bytes);
    for (int i = 0; i < blocks; i++) {
        int in_block = n - i * KEY_BLOCK < KEY_BLOCK ? n - i * KEY_BLOCK : KEY_BLOCK;
        unsigned char *block = base + i * KEY_BLOCK * stride;
        if (layout == SCATTERED)
            block = guard_tail(&a->block[(i * 7 + first) % MAX_BLOCKS], (size_t)(in_block * row));
        for (int j = 0; j < in_block; j++)
            place_row(block + j * stride, p, first + i * KEY_BLOCK + j);
        list[i] = block;
    }
    for (int i = 0; i < n_ahead; i++)
        list[blocks + i] = a->dense.data + a->dense.size;
    return (struct key_run){list, stride, n, n_ahead};
}

int untouched(const unsigned char *from, const unsigned char *end) {
    for (; from < end; from++) {
        if (*from != 0xA5)
            return 0;
    }
    return 1;
}

const void *pack_guarded(struct arena *a, const struct kernel_path *path,
                         const struct problem_data *p, int shifted) {
    size_t query_bytes = sizeof(uint16_t) * (size_t)(p->n_heads * p->head_dim);
    size_t weight_bytes = sizeof(float) * (size_t)p->n_heads;
    size_t packed_bytes = path->packed_size(p->n_heads, p->head_dim);
    unsigned char *query = guard_tail(&a->query, query_bytes + (shifted ? 2 : 0));
    float *weights = (float *)(void *)guard_tail(&a->weights, weight_bytes);
    unsigned char *packed = guard_tail(&a->packed, round_up(packed_bytes, 64));
    memcpy(query, p->query, query_bytes);
    memcpy(weights, p->weights, weight_bytes);
    memset(a->packed.data, 0xA5, a->packed.size);
    path->pack(packed, &(struct query_row){query, weights, p->n_heads, p->head_dim});
    if (!untouched(packed + packed_bytes, a->packed.data + a->packed.size) ||
        !untouched(a->packed.data, packed))
        return NULL;
    return packed;
}

const float *score_guarded(struct arena *a, const struct kernel_path *path, const void *packed,
                           const struct problem_data *p, const struct key_run *run) {
    size_t bytes = sizeof(float) * (size_t)run->n_keys;
    unsigned char *score = guard_tail(&a->score, round_up(bytes, 64));
    memset(a->score.data, 0xA5, a->score.size);
    path->score((float *)(void *)score, packed, p->n_heads, p->head_dim, run);
    if (!untouched(score + bytes, a->score.data + a->score.size) ||
        !untouched(a->score.data, score))
        return NULL;
    return (const float *)(const void *)score;
}
