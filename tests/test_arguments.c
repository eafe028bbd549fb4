/* SPDX-License-Identifier: Apache-2.0
 *
 * One call for each way in which an argument can be wrong. Each must return its status and a
 * sentence that names the argument, and leave the outputs alone; the same call without the fault
 * must run.
 */
#include "valid_call.h"

static struct lidx_context *context;

static void accept(const struct call *c, const char *what) {
    int status = lidx_run(context, &c->args);
    CHECK(status == LIDX_OK, "%s: %s, \"%s\"", what, lidx_status_name(status), lidx_last_error());
    for (int i = 0; status == LIDX_OK && i < B * S1 * TOP; i++)
        CHECK(c->indices[i] >= -1 && c->indices[i] < S2, "%s: slot %d is %d", what, i,
              c->indices[i]);
}

/* What is wrong with tensor `which` has this status, and the sentence names the tensor. */
static void refuse_tensor(const struct call *c, int pair, int which, int status,
                          const char *fault) {
    refuse(context, c, status, tensor_name[which], say(fault, pair, which));
}

/* ---- faults that any tensor can have --------------------------------------------------------- */

static void check_missing(int pair) {
    struct call c;
    const struct lidx_tensor **field[N_TENSORS] = {&c.args.query,
                                                   &c.args.key,
                                                   &c.args.weights,
                                                   &c.args.actual_seq_lengths_query,
                                                   &c.args.actual_seq_lengths_key,
                                                   &c.args.block_table,
                                                   &c.args.sparse_indices,
                                                   &c.args.sparse_values};
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
            refuse_tensor(&c, pair, which, LIDX_ERR_ARGUMENT, "absent");
        valid_call(&c, pair);
        c.t[which].data = NULL;
        refuse_tensor(&c, pair, which, LIDX_ERR_ARGUMENT, "data NULL");
        valid_call(&c, pair);
        c.t[which].shape = NULL;
        refuse_tensor(&c, pair, which, LIDX_ERR_ARGUMENT, "shape NULL");
        valid_call(&c, pair);
        c.t[which].byte_offset = 1;
        refuse_tensor(&c, pair, which, LIDX_ERR_ARGUMENT, "misaligned");
    }
}

static void check_dimensions(int pair) {
    static const int bad[] = {-1, 1, -2, -100, 1000};
    struct call c;
    for (int which = 0; which < N_TENSORS; which++)
        for (int i = 0; i < 5 && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].ndim += bad[i];
            refuse_tensor(&c, pair, which, LIDX_ERR_SHAPE, "number of dimensions");
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
            refuse_tensor(&c, pair, which, LIDX_ERR_SHAPE, "size -1");
            c.shape[which][dim] = INT64_MIN;
            refuse_tensor(&c, pair, which, LIDX_ERR_SHAPE, "smallest size");
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
    static const struct {
        struct lidx_dtype dtype;
        const char *name;
    } wrong[] = {{{LIDX_INT, 64, 1}, "int64"},     {{LIDX_INT, 8, 1}, "int8"},
                 {{LIDX_UINT, 32, 1}, "uint32"},   {{LIDX_FLOAT, 64, 1}, "float64"},
                 {{LIDX_BFLOAT, 8, 1}, "bfloat8"}, {{LIDX_FLOAT, 0, 1}, "float0"},
                 {{10, 8, 1}, "code 10, 8 bits"},  {{99, 16, 1}, "code 99, 16 bits"},
                 {{LIDX_FLOAT, 16, 1}, "float16"}, {{LIDX_UINT, 16, 1}, "uint16"}};
    struct call c;
    for (int which = 0; which < N_TENSORS; which++) {
        for (int i = 0; i < 10 && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].dtype = wrong[i].dtype;
            if (which == Q && i == 8) /* a float16 query is fine; the others are then wrong */
                refuse(context, &c, LIDX_ERR_DTYPE, "key", say("float16", pair, which));
            else
                refuse_tensor(&c, pair, which, LIDX_ERR_DTYPE, "wrong dtype");
            CHECK(strstr(lidx_last_error(), wrong[i].name), "\"%s\" says what the dtype was",
                  lidx_last_error());
        }
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].dtype.lanes = 2;
        refuse_tensor(&c, pair, which, LIDX_ERR_DTYPE, "2 lanes");
        c.t[which].dtype.lanes = 0;
        refuse_tensor(&c, pair, which, LIDX_ERR_DTYPE, "0 lanes");
    }
    valid_call(&c, pair);
    c.t[Q].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse_tensor(&c, pair, Q, LIDX_ERR_DTYPE, "float32");
    valid_call(&c, pair);
    c.t[INDICES].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse_tensor(&c, pair, INDICES, LIDX_ERR_DTYPE, "float32");
}

