/* SPDX-License-Identifier: Apache-2.0
 *
 * One call for each way in which any tensor of a call can be wrong: missing, of another shape,
 * type, device or stride. Each must return its status and a sentence that names the argument, and
 * leave the outputs alone; the same call without the fault must run.
 */
#include "valid_call.h"

static struct lidx_context *context;

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
            accept(context, &c, say("absent", pair, which));
        else
            refuse_tensor(context, &c, pair, which, LIDX_ERR_ARGUMENT, "absent");
        valid_call(&c, pair);
        c.t[which].data = NULL;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_ARGUMENT, "data NULL");
        valid_call(&c, pair);
        c.t[which].shape = NULL;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_ARGUMENT, "shape NULL");
        valid_call(&c, pair);
        c.t[which].byte_offset = 1;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_ARGUMENT, "misaligned");
    }
}

static void check_dimensions(int pair) {
    static const int bad[] = {-1, 1, -2, -100, 1000};
    struct call c;
    for (int which = 0; which < N_TENSORS; which++)
        for (int i = 0; i < 5 && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].ndim += bad[i];
            refuse_tensor(context, &c, pair, which, LIDX_ERR_SHAPE, "number of dimensions");
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
            refuse_tensor(context, &c, pair, which, LIDX_ERR_SHAPE, "size -1");
            c.shape[which][dim] = INT64_MIN;
            refuse_tensor(context, &c, pair, which, LIDX_ERR_SHAPE, "smallest size");
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

static void check_sentence_of_shape(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.t[K].strides = NULL;
    c.shape[K][0] = B + 1;
    CHECK_INT(lidx_run(context, &c.args), LIDX_ERR_SHAPE, "keys of a third batch");
    CHECK_STRING(lidx_last_error(),
                 "key has shape [3, 40, 1, 64]; it should be [2, 40, 1, 64], query's batches, and "
                 "one key head of its dimension",
                 "keys of a third batch");
}

static void check_types(int pair) {
    static const struct {
        struct lidx_dtype dtype;
        const char *name;
    } wrong[] = {{{LIDX_INT, 64, 1}, "int64"},     {{LIDX_INT, 8, 1}, "int8"},
                 {{LIDX_UINT, 32, 1}, "uint32"},   {{LIDX_FLOAT, 64, 1}, "float64"},
                 {{LIDX_BFLOAT, 8, 1}, "bfloat8"}, {{LIDX_FLOAT, 0, 1}, "float0"},
                 {{LIDX_UINT, 16, 1}, "uint16"},   {{3, 64, 1}, "code 3, 64 bits"},
                 {{5, 64, 1}, "complex64"},        {{6, 8, 1}, "bool;"},
                 {{10, 8, 1}, "float8_e4m3fn;"},   {{14, 8, 1}, "float8_e8m0fnu;"},
                 {{15, 6, 1}, "code 15, 6 bits"},  {{255, 16, 1}, "code 255, 16 bits"},
                 {{LIDX_FLOAT, 16, 1}, "float16"}};
    enum { WRONG = sizeof wrong / sizeof wrong[0] };
    struct call c;
    for (int which = 0; which < N_TENSORS; which++) {
        for (int i = 0; i < WRONG && is_used(pair, which); i++) {
            valid_call(&c, pair);
            c.t[which].dtype = wrong[i].dtype;
            if (which == Q &&
                i == WRONG - 1) /* a float16 query is fine; the others are then wrong */
                refuse(context, &c, LIDX_ERR_DTYPE, "key", say("float16", pair, which));
            else
                refuse_tensor(context, &c, pair, which, LIDX_ERR_DTYPE, "wrong dtype");
            CHECK(strstr(lidx_last_error(), wrong[i].name), "\"%s\" says what the dtype was",
                  lidx_last_error());
        }
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].dtype.lanes = 2;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_DTYPE, "2 lanes");
        c.t[which].dtype.lanes = 0;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_DTYPE, "0 lanes");
    }
    valid_call(&c, pair);
    c.t[Q].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse_tensor(context, &c, pair, Q, LIDX_ERR_DTYPE, "float32");
    valid_call(&c, pair);
    c.t[INDICES].dtype = (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    refuse_tensor(context, &c, pair, INDICES, LIDX_ERR_DTYPE, "float32");
}

static void check_devices(int pair) {
    struct call c;
    for (int which = 1; which < N_TENSORS; which++) {
        if (!is_used(pair, which))
            continue;
        valid_call(&c, pair);
        c.t[which].device.device_type = LIDX_CUDA;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_DEVICE, "another device");
        valid_call(&c, pair);
        c.t[which].device.device_id = 1;
        refuse_tensor(context, &c, pair, which, LIDX_ERR_DEVICE, "another device id");
    }
    static const int unknown[] = {0, -1, 4, 9, 12, 1000};
    for (int i = 0; i < 6; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].device.device_type = unknown[i];
        refuse_tensor(context, &c, pair, Q, LIDX_ERR_DEVICE, "a device that is not served");
    }
    valid_call(&c, pair);
    for (int which = 0; which < N_TENSORS; which++)
        c.t[which].device.device_type = LIDX_CUDA_HOST;
    accept(context, &c, say("page-locked host memory", pair, Q));
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
            if (free_batch)
                continue;
            if (c.shape[which][dim] == 1) {
                c.stride[which][dim] = -77;
                accept(context, &c, say("stride over one element", pair, which));
                continue;
            }
            int64_t right = c.stride[which][dim];
            const int64_t bad[] = {right + 1, right - 1, -right, INT64_MAX, INT64_MIN};
            for (int i = 0; i < 5; i++) {
                c.stride[which][dim] = bad[i];
                refuse_tensor(context, &c, pair, which, LIDX_ERR_STRIDE, "wrong stride");
            }
        }
    for (int which = 0; which < N_TENSORS; which++) {
        valid_call(&c, pair);
        if (!is_used(pair, which) || c.t[which].ndim < 2)
            continue;
        static const int64_t bad[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 8};
        for (int i = 0; i < 4; i++) {
            c.stride[which][0] = bad[i];
            refuse_tensor(context, &c, pair, which, LIDX_ERR_STRIDE, "batch stride");
        }
        if (which == INDICES || which == VALUES) {
            valid_call(&c, pair);
            c.stride[which][0]--;
            refuse_tensor(context, &c, pair, which, LIDX_ERR_STRIDE, "batches overlap");
            c.stride[which][0] = 0;
            refuse_tensor(context, &c, pair, which, LIDX_ERR_STRIDE, "batch stride 0");
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
    accept(context, &c, say("strides without elements", BSND_BSND, K));
}

int main(void) {
    struct call c;
    if (!CHECK(lidx_create(&context, NULL) == LIDX_OK, "%s", lidx_last_error()))
        return test_end();
    for (int pair = 0; pair < N_PAIRS; pair++) {
        valid_call(&c, pair);
        accept(context, &c, pair_name[pair]);
        check_missing(pair);
        check_dimensions(pair);
        check_sizes(pair);
        check_types(pair);
        check_devices(pair);
        check_strides(pair);
    }
    check_sentence_of_shape();
    check_strides_of_nothing();
    lidx_destroy(context);
    return test_end();
}
