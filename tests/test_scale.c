/* SPDX-License-Identifier: Apache-2.0
 *
 * Sizes at which 32 bits are not enough: tensors beyond 2^31 elements and 2^32 bytes, 2^20 keys in
 * a batch, 2^20 pages in a table, 4,099 batches. Sparse mappings keep the memory small, and keys
 * whose scores are small integers make the right answer known exactly.
 */
#include "test.h"

#include "contexts.h"

enum { D = 64, FAR = 1 << 30 };

static const struct lidx_dtype BF16 = {LIDX_BFLOAT, 16, 1}, INT32 = {LIDX_INT, 32, 1},
                               F32 = {LIDX_FLOAT, 32, 1};

/* Untouched pages of it cost nothing. */
static void *sparse(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(EXIT_FAILURE);
    }
    return memory;
}

struct axes {
    int64_t shape[4], stride[4];
};

static struct lidx_tensor tensor(struct axes *axes, void *data, struct lidx_dtype dtype, int ndim,
                                 int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t shape[4] = {a, b, c, d};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        axes->shape[i] = shape[i];
        axes->stride[i] = stride;
        stride *= shape[i];
    }
    return (struct lidx_tensor){data, {LIDX_CPU, 0}, ndim, dtype, axes->shape, axes->stride, 0};
}

/* A query whose one head reads 256 * key[0] + key[1]. */
static void set_query(uint16_t *query, uint16_t *weights) {
    query[0] = test_to_bf16(256);
    query[1] = test_to_bf16(1);
    weights[0] = test_to_bf16(1);
}

static void set_key(uint16_t *key, int score) {
    key[0] = test_to_bf16((float)(score / 256));
    key[1] = test_to_bf16((float)(score % 256));
}

struct setup {
    struct lidx_args args;
    struct axes axes[8];
    struct lidx_tensor query, key, weights, indices, values, query_list, key_list, table;
};

static struct lidx_context *contexts[MAX_KERNELS];
static char names[MAX_KERNELS][KERNEL_NAME];
static int n_contexts;

/* Runs on the first `kernels` kernels; the output row must be want[], of n keys, then -1. */
static void expect_of(int kernels, const struct setup *s, const int32_t *want, int64_t n,
                      int64_t row_begin, const char *what) {
    int32_t *indices = (int32_t *)s->indices.data + row_begin;
    int k = s->args.sparse_count;
    for (int c = 0; c < kernels; c++) {
        memset(indices, 0xA5, sizeof *indices * (size_t)k);
        int status = lidx_run(contexts[c], &s->args);
        if (!CHECK(status == LIDX_OK, "%s, %s: %s", what, names[c], lidx_last_error()))
            continue;
        int wrong = 0, first = -1;
        for (int i = k - 1; i >= 0; i--)
            if (indices[i] != (i < n ? want[i] : -1))
                wrong++, first = i;
        CHECK(wrong == 0, "%s, %s: %d slots are wrong, first %d, which is %d", what, names[c],
              wrong, first, first < 0 ? 0 : indices[first]);
    }
}

static void expect(const struct setup *s, const int32_t *want, int64_t n, int64_t row_begin,
                   const char *what) {
    expect_of(n_contexts, s, want, n, row_begin, what);
}

static void start(struct setup *s, int layout_query, int layout_key, int k) {
    memset(s, 0, sizeof *s);
    s->args = (struct lidx_args)LIDX_ARGS_INIT;
    s->args.layout_query = layout_query;
    s->args.layout_key = layout_key;
    s->args.sparse_count = k;
    s->args.query = &s->query;
    s->args.key = &s->key;
    s->args.weights = &s->weights;
    s->args.sparse_indices = &s->indices;
}

