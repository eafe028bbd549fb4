/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* RTLD_NOLOAD */
#include "torch_lookup.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

struct torch_shim torch;
struct torch_numbers numbers;

enum symbol_use { NEEDED, ONE_OF, CUDA };

/* ONE_OF: of the two ways to free a cell the first that exists is taken. CUDA: needed too, where
 * torch has CUDA. */
static const struct symbol {
    const char *name;
    size_t offset;
    enum symbol_use use;
} symbols[] = {
    {"aoti_torch_library_init_def", offsetof(struct torch_shim, library_init_def), NEEDED},
    {"aoti_torch_library_init_fragment", offsetof(struct torch_shim, library_init_fragment),
     NEEDED},
    {"aoti_torch_library_init_impl", offsetof(struct torch_shim, library_init_impl), NEEDED},
    {"aoti_torch_library_def", offsetof(struct torch_shim, library_def), NEEDED},
    {"aoti_torch_library_impl", offsetof(struct torch_shim, library_impl), NEEDED},
    {"aoti_torch_is_defined", offsetof(struct torch_shim, is_defined), NEEDED},
    {"aoti_torch_get_dim", offsetof(struct torch_shim, get_dim), NEEDED},
    {"aoti_torch_get_sizes", offsetof(struct torch_shim, get_sizes), NEEDED},
    {"aoti_torch_get_strides", offsetof(struct torch_shim, get_strides), NEEDED},
    {"aoti_torch_get_dtype", offsetof(struct torch_shim, get_dtype), NEEDED},
    {"aoti_torch_get_device_type", offsetof(struct torch_shim, get_device_type), NEEDED},
    {"aoti_torch_get_device_index", offsetof(struct torch_shim, get_device_index), NEEDED},
    {"torch_get_const_data_ptr", offsetof(struct torch_shim, get_const_data), NEEDED},
    {"aoti_torch_get_data_ptr", offsetof(struct torch_shim, get_data), NEEDED},
    {"aoti_torch_empty_strided", offsetof(struct torch_shim, empty_strided), NEEDED},
    {"aoti_torch_delete_tensor_object", offsetof(struct torch_shim, delete_tensor), NEEDED},
    {"torch_string_c_str", offsetof(struct torch_shim, string_c_str), NEEDED},
    {"torch_string_length", offsetof(struct torch_shim, string_length), NEEDED},
    {"torch_delete_string", offsetof(struct torch_shim, delete_string), NEEDED},
    {"torch_get_num_threads", offsetof(struct torch_shim, get_num_threads), NEEDED},
    {"aoti_torch_check", offsetof(struct torch_shim, check), NEEDED},
    {"aoti_torch_dtype_bfloat16", offsetof(struct torch_shim, dtype[TORCH_BFLOAT16]), NEEDED},
    {"aoti_torch_dtype_float16", offsetof(struct torch_shim, dtype[TORCH_FLOAT16]), NEEDED},
    {"aoti_torch_dtype_float32", offsetof(struct torch_shim, dtype[TORCH_FLOAT32]), NEEDED},
    {"aoti_torch_dtype_int32", offsetof(struct torch_shim, dtype[TORCH_INT32]), NEEDED},
    {"aoti_torch_dtype_int64", offsetof(struct torch_shim, dtype[TORCH_INT64]), NEEDED},
    {"aoti_torch_dtype_float64", offsetof(struct torch_shim, dtype[TORCH_FLOAT64]), NEEDED},
    {"aoti_torch_dtype_int8", offsetof(struct torch_shim, dtype[TORCH_INT8]), NEEDED},
    {"aoti_torch_dtype_int16", offsetof(struct torch_shim, dtype[TORCH_INT16]), NEEDED},
    {"aoti_torch_dtype_uint8", offsetof(struct torch_shim, dtype[TORCH_UINT8]), NEEDED},
    {"aoti_torch_dtype_bool", offsetof(struct torch_shim, dtype[TORCH_BOOL]), NEEDED},
    {"aoti_torch_dtype_float8_e4m3fn", offsetof(struct torch_shim, dtype[TORCH_FLOAT8_E4M3FN]),
     NEEDED},
    {"aoti_torch_dtype_float8_e5m2", offsetof(struct torch_shim, dtype[TORCH_FLOAT8_E5M2]), NEEDED},
    {"aoti_torch_dtype_element_size", offsetof(struct torch_shim, dtype_element_size), NEEDED},
    {"aoti_torch_device_type_cpu", offsetof(struct torch_shim, device_type_cpu), NEEDED},
    {"aoti_torch_device_type_cuda", offsetof(struct torch_shim, device_type_cuda), NEEDED},
    {"torch_delete_stable_ivalue", offsetof(struct torch_shim, delete_cell), ONE_OF},
    {"_ZdlPv", offsetof(struct torch_shim, operator_delete), ONE_OF},
    {"aoti_torch_get_current_cuda_stream", offsetof(struct torch_shim, get_cuda_stream), CUDA},
    {"aoti_torch_create_cuda_guard", offsetof(struct torch_shim, create_cuda_guard), CUDA},
    {"aoti_torch_delete_cuda_guard", offsetof(struct torch_shim, delete_cuda_guard), CUDA},
    {"aoti_torch_cuda_caching_allocator_raw_alloc", offsetof(struct torch_shim, cuda_alloc), CUDA},
    {"aoti_torch_cuda_caching_allocator_raw_delete", offsetof(struct torch_shim, cuda_free), CUDA},
};

enum { N_SYMBOLS = sizeof symbols / sizeof symbols[0] };

const char *lidx_torch_symbol(int index, const char **library) {
    static const char *const libraries[] = {"libtorch_cpu", "libtorch_cpu?", "libtorch_cuda"};
    if (index < 0 || index >= N_SYMBOLS)
        return NULL;
    *library = libraries[symbols[index].use];
    return symbols[index].name;
}

static void ask_numbers(void) {
    for (int i = 0; i < N_TORCH_DTYPES; i++)
        numbers.dtype[i] = torch.dtype[i]();
    numbers.cpu = torch.device_type_cpu();
    numbers.cuda = torch.device_type_cuda();
}

const char *lidx_torch_load(const char *libtorch_cpu, const char *libtorch_cuda) {
    static char sentence[256];
    void *cpu = dlopen(libtorch_cpu, RTLD_NOW | RTLD_NOLOAD);
    void *cuda = libtorch_cuda ? dlopen(libtorch_cuda, RTLD_NOW | RTLD_NOLOAD) : NULL;
    if (!cpu) {
        snprintf(sentence, sizeof sentence, "%.160s is not loaded; torch should be imported first",
                 libtorch_cpu);
        return sentence;
    }
    struct torch_shim found = {0};
    for (int i = 0; i < N_SYMBOLS; i++) {
        void *from = symbols[i].use == CUDA ? cuda : cpu;
        void *address = from ? dlsym(from, symbols[i].name) : NULL;
        if (!address && from && symbols[i].use != ONE_OF) {
            snprintf(sentence, sizeof sentence,
                     "torch does not export %s; the operator needs torch 2.10 or newer",
                     symbols[i].name);
            return sentence;
        }
        /* ISO C has no conversion between object and function pointers; POSIX says their
         * representations agree. */
        memcpy((char *)&found + symbols[i].offset, &address, sizeof address);
    }
    if (!found.delete_cell && !found.operator_delete)
        return "torch exports neither torch_delete_stable_ivalue nor _ZdlPv; the operator needs "
               "one of them to free an optional argument";
    torch = found;
    ask_numbers();
    return NULL;
}
