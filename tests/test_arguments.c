/* SPDX-License-Identifier: Apache-2.0
 *
 * One call for each way to be wrong. Each must return its status and a sentence that names the
 * argument, and leave the outputs alone; the same call without the fault must run.
 */
#include "test.h"

#include <pthread.h>

#include "lightning_indexer.h"

enum { Q, K, W, QL, KL, TABLE, INDICES, VALUES, N_TENSORS };
enum { B = 2, S1 = 3, N1 = 4, D = 64, S2 = 40, TOP = 5, BLOCK = 16, PAGES = 8, COLUMNS = 4 };
enum { BSND_BSND, TND_TND, BSND_PA, TND_PA, N_PAIRS };

static const char *const tensor_name[N_TENSORS] = {
    "query",       "key",           "weights",      "actual_seq_lengths_query",
    "actual_seq_lengths_key", "block_table", "sparse_indices", "sparse_values"};
static const char *const pair_name[N_PAIRS] = {"BSND/BSND", "TND/TND", "BSND/PA_BSND",
                                               "TND/PA_BSND"};

static struct lidx_context *context;

/* A valid call of the given pair of layouts, to be broken in one place. */
struct call {
    struct lidx_args args;
    struct lidx_tensor t[N_TENSORS];
    int64_t shape[N_TENSORS][6];
    int64_t stride[N_TENSORS][6];
    uint16_t query[B * S1 * N1 * D];
    uint16_t key[PAGES * BLOCK * D + 1];
    uint16_t weights[B * S1 * N1];
    int32_t query_list[B + 1], key_list[B + 1], table[B * COLUMNS];
    int32_t indices[B * S1 * TOP];
    float values[B * S1 * TOP];
};

static void describe(struct call *c, int which, void *data, struct lidx_dtype dtype, int ndim,
                     const int64_t *shape) {
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        c->shape[which][i] = shape[i];
        c->stride[which][i] = stride;
        stride *= shape[i];
    }
    c->t[which] = (struct lidx_tensor){data,           {LIDX_CPU, 0},    ndim, dtype,
                                       c->shape[which], c->stride[which], 0};
}

static int is_packed(int pair) {
    return pair == TND_TND || pair == TND_PA;
}

static int is_paged(int pair) {
    return pair == BSND_PA || pair == TND_PA;
}

static void set_lists(struct call *c, int pair) {
    for (int b = 0; b < B; b++) {
        c->query_list[b] = is_packed(pair) ? S1 * (b + 1) : S1;
        c->key_list[b] = pair == TND_TND ? S2 * (b + 1) : S2;
        for (int i = 0; i < COLUMNS; i++)
            c->table[b * COLUMNS + i] = i == COLUMNS - 1 ? -77 : (b * 3 + i) % PAGES;
    }
}

static void valid_call(struct call *c, int pair) {
    const struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, int32 = {LIDX_INT, 32, 1},
                            f32 = {LIDX_FLOAT, 32, 1};
    int packed = is_packed(pair);
    memset(c, 0, sizeof *c);
    const int64_t query[] = {B, S1, N1, D}, packed_query[] = {B * S1, N1, D};
    const int64_t key[] = {B, S2, 1, D}, packed_key[] = {B * S2, 1, D};
    const int64_t pages[] = {PAGES, BLOCK, 1, D}, list[] = {B}, table[] = {B, COLUMNS};
    const int64_t out[] = {B, S1, 1, TOP}, packed_out[] = {B * S1, 1, TOP};
    describe(c, Q, c->query, bf16, packed ? 3 : 4, packed ? packed_query : query);
    describe(c, K, c->key, bf16, pair == TND_TND ? 3 : 4,
             is_paged(pair)    ? pages
             : pair == TND_TND ? packed_key
                               : key);
    describe(c, W, c->weights, bf16, packed ? 2 : 3, packed ? packed_query : query);
    describe(c, QL, c->query_list, int32, 1, list);
    describe(c, KL, c->key_list, int32, 1, list);
    describe(c, TABLE, c->table, int32, 2, table);
    describe(c, INDICES, c->indices, int32, packed ? 3 : 4, packed ? packed_out : out);
    describe(c, VALUES, c->values, f32, packed ? 3 : 4, packed ? packed_out : out);
    set_lists(c, pair);
    for (int i = 0; i < B * S1 * N1 * D; i++)
        c->query[i] = test_to_bf16((float)(i % 7) - 3);
    for (int i = 0; i < PAGES * BLOCK * D; i++)
        c->key[i] = test_to_bf16((float)(i % 5) - 2);
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    c->args.query = &c->t[Q];
    c->args.key = &c->t[K];
    c->args.weights = &c->t[W];
    c->args.actual_seq_lengths_query = &c->t[QL];
    c->args.actual_seq_lengths_key = &c->t[KL];
    c->args.block_table = is_paged(pair) ? &c->t[TABLE] : NULL;
    c->args.layout_query = packed ? LIDX_TND : LIDX_BSND;
    c->args.layout_key = is_paged(pair) ? LIDX_PA_BSND : packed ? LIDX_TND : LIDX_BSND;
    c->args.sparse_count = TOP;
    c->args.sparse_indices = &c->t[INDICES];
    c->args.sparse_values = &c->t[VALUES];
    memset(c->indices, 0xA5, sizeof c->indices);
    memset(c->values, 0xA5, sizeof c->values);
}

