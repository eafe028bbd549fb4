/* SPDX-License-Identifier: Apache-2.0
 *
 * The only file that knows BSND, TND and PA_BSND. It turns tensors into the pointers, strides and
 * lengths of struct problem and refuses, with a sentence, whatever the contract does not allow.
 */
#include "check.h"

#include <stdio.h>
#include <string.h>

#include "dtype.h"
#include "error.h"
#include "visible.h"

enum { MAX_DIMS = 4, TEXT = 96 };

/* What is known of one argument while it is checked. */
struct operand {
    const char *name;
    const struct lidx_tensor *tensor;
    void *data; /* with byte_offset; NULL when there are no elements */
    int dtype;  /* enum dtype; -1 for int32 */
    int64_t n_elements;
    int64_t batch_stride; /* bytes along the first axis */
};

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

static void format_shape(char text[TEXT], const int64_t *shape, int ndim) {
    size_t used = (size_t)snprintf(text, TEXT, "[");
    for (int i = 0; i < ndim && used < TEXT - 1; i++)
        used +=
            (size_t)snprintf(text + used, TEXT - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    if (used < TEXT - 1)
        snprintf(text + used, TEXT - used, "]");
}

/* Structure of one tensor: what has to hold before its shape means anything. */
static int check_structure(struct checker *c, struct operand *o, const char *name,
                           const struct lidx_tensor *t, int ndim) {
    *o = (struct operand){.name = name, .tensor = t};
    if (!t)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s is missing; it is a required argument", name);
    if (t->ndim != ndim)
        return lidx_fail(LIDX_ERR_SHAPE, "%s has %d dimensions; it should have %d", name,
                         (int)t->ndim, ndim);
    if (!t->shape)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s.shape is NULL; it should list %d sizes", name,
                         ndim);
    if (t->dtype.lanes != 1)
        return lidx_fail(LIDX_ERR_DTYPE, "%s has %d lanes an element; it should have 1", name,
                         (int)t->dtype.lanes);
    /* A size of 0 counts as 1 here, so that no product of some of the sizes overflows later. */
    int64_t n = 1, empty = 0;
    for (int i = 0; i < ndim; i++) {
        int64_t size = t->shape[i];
        if (size < 0)
            return lidx_fail(LIDX_ERR_SHAPE,
                             "%s has size %lld in dimension %d; sizes are 0 or more", name,
                             (long long)size, i);
        if (size == 0)
            empty = 1;
        else if (__builtin_mul_overflow(n, size, &n) || n > INT64_MAX / 64)
            return lidx_fail(LIDX_ERR_SHAPE, "%s has more elements than 64 bits can address", name);
    }
    o->n_elements = empty ? 0 : n;
    if (t->device.device_type != c->device.device_type ||
        t->device.device_id != c->device.device_id)
        return lidx_fail(LIDX_ERR_DEVICE,
                         "%s is on device (%d, %d) and query on (%d, %d); all tensors should be on "
                         "one device",
                         name, (int)t->device.device_type, (int)t->device.device_id,
                         (int)c->device.device_type, (int)c->device.device_id);
    return LIDX_OK;
}

static int tensor_dtype(const struct lidx_tensor *t) {
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (t->dtype.code == lidx_dtypes[i].code && t->dtype.bits == lidx_dtypes[i].bits)
            return i;
    return DTYPE_COUNT;
}

/* Says "int64", or the numbers of a type that is not DLPack's of these kinds. */
static int refuse_dtype(const struct operand *o, const char *should_be, const char *why) {
    static const char *const kinds[] = {
        [LIDX_INT] = "int", [LIDX_UINT] = "uint", [LIDX_FLOAT] = "float", [LIDX_BFLOAT] = "bfloat"};
    unsigned code = o->tensor->dtype.code, bits = o->tensor->dtype.bits;
    char is[TEXT];
    if (code < sizeof kinds / sizeof kinds[0] && kinds[code])
        snprintf(is, sizeof is, "%s%u", kinds[code], bits);
    else
        snprintf(is, sizeof is, "(code %u, %u bits)", code, bits);
    return lidx_fail(LIDX_ERR_DTYPE, "%s has dtype %s; it should be %s%s", o->name, is, should_be,
                     why);
}

static int check_float_dtype(struct operand *o, int query_dtype) {
    o->dtype = tensor_dtype(o->tensor);
    if (o->dtype == query_dtype || o->dtype == DTYPE_F32)
        return LIDX_OK;
    return refuse_dtype(o, lidx_dtypes[query_dtype].name, ", as query, or float32");
}

static int check_int32(struct operand *o) {
    o->dtype = -1;
    if (o->tensor->dtype.code == LIDX_INT && o->tensor->dtype.bits == 32)
        return LIDX_OK;
    return refuse_dtype(o, "int32", "");
}

