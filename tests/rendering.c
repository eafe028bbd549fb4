/* SPDX-License-Identifier: Apache-2.0
 *
 * Content put into a form, in guarded memory.
 */
#include "scenario.h"

enum { QUERY, KEY, WEIGHTS, QUERY_LIST, KEY_LIST, TABLE, INDICES, VALUES };

static struct guard pool[N_BUFFERS];

/* `size` bytes of buffer `which`, beside an unmapped page, poisoned. */
static unsigned char *place(int which, size_t size, int after) {
    struct guard *guard = &pool[which];
    if (guard->size < size || !guard->map) {
        guard_free(guard);
        *guard = guard_before(size < 65536 ? 65536 : (2 * size + 4095) / 4096 * 4096);
    }
    unsigned char *data = after ? guard->data + guard->size - size : guard->data;
    memset(data, 0xA5, size);
    return data;
}

void rendering_release(void) {
    for (int i = 0; i < N_BUFFERS; i++)
        guard_free(&pool[i]);
}

struct renderer {
    struct rendering *r;
    const struct scenario *s;
    const struct form *f;
    struct rng *rng;
};

static struct lidx_dtype dtype_of(const struct scenario *s, int is_f32) {
    if (is_f32)
        return (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    return (struct lidx_dtype){(uint8_t)(s->is_bf16 ? LIDX_BFLOAT : LIDX_FLOAT), 16, 1};
}

static const struct lidx_dtype INT32 = {LIDX_INT, 32, 1};

/* Describes and allocates a tensor; `gap` elements lie between the steps of its first axis. */
static unsigned char *add(struct renderer *w, int which, struct lidx_dtype dtype, int ndim,
                          const int64_t *shape, int64_t gap) {
    struct rendering *r = w->r;
    int64_t inner = 1, bytes = dtype.bits / 8;
    for (int i = ndim - 1; i >= 0; i--) {
        r->shape[which][i] = shape[i];
        r->stride[which][i] = inner;
        inner *= i ? shape[i] : 1;
    }
    r->stride[which][0] = inner + gap;
    int64_t n = shape[0] && inner ? (shape[0] - 1) * (inner + gap) + inner : 0;
    r->bytes[which] = (size_t)(n * bytes);
    r->data[which] = place(which, r->bytes[which], w->f->after);
    int64_t offset = rng_one_in(w->rng, 4) ? bytes * rng_between(w->rng, 0, 9) : 0;
    r->tensor[which] = (struct lidx_tensor){
        .data = n || rng_one_in(w->rng, 2) ? r->data[which] - offset : NULL,
        .device = {LIDX_CPU, 0},
        .ndim = ndim,
        .dtype = dtype,
        .shape = r->shape[which],
        .strides = gap || rng_one_in(w->rng, 2) ? r->stride[which] : NULL,
        .byte_offset = n ? (uint64_t)offset : 0,
    };
    if (!n && r->tensor[which].data)
        r->tensor[which].data = r->data[which];
    return r->data[which];
}

static int64_t gap(const struct renderer *w) {
    return w->f->strided ? rng_between(w->rng, 0, 70) : 0;
}

static int64_t padding(const struct renderer *w) {
    return w->f->pad ? rng_between(w->rng, 0, w->f->pad) : 0;
}

static int64_t most(const struct form *f, int of_keys) {
    int64_t n = 0;
    for (int g = 0; g < f->n_segments; g++) {
        int64_t x = of_keys ? f->segment[g].n_key : f->segment[g].n_rows;
        n = x > n ? x : n;
    }
    return n;
}

static int64_t total(const struct form *f, int of_keys) {
    int64_t n = 0;
    for (int g = 0; g < f->n_segments; g++)
        n += of_keys ? f->segment[g].n_key : f->segment[g].n_rows;
    return n;
}

static int all_equal(const struct form *f, int of_keys, int64_t to) {
    for (int g = 0; g < f->n_segments; g++)
        if ((of_keys ? f->segment[g].n_key : f->segment[g].n_rows) != to)
            return 0;
    return 1;
}

static void put_list(struct renderer *w, int which, int of_keys, int prefix,
                     const struct lidx_tensor **argument) {
    int64_t shape[1] = {w->f->n_segments}, sum = 0;
    unsigned char *list = add(w, which, INT32, 1, shape, 0);
    for (int g = 0; g < w->f->n_segments; g++) {
        int64_t n = of_keys ? w->f->segment[g].n_key : w->f->segment[g].n_rows;
        sum = prefix ? sum + n : n;
        int32_t x = (int32_t)sum;
        memcpy(list + 4 * g, &x, sizeof x);
    }
    *argument = &w->r->tensor[which];
}

/* Where the rows of each segment begin, counted in elements of the row. */
static int64_t first_row(const struct rendering *r, const struct form *f, int which, int g,
                         int64_t row_size) {
    if (f->layout_query != LIDX_TND)
        return r->stride[which][0] * g;
    int64_t row = 0;
    for (int i = 0; i < g; i++)
        row += f->segment[i].n_rows;
    return row * row_size;
}

static void put_queries(struct renderer *w) {
    const struct scenario *s = w->s;
    const struct form *f = w->f;
    int packed = f->layout_query == LIDX_TND;
    int64_t n = packed ? total(f, 0) + padding(w) : most(f, 0) + padding(w);
    int64_t shape[4] = {f->n_segments, n, s->n_heads, s->head_dim};
    int first = packed ? 1 : 0;
    int64_t row = (int64_t)s->n_heads * s->head_dim;
    unsigned char *query =
        add(w, QUERY, dtype_of(s, 0), 4 - first, shape + first, packed ? 0 : gap(w));
    unsigned char *weights =
        add(w, WEIGHTS, dtype_of(s, s->weights_f32), 3 - first, shape + first, packed ? 0 : gap(w));
    for (int g = 0; g < f->n_segments; g++) {
        const struct segment *e = &f->segment[g];
        int64_t at = first_row(w->r, f, QUERY, g, row);
        int64_t weights_at = first_row(w->r, f, WEIGHTS, g, s->n_heads);
        if (e->n_rows)
            memcpy(query + 2 * at, s->query[e->batch] + e->row * row,
                   (size_t)(2 * row * e->n_rows));
        for (int64_t i = 0; i < e->n_rows * s->n_heads; i++) {
            float x = s->weights[e->batch][e->row * s->n_heads + i];
            uint16_t half = test_to_half(x, s->is_bf16);
            if (s->weights_f32)
                memcpy(weights + 4 * (weights_at + i), &x, sizeof x);
            else
                memcpy(weights + 2 * (weights_at + i), &half, sizeof half);
        }
    }
    if (packed || f->lists || !all_equal(f, 0, n))
        put_list(w, QUERY_LIST, 0, packed, &w->r->args.actual_seq_lengths_query);
    w->r->args.query = &w->r->tensor[QUERY];
    w->r->args.weights = &w->r->tensor[WEIGHTS];
}

static void put_plain_keys(struct renderer *w) {
    const struct scenario *s = w->s;
    const struct form *f = w->f;
    int packed = f->layout_key == LIDX_TND;
    int64_t n = packed ? total(f, 1) + padding(w) : most(f, 1) + padding(w);
    int64_t shape[4] = {f->n_segments, n, 1, s->head_dim}, row = 0;
    int first = packed ? 1 : 0;
    unsigned char *key = add(w, KEY, dtype_of(s, 0), 4 - first, shape + first, packed ? 0 : gap(w));
    for (int g = 0; g < f->n_segments; g++) {
        const struct segment *e = &f->segment[g];
        int64_t at = packed ? row * s->head_dim : g * w->r->stride[KEY][0];
        if (e->n_key)
            memcpy(key + 2 * at, s->key[e->batch], (size_t)(2 * e->n_key * s->head_dim));
        row += e->n_key;
    }
    if (packed || f->lists || !all_equal(f, 1, n))
        put_list(w, KEY_LIST, 1, packed, &w->r->args.actual_seq_lengths_key);
}

static int64_t pages_of(const struct form *f, int64_t n_key) {
    return (n_key + f->page_size - 1) / f->page_size;
}

/* Page numbers of segment g go to `page`; *next counts pages handed out. With shared pages a
 * batch's pages are handed out once, for its longest segment. */
static void hand_out_pages(const struct form *f, int64_t *page, int64_t width, int64_t *next) {
    int64_t first[MAX_BATCH];
    for (int b = 0; b < MAX_BATCH; b++)
        first[b] = -1;
    for (int g = 0; g < f->n_segments; g++) {
        const struct segment *e = &f->segment[g];
        int64_t begin = *next;
        if (f->share_pages && first[e->batch] >= 0) {
            begin = first[e->batch];
        } else if (f->share_pages) {
            int64_t longest = 0;
            for (int i = g; i < f->n_segments; i++)
                if (f->segment[i].batch == e->batch && f->segment[i].n_key > longest)
                    longest = f->segment[i].n_key;
            first[e->batch] = begin;
            *next += pages_of(f, longest);
        } else {
            *next += pages_of(f, e->n_key);
        }
        for (int64_t i = 0; i < pages_of(f, e->n_key); i++)
            page[g * width + i] = begin + i;
    }
}

static void fill_page(unsigned char *to, const struct scenario *s, const struct form *f,
                      const struct segment *e, int64_t index) {
    int64_t begin = index * f->page_size, end = begin + f->page_size;
    end = end < e->n_key ? end : e->n_key;
    memcpy(to, s->key[e->batch] + begin * s->head_dim, (size_t)(2 * (end - begin) * s->head_dim));
}

static void put_paged_keys(struct renderer *w) {
    const struct scenario *s = w->s;
    const struct form *f = w->f;
    int64_t width = pages_of(f, most(f, 1)), used = 0;
    int64_t table_shape[2] = {f->n_segments, width + padding(w)};
    int64_t *page = calloc((size_t)(f->n_segments * width) + 1, sizeof *page);
    hand_out_pages(f, page, width, &used);
    int64_t n_pages = used + padding(w);
    int64_t *place_of = malloc(sizeof *place_of * (size_t)(n_pages + 1));
    for (int64_t i = 0; i < n_pages; i++) {
        int64_t j = (int64_t)rng_below(w->rng, (uint64_t)i + 1);
        place_of[i] = place_of[j];
        place_of[j] = i;
    }
    int64_t shape[4] = {n_pages, f->page_size, 1, s->head_dim};
    unsigned char *key = add(w, KEY, dtype_of(s, 0), 4, shape, gap(w));
    unsigned char *table = add(w, TABLE, INT32, 2, table_shape, gap(w));
    for (int g = 0; g < f->n_segments; g++) {
        const struct segment *e = &f->segment[g];
        for (int64_t i = 0; i < table_shape[1]; i++) {
            int32_t id = rng_one_in(w->rng, 2) ? INT32_MIN : INT32_MAX; /* never to be read */
            if (i < pages_of(f, e->n_key)) {
                id = (int32_t)place_of[page[g * width + i]];
                fill_page(key + 2 * id * w->r->stride[KEY][0], s, f, e, i);
            }
            memcpy(table + 4 * (g * w->r->stride[TABLE][0] + i), &id, sizeof id);
        }
    }
    free(page);
    free(place_of);
    w->r->args.block_table = &w->r->tensor[TABLE];
    put_list(w, KEY_LIST, 1, 0, &w->r->args.actual_seq_lengths_key);
}

static void put_outputs(struct renderer *w) {
    int packed = w->f->layout_query == LIDX_TND, first = packed ? 1 : 0;
    const int64_t *query = w->r->shape[QUERY];
    int64_t shape[4] = {query[0], query[packed ? 0 : 1], 1, w->s->top_k};
    add(w, INDICES, INT32, 4 - first, shape + first, packed ? 0 : gap(w));
    w->r->args.sparse_indices = &w->r->tensor[INDICES];
    if (!w->f->values)
        return;
    add(w, VALUES, dtype_of(w->s, w->f->values == 1), 4 - first, shape + first,
        packed ? 0 : gap(w));
    w->r->args.sparse_values = &w->r->tensor[VALUES];
}

void rendering_make(struct rendering *r, const struct scenario *s, const struct form *f,
                    struct rng *rng) {
    struct renderer w = {r, s, f, rng};
    memset(r, 0, sizeof *r);
    r->args = (struct lidx_args)LIDX_ARGS_INIT;
    r->args.layout_query = f->layout_query;
    r->args.layout_key = f->layout_key;
    r->args.sparse_count = s->top_k;
    r->args.sparse_mode = s->mode;
    put_queries(&w);
    if (f->layout_key == LIDX_PA_BSND)
        put_paged_keys(&w);
    else
        put_plain_keys(&w);
    put_outputs(&w);
    r->args.key = &r->tensor[KEY];
}

void rendering_poison(struct rendering *r) {
    memset(r->data[INDICES], 0xA5, r->bytes[INDICES]);
    if (r->data[VALUES])
        memset(r->data[VALUES], 0xA5, r->bytes[VALUES]);
}

int32_t *rendering_indices(const struct rendering *r, const struct form *f, int g, int64_t i) {
    int64_t k = r->args.sparse_count;
    return (int32_t *)(void *)r->data[INDICES] + first_row(r, f, INDICES, g, k) + i * k;
}

void *rendering_values(const struct rendering *r, const struct form *f, int g, int64_t i) {
    int64_t k = r->args.sparse_count, bytes = r->tensor[VALUES].dtype.bits / 8;
    return r->data[VALUES] + (first_row(r, f, VALUES, g, k) + i * k) * bytes;
}

static int gaps_intact(const struct rendering *r, int which) {
    const struct lidx_tensor *t = &r->tensor[which];
    int64_t inner = 1, bytes = t->dtype.bits / 8;
    for (int i = 1; i < t->ndim; i++)
        inner *= t->shape[i];
    for (int64_t i = 0; i + 1 < t->shape[0] && r->bytes[which]; i++)
        for (int64_t j = (i * r->stride[which][0] + inner) * bytes;
             j < (i + 1) * r->stride[which][0] * bytes; j++)
            if (r->data[which][j] != 0xA5)
                return 0;
    return 1;
}

int rendering_gaps_intact(const struct rendering *r) {
    if (r->args.layout_query == LIDX_TND)
        return 1;
    return gaps_intact(r, INDICES) && (!r->args.sparse_values || gaps_intact(r, VALUES));
}
