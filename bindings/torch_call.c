/* SPDX-License-Identifier: Apache-2.0 */
#include "torch_call.h"

#include <stdio.h>
#include <string.h>

#include "torch_context.h"
#include "torch_lookup.h"

static const char *const tensor_names[N_TENSORS] = {
    "query",
    "key",
    "weights",
    "actual_seq_lengths_query",
    "actual_seq_lengths_key",
    "block_table",
    "sparse_indices",
    "sparse_values",
};

static void free_cell(torch_value *cell) {
    if (torch.delete_cell)
        torch.delete_cell(cell);
    else
        torch.operator_delete(cell);
}

int torch_take_optional(torch_value argument, torch_value *value) {
    if (!argument)
        return 0;
    torch_value *cell = (torch_value *)(uintptr_t)argument;
    *value = *cell;
    free_cell(cell);
    return 1;
}

static void take_tensor(struct call *c, int which, torch_value argument) {
    c->handle[which] = (struct torch_tensor *)(uintptr_t)argument;
}

static void take_optional_tensor(struct call *c, int which, torch_value argument) {
    torch_value value;
    if (torch_take_optional(argument, &value))
        take_tensor(c, which, value);
}

void call_begin(struct call *c, const torch_value *stack) {
    memset(c, 0, offsetof(struct call, tensor));
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    c->sparse_count = LIDX_DEFAULT_TOP_K;
    c->sparse_mode = LIDX_MODE_CAUSAL;
    c->pre_tokens = c->next_tokens = INT64_MAX;
    for (int i = QUERY; i <= WEIGHTS; i++)
        take_tensor(c, i, stack[i]);
}

void call_take_lists(struct call *c, const torch_value *stack) {
    for (int i = QUERY_LENGTHS; i <= BLOCK_TABLE; i++)
        take_optional_tensor(c, i, stack[i]);
}

void call_take_layout(struct call *c, const char *name, torch_value argument, int32_t *layout) {
    static const char *const names[] = {"BSND", "TND", "PA_BSND"};
    struct torch_string *string = (struct torch_string *)(uintptr_t)argument;
    const char *text = "";
    int known = 0;
    torch.string_c_str(string, &text);
    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0) {
            *layout = i;
            known = 1;
        }
    if (!known && !c->error) {
        snprintf(c->sentence, sizeof c->sentence, "%s is \"%.40s\"; it should be %s", name, text,
                 strcmp(name, "layout_key") == 0 ? "\"BSND\", \"TND\" or \"PA_BSND\""
                                                 : "\"BSND\" or \"TND\"");
        c->error = c->sentence;
    }
    torch.delete_string(string);
}

static struct lidx_dtype dtype_of(int32_t dtype) {
    if (dtype == numbers.bfloat16)
        return (struct lidx_dtype){LIDX_BFLOAT, 16, 1};
    if (dtype == numbers.float16)
        return (struct lidx_dtype){LIDX_FLOAT, 16, 1};
    if (dtype == numbers.float32)
        return (struct lidx_dtype){LIDX_FLOAT, 32, 1};
    if (dtype == numbers.float64)
        return (struct lidx_dtype){LIDX_FLOAT, 64, 1};
    if (dtype == numbers.int32)
        return (struct lidx_dtype){LIDX_INT, 32, 1};
    if (dtype == numbers.int64)
        return (struct lidx_dtype){LIDX_INT, 64, 1};
    /* None that the operator takes: a code that DLPack does not use, and the true size. */
    return (struct lidx_dtype){255, (uint8_t)(8 * torch.dtype_element_size(dtype)), 1};
}

static struct lidx_device device_of(int32_t type, int32_t index) {
    if (type == numbers.cpu)
        return (struct lidx_device){LIDX_CPU, 0};
    if (type == numbers.cuda)
        return (struct lidx_device){LIDX_CUDA, index};
    return (struct lidx_device){-1, type};
}

