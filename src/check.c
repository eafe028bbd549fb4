/* SPDX-License-Identifier: Apache-2.0
 *
 * The only file that knows BSND, TND and PA_BSND. It turns tensors into the pointers, strides and
 * lengths of struct problem and refuses, with a sentence, whatever the contract does not allow:
 * here what one argument requires of another, in check_tensor.c what holds for any tensor, in
 * check_values.c what the lists say.
 */
#include "check.h"

#include "check_tensor.h"
#include "check_values.h"
#include "dtype.h"
#include "error.h"

enum { MAX_DIMS = 4 };

struct checker {
    const struct lidx_args *args;
    enum check_depth depth;
    struct problem *p;
    struct lidx_device device;
    struct operand query, key, weights, query_lengths, key_lengths, table, indices, values;
};

static const char *const layout_names[] = {"BSND", "TND", "PA_BSND"}; /* by enum lidx_layout */

static int refuse_layout(const char *name, int layout, const char *should_be) {
    if (layout >= LIDX_BSND && layout <= LIDX_PA_BSND)
        return lidx_fail(LIDX_ERR_LAYOUT, "%s is %s; it should be %s", name, layout_names[layout],
                         should_be);
    return lidx_fail(LIDX_ERR_LAYOUT, "%s is %d; it should be %s", name, layout, should_be);
}

static int check_options(const struct lidx_args *args) {
    int q = args->layout_query, k = args->layout_key;
    if (q != LIDX_BSND && q != LIDX_TND)
        return refuse_layout("layout_query", q, "BSND (0) or TND (1)");
    if (k != LIDX_BSND && k != LIDX_TND && k != LIDX_PA_BSND)
        return refuse_layout("layout_key", k, "BSND (0), TND (1) or PA_BSND (2)");
    if (k != LIDX_PA_BSND && k != q)
        return lidx_fail(LIDX_ERR_LAYOUT,
                         "layout_key is %s with layout_query %s; it should be %s or PA_BSND",
                         layout_names[k], layout_names[q], layout_names[q]);
    if (args->block_table && k != LIDX_PA_BSND)
        return lidx_fail(LIDX_ERR_ARGUMENT,
                         "block_table is given with layout_key %s; it belongs to PA_BSND only",
                         layout_names[k]);
    if (args->sparse_count < 1 || args->sparse_count > LIDX_MAX_TOP_K)
        return lidx_fail(LIDX_ERR_OPTION, "sparse_count is %d; it should be 1 to %d",
                         (int)args->sparse_count, LIDX_MAX_TOP_K);
    if (args->sparse_mode != LIDX_MODE_FULL && args->sparse_mode != LIDX_MODE_CAUSAL)
        return lidx_fail(LIDX_ERR_OPTION, "sparse_mode is %d; it should be %d or %d",
                         (int)args->sparse_mode, LIDX_MODE_FULL, LIDX_MODE_CAUSAL);
    return LIDX_OK;
}

static int check_data(const struct checker *c, struct operand *o) {
    return c->depth == CHECK_SIZES ? LIDX_OK : lidx_check_data(o);
}

static int check_query(struct checker *c) {
    struct problem *p = c->p;
    int packed = p->query_packed, status;
    if ((status =
             lidx_check_structure(&c->query, "query", c->args->query, packed ? 3 : 4, &c->device)))
        return status;
    p->dtype = lidx_tensor_dtype(c->query.tensor);
    if (p->dtype != DTYPE_BF16 && p->dtype != DTYPE_FP16)
        return lidx_refuse_dtype(&c->query, "bfloat16 or float16", "");
    c->query.dtype = p->dtype;
    const int64_t *shape = c->query.tensor->shape;
    int64_t heads = shape[packed ? 1 : 2], dim = shape[packed ? 2 : 3];
    if (heads < 1 || heads > LIDX_MAX_HEADS)
        return lidx_fail(LIDX_ERR_SHAPE, "query has %lld heads (N1); it should have 1 to %d",
                         (long long)heads, LIDX_MAX_HEADS);
    if (dim != 64 && dim != 128)
        return lidx_fail(LIDX_ERR_SHAPE,
                         "query has head dimension %lld (D); it should be 64 or 128",
                         (long long)dim);
    p->n_heads = (int32_t)heads;
    p->head_dim = (int32_t)dim;
    p->n_query = shape[packed ? 0 : 1];
    p->n_batch = packed ? 0 : shape[0]; /* packed: known from the list of lengths */
    return lidx_check_strides(&c->query, packed, 0);
}