static int outputs_untouched(const struct call *c) {
    const unsigned char *indices = (const unsigned char *)c->indices;
    const unsigned char *values = (const unsigned char *)c->values;
    for (size_t i = 0; i < sizeof c->indices; i++)
        if (indices[i] != 0xA5)
            return 0;
    for (size_t i = 0; i < sizeof c->values; i++)
        if (values[i] != 0xA5)
            return 0;
    return 1;
}

/* A sentence of ours says what was found and what it should be. */
static int is_sentence(const char *text) {
    return strlen(text) > 20 && strchr(text, ' ') != NULL;
}

static void check_sentence(int got, int status, const char *mention, const char *what) {
    const char *sentence = lidx_last_error();
    CHECK(got == status, "%s: %s (\"%s\"), it should be %s", what, lidx_status_name(got),
          got ? sentence : "", lidx_status_name(status));
    if (got != LIDX_OK)
        CHECK(strstr(sentence, mention) && is_sentence(sentence), "%s: \"%s\" does not name %s",
              what, sentence, mention);
}

/* The broken call is refused as it should be. */
static void refuse(const struct call *c, int status, const char *mention, const char *what) {
    check_sentence(lidx_run(context, &c->args), status, mention, what);
    CHECK(outputs_untouched(c), "%s: an output was touched", what);
}

static void accept(const struct call *c, const char *what) {
    int status = lidx_run(context, &c->args);
    CHECK(status == LIDX_OK, "%s: %s, \"%s\"", what, lidx_status_name(status), lidx_last_error());
    for (int i = 0; status == LIDX_OK && i < B * S1 * TOP; i++)
        CHECK(c->indices[i] >= -1 && c->indices[i] < S2, "%s: slot %d is %d", what, i,
              c->indices[i]);
}

static char what_text[160];

static const char *say(const char *what, int pair, int which) {
    snprintf(what_text, sizeof what_text, "%s, %s of %s", what, tensor_name[which],
             pair_name[pair]);
    return what_text;
}

/* ---- faults that any tensor can have ---------------------------------------------------------- */

static int is_used(int pair, int which) {
    return which != TABLE || is_paged(pair);
}

static void check_missing(int pair) {
    struct call c;
    const struct lidx_tensor **field[N_TENSORS] = {
        &c.args.query,       &c.args.key,          &c.args.weights,
        &c.args.actual_seq_lengths_query, &c.args.actual_seq_lengths_key, &c.args.block_table,
        &c.args.sparse_indices, &c.args.sparse_values};
    for (int which = 0; which < N_TENSORS; which++) {
        if (!is_used(pair, which))
            continue;
        int optional = which == VALUES || (which == QL && !is_packed(pair)) ||
                       (which == KL && pair == BSND_BSND);
        valid_call(&c, pair);
        *field[which] = NULL;
        if (optional)
            accept(&c, say("absent", pair, which));
        else
            refuse(&c, LIDX_ERR_ARGUMENT, tensor_name[which], say("absent", pair, which));
        valid_call(&c, pair);
        c.t[which].data = NULL;
        refuse(&c, LIDX_ERR_ARGUMENT, tensor_name[which], say("data NULL", pair, which));
        valid_call(&c, pair);
        c.t[which].shape = NULL;
        refuse(&c, LIDX_ERR_ARGUMENT, tensor_name[which], say("shape NULL", pair, which));
        valid_call(&c, pair);
        c.t[which].byte_offset = 1;
        refuse(&c, LIDX_ERR_ARGUMENT, tensor_name[which], say("misaligned", pair, which));
    }
}