static void check_devices(int pair) {
    struct call c;
    for (int which = 1; which < N_TENSORS; which++) {
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].device.device_type = LIDX_CUDA;
        refuse_tensor(&c, pair, which, LIDX_ERR_DEVICE, "another device");
        valid_call(&c, pair);
        c.t[which].device.device_id = 1;
        refuse_tensor(&c, pair, which, LIDX_ERR_DEVICE, "another device id");
    }
    static const int unknown[] = {0, -1, 4, 9, 12, 1000};
    for (int i = 0; i < 6; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].device.device_type = unknown[i];
        refuse_tensor(&c, pair, Q, LIDX_ERR_DEVICE, "a device that is not served");
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
            int free_batch =
                dim == 0 && c.t[which].ndim > 1 &&
                !(is_packed(pair) && which != TABLE && !(which == K && is_paged(pair)));
            if (c.shape[which][dim] == 1 || free_batch)
                continue;
            int64_t right = c.stride[which][dim];
            const int64_t bad[] = {right + 1, right - 1, -right, INT64_MAX, INT64_MIN};
            for (int i = 0; i < 5; i++) {
                c.stride[which][dim] = bad[i];
                refuse_tensor(&c, pair, which, LIDX_ERR_STRIDE, "wrong stride");
            }
        }
    for (int which = 0; which < N_TENSORS; which++) {
        valid_call(&c, pair);
        if (!is_used(pair, which) || c.t[which].ndim < 2)
            continue;
        static const int64_t bad[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 8};
        for (int i = 0; i < 4; i++) {
            c.stride[which][0] = bad[i];
            refuse_tensor(&c, pair, which, LIDX_ERR_STRIDE, "batch stride");
        }
        if (which == INDICES || which == VALUES) {
            valid_call(&c, pair);
            c.stride[which][0]--;
            refuse_tensor(&c, pair, which, LIDX_ERR_STRIDE, "batches overlap");
            c.stride[which][0] = 0;
            refuse_tensor(&c, pair, which, LIDX_ERR_STRIDE, "batch stride 0");
        }
    }
}

/* Of a tensor without elements strides say nothing: frameworks leave any number there. */
static void check_strides_of_nothing(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.shape[K][1] = c.key_list[0] = c.key_list[1] = 0;
    for (int dim = 0; dim < 4; dim++)
        c.stride[K][dim] = -77;
    accept(&c, say("strides without elements", BSND_BSND, K));
}

/* ---- faults of one argument ------------------------------------------------------------------ */

static void check_heads_and_dim(int pair) {
    static const int64_t bad_heads[] = {0, 129, 1 << 20},
                         bad_dims[] = {0, 1, 32, 96, 127, 129, 256};
    struct call c;
    int heads = is_packed(pair) ? 1 : 2;
    for (int i = 0; i < 3; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads] = c.shape[W][heads] = bad_heads[i];
        refuse_tensor(&c, pair, Q, LIDX_ERR_SHAPE, "heads");
        CHECK(strstr(lidx_last_error(), "128"), "\"%s\" names the limit", lidx_last_error());
    }
    for (int i = 0; i < 7; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads + 1] = c.shape[K][pair == TND_TND ? 2 : 3] = bad_dims[i];
        refuse_tensor(&c, pair, Q, LIDX_ERR_SHAPE, "head dimension");
        CHECK(strstr(lidx_last_error(), "64") && strstr(lidx_last_error(), "128"),
              "\"%s\" names what is allowed", lidx_last_error());
    }
    valid_call(&c, pair);
    c.t[K].strides = NULL;
    c.shape[K][pair == TND_TND ? 1 : 2] = 2;
    refuse_tensor(&c, pair, K, LIDX_ERR_SHAPE, "2 key heads");
}

static void check_options(int pair) {
    static const int32_t bad_counts[] = {0, -1, 8193, INT32_MAX, INT32_MIN};
    static const int32_t bad_modes[] = {1, 2, 4, -1, INT32_MAX};
    struct call c;
    for (int i = 0; i < 5; i++) {
        valid_call(&c, pair);
        c.args.sparse_count = bad_counts[i];
        refuse(context, &c, LIDX_ERR_OPTION, "sparse_count", say("sparse_count", pair, INDICES));
        valid_call(&c, pair);
        c.args.sparse_mode = bad_modes[i];
        refuse(context, &c, LIDX_ERR_OPTION, "sparse_mode", say("sparse_mode", pair, Q));
    }
}