/* BSND, two batches whose every tensor lies 2^33 bytes or more apart. */
static void check_far_batches(void) {
    enum { K = 3, S2 = 100 };
    static const int32_t want[K] = {70, 5, 98};
    const int64_t far = (int64_t)8 * FAR; /* elements */
    struct setup s;
    start(&s, LIDX_BSND, LIDX_BSND, K);
    size_t bytes = (size_t)far * 2 + 65536, wide = (size_t)far * 4 + 65536;
    uint16_t *query = sparse(bytes), *key = sparse(bytes), *weights = sparse(bytes);
    int32_t *indices = sparse(wide);
    float *values = sparse(wide);
    s.query = tensor(&s.axes[0], query, BF16, 4, 2, 1, 1, D);
    s.key = tensor(&s.axes[1], key, BF16, 4, 2, S2, 1, D);
    s.weights = tensor(&s.axes[2], weights, BF16, 3, 2, 1, 1, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 4, 2, 1, 1, K);
    s.values = tensor(&s.axes[4], values, F32, 4, 2, 1, 1, K);
    s.args.sparse_values = &s.values;
    for (int i = 0; i < 5; i++)
        s.axes[i].stride[0] = far;
    set_query(query + far, weights + far);
    set_key(key + far + 70 * D, 900);
    set_key(key + far + 5 * D, 800);
    set_key(key + far + 98 * D, 700);
    expect(&s, want, K, far, "batches 2^34 bytes apart");
    CHECK(values[far] == 900 && values[far + 2] == 700, "values %g and %g", (double)values[far],
          (double)values[far + 2]);
    CHECK(indices[0] == 0 && indices[1] == 1, "the first batch is %d, %d", indices[0], indices[1]);
    munmap(query, bytes);
    munmap(key, bytes);
    munmap(weights, bytes);
    munmap(indices, wide);
    munmap(values, wide);
}

/* TND: the second batch's keys begin behind 2^32 elements, 2^33 bytes. */
static void check_far_prefix(void) {
    enum { K = 2, LAST = 50 };
    static const int32_t want[K] = {49, 0};
    const int64_t keys = ((int64_t)1 << 26) + LAST;
    int32_t query_list[2] = {0, 1}, key_list[2] = {1 << 26, (1 << 26) + LAST};
    struct setup s;
    start(&s, LIDX_TND, LIDX_TND, K);
    size_t bytes = (size_t)keys * D * 2;
    uint16_t *key = sparse(bytes), query[D] = {0}, weights[1];
    int32_t indices[K];
    s.query = tensor(&s.axes[0], query, BF16, 3, 1, 1, D, 0);
    s.key = tensor(&s.axes[1], key, BF16, 3, keys, 1, D, 0);
    s.weights = tensor(&s.axes[2], weights, BF16, 2, 1, 1, 0, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 3, 1, 1, K, 0);
    s.query_list = tensor(&s.axes[4], query_list, INT32, 1, 2, 0, 0, 0);
    s.key_list = tensor(&s.axes[5], key_list, INT32, 1, 2, 0, 0, 0);
    s.args.actual_seq_lengths_query = &s.query_list;
    s.args.actual_seq_lengths_key = &s.key_list;
    set_query(query, weights);
    set_key(key + ((int64_t)(1 << 26) + 49) * D, 7);
    set_key(key + (int64_t)(1 << 26) * D, 6);
    expect(&s, want, K, 0, "keys behind 2^33 bytes");
    munmap(key, bytes);
}