static void check_dimensions(int pair) {
    static const int bad[] = {-1, 1, -2, -100, 1000};
    struct call c;
    for (int which = 0; which < N_TENSORS; which++)
        for (int i = 0; i < 5 && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].ndim += bad[i];
            refuse(&c, LIDX_ERR_SHAPE, tensor_name[which], say("number of dimensions", pair, which));
        }
}

/* Sizes that may be larger than the valid call's without being wrong by themselves. */
static int may_grow(int pair, int which, int dim) {
    return (which == K && is_paged(pair) && dim == 0) || (which == TABLE && dim == 1) ||
           (which == K && !is_paged(pair) && dim == (pair == TND_TND ? 0 : 1));
}

static void check_sizes(int pair) {
    struct call c;
    for (int which = 0; which < N_TENSORS; which++)
        for (int dim = 0; dim < 4; dim++) {
            valid_call(&c, pair);
            if (!is_used(pair, which) || dim >= c.t[which].ndim)
                break;
            c.t[which].strides = NULL;
            c.shape[which][dim] = -1;
            refuse(&c, LIDX_ERR_SHAPE, tensor_name[which], say("size -1", pair, which));
            c.shape[which][dim] = INT64_MIN;
            refuse(&c, LIDX_ERR_SHAPE, tensor_name[which], say("smallest size", pair, which));
            valid_call(&c, pair);
            c.t[which].strides = NULL;
            c.shape[which][dim]++;
            int got = lidx_run(context, &c.args);
            if (may_grow(pair, which, dim))
                continue;
            CHECK(got != LIDX_OK && outputs_untouched(&c), "%s", say("size + 1", pair, which));
            c.shape[which][dim] = INT64_MAX;
            got = lidx_run(context, &c.args);
            CHECK(got != LIDX_OK && outputs_untouched(&c), "%s", say("largest size", pair, which));
        }
}

static void check_types(int pair) {
    static const struct lidx_dtype wrong_types[] = {
        {LIDX_INT, 64, 1},  {LIDX_INT, 8, 1},    {LIDX_UINT, 32, 1}, {LIDX_FLOAT, 64, 1},
        {LIDX_BFLOAT, 8, 1}, {LIDX_FLOAT, 0, 1}, {10, 8, 1},         {99, 16, 1},
        {LIDX_FLOAT, 16, 1}, {LIDX_UINT, 16, 1}};
    struct call c;
    for (int which = 0; which < N_TENSORS; which++) {
        for (int i = 0; i < 10 && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].dtype = wrong_types[i];
            if (which == Q && i == 8) /* a float16 query is fine; the others are then wrong */
                refuse(&c, LIDX_ERR_DTYPE, "key", say("float16", pair, which));
            else
                refuse(&c, LIDX_ERR_DTYPE, tensor_name[which], say("wrong dtype", pair, which));
        }
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].dtype.lanes = 2;
        refuse(&c, LIDX_ERR_DTYPE, tensor_name[which], say("2 lanes", pair, which));
        c.t[which].dtype.lanes = 0;
        refuse(&c, LIDX_ERR_DTYPE, tensor_name[which], say("0 lanes", pair, which));
    }
    valid_call(&c, pair);
    c.t[Q].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse(&c, LIDX_ERR_DTYPE, "query", say("float32", pair, Q));
    valid_call(&c, pair);
    c.t[INDICES].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse(&c, LIDX_ERR_DTYPE, "sparse_indices", say("float32", pair, INDICES));
}