static int element_bytes(const struct operand *o) {
    return o->tensor->dtype.bits / 8;
}

/* All axes but the first must be contiguous; the first too when `packed`. An output's batches
 * must not overlap. Axes of size 1 have no stride to speak of. */
static int check_strides(struct operand *o, int packed, int is_output) {
    const struct lidx_tensor *t = o->tensor;
    int64_t inner = 1;
    for (int i = t->ndim - 1; i > 0; i--) {
        if (t->strides && o->n_elements && t->shape[i] != 1 && t->strides[i] != inner)
            return lidx_fail(
                LIDX_ERR_STRIDE,
                "%s has stride %lld in dimension %d; it should be %lld (all dimensions "
                "but the first are contiguous)",
                o->name, (long long)t->strides[i], i, (long long)inner);
        inner *= t->shape[i];
    }
    int64_t stride = inner;
    if (t->strides && o->n_elements && t->shape[0] > 1) {
        int64_t least = is_output ? inner : 0, most = INT64_MAX / 16 / t->shape[0];
        stride = t->strides[0];
        if (packed && stride != inner)
            return lidx_fail(LIDX_ERR_STRIDE,
                             "%s has stride %lld in dimension 0; it should be %lld (contiguous)",
                             o->name, (long long)stride, (long long)inner);
        if (stride < least || stride > most)
            return lidx_fail(LIDX_ERR_STRIDE,
                             "%s has stride %lld in dimension 0; it should be at %s %lld", o->name,
                             (long long)stride, stride < least ? "least" : "most",
                             (long long)(stride < least ? least : most));
    }
    o->batch_stride = packed ? 0 : stride * element_bytes(o);
    return LIDX_OK;
}

static int check_data(struct checker *c, struct operand *o) {
    const struct lidx_tensor *t = o->tensor;
    if (c->depth == CHECK_SIZES || o->n_elements == 0)
        return LIDX_OK;
    if (!t->data)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s.data is NULL; it should point at %lld elements",
                         o->name, (long long)o->n_elements);
    o->data = (unsigned char *)t->data + t->byte_offset;
    if ((uintptr_t)o->data & (uintptr_t)(element_bytes(o) - 1)) /* a power of two */
        return lidx_fail(LIDX_ERR_ARGUMENT,
                         "%s.data is not aligned to its elements; it should be a multiple of %d",
                         o->name, element_bytes(o));
    return LIDX_OK;
}