static int check_key(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_args *args = c->args;
    int paged = args->layout_key == LIDX_PA_BSND, status;
    if ((status =
             lidx_check_structure(&c->key, "key", args->key, p->key_packed ? 3 : 4, &c->device)))
        return status;
    c->key.dtype = lidx_tensor_dtype(c->key.tensor);
    if (c->key.dtype != p->dtype)
        return lidx_refuse_dtype(&c->key, lidx_dtypes[p->dtype].name, ", as query");
    const int64_t *shape = c->key.tensor->shape;
    int64_t expected[MAX_DIMS] = {shape[0], p->key_packed ? 1 : shape[1],
                                  p->key_packed ? p->head_dim : 1, p->head_dim};
    const char *meaning = "one key head of query's dimension";
    if (args->layout_key == LIDX_BSND) {
        expected[0] = p->n_batch;
        meaning = "query's batches, and one key head of its dimension";
    }
    if ((status = lidx_check_shape(&c->key, expected, meaning)))
        return status;
    p->n_key = p->key_packed ? shape[0] : shape[1];
    if (!paged && p->n_key > INT32_MAX)
        return lidx_fail(LIDX_ERR_SHAPE, "key has %lld keys; positions are int32, so at most %d",
                         (long long)p->n_key, INT32_MAX);
    if (paged) {
        if (shape[1] < 16 || shape[1] > 1024 || shape[1] % 16)
            return lidx_fail(LIDX_ERR_SHAPE,
                             "key has block_size %lld (dimension 1); it should be a multiple of 16 "
                             "in 16..1024",
                             (long long)shape[1]);
        p->n_pages = shape[0];
        p->page_size = (int32_t)shape[1];
    }
    return lidx_check_strides(&c->key, p->key_packed, 0);
}

static int refuse_missing(const char *name, const char *required) {
    return lidx_fail(LIDX_ERR_ARGUMENT, "%s is missing; it is required with %s", name, required);
}

/* One of the two lists; `required` says why it may not be left out, or is NULL. */
static int check_lengths(struct checker *c, struct operand *o, const char *name,
                         const struct lidx_tensor *t, const char *required) {
    int status;
    if (!t) {
        *o = (struct operand){.name = name};
        return required ? refuse_missing(name, required) : LIDX_OK;
    }
    if ((status = lidx_check_structure(o, name, t, 1, &c->device)) ||
        (status = lidx_check_int32(o)) || (status = lidx_check_strides(o, 1, 0)))
        return status;
    return check_data(c, o);
}

static int check_lists(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_args *args = c->args;
    int paged = args->layout_key == LIDX_PA_BSND, status;
    status =
        check_lengths(c, &c->query_lengths, "actual_seq_lengths_query",
                      args->actual_seq_lengths_query, p->query_packed ? "layout_query TND" : NULL);
    if (status)
        return status;
    status =
        check_lengths(c, &c->key_lengths, "actual_seq_lengths_key", args->actual_seq_lengths_key,
                      paged           ? "layout_key PA_BSND"
                      : p->key_packed ? "layout_key TND"
                                      : NULL);
    if (status)
        return status;
    if (p->query_packed)
        p->n_batch = c->query_lengths.tensor->shape[0];
    const char *meaning = "one length a batch";
    if (c->query_lengths.tensor &&
        (status = lidx_check_shape(&c->query_lengths, &p->n_batch, meaning)))
        return status;
    if (c->key_lengths.tensor && (status = lidx_check_shape(&c->key_lengths, &p->n_batch, meaning)))
        return status;
    p->query_lengths = c->query_lengths.data;
    p->key_lengths = c->key_lengths.data;
    return LIDX_OK;
}

static int check_table(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_tensor *t = c->args->block_table;
    int status;
    if (c->args->layout_key != LIDX_PA_BSND)
        return LIDX_OK;
    if (!t)
        return refuse_missing("block_table", "layout_key PA_BSND");
    if ((status = lidx_check_structure(&c->table, "block_table", t, 2, &c->device)) ||
        (status = lidx_check_int32(&c->table)))
        return status;
    int64_t expected[2] = {p->n_batch, t->shape[1]};
    if ((status = lidx_check_shape(&c->table, expected, "one row a batch")) ||
        (status = lidx_check_strides(&c->table, 0, 0)) || (status = check_data(c, &c->table)))
        return status;
    p->page_table = c->table.data;
    p->page_table_stride = c->table.batch_stride;
    int64_t width_limit = INT32_MAX / p->page_size;
    p->n_key = t->shape[1] > width_limit ? INT32_MAX : t->shape[1] * p->page_size;
    return LIDX_OK;
}

