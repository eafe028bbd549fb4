/* SPDX-License-Identifier: Apache-2.0
 *
 * Content: what queries, keys and weights say.
 */
#include "scenario.h"

const char *const data_kind_name[DATA_KINDS] = {
    "normal", "levels", "copies", "plateau", "shifted", "tiny", "denormal", "huge",
    "inf",    "nan",    "equal",  "rising",  "falling", "zero", "bits"};

static int64_t pick_length(struct rng *rng, int64_t most) {
    if (rng_one_in(rng, 12))
        return 0;
    if (rng_one_in(rng, 6))
        return 1;
    int64_t limit = rng_between(rng, 1, most);
    return rng_between(rng, 1, limit);
}

static int pick_heads(struct rng *rng) {
    static const int usual[] = {64, 32, 16, 8, 1, 128, 4, 2};
    return rng_one_in(rng, 2) ? usual[rng_below(rng, 8)] : (int)rng_between(rng, 1, 128);
}

static int pick_top_k(const struct scenario *s, struct rng *rng) {
    int64_t k = rng_between(rng, 1, 40);
    int b = s->n_batch ? (int)rng_below(rng, (uint64_t)s->n_batch) : 0;
    int64_t n_key = s->n_batch ? s->n_key[b] : 0;
    switch (rng_below(rng, 10)) {
    case 0:
        k = n_key;
        break;
    case 1:
        k = n_key + 1;
        break;
    case 2:
        k = n_key - 1;
        break;
    case 3:
        k = n_key / 2;
        break;
    case 4:
        k = rng_between(rng, 1, 8192);
        break;
    case 5:
        k = rng_one_in(rng, 4) ? 8192 : 2048;
        break;
    case 6:
        k = 1;
        break;
    }
    return k < 1 ? 1 : k > 8192 ? 8192 : (int)k;
}

static double scenario_work(const struct scenario *s) {
    double pairs = 0;
    for (int b = 0; b < s->n_batch; b++)
        pairs += (double)s->n_query[b] * (double)s->n_key[b];
    return pairs * s->n_heads * s->head_dim;
}

static double slots(const struct scenario *s) {
    double rows = 0;
    for (int b = 0; b < s->n_batch; b++)
        rows += (double)s->n_query[b];
    return rows * s->top_k;
}

void scenario_make(struct scenario *s, struct rng *rng, double work) {
    memset(s, 0, sizeof *s);
    s->is_bf16 = !rng_one_in(rng, 3);
    s->weights_f32 = rng_one_in(rng, 2);
    s->head_dim = rng_one_in(rng, 3) ? 64 : 128;
    s->mode = rng_one_in(rng, 4) ? LIDX_MODE_FULL : LIDX_MODE_CAUSAL;
    s->n_heads = pick_heads(rng);
    s->n_batch =
        rng_one_in(rng, 30) ? 0 : (int)rng_between(rng, 1, rng_one_in(rng, 2) ? 2 : MAX_BATCH);
    s->kind = (enum data_kind)rng_below(rng, DATA_KINDS);
    int64_t most_query = rng_one_in(rng, 3) ? 1 : rng_one_in(rng, 2) ? 6 : 50;
    int64_t most_key = rng_one_in(rng, 4) ? 12000 : rng_one_in(rng, 2) ? 1500 : 150;
    for (int b = 0; b < s->n_batch; b++) {
        s->n_query[b] = pick_length(rng, most_query);
        s->n_key[b] = pick_length(rng, most_key);
    }
    s->top_k = pick_top_k(s, rng);
    while (scenario_work(s) > work && s->n_heads > 4)
        s->n_heads /= 2;
    for (int b = 0; scenario_work(s) > work; b = (b + 1) % s->n_batch) {
        s->n_key[b] = s->n_key[b] * 3 / 4;
        s->n_query[b] = (s->n_query[b] * 3 + 3) / 4;
    }
    while (slots(s) > 40000 && s->top_k > 1)
        s->top_k /= 2;
    scenario_fill(s, rng);
}

static uint16_t half_of(const struct scenario *s, float x) {
    return test_to_half(x, s->is_bf16);
}

static float tiny_scale(const struct scenario *s) {
    return s->is_bf16 ? 1e-5f : 1e-4f; /* twice, in query and key, and once more in weights */
}

/* An element of a query (`is_key` 0) or a key. */
static uint16_t element(const struct scenario *s, struct rng *rng, int is_key) {
    uint16_t infinity = s->is_bf16 ? 0x7F80 : 0x7C00;
    uint16_t sign = (uint16_t)(rng_next(rng) & 0x8000u);
    uint16_t denormal = s->is_bf16 ? 0x7F : 0x3FF;
    switch (s->kind) {
    case DATA_LEVELS:
        return half_of(s, (float)rng_between(rng, -1, 1));
    case DATA_PLATEAU:
        return half_of(s, is_key ? -fabsf(rng_normal(rng)) : fabsf(rng_normal(rng)));
    case DATA_TINY:
        return half_of(s, rng_normal(rng) * tiny_scale(s));
    case DATA_DENORMAL:
        return rng_one_in(rng, 2) ? (uint16_t)(sign | (rng_next(rng) & denormal))
                                  : half_of(s, rng_normal(rng));
    case DATA_HUGE:
        return rng_one_in(rng, 4) ? (uint16_t)(sign | (infinity - 1)) : half_of(s, rng_normal(rng));
    case DATA_INFINITE:
        return rng_one_in(rng, 300) ? (uint16_t)(sign | infinity) : half_of(s, rng_normal(rng));
    case DATA_NAN:
        return rng_one_in(rng, is_key ? 400 : 4000)
                   ? (uint16_t)(sign | (infinity + 1 + (rng_next(rng) & (denormal >> 1))))
                   : half_of(s, rng_normal(rng));
    case DATA_ZERO:
        return sign;
    case DATA_BITS:
        return (uint16_t)rng_next(rng);
    default:
        return half_of(s, rng_normal(rng));
    }
}