static void check_devices(int pair) {
    struct call c;
    for (int which = 1; which < N_TENSORS; which++) {
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].device.device_type = LIDX_CUDA;
        refuse(&c, LIDX_ERR_DEVICE, tensor_name[which], say("another device", pair, which));
        valid_call(&c, pair);
        c.t[which].device.device_id = 1;
        refuse(&c, LIDX_ERR_DEVICE, tensor_name[which], say("another device id", pair, which));
    }
    static const int unknown[] = {0, -1, 4, 9, 12, 1000};
    for (int i = 0; i < 6; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].device.device_type = unknown[i];
        refuse(&c, LIDX_ERR_DEVICE, "query", say("a device that is not served", pair, Q));
    }
    valid_call(&c, pair);
    for (int which = 0; which < N_TENSORS; which++)
        c.t[which].device.device_type = LIDX_CUDA_HOST;
    accept(&c, say("page-locked host memory", pair, Q));
}

static void check_strides(int pair) {
    struct call c;
    for (int which = 0; which < N_TENSORS; which++)
        for (int dim = 0; dim < 4; dim++) {
            valid_call(&c, pair);
            if (!is_used(pair, which) || dim >= c.t[which].ndim)
                break;
            int free_batch = dim == 0 && c.t[which].ndim > 1 &&
                             !(is_packed(pair) && which != TABLE && !(which == K && is_paged(pair)));
            if (c.shape[which][dim] == 1 || free_batch)
                continue;
            int64_t right = c.stride[which][dim];
            const int64_t bad[] = {right + 1, right - 1, -right, INT64_MAX, INT64_MIN};
            for (int i = 0; i < 5; i++) {
                c.stride[which][dim] = bad[i];
                refuse(&c, LIDX_ERR_STRIDE, tensor_name[which], say("wrong stride", pair, which));
            }
        }
    for (int which = 0; which < N_TENSORS; which++) {
        valid_call(&c, pair);
        if (!is_used(pair, which) || c.t[which].ndim < 2)
            continue;
        static const int64_t bad[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 8};
        for (int i = 0; i < 4; i++) {
            c.stride[which][0] = bad[i];
            refuse(&c, LIDX_ERR_STRIDE, tensor_name[which], say("batch stride", pair, which));
        }
        if (which == INDICES || which == VALUES) {
            valid_call(&c, pair);
            c.stride[which][0]--;
            refuse(&c, LIDX_ERR_STRIDE, tensor_name[which], say("batches overlap", pair, which));
            c.stride[which][0] = 0;
            refuse(&c, LIDX_ERR_STRIDE, tensor_name[which], say("batch stride 0", pair, which));
        }
    }
}

/* ---- faults of one argument ------------------------------------------------------------------- */

static void check_heads_and_dim(int pair) {
    static const int64_t bad_heads[] = {0, 129, 1 << 20}, bad_dims[] = {0, 1, 32, 96, 127, 129, 256};
    struct call c;
    int heads = is_packed(pair) ? 1 : 2;
    for (int i = 0; i < 3; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads] = c.shape[W][heads] = bad_heads[i];
        refuse(&c, LIDX_ERR_SHAPE, "query", say("heads", pair, Q));
        CHECK(strstr(lidx_last_error(), "128"), "\"%s\" names the limit", lidx_last_error());
    }
    for (int i = 0; i < 7; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads + 1] = c.shape[K][pair == TND_TND ? 2 : 3] = bad_dims[i];
        refuse(&c, LIDX_ERR_SHAPE, "query", say("head dimension", pair, Q));
        CHECK(strstr(lidx_last_error(), "64") && strstr(lidx_last_error(), "128"),
              "\"%s\" names what is allowed", lidx_last_error());
    }
    valid_call(&c, pair);
    c.t[K].strides = NULL;
    c.shape[K][pair == TND_TND ? 1 : 2] = 2;
    refuse(&c, LIDX_ERR_SHAPE, "key", say("2 key heads", pair, K));
}

static void check_options(int pair) {
    static const int32_t bad_counts[] = {0, -1, 8193, INT32_MAX, INT32_MIN};
    static const int32_t bad_modes[] = {1, 2, 4, -1, INT32_MAX};
    struct call c;
    for (int i = 0; i < 5; i++) {
        valid_call(&c, pair);
        c.args.sparse_count = bad_counts[i];
        refuse(&c, LIDX_ERR_OPTION, "sparse_count", say("sparse_count", pair, INDICES));
        valid_call(&c, pair);
        c.args.sparse_mode = bad_modes[i];
        refuse(&c, LIDX_ERR_OPTION, "sparse_mode", say("sparse_mode", pair, Q));
    }
}