static int check_shape(const struct operand *o, const int64_t *expected, const char *meaning) {
    const struct lidx_tensor *t = o->tensor;
    int i = 0;
    while (i < t->ndim && t->shape[i] == expected[i])
        i++;
    if (i == t->ndim)
        return LIDX_OK;
    char is[TEXT], should_be[TEXT];
    format_shape(is, t->shape, t->ndim);
    format_shape(should_be, expected, t->ndim);
    return lidx_fail(LIDX_ERR_SHAPE, "%s has shape %s; it should be %s, %s", o->name, is, should_be,
                     meaning);
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

static int check_query(struct checker *c) {
    struct problem *p = c->p;
    int packed = p->query_packed, status;
    if ((status = check_structure(c, &c->query, "query", c->args->query, packed ? 3 : 4)))
        return status;
    p->dtype = tensor_dtype(c->query.tensor);
    if (p->dtype != DTYPE_BF16 && p->dtype != DTYPE_FP16)
        return refuse_dtype(&c->query, "bfloat16 or float16", "");
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
    return check_strides(&c->query, packed, 0);
}

static int check_key(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_args *args = c->args;
    int paged = args->layout_key == LIDX_PA_BSND, status;
    if ((status = check_structure(c, &c->key, "key", args->key, p->key_packed ? 3 : 4)))
        return status;
    c->key.dtype = tensor_dtype(c->key.tensor);
    if (c->key.dtype != p->dtype)
        return refuse_dtype(&c->key, lidx_dtypes[p->dtype].name, ", as query");
    const int64_t *shape = c->key.tensor->shape;
    int64_t expected[MAX_DIMS] = {shape[0], p->key_packed ? 1 : shape[1],
                                  p->key_packed ? p->head_dim : 1, p->head_dim};
    const char *meaning = "one key head of query's dimension";
    if (args->layout_key == LIDX_BSND) {
        expected[0] = p->n_batch;
        meaning = "query's batches, and one key head of its dimension";
    }
    if ((status = check_shape(&c->key, expected, meaning)))
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
    return check_strides(&c->key, p->key_packed, 0);
}

/* One of the two lists; `required` says why it may not be left out, or is NULL. */
static int check_lengths(struct checker *c, struct operand *o, const char *name,
                         const struct lidx_tensor *t, const char *required) {
    int status;
    if (!t) {
        *o = (struct operand){.name = name};
        if (required)
            return lidx_fail(LIDX_ERR_ARGUMENT, "%s is missing; it is required with %s", name,
                             required);
        return LIDX_OK;
    }
    if ((status = check_structure(c, o, name, t, 1)) || (status = check_int32(o)) ||
        (status = check_strides(o, 1, 0)))
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
    if (c->query_lengths.tensor && (status = check_shape(&c->query_lengths, &p->n_batch, meaning)))
        return status;
    if (c->key_lengths.tensor && (status = check_shape(&c->key_lengths, &p->n_batch, meaning)))
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
    if ((status = check_structure(c, &c->table, "block_table", t, 2)) ||
        (status = check_int32(&c->table)))
        return status;
    int64_t expected[2] = {p->n_batch, t->shape[1]};
    if ((status = check_shape(&c->table, expected, "one row a batch")) ||
        (status = check_strides(&c->table, 0, 0)) || (status = check_data(c, &c->table)))
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
    if ((status = check_structure(c, &c->weights, "weights", c->args->weights, packed ? 2 : 3)) ||
        (status = check_float_dtype(&c->weights, p->dtype)))
        return status;
    p->weights_dtype = c->weights.dtype;
    int64_t expected[MAX_DIMS] = {p->n_batch, p->n_query, p->n_heads};
    if ((status = check_shape(&c->weights, packed ? expected + 1 : expected,
                              "one weight for each head of query")))
        return status;
    return check_strides(&c->weights, packed, 0);
}

static int check_output(struct checker *c, struct operand *o, const char *name,
                        const struct lidx_tensor *t) {
    const struct problem *p = c->p;
    int packed = p->query_packed, status;
    if ((status = check_structure(c, o, name, t, packed ? 3 : 4)))
        return status;
    int64_t expected[MAX_DIMS] = {p->n_batch, p->n_query, 1, p->top_k};
    if ((status = check_shape(o, packed ? expected + 1 : expected,
                              "query's tokens, one key head and sparse_count")))
        return status;
    return check_strides(o, packed, 1);
}

static int check_outputs(struct checker *c) {
    struct problem *p = c->p;
    const struct lidx_args *args = c->args;
    int status;
    if ((status = check_output(c, &c->indices, "sparse_indices", args->sparse_indices)) ||
        (status = check_int32(&c->indices)))
        return status;
    p->values_dtype = DTYPE_F32;
    c->values = (struct operand){.name = "sparse_values"};
    if (!args->sparse_values)
        return LIDX_OK;
    if ((status = check_output(c, &c->values, "sparse_values", args->sparse_values)) ||
        (status = check_float_dtype(&c->values, p->dtype)))
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

/* A list's values: lengths in 0..limit, or prefix sums that do not decrease and end in it. */
static int check_length_values(const struct operand *o, int packed, int64_t limit,
                               const char *limit_is) {
    const int32_t *list = o->data;
    int64_t floor = 0;
    for (int64_t b = 0; o->tensor && b < o->n_elements; b++) {
        if (list[b] < floor || list[b] > limit)
            return lidx_fail(LIDX_ERR_VALUE, "%s[%lld] is %d; it should be %lld to %lld (%s%s)",
                             o->name, (long long)b, (int)list[b], (long long)floor,
                             (long long)limit, packed ? "prefix sums up to " : "", limit_is);
        if (packed)
            floor = list[b];
    }
    return LIDX_OK;
}

static int check_page_ids(const struct checker *c) {
    const struct problem *p = c->p;
    if (!p->page_size || p->n_query == 0)
        return LIDX_OK;
    for (int64_t b = 0; b < p->n_batch; b++) {
        struct extent e = lidx_extent(p, b);
        if (e.n_query == 0 || e.n_key == 0)
            continue;
        const int32_t *row =
            (const int32_t *)((const unsigned char *)p->page_table + b * p->page_table_stride);
        int64_t needed = (e.n_key + p->page_size - 1) / p->page_size;
        for (int64_t i = 0; i < needed; i++)
            if (row[i] < 0 || row[i] >= p->n_pages)
                return lidx_fail(LIDX_ERR_VALUE,
                                 "block_table[%lld][%lld] is %d; it should be one of key's %lld "
                                 "blocks, counted from 0",
                                 (long long)b, (long long)i, (int)row[i], (long long)p->n_pages);
    }
    return LIDX_OK;
}

static int check_values(const struct checker *c) {
    const struct problem *p = c->p;
    const char *keys = p->page_size ? "the room of a row of block_table" : "the size of key";
    int status;
    if ((status = check_length_values(&c->query_lengths, p->query_packed, p->n_query,
                                      "the size of query")) ||
        (status = check_length_values(&c->key_lengths, p->key_packed, p->n_key, keys)))
        return status;
    return check_page_ids(c);
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
    return check_values(&c);
}
