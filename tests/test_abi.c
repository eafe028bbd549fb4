/* SPDX-License-Identifier: Apache-2.0
 *
 * The binary interface as published, checked while this compiles: sizes, offsets and numbers that
 * a program built against an earlier version relies on. Fields are added at the end of a struct,
 * numbers are added, and nothing here is ever changed within a major version.
 */
#include "test.h"

#include "lightning_indexer.h"

#define SAME(a, b)             _Static_assert((a) == (b), #a " is no longer " #b)
#define FIELD(type, field, at) SAME(offsetof(struct type, field), at)

#if UINTPTR_MAX == UINT64_MAX
SAME(sizeof(struct lidx_tensor), 48);
FIELD(lidx_tensor, data, 0);
FIELD(lidx_tensor, device, 8);
FIELD(lidx_tensor, ndim, 16);
FIELD(lidx_tensor, dtype, 20);
FIELD(lidx_tensor, shape, 24);
FIELD(lidx_tensor, strides, 32);
FIELD(lidx_tensor, byte_offset, 40);

_Static_assert(sizeof(struct lidx_args) >= 120, "lidx_args lost a field");
FIELD(lidx_args, size, 0);
FIELD(lidx_args, query, 8);
FIELD(lidx_args, key, 16);
FIELD(lidx_args, weights, 24);
FIELD(lidx_args, actual_seq_lengths_query, 32);
FIELD(lidx_args, actual_seq_lengths_key, 40);
FIELD(lidx_args, block_table, 48);
FIELD(lidx_args, layout_query, 56);
FIELD(lidx_args, layout_key, 60);
FIELD(lidx_args, sparse_count, 64);
FIELD(lidx_args, sparse_mode, 68);
FIELD(lidx_args, sparse_indices, 72);
FIELD(lidx_args, sparse_values, 80);
FIELD(lidx_args, stream, 88);
FIELD(lidx_args, workspace, 96);
FIELD(lidx_args, workspace_size, 104);
FIELD(lidx_args, error_word, 112);

_Static_assert(sizeof(struct lidx_options) >= 24, "lidx_options lost a field");
FIELD(lidx_options, size, 0);
FIELD(lidx_options, n_threads, 8);
FIELD(lidx_options, kernel, 16);

_Static_assert(sizeof(struct lidx_kernel_info) >= 48, "lidx_kernel_info lost a field");
FIELD(lidx_kernel_info, size, 0);
FIELD(lidx_kernel_info, name, 8);
FIELD(lidx_kernel_info, backend, 16);
FIELD(lidx_kernel_info, available, 24);
FIELD(lidx_kernel_info, chosen_bf16, 28);
FIELD(lidx_kernel_info, chosen_fp16, 32);
FIELD(lidx_kernel_info, reason, 40);
#endif

SAME(sizeof(struct lidx_device), 8);
FIELD(lidx_device, device_type, 0);
FIELD(lidx_device, device_id, 4);
SAME(sizeof(struct lidx_dtype), 4);
FIELD(lidx_dtype, code, 0);
FIELD(lidx_dtype, bits, 1);
FIELD(lidx_dtype, lanes, 2);

SAME(LIDX_OK, 0);
SAME(LIDX_ERR_ARGUMENT, 1);
SAME(LIDX_ERR_LAYOUT, 2);
SAME(LIDX_ERR_SHAPE, 3);
SAME(LIDX_ERR_DTYPE, 4);
SAME(LIDX_ERR_STRIDE, 5);
SAME(LIDX_ERR_OPTION, 6);
SAME(LIDX_ERR_VALUE, 7);
SAME(LIDX_ERR_DEVICE, 8);
SAME(LIDX_ERR_WORKSPACE, 9);
SAME(LIDX_ERR_MEMORY, 10);
SAME(LIDX_ERR_CUDA, 11);
SAME(LIDX_CPU, 1);
SAME(LIDX_CUDA, 2);
SAME(LIDX_CUDA_HOST, 3);
SAME(LIDX_CUDA_MANAGED, 13);
SAME(LIDX_INT, 0);
SAME(LIDX_UINT, 1);
SAME(LIDX_FLOAT, 2);
SAME(LIDX_BFLOAT, 4);
SAME(LIDX_BSND, 0);
SAME(LIDX_TND, 1);
SAME(LIDX_PA_BSND, 2);
SAME(LIDX_MODE_FULL, 0);
SAME(LIDX_MODE_CAUSAL, 3);

/* Where a real dlpack.h is at hand, field by field: a DLTensor pointer may be cast. */
#if defined(__has_include)
#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#define HAVE_DLPACK 1
SAME(sizeof(struct lidx_tensor), sizeof(DLTensor));
SAME(offsetof(struct lidx_tensor, data), offsetof(DLTensor, data));
SAME(offsetof(struct lidx_tensor, device), offsetof(DLTensor, device));
SAME(offsetof(struct lidx_tensor, ndim), offsetof(DLTensor, ndim));
SAME(offsetof(struct lidx_tensor, dtype), offsetof(DLTensor, dtype));
SAME(offsetof(struct lidx_tensor, shape), offsetof(DLTensor, shape));
SAME(offsetof(struct lidx_tensor, strides), offsetof(DLTensor, strides));
SAME(offsetof(struct lidx_tensor, byte_offset), offsetof(DLTensor, byte_offset));
SAME(sizeof(struct lidx_device), sizeof(DLDevice));
SAME(offsetof(struct lidx_device, device_type), offsetof(DLDevice, device_type));
SAME(offsetof(struct lidx_device, device_id), offsetof(DLDevice, device_id));
SAME(sizeof(struct lidx_dtype), sizeof(DLDataType));
SAME(offsetof(struct lidx_dtype, code), offsetof(DLDataType, code));
SAME(offsetof(struct lidx_dtype, bits), offsetof(DLDataType, bits));
SAME(offsetof(struct lidx_dtype, lanes), offsetof(DLDataType, lanes));
SAME((int)LIDX_CPU, (int)kDLCPU);
SAME((int)LIDX_CUDA, (int)kDLCUDA);
SAME((int)LIDX_CUDA_HOST, (int)kDLCUDAHost);
SAME((int)LIDX_CUDA_MANAGED, (int)kDLCUDAManaged);
SAME((int)LIDX_INT, (int)kDLInt);
SAME((int)LIDX_UINT, (int)kDLUInt);
SAME((int)LIDX_FLOAT, (int)kDLFloat);
SAME((int)LIDX_BFLOAT, (int)kDLBfloat);
#endif
#endif

int main(void) {
    const struct lidx_args args = LIDX_ARGS_INIT;
    const struct lidx_options options = LIDX_OPTIONS_INIT;
    CHECK_INT(args.size, sizeof args, "LIDX_ARGS_INIT");
    CHECK(!args.query && !args.sparse_values && !args.error_word && !args.workspace,
          "LIDX_ARGS_INIT leaves pointers empty");
    CHECK_INT(args.layout_query, LIDX_BSND, "LIDX_ARGS_INIT");
    CHECK_INT(args.sparse_count, 2048, "LIDX_ARGS_INIT");
    CHECK_INT(args.sparse_mode, LIDX_MODE_CAUSAL, "LIDX_ARGS_INIT");
    CHECK_INT(options.size, sizeof options, "LIDX_OPTIONS_INIT");
#if defined(HAVE_DLPACK)
    printf("compared with dlpack.h %d.%d\n", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
#else
    printf("no dlpack.h here; sizes and offsets stand as published\n");
#endif
    return test_end();
}
