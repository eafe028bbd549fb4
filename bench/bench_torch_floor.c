/* SPDX-License-Identifier: Apache-2.0
 *
 * An operator that scores nothing, for bench_torch_call.py: it takes what ours takes, gives it
 * back, and makes the output of one token, all -1. What a call of it costs is what torch.ops costs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "../bindings/torch_shim.h"

int lidx_floor_define(const char *libtorch_cpu, const char *schema);

static struct torch_shim torch;
static int32_t number_of_cpu, number_of_int32;

static void release_optional(torch_value argument, int is_tensor) {
    torch_value *cell = (torch_value *)(uintptr_t)argument;
    if (!cell)
        return;
    if (is_tensor)
        torch.delete_tensor((struct torch_tensor *)(uintptr_t)*cell);
    torch.operator_delete(cell);
}

/* The layouts, at 6 and 7, are never given here. */
static void score_nothing(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    const torch_value *count = (const torch_value *)(uintptr_t)stack[8];
    const int64_t n = count ? (int64_t)*count : 2048;
    const int64_t sizes[4] = {1, 1, 1, n}, strides[4] = {n, n, n, 1};
    struct torch_tensor *output = NULL;
    int32_t device = number_of_cpu;
    void *data = NULL;
    (void)n_results;
    torch.get_device_type((struct torch_tensor *)(uintptr_t)stack[0], &device);
    for (uint64_t i = 0; i < 3; i++)
        torch.delete_tensor((struct torch_tensor *)(uintptr_t)stack[i]);
    for (uint64_t i = 3; i < n_arguments; i++)
        release_optional(stack[i], i < 6);
    torch.empty_strided(4, sizes, strides, number_of_int32, device, 0, &output);
    torch.get_data(output, &data);
    if (device == number_of_cpu)
        memset(data, 0xFF, sizeof(int32_t) * (size_t)n);
    stack[0] = (torch_value)(uintptr_t)output;
}

/* 0 on success. `schema` is the operator's without a namespace. */
int lidx_floor_define(const char *libtorch_cpu, const char *schema) {
    static const struct {
        const char *name;
        void *function;
    } wanted[] = {
        {"aoti_torch_library_init_def", &torch.library_init_def},
        {"aoti_torch_library_init_impl", &torch.library_init_impl},
        {"aoti_torch_library_def", &torch.library_def},
        {"aoti_torch_library_impl", &torch.library_impl},
        {"aoti_torch_get_device_type", &torch.get_device_type},
        {"aoti_torch_get_data_ptr", &torch.get_data},
        {"aoti_torch_empty_strided", &torch.empty_strided},
        {"aoti_torch_delete_tensor_object", &torch.delete_tensor},
        {"aoti_torch_device_type_cpu", &torch.device_type_cpu},
        {"aoti_torch_dtype_int32", &torch.dtype_int32},
        {"_ZdlPv", &torch.operator_delete},
    };
    static const char ns[] = "lightning_indexer_floor";
    static const char *const keys[] = {"CPU", "CUDA"};
    struct torch_library *library;
    void *handle = dlopen(libtorch_cpu, RTLD_NOW | RTLD_NOLOAD);
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        void *address = handle ? dlsym(handle, wanted[i].name) : NULL;
        if (!address)
            return 1;
        memcpy(wanted[i].function, &address, sizeof address);
    }
    number_of_cpu = torch.device_type_cpu();
    number_of_int32 = torch.dtype_int32();
    if (torch.library_init_def(ns, __FILE__, __LINE__, &library) ||
        torch.library_def(library, schema))
        return 1;
    for (int i = 0; i < 2; i++)
        if (torch.library_init_impl(ns, keys[i], __FILE__, __LINE__, &library) ||
            torch.library_impl(library, "lightning_indexer", score_nothing))
            return 1;
    return 0;
}
