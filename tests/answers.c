/* SPDX-License-Identifier: Apache-2.0 */
#include "answers.h"

void answers_make(struct answers *a, const struct scenario *s) {
    for (int b = 0; b < s->n_batch; b++) {
        size_t n = (size_t)s->n_query[b] * (size_t)s->top_k + 1;
        a->index[b] = malloc(sizeof(int32_t) * n);
        a->value[b] = malloc(sizeof(float) * n);
    }
}

void answers_free(struct answers *a, const struct scenario *s) {
    for (int b = 0; b < s->n_batch; b++) {
        free(a->index[b]);
        free(a->value[b]);
    }
}

void answers_keep(struct answers *a, const struct scenario *s, const struct rendering *r,
                  const struct form *f) {
    size_t k = (size_t)s->top_k;
    for (int g = 0; g < f->n_segments; g++)
        for (int64_t i = 0; i < f->segment[g].n_rows; i++) {
            size_t at = (size_t)i * k;
            memcpy(a->index[g] + at, rendering_indices(r, f, g, i), sizeof(int32_t) * k);
            memcpy(a->value[g] + at, rendering_values(r, f, g, i), sizeof(float) * k);
        }
}

/* A value as `r` stores it against the float32 one of the first form. */
static int same_value(const struct scenario *s, const struct form *f, const unsigned char *got,
                      int64_t i, float want) {
    uint16_t half;
    if (f->values == 1)
        return memcmp(got + 4 * i, &want, sizeof want) == 0;
    memcpy(&half, got + 2 * i, sizeof half);
    if (isnan(want))
        return isnan(test_from_half(half, s->is_bf16));
    return half == test_to_half(want, s->is_bf16);
}

/* The first slot in which row i of segment g differs; -1 if none does. */
static int64_t difference(const struct answers *a, const struct scenario *s,
                          const struct rendering *r, const struct form *f, int g, int64_t i) {
    const struct segment *e = &f->segment[g];
    int64_t k = s->top_k, row = (e->row + i) * k;
    const int32_t *index = rendering_indices(r, f, g, i);
    for (int64_t j = 0; j < k; j++)
        if (index[j] != a->index[e->batch][row + j])
            return j;
    const unsigned char *value = f->values ? rendering_values(r, f, g, i) : NULL;
    for (int64_t j = 0; value && j < k; j++)
        if (!same_value(s, f, value, j, a->value[e->batch][row + j]))
            return j;
    return -1;
}

void answers_check(const struct answers *a, const struct scenario *s, const struct rendering *r,
                   const struct form *f, const char *run, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, run);
    vsnprintf(text, sizeof text, run, arguments);
    va_end(arguments);
    for (int g = 0; g < f->n_segments; g++)
        for (int64_t i = 0; i < f->segment[g].n_rows; i++) {
            const struct segment *e = &f->segment[g];
            int64_t slot = difference(a, s, r, f, g, i), row = e->row + i, at = slot < 0 ? 0 : slot;
            if (!CHECK(slot < 0, "%s: row %lld of batch %d differs in slot %lld (key %d, not %d)",
                       text, (long long)row, e->batch, (long long)slot,
                       (int)rendering_indices(r, f, g, i)[at],
                       (int)a->index[e->batch][row * s->top_k + at]))
                return;
        }
    CHECK(rendering_gaps_intact(r), "%s: bytes between rows were written", text);
}