static int check_weights(struct checker *c) {
    struct problem *p = c->p;
    int packed = p->query_packed, status;
    if ((status = lidx_check_structure(&c->weights, "weights", c->args->weights, packed ? 2 : 3,
                                       &c->device)) ||
        (status = lidx_check_float_dtype(&c->weights, p->dtype)))
        return status;
    p->weights_dtype = c->weights.dtype;
    int64_t expected[MAX_DIMS] = {p->n_batch, p->n_query, p->n_heads};
    if ((status = lidx_check_shape(&c->weights, packed ? expected + 1 : expected,
                                   "one weight for each head of query")))
        return status;
    return lidx_check_strides(&c->weights, packed, 0);
}

static int check_output(struct checker *c, struct operand *o, const char *name,
                        const struct lidx_tensor *t) {
    const struct problem *p = c->p;
    int packed = p->query_packed, status;
    if ((status = lidx_check_structure(o, name, t, packed ? 3 : 4, &c->device)))
        return status;
    int64_t expected[MAX_DIMS] = {p->n_batch, p->n_query, 1, p->top_k};
    if ((status = lidx_check_shape(o, packed ? expected + 1 : expected,
                                   "query's tokens, one key head and sparse_count")))
        return status;
    return lidx_check_strides(o, packed, 1);
}

static int check_outputs(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_args *args = c->args;
    int status;
    if ((status = check_output(c, &c->indices, "sparse_indices", args->sparse_indices)) ||
        (status = lidx_check_int32(&c->indices)))
        return status;
    p->values_dtype = DTYPE_F32;
    c->values = (struct operand){.name = "sparse_values"};
    if (!args->sparse_values)
        return LIDX_OK;
    if ((status = check_output(c, &c->values, "sparse_values", args->sparse_values)) ||
        (status = lidx_check_float_dtype(&c->values, p->dtype)))
        return status;
    p->values_dtype = c->values.dtype;
    return LIDX_OK;
}

static int bind_data(struct checker *c) {
    struct problem *p = c->p;
    int status;
    if ((status = check_data(c, &c->query)) || (status = check_data(c, &c->key)) ||
        (status = check_data(c, &c->weights)) || (status = check_data(c, &c->indices)) ||
        (c->values.tensor && (status = check_data(c, &c->values))))
        return status;
    p->query = c->query.data;
    p->key = c->key.data;
    p->weights = c->weights.data;
    p->indices = c->indices.data;
    p->values = c->values.data;
    p->query_batch_stride = c->query.batch_stride;
    p->key_batch_stride = c->key.batch_stride;
    p->weights_batch_stride = c->weights.batch_stride;
    p->indices_batch_stride = c->indices.batch_stride;
    p->values_batch_stride = c->values.batch_stride;
    return LIDX_OK;
}

int lidx_check(const struct lidx_args *args, enum check_depth depth, struct problem *p,
               struct lidx_device *device) {
    static const struct problem empty; /* gcc copies by stores and clears by a slower `rep stos` */
    struct checker c;                  /* each operand is filled where it is checked */
    int status;
    c.args = args;
    c.depth = depth;
    c.p = p;
    *p = empty;
    if ((status = check_options(args)))
        return status;
    if (!args->query)
        return lidx_fail(LIDX_ERR_ARGUMENT, "query is missing; it is a required argument");
    c.device = args->query->device;
    p->query_packed = args->layout_query == LIDX_TND;
    p->key_packed = args->layout_key == LIDX_TND;
    p->top_k = args->sparse_count;
    p->sparse_mode = args->sparse_mode;
    p->error_word = args->error_word;
    if ((status = check_query(&c)) || (status = check_key(&c)) || (status = check_lists(&c)) ||
        (status = check_table(&c)) || (status = check_weights(&c)) ||
        (status = check_outputs(&c)) || (status = bind_data(&c)))
        return status;
    *device = c.device;
    if (depth == CHECK_SIZES || device->device_type == LIDX_CUDA ||
        device->device_type == LIDX_CUDA_MANAGED)
        return LIDX_OK;
    return lidx_check_values(p);
}
