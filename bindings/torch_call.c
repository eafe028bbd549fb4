/* SPDX-License-Identifier: Apache-2.0 */
#include "torch_call.h"

#include <stdio.h>

#include "torch_context.h"
#include "torch_lookup.h"

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
                 call_tensor_names[which]);
        c->error = c->sentence;
    }
    return data;
}

static int32_t query_dtype(const struct call *c) {
    return c->tensor[QUERY].dtype.code == LIDX_BFLOAT ? numbers.dtype[TORCH_BFLOAT16]
                                                      : numbers.dtype[TORCH_FLOAT16];
}

/* A new contiguous output of the shape in output_shape. */
static const struct lidx_tensor *make_output(struct call *c, int which, int32_t dtype) {
    const struct lidx_tensor *query = &c->tensor[QUERY];
    c->tensor[which] = (struct lidx_tensor){
        .data = allocate(c, which, query->ndim, c->output_shape, c->output_strides, dtype),
        .device = query->device,
        .ndim = query->ndim,
        .dtype = torch_dtype(dtype),
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
    c->args.sparse_indices = make_output(c, INDICES, numbers.dtype[TORCH_INT32]);
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
        call_describe(c, which);
    return &c->tensor[which];
}

/* The caller's outputs say how many positions are wanted. */
static void take_outputs(struct call *c) {
    struct lidx_args *args = &c->args;
    args->sparse_indices = present(c, INDICES);
    args->sparse_values = present(c, VALUES);
    const struct lidx_tensor *indices = args->sparse_indices;
    if (!c->error && indices && indices->ndim > 0)
        c->sparse_count = indices->shape[indices->ndim - 1];
}

/* One int32 of query's device, for CUDA to count in. */
static void take_error_word(struct call *c) {
    const struct lidx_tensor *word = present(c, ERROR_WORD);
    if (!word || c->error)
        return;
    const struct lidx_device *device = &c->tensor[QUERY].device;
    if (word->dtype.code == LIDX_INT && word->dtype.bits == 32 && word->ndim == 1 &&
        word->shape[0] == 1 && word->device.device_type == device->device_type &&
        word->device.device_id == device->device_id)
        c->args.error_word = word->data;
    else
        c->error = "error_word is something else; it should be int32 [1] on query's device";
}

void call_run(struct call *c) {
    struct lidx_args *args = &c->args;
    args->query = present(c, QUERY);
    args->key = present(c, KEY);
    args->weights = present(c, WEIGHTS);
    args->actual_seq_lengths_query = present(c, QUERY_LENGTHS);
    args->actual_seq_lengths_key = present(c, KEY_LENGTHS);
    args->block_table = present(c, BLOCK_TABLE);
    take_error_word(c);
    take_outputs(c);
    check_ints(c);
    if (c->error)
        return;
    struct lidx_context *context = torch_context();
    if (!context) {
        c->error = lidx_last_error();
        return;
    }
    if (!c->fills_outputs)
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
    if (c->error || c->fills_outputs)
        release(c, INDICES, N_TENSORS);
    if (!c->error)
        return;
    torch.check(false, "lightning_indexer", __FILE__, __LINE__, c->error);
}

void call_empty_values(struct call *c) {
    const int64_t none = 0, stride = 1;
    if (!c->error)
        allocate(c, VALUES, 1, &none, &stride, query_dtype(c));
}