static void check_layouts(void) {
    struct call c;
    static const int bad_query[] = {LIDX_PA_BSND, 3, -1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 5; i++) {
        valid_call(&c, BSND_BSND);
        c.args.layout_query = bad_query[i];
        refuse(&c, LIDX_ERR_LAYOUT, "layout_query", "layout_query");
        if (i == 0)
            continue;
        valid_call(&c, BSND_BSND);
        c.args.layout_key = bad_query[i];
        refuse(&c, LIDX_ERR_LAYOUT, "layout_key", "layout_key");
    }
    valid_call(&c, BSND_BSND);
    c.args.layout_key = LIDX_TND;
    refuse(&c, LIDX_ERR_LAYOUT, "layout_key", "BSND with TND");
    valid_call(&c, TND_TND);
    c.args.layout_key = LIDX_BSND;
    refuse(&c, LIDX_ERR_LAYOUT, "layout_key", "TND with BSND");
}

static void check_pages(int pair) {
    static const int64_t bad_sizes[] = {0, 1, 8, 15, 17, 24, 1032, 1040, 2048, 1 << 30};
    static const int32_t bad_ids[] = {-1, PAGES, INT32_MAX, INT32_MIN};
    struct call c;
    for (int i = 0; i < 10; i++) {
        valid_call(&c, pair);
        c.t[K].strides = NULL;
        c.shape[K][1] = bad_sizes[i];
        refuse(&c, LIDX_ERR_SHAPE, "block_size", say("block size", pair, K));
    }
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < B * COLUMNS; at++) {
            valid_call(&c, pair);
            c.table[at] = bad_ids[i];
            if (at % COLUMNS == COLUMNS - 1)
                accept(&c, say("entry past the last needed one", pair, TABLE));
            else
                refuse(&c, LIDX_ERR_VALUE, "block_table", say("page id", pair, TABLE));
        }
    valid_call(&c, pair);
    c.key_list[1] = BLOCK * COLUMNS + 1;
    refuse(&c, LIDX_ERR_VALUE, "actual_seq_lengths_key", say("longer than the table", pair, KL));
    valid_call(&c, pair);
    c.shape[K][0] = 0;
    refuse(&c, LIDX_ERR_VALUE, "block_table", say("no pages", pair, K));
}

static void check_unpaged_table(int pair) {
    struct call c;
    valid_call(&c, pair);
    c.args.block_table = &c.t[TABLE];
    refuse(&c, LIDX_ERR_ARGUMENT, "block_table", say("given without pages", pair, TABLE));
}

static void refuse_value(struct call *c, int pair, int which, int32_t *at, int32_t value) {
    int32_t right = *at;
    *at = value;
    refuse(c, LIDX_ERR_VALUE, tensor_name[which], say("list value", pair, which));
    *at = right;
}

static void check_lists(int pair) {
    struct call c;
    int32_t rows = is_packed(pair) ? B * S1 : S1, keys = pair == TND_TND ? B * S2 : S2;
    if (is_paged(pair))
        keys = BLOCK * COLUMNS;
    valid_call(&c, pair);
    for (int b = 0; b < B; b++) {
        refuse_value(&c, pair, QL, &c.query_list[b], -1);
        refuse_value(&c, pair, QL, &c.query_list[b], INT32_MIN);
        refuse_value(&c, pair, QL, &c.query_list[b], rows + 1);
        refuse_value(&c, pair, QL, &c.query_list[b], INT32_MAX);
        refuse_value(&c, pair, KL, &c.key_list[b], -1);
        refuse_value(&c, pair, KL, &c.key_list[b], INT32_MIN);
        refuse_value(&c, pair, KL, &c.key_list[b], keys + 1);
        refuse_value(&c, pair, KL, &c.key_list[b], INT32_MAX);
    }
    if (is_packed(pair))
        refuse_value(&c, pair, QL, &c.query_list[1], S1 - 1);
    if (pair == TND_TND)
        refuse_value(&c, pair, KL, &c.key_list[1], S2 - 1);
    accept(&c, say("restored", pair, QL));
    for (int which = QL; which <= KL; which++)
        for (int change = -1; change <= 1; change += 2) {
            valid_call(&c, pair);
            c.shape[which][0] += change;
            int got = lidx_run(context, &c.args);
            CHECK(got == LIDX_ERR_SHAPE && outputs_untouched(&c), "%s: %s",
                  say("length of a list", pair, which), lidx_status_name(got));
        }
}

