/* SPDX-License-Identifier: Apache-2.0
 *
 * torch's arguments: taken over from its stack, and described to the library.
 */
#include <stdio.h>
#include <string.h>

#include "torch_call.h"
#include "torch_lookup.h"

/* Types that the operator refuses, by name. */
enum { DLPACK_BOOL = 6, DLPACK_FLOAT8_E4M3FN = 10, DLPACK_FLOAT8_E5M2 = 12 };

const char *const call_tensor_names[N_TENSORS] = {
    "query",
    "key",
    "weights",
    "actual_seq_lengths_query",
    "actual_seq_lengths_key",
    "block_table",
    "error_word",
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

void call_take_tensor(struct call *c, int which, torch_value argument) {
    c->handle[which] = (struct torch_tensor *)(uintptr_t)argument;
}

void call_take_optional_tensor(struct call *c, int which, torch_value argument) {
    torch_value value;
    if (torch_take_optional(argument, &value))
        call_take_tensor(c, which, value);
}

void call_begin(struct call *c, const torch_value *stack) {
    memset(c, 0, offsetof(struct call, tensor));
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    c->sparse_count = LIDX_DEFAULT_TOP_K;
    c->sparse_mode = LIDX_MODE_CAUSAL;
    c->pre_tokens = c->next_tokens = INT64_MAX;
    for (int i = QUERY; i <= WEIGHTS; i++)
        call_take_tensor(c, i, stack[i]);
}

void call_take_lists(struct call *c, const torch_value *stack) {
    for (int i = QUERY_LENGTHS; i <= BLOCK_TABLE; i++)
        call_take_optional_tensor(c, i, stack[i]);
}

void call_take_layout(struct call *c, const char *name, torch_value argument, int32_t *layout) {
    static const char *const names[] = {"BSND", "TND", "PA_BSND"};
    struct torch_string *string = (struct torch_string *)(uintptr_t)argument;
    const char *text = "";
    size_t length = 0; /* of the text, which may hold a NUL */
    int known = 0;
    torch.string_c_str(string, &text);
    torch.string_length(string, &length);
    for (int i = 0; i < 3; i++)
        if (length == strlen(names[i]) && memcmp(text, names[i], length) == 0) {
            *layout = i;
            known = 1;
        }
    if (!known && !c->error) {
        snprintf(c->sentence, sizeof c->sentence, "%s is \"%.40s\"%s; it should be %s", name, text,
                 length > strlen(text) ? " and more, behind a NUL" : "",
                 strcmp(name, "layout_key") == 0 ? "\"BSND\", \"TND\" or \"PA_BSND\""
                                                 : "\"BSND\" or \"TND\"");
        c->error = c->sentence;
    }
    torch.delete_string(string);
}

struct lidx_dtype torch_dtype(int32_t dtype) {
    static const struct lidx_dtype known[N_TORCH_DTYPES] = {
        [TORCH_BFLOAT16] = {LIDX_BFLOAT, 16, 1},
        [TORCH_FLOAT16] = {LIDX_FLOAT, 16, 1},
        [TORCH_FLOAT32] = {LIDX_FLOAT, 32, 1},
        [TORCH_FLOAT64] = {LIDX_FLOAT, 64, 1},
        [TORCH_INT8] = {LIDX_INT, 8, 1},
        [TORCH_INT16] = {LIDX_INT, 16, 1},
        [TORCH_INT32] = {LIDX_INT, 32, 1},
        [TORCH_INT64] = {LIDX_INT, 64, 1},
        [TORCH_UINT8] = {LIDX_UINT, 8, 1},
        [TORCH_BOOL] = {DLPACK_BOOL, 8, 1},
        [TORCH_FLOAT8_E4M3FN] = {DLPACK_FLOAT8_E4M3FN, 8, 1},
        [TORCH_FLOAT8_E5M2] = {DLPACK_FLOAT8_E5M2, 8, 1},
    };
    for (int i = 0; i < N_TORCH_DTYPES; i++)
        if (dtype == numbers.dtype[i])
            return known[i];
    /* One without a name here: a code that DLPack does not use, and the true size. */
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
    snprintf(c->sentence, sizeof c->sentence, "%s is %s", call_tensor_names[which],
             defined ? "not a tensor with strides and memory"
                     : "missing; it is a required argument");
    c->error = c->sentence;
}

void call_describe(struct call *c, int which) {
    struct torch_tensor *handle = c->handle[which];
    int64_t ndim = 0, *shape = NULL, *strides = NULL;
    int32_t dtype = 0, type = 0, index = 0;
    const void *read = NULL;
    void *written = NULL;
    if (torch.get_dim(handle, &ndim) || torch.get_sizes(handle, &shape) ||
        torch.get_strides(handle, &strides) || torch.get_dtype(handle, &dtype) ||
        torch.get_device_type(handle, &type) ||
        (type != numbers.cpu && torch.get_device_index(handle, &index)) ||
        (which < ERROR_WORD ? torch.get_const_data(handle, &read)
                            : torch.get_data(handle, &written))) {
        refuse_tensor(c, which);
        return;
    }
    c->tensor[which] = (struct lidx_tensor){
        .data = which < ERROR_WORD ? (void *)(uintptr_t)read : written,
        .device = device_of(type, index),
        .ndim = (int32_t)ndim,
        .dtype = torch_dtype(dtype),
        .shape = shape,
        .strides = strides,
    };
    if (which == QUERY) {
        c->device_type = type;
        c->device_index = index;
    }
}
