/* SPDX-License-Identifier: Apache-2.0
 *
 * Content and form of a run, kept apart: a scenario is what queries, keys and weights say; a form
 * is how they are laid out (layout, pages, strides, order and cutting of batches, garbage around
 * them). rendering_make() puts a scenario into a form. The same content must give the same bits in
 * every form.
 */
#ifndef LIDX_SCENARIO_H
#define LIDX_SCENARIO_H

#include "test.h"

#include "lightning_indexer.h"

enum { MAX_BATCH = 6, MAX_SEGMENTS = 160, N_BUFFERS = 8 };

/* What the numbers are like. */
enum data_kind {
    DATA_NORMAL,
    DATA_LEVELS,   /* small integers: sums exact in fp32, many ties */
    DATA_COPIES,   /* few different keys, each many times */
    DATA_PLATEAU,  /* nearly every dot is negative: plateaus of exact 0 */
    DATA_SHIFTED,  /* scores crowd around a large number */
    DATA_TINY,     /* scores of about 1e-8 */
    DATA_DENORMAL, /* bf16 and fp16 denormals among the elements */
    DATA_HUGE,     /* largest finite elements: bf16 sums overflow fp32 */
    DATA_INFINITE, /* +-inf here and there */
    DATA_NAN,      /* NaN in query, key or weights */
    DATA_EQUAL,    /* all keys alike */
    DATA_RISING,   /* scores grow with the position: each key beats all before */
    DATA_FALLING,  /* the first keys are the best */
    DATA_ZERO,     /* +0 and -0 only */
    DATA_BITS,     /* any bit patterns */
    DATA_KINDS
};

extern const char *const data_kind_name[DATA_KINDS];

struct scenario {
    int is_bf16;
    int weights_f32;
    int n_heads;
    int head_dim;
    int top_k;
    int mode;
    int n_batch;
    enum data_kind kind;
    int64_t n_query[MAX_BATCH];
    int64_t n_key[MAX_BATCH];
    uint16_t *query[MAX_BATCH];
    uint16_t *key[MAX_BATCH];
    float *weights[MAX_BATCH]; /* exact in the weights' dtype */
};

/* A random scenario of at most about `work` multiplications. */
void scenario_make(struct scenario *s, struct rng *rng, double work);
void scenario_fill(struct scenario *s, struct rng *rng); /* data for the sizes set in *s */
void scenario_free(struct scenario *s);
void scenario_text(const struct scenario *s, char *text, size_t size);

/* One batch of a rendering: rows [row, row + n_rows) of a scenario's batch, which see n_key keys
 * (so that a chunk of a prefill sees what it saw in the whole). */
struct segment {
    int batch;
    int64_t row;
    int64_t n_rows;
    int64_t n_key;
};

struct form {
    int layout_query;
    int layout_key;
    int64_t page_size;
    int values;      /* 0 none, 1 float32, 2 the query's dtype */
    int strided;     /* gaps between batches and pages */
    int lists;       /* give lists that could be left out */
    int share_pages; /* segments of one batch use the same pages */
    int after;       /* buffers end at, or else begin behind, an unmapped page */
    int64_t pad;     /* more rows, keys, pages and table entries than needed, up to this */
    int n_segments;
    struct segment segment[MAX_SEGMENTS];
};

/* Each batch once, in order, as a whole. */
void form_whole(struct form *f, const struct scenario *s);
void form_random_layout(struct form *f, struct rng *rng);
/* The same rows in another way: alone, in another order, cut into pieces, single steps. */
void form_random_segments(struct form *f, const struct scenario *s, struct rng *rng);
void form_text(const struct form *f, char *text, size_t size);

struct rendering {
    struct lidx_args args;
    struct lidx_tensor tensor[N_BUFFERS];
    int64_t shape[N_BUFFERS][4];
    int64_t stride[N_BUFFERS][4];
    size_t bytes[N_BUFFERS];
    unsigned char *data[N_BUFFERS];
};

/* One rendering lives at a time: buffers are reused. Outputs are poisoned. */
void rendering_make(struct rendering *r, const struct scenario *s, const struct form *f,
                    struct rng *rng);
/* Poisons the outputs again. */
void rendering_poison(struct rendering *r);
/* Slots of row i of segment g. */
int32_t *rendering_indices(const struct rendering *r, const struct form *f, int g, int64_t i);
void *rendering_values(const struct rendering *r, const struct form *f, int g, int64_t i);
/* 1 when all bytes between the outputs' rows still hold poison. */
int rendering_gaps_intact(const struct rendering *r);
void rendering_release(void); /* frees the buffers, at the end */

#endif