static void check_counts(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.args.actual_seq_lengths_key = NULL;
    for (int which = 0; which < N_TENSORS; which++)
        c.t[which].strides = NULL;
    c.shape[K][1] = (int64_t)INT32_MAX + 1;
    refuse(&c, LIDX_ERR_SHAPE, "key", "2^31 keys of one batch");
    /* A size of 0 does not make the other sizes harmless. */
    for (int which = 0; which < N_TENSORS; which++)
        for (int dim = 1; dim < c.t[which].ndim; dim++) {
            valid_call(&c, BSND_PA);
            for (int i = 0; i < N_TENSORS; i++)
                c.t[i].strides = NULL;
            c.shape[which][0] = 0;
            c.shape[which][dim] = INT64_MAX;
            int got = lidx_run(context, &c.args);
            CHECK(got != LIDX_OK && outputs_untouched(&c), "%s",
                  say("0 times the largest size", BSND_PA, which));
        }
}

/* A table without columns is enough for batches without keys. */
static void check_empty_table(void) {
    for (int pair = BSND_PA; pair <= TND_PA; pair++) {
        struct call c;
        valid_call(&c, pair);
        c.t[TABLE].strides = NULL;
        c.t[TABLE].data = NULL;
        c.shape[TABLE][1] = 0;
        c.key_list[0] = c.key_list[1] = 0;
        accept(&c, say("no columns", pair, TABLE));
        for (int i = 0; i < B * S1 * TOP; i++)
            CHECK_INT(c.indices[i], -1, "a batch without keys");
        memset(c.indices, 0xA5, sizeof c.indices);
        memset(c.values, 0xA5, sizeof c.values);
        c.key_list[1] = 1;
        refuse(&c, LIDX_ERR_VALUE, "actual_seq_lengths_key", say("no columns", pair, TABLE));
    }
}

/* B = 2^40 without tokens is legal, and no work. */
static void check_many_empty_batches(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.args.actual_seq_lengths_query = c.args.actual_seq_lengths_key = NULL;
    for (int which = 0; which < N_TENSORS; which++) {
        c.t[which].strides = NULL;
        c.shape[which][0] = (int64_t)1 << 40;
        c.shape[which][1] = 0;
    }
    int got = lidx_run(context, &c.args);
    CHECK(got == LIDX_OK && outputs_untouched(&c), "2^40 batches without tokens: %s",
          lidx_status_name(got));
}

/* ---- sizes of structs, contexts, options ------------------------------------------------------ */

static void check_struct_size(void) {
    struct call c;
    struct {
        struct lidx_args args;
        unsigned char later[64];
    } newer;
    static const size_t bad[] = {0, 1, 8, sizeof(struct lidx_args) - 1, 4097, SIZE_MAX};
    for (int i = 0; i < 6; i++) {
        valid_call(&c, BSND_BSND);
        c.args.size = bad[i];
        refuse(&c, LIDX_ERR_ARGUMENT, "size", "args.size");
    }
    memset(&newer, 0, sizeof newer);
    valid_call(&c, BSND_BSND);
    newer.args = c.args;
    newer.args.size = sizeof newer;
    CHECK_INT(lidx_run(context, &newer.args), LIDX_OK, "a newer caller that leaves new fields 0");
    for (size_t i = 0; i < sizeof newer.later; i += 21) {
        valid_call(&c, BSND_BSND);
        memset(newer.later, 0, sizeof newer.later);
        newer.later[i] = 1;
        check_sentence(lidx_run(context, &newer.args), LIDX_ERR_ARGUMENT, "lidx_args",
                       "a newer caller that sets a new field");
        CHECK(outputs_untouched(&c), "a newer caller: an output was touched");
    }
}