static float weight(const struct scenario *s, struct rng *rng) {
    float x = rng_one_in(rng, 12) ? 0 : rng_normal(rng);
    switch (s->kind) {
    case DATA_LEVELS:
        x = (float)rng_between(rng, -2, 2);
        break;
    case DATA_SHIFTED:
    case DATA_RISING:
    case DATA_FALLING:
        x = fabsf(x);
        break;
    case DATA_TINY:
        x = rng_one_in(rng, 2) ? x : x * 1e-3f;
        break;
    case DATA_INFINITE:
        x = rng_one_in(rng, 300) ? INFINITY : x;
        break;
    case DATA_NAN:
        x = rng_one_in(rng, 1000) ? NAN : x;
        break;
    case DATA_ZERO:
        x = rng_one_in(rng, 2) ? -0.0f : 0.0f;
        break;
    case DATA_BITS:
        x = s->weights_f32 ? test_float_from_bits((uint32_t)rng_next(rng))
                           : test_from_half((uint16_t)rng_next(rng), s->is_bf16);
        break;
    default:
        break;
    }
    return s->weights_f32 ? x : test_from_half(test_to_half(x, s->is_bf16), s->is_bf16);
}

/* Kinds that say something of a key as a whole. */
static void shape_key(const struct scenario *s, struct rng *rng, int b, int64_t j) {
    uint16_t *key = s->key[b] + j * s->head_dim;
    int64_t other = j;
    if (s->kind == DATA_EQUAL)
        other = 0;
    else if ((s->kind == DATA_COPIES && j > 4 && !rng_one_in(rng, 12)) ||
             (j && rng_one_in(rng, 40)))
        other = (int64_t)rng_below(rng, (uint64_t)(s->kind == DATA_COPIES && j > 9 ? 9 : j));
    if (other != j) {
        memcpy(key, s->key[b] + other * s->head_dim, sizeof *key * (size_t)s->head_dim);
        return;
    }
    if (s->kind == DATA_SHIFTED)
        key[0] = half_of(s, 10.0f);
    if (s->kind == DATA_RISING || s->kind == DATA_FALLING) {
        int64_t step = s->kind == DATA_RISING ? j + 1 : s->n_key[b] - j;
        memset(key, 0, sizeof *key * (size_t)s->head_dim);
        key[0] = half_of(s, (float)(step / 100));
        key[1] = half_of(s, (float)(step % 100) / 128);
    }
}

static void shape_query(const struct scenario *s, uint16_t *head) {
    if (s->kind == DATA_SHIFTED)
        head[0] = half_of(s, 10.0f);
    if (s->kind == DATA_RISING || s->kind == DATA_FALLING) {
        head[0] = half_of(s, 1.0f);
        head[1] = half_of(s, 0.01f);
    }
}

void scenario_fill(struct scenario *s, struct rng *rng) {
    for (int b = 0; b < s->n_batch; b++) {
        size_t row = (size_t)s->n_heads * (size_t)s->head_dim;
        s->query[b] = malloc(sizeof(uint16_t) * (row * (size_t)s->n_query[b] + 1));
        s->key[b] = malloc(sizeof(uint16_t) * ((size_t)s->head_dim * (size_t)s->n_key[b] + 1));
        s->weights[b] = malloc(sizeof(float) * ((size_t)s->n_heads * (size_t)s->n_query[b] + 1));
        for (int64_t h = 0; h < s->n_query[b] * s->n_heads; h++) {
            uint16_t *head = s->query[b] + h * s->head_dim;
            for (int d = 0; d < s->head_dim; d++)
                head[d] = element(s, rng, 0);
            shape_query(s, head);
            s->weights[b][h] = weight(s, rng);
        }
        for (int64_t j = 0; j < s->n_key[b]; j++) {
            for (int d = 0; d < s->head_dim; d++)
                s->key[b][j * s->head_dim + d] = element(s, rng, 1);
            shape_key(s, rng, b, j);
        }
    }
}

void scenario_free(struct scenario *s) {
    for (int b = 0; b < s->n_batch; b++) {
        free(s->query[b]);
        free(s->key[b]);
        free(s->weights[b]);
    }
}

void scenario_text(const struct scenario *s, char *text, size_t size) {
    int used =
        snprintf(text, size, "%s, %s, weights %s, N1 %d, D %d, k %d, mode %d, L1/L2",
                 data_kind_name[s->kind], s->is_bf16 ? "bf16" : "fp16",
                 s->weights_f32 ? "f32" : "16 bit", s->n_heads, s->head_dim, s->top_k, s->mode);
    for (int b = 0; b < s->n_batch && used > 0 && (size_t)used < size; b++)
        used += snprintf(text + used, size - (size_t)used, " %lld/%lld", (long long)s->n_query[b],
                         (long long)s->n_key[b]);
}