/* TND query: the last token lies behind 2^31 elements of tokens that see nothing. */
static void check_far_token(void) {
    enum { K = 1, HEADS = 128, WIDE = 128 };
    static const int32_t want[K] = {3};
    const int64_t tokens = (1 << 17) + 1, row = HEADS * WIDE;
    int32_t query_list[2] = {1 << 17, (1 << 17) + 1}, key_list[2] = {0, 5};
    struct setup s;
    start(&s, LIDX_TND, LIDX_TND, K);
    size_t bytes = (size_t)(tokens * row) * 2;
    uint16_t *query = sparse(bytes), *weights = sparse((size_t)tokens * HEADS * 2);
    uint16_t key[5 * WIDE] = {0};
    int32_t *indices = sparse((size_t)tokens * 4);
    s.query = tensor(&s.axes[0], query, BF16, 3, tokens, HEADS, WIDE, 0);
    s.key = tensor(&s.axes[1], key, BF16, 3, 5, 1, WIDE, 0);
    s.weights = tensor(&s.axes[2], weights, BF16, 2, tokens, HEADS, 0, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 3, tokens, 1, K, 0);
    s.query_list = tensor(&s.axes[4], query_list, INT32, 1, 2, 0, 0, 0);
    s.key_list = tensor(&s.axes[5], key_list, INT32, 1, 2, 0, 0, 0);
    s.args.actual_seq_lengths_query = &s.query_list;
    s.args.actual_seq_lengths_key = &s.key_list;
    set_query(query + (tokens - 1) * row, weights + (tokens - 1) * HEADS);
    set_key(key + 3 * WIDE, 7);
    expect(&s, want, K, tokens - 1, "a token behind 2^31 elements");
    CHECK(indices[0] == -1 && indices[tokens - 2] == -1, "tokens without keys: %d, %d", indices[0],
          indices[tokens - 2]);
    munmap(query, bytes);
    munmap(weights, (size_t)tokens * HEADS * 2);
    munmap(indices, (size_t)tokens * 4);
}

/* 2^20 pages in the table of one batch, 16.8 million keys, in a cache of 2^33 elements of which
 * the last pages are used. */
static void check_many_pages(void) {
    enum { K = 5, BLOCK = 16, PAGES = 1 << 20, CACHE = 1 << 23 };
    const int64_t page = BLOCK * D;
    static const int32_t want[K] = {BLOCK * (PAGES - 1) + 15, BLOCK * 777777 + 3, 0, 1, 2};
    struct setup s;
    start(&s, LIDX_BSND, LIDX_PA_BSND, K);
    size_t bytes = (size_t)CACHE * page * 2;
    uint16_t *key = sparse(bytes), query[D] = {0}, weights[1];
    int32_t *table = malloc(sizeof *table * PAGES), length = BLOCK * PAGES, indices[K];
    for (int i = 0; i < PAGES; i++)
        table[i] = CACHE - 1 - i % 3;
    table[PAGES - 1] = CACHE - 5;
    table[777777] = CACHE - 6;
    s.query = tensor(&s.axes[0], query, BF16, 4, 1, 1, 1, D);
    s.key = tensor(&s.axes[1], key, BF16, 4, CACHE, BLOCK, 1, D);
    s.weights = tensor(&s.axes[2], weights, BF16, 3, 1, 1, 1, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 4, 1, 1, 1, K);
    s.key_list = tensor(&s.axes[4], &length, INT32, 1, 1, 0, 0, 0);
    s.table = tensor(&s.axes[5], table, INT32, 2, 1, PAGES, 0, 0);
    s.args.actual_seq_lengths_key = &s.key_list;
    s.args.block_table = &s.table;
    set_query(query, weights);
    set_key(key + (int64_t)(CACHE - 5) * page + 15 * D, 9);
    set_key(key + (int64_t)(CACHE - 6) * page + 3 * D, 8);
    /* Slow machines, which ask for fewer cases, walk the table with the fastest kernel only. */
    int kernels = getenv("LIDX_TEST_CASES") ? 1 : n_contexts;
    expect_of(kernels, &s, want, K, 0, "2^20 pages");
    table[PAGES / 2] = CACHE;
    CHECK_INT(lidx_run(contexts[0], &s.args), LIDX_ERR_VALUE, "one bad page among 2^20");
    free(table);
    munmap(key, bytes);
}

static const int32_t *score_of;

static int before(const void *left, const void *right) {
    int32_t a = *(const int32_t *)left, b = *(const int32_t *)right;
    return score_of[a] != score_of[b] ? (score_of[a] > score_of[b] ? -1 : 1) : a < b ? -1 : 1;
}