static void check_context(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    size_t bytes = 77;
    check_sentence(lidx_run(NULL, &c.args), LIDX_ERR_ARGUMENT, "context", "context NULL");
    check_sentence(lidx_run(context, NULL), LIDX_ERR_ARGUMENT, "args", "args NULL");
    CHECK(outputs_untouched(&c), "context NULL: an output was touched");
    check_sentence(lidx_workspace_size(NULL, &c.args, &bytes), LIDX_ERR_ARGUMENT, "context",
                   "workspace of no context");
    check_sentence(lidx_workspace_size(context, NULL, &bytes), LIDX_ERR_ARGUMENT, "args",
                   "workspace of no args");
    check_sentence(lidx_workspace_size(context, &c.args, NULL), LIDX_ERR_ARGUMENT, "bytes",
                   "workspace to nowhere");
    c.args.sparse_mode = 1;
    check_sentence(lidx_workspace_size(context, &c.args, &bytes), LIDX_ERR_OPTION, "sparse_mode",
                   "workspace of a bad call");
    CHECK_INT(bytes, 77, "workspace of a bad call");
    for (int pair = 0; pair < N_PAIRS; pair++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].data = NULL;
        bytes = 77;
        CHECK_INT(lidx_workspace_size(context, &c.args, &bytes), LIDX_OK, pair_name[pair]);
        CHECK_INT(bytes, 0, "workspace on the CPU");
    }
    lidx_destroy(NULL);
}

static void refuse_options(const struct lidx_options *options, int status, const char *mention,
                           const char *what) {
    struct lidx_context *made = context;
    check_sentence(lidx_create(&made, options), status, mention, what);
    CHECK(made == NULL, "%s: there is a context", what);
}

static void check_create(void) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *made = NULL;
    check_sentence(lidx_create(NULL, NULL), LIDX_ERR_ARGUMENT, "context", "create to nowhere");
    CHECK_INT(lidx_create(&made, NULL), LIDX_OK, "options NULL");
    lidx_destroy(made);
    static const int bad_threads[] = {-1, LIDX_MAX_THREADS + 1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++) {
        options.n_threads = bad_threads[i];
        refuse_options(&options, LIDX_ERR_OPTION, "n_threads", "n_threads");
    }
    options.n_threads = 0;
    static const char *const bad_kernels[] = {"nonsense", "Scalar", "scalar ", "avx", "cpu"};
    for (int i = 0; i < 5; i++) {
        options.kernel = bad_kernels[i];
        refuse_options(&options, LIDX_ERR_OPTION, "kernel", "kernel");
        CHECK(strstr(lidx_last_error(), "scalar"), "\"%s\" lists the kernels", lidx_last_error());
        setenv("LIDX_KERNEL", bad_kernels[i], 1);
        refuse_options(NULL, LIDX_ERR_OPTION, "kernel", "LIDX_KERNEL");
        unsetenv("LIDX_KERNEL");
    }
    setenv("LIDX_KERNEL", "nonsense", 1);
    options.kernel = "scalar";
    CHECK_INT(lidx_create(&made, &options), LIDX_OK, "an option goes before LIDX_KERNEL");
    lidx_destroy(made);
    setenv("LIDX_KERNEL", "", 1);
    CHECK_INT(lidx_create(&made, NULL), LIDX_OK, "an empty LIDX_KERNEL");
    lidx_destroy(made);
    unsetenv("LIDX_KERNEL");
    static const size_t bad_sizes[] = {0, 4, sizeof(struct lidx_options) - 1, SIZE_MAX};
    for (int i = 0; i < 4; i++) {
        options = (struct lidx_options)LIDX_OPTIONS_INIT;
        options.size = bad_sizes[i];
        refuse_options(&options, LIDX_ERR_ARGUMENT, "size", "options.size");
    }
}