/* A tensor whose facts torch did not give. */
static void refuse_tensor(struct call *c, int which) {
    bool defined = true;
    torch.is_defined(c->handle[which], &defined);
    snprintf(c->sentence, sizeof c->sentence, "%s is %s", tensor_names[which],
             defined ? "not a tensor with strides and memory"
                     : "missing; it is a required argument");
    c->error = c->sentence;
}

/* Fills tensor[which] from its handle; the arrays stay torch's. */
static void describe(struct call *c, int which) {
    struct torch_tensor *handle = c->handle[which];
    int64_t ndim = 0, *shape = NULL, *strides = NULL;
    int32_t dtype = 0, type = 0, index = 0;
    const void *data = NULL;
    if (torch.get_dim(handle, &ndim) || torch.get_sizes(handle, &shape) ||
        torch.get_strides(handle, &strides) || torch.get_dtype(handle, &dtype) ||
        torch.get_device_type(handle, &type) ||
        (type != numbers.cpu && torch.get_device_index(handle, &index)) ||
        torch.get_const_data(handle, &data)) {
        refuse_tensor(c, which);
        return;
    }
    c->tensor[which] = (struct lidx_tensor){
        .data = (void *)(uintptr_t)data,
        .device = device_of(type, index),
        .ndim = (int32_t)ndim,
        .dtype = dtype_of(dtype),
        .shape = shape,
        .strides = strides,
    };
    if (which == QUERY) {
        c->device_type = type;
        c->device_index = index;
    }
}

static void refuse_int(struct call *c, const char *name, int64_t value, const char *should_be) {
    if (c->error)
        return;
    snprintf(c->sentence, sizeof c->sentence, "%s is %lld; it should be %s", name, (long long)value,
             should_be);
    c->error = c->sentence;
}

/* What the library cannot see because its fields are narrower, or does not have. */
static void check_ints(struct call *c) {
    if (c->sparse_count != (int32_t)c->sparse_count)
        refuse_int(c, "sparse_count", c->sparse_count, "1 to 8192");
    if (c->sparse_mode != (int32_t)c->sparse_mode)
        refuse_int(c, "sparse_mode", c->sparse_mode, "0 or 3");
    if (c->pre_tokens != INT64_MAX)
        refuse_int(c, "pre_tokens", c->pre_tokens, "9223372036854775807, no window");
    if (c->next_tokens != INT64_MAX)
        refuse_int(c, "next_tokens", c->next_tokens, "9223372036854775807, no window");
    c->args.sparse_count = (int32_t)c->sparse_count;
    c->args.sparse_mode = (int32_t)c->sparse_mode;
}

/* A new tensor on query's device; its memory, or NULL where it has none. */
static void *allocate(struct call *c, int which, int64_t ndim, const int64_t *shape,
                      const int64_t *strides, int32_t dtype) {
    void *data = NULL;
    if (torch.empty_strided(ndim, shape, strides, dtype, c->device_type, c->device_index,
                            &c->handle[which]) ||
        torch.get_data(c->handle[which], &data)) {
        snprintf(c->sentence, sizeof c->sentence, "torch could not allocate %s",
                 tensor_names[which]);
        c->error = c->sentence;
    }
    return data;
}

static int32_t query_dtype(const struct call *c) {
    return c->tensor[QUERY].dtype.code == LIDX_BFLOAT ? numbers.bfloat16 : numbers.float16;
}

/* A new contiguous output of the shape in output_shape. */
static const struct lidx_tensor *make_output(struct call *c, int which, int32_t dtype) {
    const struct lidx_tensor *query = &c->tensor[QUERY];
    c->tensor[which] = (struct lidx_tensor){
        .data = allocate(c, which, query->ndim, c->output_shape, c->output_strides, dtype),
        .device = query->device,
        .ndim = query->ndim,
        .dtype = dtype_of(dtype),
        .shape = c->output_shape,
        .strides = c->output_strides,
    };
    return &c->tensor[which];
}