static void check_layouts(void) {
    struct call c;
    static const int bad_query[] = {LIDX_PA_BSND, 3, -1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 5; i++) {
        valid_call(&c, BSND_BSND);
        c.args.layout_query = bad_query[i];
        refuse(context, &c, LIDX_ERR_LAYOUT,
               i ? "layout_query" : "layout_query is PA_BSND; it should be BSND", "layout_query");
        if (i == 0)
            continue;
        valid_call(&c, BSND_BSND);
        c.args.layout_key = bad_query[i];
        refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "layout_key");
    }
    valid_call(&c, BSND_BSND);
    c.args.layout_key = LIDX_TND;
    refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "BSND with TND");
    valid_call(&c, TND_TND);
    c.args.layout_key = LIDX_BSND;
    refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "TND with BSND");
    /* Who forgets the layout should hear of that, not of a shape. */
    valid_call(&c, BSND_PA);
    c.args.layout_key = LIDX_BSND;
    refuse(context, &c, LIDX_ERR_ARGUMENT, "block_table is given with layout_key BSND",
           "pages and their table without PA_BSND");
}

static void check_pages(int pair) {
    static const int64_t bad_sizes[] = {0, 1, 8, 15, 17, 24, 1032, 1040, 2048, 1 << 30};
    static const int32_t bad_ids[] = {-1, PAGES, INT32_MAX, INT32_MIN};
    struct call c;
    for (int i = 0; i < 10; i++) {
        valid_call(&c, pair);
        c.t[K].strides = NULL;
        c.shape[K][1] = bad_sizes[i];
        refuse(context, &c, LIDX_ERR_SHAPE, "block_size", say("block size", pair, K));
    }
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < B * COLUMNS; at++) {
            valid_call(&c, pair);
            c.table[at] = bad_ids[i];
            if (at % COLUMNS == COLUMNS - 1)
                accept(&c, say("entry past the last needed one", pair, TABLE));
            else
                refuse_tensor(&c, pair, TABLE, LIDX_ERR_VALUE, "page id");
        }
    valid_call(&c, pair);
    c.query_list[0] = 0;
    for (int at = 0; at < COLUMNS; at++)
        c.table[at] = bad_ids[at];
    accept(&c, say("entries of a batch without tokens", pair, TABLE));
    valid_call(&c, pair);
    c.key_list[1] = BLOCK * COLUMNS + 1;
    refuse_tensor(&c, pair, KL, LIDX_ERR_VALUE, "longer than the table");
    CHECK(strstr(lidx_last_error(), "block_table"), "\"%s\" names what is too short",
          lidx_last_error());
    valid_call(&c, pair);
    c.shape[K][0] = 0;
    refuse(context, &c, LIDX_ERR_VALUE,
           "block_table[0][0] is 0; it should be one of key's 0 blocks", say("no pages", pair, K));
}

static void check_unpaged_table(int pair) {
    struct call c;
    valid_call(&c, pair);
    c.args.block_table = &c.t[TABLE];
    refuse_tensor(&c, pair, TABLE, LIDX_ERR_ARGUMENT, "given without pages");
}

static void refuse_value(struct call *c, int pair, int which, int32_t *at, int32_t value) {
    int32_t right = *at;
    *at = value;
    refuse_tensor(c, pair, which, LIDX_ERR_VALUE, "list value");
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
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "2^31 keys of one batch");
    /* A size of 0 does not make the other sizes harmless. */
    valid_call(&c, BSND_BSND);
    for (int which = 0; which < N_TENSORS; which++) {
        c.t[which].strides = NULL;
        c.shape[which][0] = 0;
    }
    CHECK_INT(lidx_run(context, &c.args), LIDX_OK, "no batches");
    c.shape[K][1] = -1;
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "no batches of -1 keys");
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
        refuse_tensor(&c, pair, KL, LIDX_ERR_VALUE, "longer than a table without columns");
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
    /* Their keys, were there any to speak of, would be 2^77 elements. */
    c.shape[K][1] = INT32_MAX;
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "more elements than 64 bits address");
}

int main(void) {
    struct call c;
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
    check_strides_of_nothing();
    check_layouts();
    check_counts();
    check_empty_table();
    check_many_empty_batches();
    lidx_destroy(context);
    return test_end();
}
