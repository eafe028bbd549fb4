/* SPDX-License-Identifier: Apache-2.0
 *
 * What the operator uses of PyTorch's stable C interface, declared by hand: the headers that
 * declare it (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h) have C linkage
 * but C++ syntax. The functions are looked up at run time in the libtorch_cpu that is already
 * loaded, so this builds without torch, serves every torch since 2.10, and cannot bind by mistake
 * to another library that exports the same names.
 */
#ifndef LIDX_TORCH_SHIM_H
#define LIDX_TORCH_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* 64 bits that carry one argument or result of an operator: an int or bool itself, a tensor's or
 * string's owning handle, and for an optional 0 or a pointer to an owned cell with the value. */
typedef uint64_t torch_value;
typedef int32_t torch_error; /* 0 is success */

struct torch_tensor;     /* opaque; a handle owns one reference */
struct torch_string;     /* opaque */
struct torch_library;    /* opaque */
struct torch_cuda_guard; /* opaque */

/* Element types that are known by name; the operator takes the first few. */
enum {
    TORCH_BFLOAT16,
    TORCH_FLOAT16,
    TORCH_FLOAT32,
    TORCH_INT32,
    TORCH_INT64,
    TORCH_FLOAT64,
    TORCH_INT8,
    TORCH_INT16,
    TORCH_UINT8,
    TORCH_BOOL,
    TORCH_FLOAT8_E4M3FN,
    TORCH_FLOAT8_E5M2,
    N_TORCH_DTYPES
};

typedef void (*torch_kernel)(torch_value *stack, uint64_t n_arguments, uint64_t n_results);

struct torch_shim {
    /* Registration. The library objects live as long as the registrations should. */
    torch_error (*library_init_def)(const char *ns, const char *file, uint32_t line,
                                    struct torch_library **library);
    torch_error (*library_init_fragment)(const char *ns, const char *file, uint32_t line,
                                         struct torch_library **library);
    torch_error (*library_init_impl)(const char *ns, const char *dispatch_key, const char *file,
                                     uint32_t line, struct torch_library **library);
    torch_error (*library_def)(struct torch_library *library, const char *schema);
    torch_error (*library_impl)(struct torch_library *library, const char *name,
                                torch_kernel kernel);

    /* Facts of a tensor. Sizes and strides are borrowed from it. One that is not defined, which is
     * what None becomes where a tensor is required, has no others. */
    torch_error (*is_defined)(struct torch_tensor *tensor, bool *defined);
    torch_error (*get_dim)(struct torch_tensor *tensor, int64_t *ndim);
    torch_error (*get_sizes)(struct torch_tensor *tensor, int64_t **sizes);
    torch_error (*get_strides)(struct torch_tensor *tensor, int64_t **strides);
    torch_error (*get_dtype)(struct torch_tensor *tensor, int32_t *dtype);
    torch_error (*get_device_type)(struct torch_tensor *tensor, int32_t *type);
    torch_error (*get_device_index)(struct torch_tensor *tensor, int32_t *index);
    torch_error (*get_const_data)(struct torch_tensor *tensor, const void **data);
    torch_error (*get_data)(struct torch_tensor *tensor, void **data);

    torch_error (*empty_strided)(int64_t ndim, const int64_t *sizes, const int64_t *strides,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 struct torch_tensor **tensor);
    torch_error (*delete_tensor)(struct torch_tensor *tensor);

    torch_error (*string_c_str)(struct torch_string *string, const char **text);
    torch_error (*string_length)(struct torch_string *string, size_t *length);
    torch_error (*delete_string)(struct torch_string *string);

    torch_error (*get_num_threads)(uint32_t *count);

    /* Throws RuntimeError(message) when `condition` is false; it does not return then. */
    void (*check)(bool condition, const char *function, const char *file, uint32_t line,
                  const char *message);

    /* The numbers that torch gives to element types and device types. */
    int32_t (*dtype[N_TORCH_DTYPES])(void);
    size_t (*dtype_element_size)(int32_t dtype);
    int32_t (*device_type_cpu)(void);
    int32_t (*device_type_cuda)(void);

    /* Frees an optional's cell. Since torch 2.13; before, the C++ operator delete that made the
     * cell's allocation undone. Exactly one of the two is set. */
    torch_error (*delete_cell)(torch_value *cell);
    void (*operator_delete)(void *memory);

    /* Exported by libtorch_cuda; NULL where torch has no CUDA. The allocator's memory is of the
     * current device and in the order of its current stream; a guard makes a device current. */
    torch_error (*get_cuda_stream)(int32_t device_index, void **stream);
    torch_error (*create_cuda_guard)(int32_t device_index, struct torch_cuda_guard **guard);
    torch_error (*delete_cuda_guard)(struct torch_cuda_guard *guard);
    torch_error (*cuda_alloc)(uint64_t bytes, void **memory);
    torch_error (*cuda_free)(void *memory);
};

#endif