/* The outputs, where query's shape and the options say what they are. Where they do not, the
 * library is asked without outputs: it looks at them last and so refuses with the true reason. */
static void make_outputs(struct call *c) {
    const struct lidx_tensor *query = &c->tensor[QUERY];
    int32_t ndim = query->ndim, count = c->args.sparse_count;
    if (ndim != (c->args.layout_query == LIDX_TND ? 3 : 4) ||
        c->args.layout_query == LIDX_PA_BSND || count < 1 || count > LIDX_MAX_TOP_K)
        return;
    int64_t *shape = c->output_shape, *strides = c->output_strides;
    for (int i = 0; i < ndim - 2; i++)
        shape[i] = query->shape[i];
    shape[ndim - 2] = 1;
    shape[ndim - 1] = count;
    strides[ndim - 1] = 1;
    for (int i = ndim - 2; i >= 0; i--)
        strides[i] = strides[i + 1] * shape[i + 1];
    c->args.sparse_indices = make_output(c, INDICES, numbers.int32);
    if (c->return_values && !c->error)
        c->args.sparse_values = make_output(c, VALUES, query_dtype(c));
}

/* torch's allocator gives the workspace and takes it back at once: it hands memory on in stream
 * order, and inside a graph's capture from the graph's pool. It is asked for bytes, since a tensor
 * around them would cost as much again. */
static void run_on_cuda(struct call *c, struct lidx_context *context) {
    struct lidx_args *args = &c->args;
    struct torch_cuda_guard *guard = NULL;
    if (lidx_workspace_size(context, args, &args->workspace_size)) {
        c->error = lidx_last_error();
        return;
    }
    if (torch.get_cuda_stream(c->device_index, &args->stream) ||
        torch.create_cuda_guard(c->device_index, &guard)) {
        c->error = "torch could not switch to query's device";
        return;
    }
    if (args->workspace_size && torch.cuda_alloc(args->workspace_size, &args->workspace))
        c->error = "torch could not allocate the workspace";
    else if (lidx_run(context, args))
        c->error = lidx_last_error();
    torch.cuda_free(args->workspace);
    torch.delete_cuda_guard(guard);
}

static const struct lidx_tensor *present(struct call *c, int which) {
    if (!c->handle[which])
        return NULL;
    if (!c->error)
        describe(c, which);
    return &c->tensor[which];
}

void call_run(struct call *c) {
    struct lidx_args *args = &c->args;
    check_ints(c);
    args->query = present(c, QUERY);
    args->key = present(c, KEY);
    args->weights = present(c, WEIGHTS);
    args->actual_seq_lengths_query = present(c, QUERY_LENGTHS);
    args->actual_seq_lengths_key = present(c, KEY_LENGTHS);
    args->block_table = present(c, BLOCK_TABLE);
    if (c->error)
        return;
    struct lidx_context *context = torch_context();
    if (!context) {
        c->error = lidx_last_error();
        return;
    }
    make_outputs(c);
    if (c->error)
        return;
    if (c->device_type == numbers.cuda && torch.cuda_alloc)
        run_on_cuda(c, context);
    else if (lidx_run(context, args))
        c->error = lidx_last_error();
}

static void release(struct call *c, int first, int end) {
    for (int i = first; i < end; i++)
        if (c->handle[i])
            torch.delete_tensor(c->handle[i]);
}

void call_finish(struct call *c) {
    release(c, QUERY, INDICES);
    if (!c->error)
        return;
    release(c, INDICES, N_TENSORS);
    torch.check(false, "lightning_indexer", __FILE__, __LINE__, c->error);
}

void call_empty_values(struct call *c) {
    const int64_t none = 0, stride = 1;
    if (!c->error)
        allocate(c, VALUES, 1, &none, &stride, query_dtype(c));
}