static void check_kernel_info(void) {
    struct lidx_kernel_info info = {.size = sizeof info};
    int n = lidx_kernel_count(), chosen_bf16 = 0, chosen_fp16 = 0, scalar = 0;
    CHECK(n >= 1, "%d kernels", n);
    check_sentence(lidx_kernel_info(-1, &info), LIDX_ERR_ARGUMENT, "index", "kernel -1");
    check_sentence(lidx_kernel_info(n, &info), LIDX_ERR_ARGUMENT, "index", "kernel past the end");
    check_sentence(lidx_kernel_info(INT32_MIN, &info), LIDX_ERR_ARGUMENT, "index", "least kernel");
    check_sentence(lidx_kernel_info(0, NULL), LIDX_ERR_ARGUMENT, "info", "info NULL");
    info.size = sizeof info - 1;
    check_sentence(lidx_kernel_info(0, &info), LIDX_ERR_ARGUMENT, "info", "info.size");
    for (int i = 0; i < n; i++) {
        info = (struct lidx_kernel_info){.size = sizeof info};
        CHECK_INT(lidx_kernel_info(i, &info), LIDX_OK, "kernel info");
        CHECK(info.name && info.backend && info.reason && is_sentence(info.reason),
              "kernel %d says why", i);
        CHECK(info.available || (!info.chosen_bf16 && !info.chosen_fp16),
              "%s is chosen and not available", info.name);
        struct lidx_options options = LIDX_OPTIONS_INIT;
        char name[32];
        snprintf(name, sizeof name, "%s", info.name);
        options.kernel = name;
        if (!info.available)
            refuse_options(&options, LIDX_ERR_OPTION, name, "a kernel of another machine");
        if (strcmp(info.backend, "cpu") != 0)
            continue;
        chosen_bf16 += info.chosen_bf16;
        chosen_fp16 += info.chosen_fp16;
        scalar += strcmp(name, "scalar") == 0 && info.available;
    }
    CHECK(chosen_bf16 == 1 && chosen_fp16 == 1 && scalar == 1,
          "of the CPU's kernels %d are chosen for bf16, %d for fp16, %d are scalar", chosen_bf16,
          chosen_fp16, scalar);
}

static void check_names(void) {
    static const char *const name[] = {
        "LIDX_OK",         "LIDX_ERR_ARGUMENT", "LIDX_ERR_LAYOUT", "LIDX_ERR_SHAPE",
        "LIDX_ERR_DTYPE",  "LIDX_ERR_STRIDE",   "LIDX_ERR_OPTION", "LIDX_ERR_VALUE",
        "LIDX_ERR_DEVICE", "LIDX_ERR_WORKSPACE", "LIDX_ERR_MEMORY", "LIDX_ERR_CUDA"};
    char version[32];
    for (int i = 0; i < 12; i++)
        CHECK_STRING(lidx_status_name(i), name[i], "status name");
    CHECK(lidx_status_name(-1) && lidx_status_name(12) && lidx_status_name(INT32_MAX) &&
              lidx_status_name(INT32_MIN),
          "%s", "names of numbers that are no status");
    snprintf(version, sizeof version, "%d.%d.%d", LIDX_VERSION_MAJOR, LIDX_VERSION_MINOR,
             LIDX_VERSION_PATCH);
    CHECK_STRING(lidx_version(), version, "version");
    CHECK(lidx_cpu_features() != NULL, "%s", "features");
}

static void *fail_elsewhere(void *sentence) {
    lidx_run(NULL, NULL);
    snprintf(sentence, 512, "%s", lidx_last_error());
    return NULL;
}

static void check_error_is_per_thread(void) {
    struct call c;
    char mine[512], theirs[512] = "";
    pthread_t thread;
    valid_call(&c, BSND_BSND);
    c.args.sparse_mode = 77;
    refuse(&c, LIDX_ERR_OPTION, "sparse_mode", "sparse_mode");
    snprintf(mine, sizeof mine, "%s", lidx_last_error());
    CHECK_INT(pthread_create(&thread, NULL, fail_elsewhere, theirs), 0, "thread");
    pthread_join(thread, NULL);
    CHECK_STRING(lidx_last_error(), mine, "this thread's sentence");
    CHECK(strstr(theirs, "context"), "the other thread's is \"%s\"", theirs);
}

int main(void) {
    struct call c;
    CHECK(lidx_last_error() != NULL, "%s", "a sentence before any error");
    if (!CHECK(lidx_create(&context, NULL) == LIDX_OK, "%s", lidx_last_error()))
        return test_end();
    for (int pair = 0; pair < N_PAIRS; pair++) {
        valid_call(&c, pair);
        accept(&c, pair_name[pair]);
        check_missing(pair);
        check_dimensions(pair);
        check_sizes(pair);
        check_types(pair);
        check_devices(pair);
        check_strides(pair);
        check_heads_and_dim(pair);
        check_options(pair);
        check_lists(pair);
        if (is_paged(pair))
            check_pages(pair);
        else
            check_unpaged_table(pair);
    }
    check_layouts();
    check_counts();
    check_struct_size();
    check_context();
    check_create();
    check_kernel_info();
    check_names();
    check_error_is_per_thread();
    check_empty_table();
    check_many_empty_batches();
    lidx_destroy(context);
    return test_end();
}