/* One decode step over 2^20 keys with 60,000 different scores, each many times. */
static void check_million_keys(int k) {
    enum { N = 1 << 20 };
    struct setup s;
    struct rng rng = rng_seed(8);
    start(&s, LIDX_BSND, LIDX_BSND, k);
    size_t bytes = (size_t)N * D * 2;
    uint16_t *key = sparse(bytes), query[D] = {0}, weights[1];
    int32_t *score = malloc(sizeof *score * N), *order = malloc(sizeof *order * N);
    int32_t *indices = malloc(sizeof *indices * (size_t)k);
    for (int j = 0; j < N; j++) {
        score[j] = (int32_t)rng_below(&rng, 60000);
        order[j] = j;
        set_key(key + (int64_t)j * D, score[j]);
    }
    score_of = score;
    qsort(order, N, sizeof *order, before);
    s.query = tensor(&s.axes[0], query, BF16, 4, 1, 1, 1, D);
    s.key = tensor(&s.axes[1], key, BF16, 4, 1, N, 1, D);
    s.weights = tensor(&s.axes[2], weights, BF16, 3, 1, 1, 1, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 4, 1, 1, 1, k);
    set_query(query, weights);
    expect(&s, order, N, 0, "2^20 keys");
    free(score);
    free(order);
    free(indices);
    munmap(key, bytes);
}

/* 4,099 decode steps in a call, a prime: threads take several of them at once, and the last take is
 * not full. Batch b has b % 40 keys, its best one at b % 40 / 2. */
static void check_many_batches(void) {
    enum { N = 4099, K = 4, S2 = 40 };
    struct setup s;
    start(&s, LIDX_BSND, LIDX_BSND, K);
    uint16_t *query = calloc((size_t)N * D, 2), *key = calloc((size_t)N * S2 * D, 2);
    uint16_t *weights = calloc(N, 2);
    int32_t *indices = malloc(sizeof *indices * N * K), *length = malloc(sizeof *length * N);
    for (int b = 0; b < N; b++) {
        length[b] = b % S2;
        set_query(query + (size_t)b * D, weights + b);
        set_key(key + ((size_t)b * S2 + (size_t)(b % S2 / 2)) * D, 5);
        set_key(key + ((size_t)b * S2 + (size_t)(b % S2)) * D, 6); /* past the end */
    }
    s.query = tensor(&s.axes[0], query, BF16, 4, N, 1, 1, D);
    s.key = tensor(&s.axes[1], key, BF16, 4, N, S2, 1, D);
    s.weights = tensor(&s.axes[2], weights, BF16, 3, N, 1, 1, 0);
    s.indices = tensor(&s.axes[3], indices, INT32, 4, N, 1, 1, K);
    s.key_list = tensor(&s.axes[4], length, INT32, 1, N, 0, 0, 0);
    s.args.actual_seq_lengths_key = &s.key_list;
    for (int c = 0; c < n_contexts; c++) {
        int wrong = 0;
        memset(indices, 0xA5, sizeof *indices * N * K);
        CHECK(lidx_run(contexts[c], &s.args) == LIDX_OK, "4,099 batches: %s", lidx_last_error());
        for (int b = 0; b < N; b++) {
            int n = b % S2, best = n / 2;
            const int32_t want[K] = {n > 0 ? best : -1, n > 1 ? best == 0 : -1,
                                     n > 2 ? (best <= 1 ? 2 : 1) : -1,
                                     n > 3 ? (best <= 2 ? 3 : 2) : -1};
            wrong += memcmp(indices + b * K, want, sizeof want) != 0;
        }
        CHECK(wrong == 0, "%s: %d of 4,099 batches are wrong", names[c], wrong);
    }
    free(query);
    free(key);
    free(weights);
    free(indices);
    free(length);
}

int main(void) {
    n_contexts = find_kernels("cpu", NULL, names);
    for (int i = 0; i < n_contexts; i++)
        contexts[i] = make_context(names[i], 2);
    CHECK(n_contexts > 0, "no kernel to test");
    check_far_batches();
    check_far_prefix();
    check_far_token();
    check_many_pages();
    check_million_keys(2048);
    check_million_keys(8192);
    check_many_batches();
    for (int i = 0; i < n_contexts; i++)
        lidx_destroy(contexts[i]);
    return test_end();
}
