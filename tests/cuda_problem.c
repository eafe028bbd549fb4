/* SPDX-License-Identifier: Apache-2.0 */
#include "cuda_problem.h"

static struct lidx_tensor tensor_of(void *data, int ndim, struct lidx_dtype dtype, int64_t *shape) {
    return (struct lidx_tensor){data, {LIDX_CUDA, 0}, ndim, dtype, shape, NULL, 0};
}

static size_t elements(const int64_t *shape, int n) {
    size_t product = 1;
    for (int i = 0; i < n; i++)
        product *= (size_t)shape[i];
    return product;
}

void fill_halves(uint16_t *to, size_t n, int is_bf16, uint64_t seed) {
    enum { POOL = 1 << 16 };
    static uint16_t pool[2][POOL];
    struct rng rng = rng_seed(seed);
    if (!pool[is_bf16][1])
        for (int i = 0; i < POOL; i++)
            pool[is_bf16][i] = test_to_half(rng_normal(&rng), is_bf16);
    for (size_t i = 0; i < n; i += 4) {
        uint64_t x = rng_next(&rng);
        for (size_t j = i; j < n && j < i + 4; j++, x >>= 16)
            to[j] = pool[is_bf16][x & (POOL - 1)];
    }
}

static void *give_halves(size_t n, int is_bf16, uint64_t seed) {
    uint16_t *host = malloc(2 * n + 1);
    void *data = give(2 * n, 0);
    fill_halves(host, n, is_bf16, seed);
    copy_in(data, host, 2 * n);
    free(host);
    return data;
}

void setup_make(struct setup *s, int packed, int is_bf16, int64_t n_batch, int64_t n_query,
                int64_t n_key, int n_heads, int head_dim, int top_k, int64_t page_size,
                int64_t n_pages, int64_t width) {
    const struct lidx_dtype half = {(uint8_t)(is_bf16 ? LIDX_BFLOAT : LIDX_FLOAT), 16, 1};
    const struct lidx_dtype int32 = {LIDX_INT, 32, 1}, f32 = {LIDX_FLOAT, 32, 1};
    int q = packed ? 1 : 0, k = packed && !page_size ? 1 : 0;
    memset(s, 0, sizeof *s);
    memcpy(s->query_shape, (int64_t[]){n_batch, n_query, n_heads, head_dim}, sizeof s->query_shape);
    memcpy(s->key_shape, (int64_t[]){n_batch, n_key, 1, head_dim}, sizeof s->key_shape);
    if (page_size)
        memcpy(s->key_shape, (int64_t[]){n_pages, page_size, 1, head_dim}, sizeof s->key_shape);
    memcpy(s->weights_shape, s->query_shape, sizeof s->weights_shape);
    memcpy(s->out_shape, (int64_t[]){n_batch, n_query, 1, top_k}, sizeof s->out_shape);
    s->batches[0] = n_batch;
    s->table_shape[0] = n_batch, s->table_shape[1] = width;
    s->n_batch = n_batch;
    s->rows = packed ? n_query : n_batch * n_query;
    size_t n_out = (size_t)s->rows * (size_t)top_k;
    s->query = tensor_of(give_halves(elements(s->query_shape + q, 4 - q), is_bf16, 11), 4 - q, half,
                         s->query_shape + q);
    s->key = tensor_of(give_halves(elements(s->key_shape + k, 4 - k), is_bf16, 12), 4 - k, half,
                       s->key_shape + k);
    s->weights = tensor_of(give_halves(elements(s->weights_shape + q, 3 - q), is_bf16, 13), 3 - q,
                           half, s->weights_shape + q);
    s->query_lengths = tensor_of(give(4 * (size_t)n_batch, 0), 1, int32, s->batches);
    s->key_lengths = tensor_of(give(4 * (size_t)n_batch, 0), 1, int32, s->batches);
    s->table = tensor_of(give(4 * (size_t)(n_batch * width), 0), 2, int32, s->table_shape);
    s->indices = tensor_of(give(4 * n_out, 0), 4 - q, int32, s->out_shape + q);
    s->values = tensor_of(give(4 * n_out, 0), 4 - q, f32, s->out_shape + q);
    s->args = (struct lidx_args)LIDX_ARGS_INIT;
    s->args.query = &s->query, s->args.key = &s->key, s->args.weights = &s->weights;
    s->args.actual_seq_lengths_query = &s->query_lengths;
    s->args.actual_seq_lengths_key = &s->key_lengths;
    s->args.block_table = page_size ? &s->table : NULL;
    s->args.sparse_indices = &s->indices, s->args.sparse_values = &s->values;
    s->args.layout_query = packed ? LIDX_TND : LIDX_BSND;
    s->args.layout_key = page_size ? LIDX_PA_BSND : packed ? LIDX_TND : LIDX_BSND;
    s->args.sparse_count = top_k;
}

void set_lengths(const struct setup *s, const int32_t *query, const int32_t *key) {
    copy_in(s->query_lengths.data, query, 4 * (size_t)s->n_batch);
    copy_in(s->key_lengths.data, key, 4 * (size_t)s->n_batch);
}

size_t output_bytes(const struct setup *s) {
    return 4 * (size_t)(s->rows * s->args.sparse_count);
}

unsigned char *answer(struct setup *s, struct kernel *kernel) {
    size_t n = output_bytes(s);
    MUST(cudaMemset(s->indices.data, 0xA5, n));
    MUST(cudaMemset(s->values.data, 0xA5, n));
    if (!run_device(kernel, &s->args))
        return NULL;
    unsigned char *out = malloc(2 * n + 1);
    copy_out(out, s->indices.data, n);
    copy_out(out + n, s->values.data, n);
    return out;
}

int same_answers(const struct setup *s, const unsigned char *a, const unsigned char *b,
                 char text[TEXT]) {
    int64_t k = s->args.sparse_count;
    const int32_t *x = (const int32_t *)(const void *)a, *y = (const int32_t *)(const void *)b;
    for (int64_t i = 0; i < 2 * s->rows * k; i++)
        if (x[i] != y[i]) {
            int64_t slot = i % (s->rows * k);
            snprintf(text, TEXT, "%s, row %lld slot %lld: got %d (%08x), want %d (%08x)",
                     i == slot ? "index" : "value", (long long)(slot / k), (long long)(slot % k),
                     (int)x[i], (unsigned)x[i], (int)y[i], (unsigned)y[i]);
            return 0;
        }
    return 1;
}

void shuffled_table(int32_t *table, int64_t entries, int64_t n_pages, struct rng *rng) {
    for (int64_t i = 0; i < entries; i++)
        table[i] = (int32_t)rng_below(rng, (uint64_t)n_pages);
}
