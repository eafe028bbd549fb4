/* SPDX-License-Identifier: Apache-2.0
 *
 * lightning_indexer: for each query token, the positions of the k best keys.
 *
 *     score[i, j] = sum over heads h of  weights[i, h] * max(0, dot(query[i, h, :], key[j, :]))
 *     out[i]      = the sparse_count best visible j: score descending, equal scores by ascending j
 *
 * Sizes, in the letters of torch.ops.npu.lightning_indexer and in this library's words:
 *
 *     B   batches                      S1  query tokens of a batch     N1  n_heads, 1..128
 *     T1  query tokens of all batches  S2  keys of a batch             D   head_dim, 64 or 128
 *     T2  keys of all batches          N2  key heads, always 1         k   sparse_count, 1..8192
 *
 * Layouts (query / key): BSND / BSND, TND / TND, BSND / PA_BSND, TND / PA_BSND.
 *
 *     tensor            BSND             TND            PA_BSND                       dtype
 *     query             [B, S1, N1, D]   [T1, N1, D]                                  bf16 | fp16
 *     key               [B, S2, 1, D]    [T2, 1, D]     [pages, block_size, 1, D]     query's
 *     weights           [B, S1, N1]      [T1, N1]                                     query's | f32
 *     sparse_indices    [B, S1, 1, k]    [T1, 1, k]                                   int32
 *     sparse_values     as sparse_indices                                             f32 | query's
 *
 * Memory: `data` is aligned to its elements. Dimensions are contiguous, except that batches (BSND),
 * pages and rows of block_table may lie any stride >= 0 apart, those of an output so that they do
 * not overlap. Outputs overlap no other tensor. B, S1, S2, T1, T2 and pages may be 0.
 * Order: -0 counts as 0; NaN comes last, by position, and is visible like any other score.
 * Every slot of an output is written: where fewer than k keys are visible, and in rows at or past a
 * batch's length (TND: past the last prefix sum), the rest is -1, with -inf as its value.
 * Ownership: every struct and tensor is borrowed for the call, on CUDA the device memory until the
 * stream has passed it. Outputs are the caller's; when a call is refused, none is touched.
 * Threads: any thread may use a context, one at a time; contexts are independent of each other, and
 * all other functions may be called by any thread at any time.
 * Failure: functions return 0 or a positive lidx_status, and lidx_last_error() then says in a
 * sentence which argument, what it was and what it should be. Nothing prints, aborts or exits.
 * Interface: within a major version functions, fields (at the end of a struct) and numbers are only
 * added, so a program runs with any later library of the same soname.
 * Determinism: same input and same kernel give the same bits, whatever the thread count, batch
 * composition, layout, paging or chunking. Two kernels may differ in the last bits of a score.
 */
#ifndef LIGHTNING_INDEXER_H
#define LIGHTNING_INDEXER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define LIDX_API
#else
#define LIDX_API __attribute__((visibility("default")))
#endif

#define LIDX_VERSION_MAJOR 0
#define LIDX_VERSION_MINOR 1
#define LIDX_VERSION_PATCH 0

enum lidx_status {
    LIDX_OK = 0,
    LIDX_ERR_ARGUMENT = 1,  /* a required argument is missing, or one is given that must not be */
    LIDX_ERR_LAYOUT = 2,    /* a layout, or a pair of layouts, that does not exist */
    LIDX_ERR_SHAPE = 3,     /* a dimension is not what the others require */
    LIDX_ERR_DTYPE = 4,     /* an element type that the argument does not take */
    LIDX_ERR_STRIDE = 5,    /* an inner dimension is not contiguous, or batches overlap */
    LIDX_ERR_OPTION = 6,    /* sparse_count, sparse_mode, threads or kernel out of range */
    LIDX_ERR_VALUE = 7,     /* a length or a page id out of range (CPU tensors only) */
    LIDX_ERR_DEVICE = 8,    /* tensors on different devices, or on one that is not supported */
    LIDX_ERR_WORKSPACE = 9, /* workspace missing, too small or misaligned */
    LIDX_ERR_MEMORY = 10,   /* the host allocator refused (only while creating a context) */
    LIDX_ERR_CUDA = 11      /* the CUDA runtime refused; the sentence carries its words */
};

/* DLPack's DLDevice, DLDataType and DLTensor, field by field: a DLTensor pointer may be cast. All
 * tensors of a call are on the same device. CUDA_HOST memory is worked on by the CPU, CUDA_MANAGED
 * by the GPU. */
enum lidx_device_type { LIDX_CPU = 1, LIDX_CUDA = 2, LIDX_CUDA_HOST = 3, LIDX_CUDA_MANAGED = 13 };
enum lidx_type_code { LIDX_INT = 0, LIDX_UINT = 1, LIDX_FLOAT = 2, LIDX_BFLOAT = 4 };

struct lidx_device {
    int32_t device_type; /* enum lidx_device_type */
    int32_t device_id;
};

struct lidx_dtype {
    uint8_t code;   /* enum lidx_type_code */
    uint8_t bits;   /* of one element */
    uint16_t lanes; /* 1 */
};

struct lidx_tensor {
    void *data;
    struct lidx_device device;
    int32_t ndim;
    struct lidx_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL means compact and row-major */
    uint64_t byte_offset;
};

enum lidx_layout { LIDX_BSND = 0, LIDX_TND = 1, LIDX_PA_BSND = 2 };

enum lidx_sparse_mode {
    LIDX_MODE_FULL = 0,  /* a query sees every key of its batch */
    LIDX_MODE_CAUSAL = 3 /* right-bottom: query i of L1 sees the first L2 - L1 + i + 1 of L2 keys */
};

enum lidx_limit {
    LIDX_MAX_HEADS = 128,
    LIDX_MAX_TOP_K = 8192,
    LIDX_DEFAULT_TOP_K = 2048,
    LIDX_MAX_THREADS = 1024
};

/* Arguments of one run. Begin with LIDX_ARGS_INIT: it sets `size` and the operator's defaults. */
struct lidx_args {
    size_t size; /* sizeof(struct lidx_args) as the caller was compiled */

    const struct lidx_tensor *query;
    const struct lidx_tensor *key;
    const struct lidx_tensor *weights;

    /* int32 [B]. BSND: optional, one length a batch; NULL means S1, S2. TND: required, prefix sums
     * without the leading 0; the list's length is B. PA_BSND: the key's list is required, one
     * length a batch, with a TND query too. On the CPU a value out of range is LIDX_ERR_VALUE. */
    const struct lidx_tensor *actual_seq_lengths_query;
    const struct lidx_tensor *actual_seq_lengths_key;

    /* int32 [B, pages of the longest batch], PA_BSND only: key j of batch b is row
     * j % block_size of page block_table[b][j / block_size]. Entries past the last needed one
     * are never read. block_size is a multiple of 16 in 16..1024. */
    const struct lidx_tensor *block_table;

    int32_t layout_query; /* enum lidx_layout */
    int32_t layout_key;
    int32_t sparse_count; /* k */
    int32_t sparse_mode;  /* enum lidx_sparse_mode */

    const struct lidx_tensor *sparse_indices; /* out; -1 where fewer than k keys are visible */
    const struct lidx_tensor *sparse_values;  /* out, optional; -inf beside a -1 */

    /* CUDA only: a cudaStream_t (NULL is the default stream), and device memory of
     * lidx_workspace_size() bytes or more, 256-byte aligned, which nothing else uses before the
     * stream has passed the run; later runs on the same stream may. */
    void *stream;
    void *workspace;
    size_t workspace_size;

    /* CUDA only, where values are not read on the host: lengths are clamped, and keys of a page
     * whose id is out of range count as invisible. Optional: a device word to which a run adds the
     * number of such lengths and visible pages. Begin with 0 in it. */
    uint32_t *error_word;
};

#define LIDX_ARGS_INIT                                                                             \
    {                                                                                              \
        sizeof(struct lidx_args), NULL, NULL, NULL, NULL, NULL, NULL, LIDX_BSND, LIDX_BSND,        \
            LIDX_DEFAULT_TOP_K, LIDX_MODE_CAUSAL, NULL, NULL, NULL, NULL, 0, NULL                  \
    }

struct lidx_options {
    size_t size;        /* sizeof(struct lidx_options) */
    int32_t n_threads;  /* CPU threads; 0 means OMP_NUM_THREADS, or else all CPUs it may run on */
    const char *kernel; /* force a kernel by name; NULL means LIDX_KERNEL, or else the best one.
                         * A CPU kernel's name leaves the choice on CUDA alone, and vice versa. */
};

#define LIDX_OPTIONS_INIT                                                                          \
    { sizeof(struct lidx_options), 0, NULL }

struct lidx_context;

/* Allocates all that CPU runs will need (at most 4 MiB a thread); runs allocate nothing. A context
 * serves the CPU and every GPU, on any streams. `options` may be NULL. On failure *context is NULL.
 * Errors: LIDX_ERR_ARGUMENT, LIDX_ERR_OPTION, LIDX_ERR_MEMORY. */
LIDX_API int lidx_create(struct lidx_context **context, const struct lidx_options *options);
LIDX_API void lidx_destroy(struct lidx_context *context); /* NULL is allowed */

/* Runs the operator on the device that holds the tensors. On the CPU it returns when the outputs
 * are written. On CUDA it enqueues on `stream` and returns: it neither synchronises nor
 * allocates, and may be captured in a graph and replayed with other lengths, tables and data in
 * the same buffers. The current CUDA device need not be the tensors', and stays current.
 * Errors: all but LIDX_ERR_MEMORY. */
LIDX_API int lidx_run(struct lidx_context *context, const struct lidx_args *args);

/* Bytes of workspace that lidx_run wants for tensors of these shapes, whatever the lengths: 0 on
 * the CPU; on CUDA at most 256 MiB, or one row of scores where more than 60 million keys make that
 * larger. Smaller shapes may want more than larger ones, so ask for each, or have 256 MiB. Reads no
 * data; `data` pointers may be NULL. Errors: lidx_run's. */
LIDX_API int lidx_workspace_size(struct lidx_context *context, const struct lidx_args *args,
                                 size_t *bytes);

LIDX_API const char *lidx_status_name(int status); /* "LIDX_ERR_SHAPE"; never NULL */
LIDX_API const char *lidx_last_error(void);        /* of this thread's last failure; never NULL */
LIDX_API const char *lidx_version(void);           /* "0.1.0" */

/* One kernel of this build, in order of preference within its backend. Strings are static, or
 * valid until this thread's next call. */
struct lidx_kernel_info {
    size_t size;         /* sizeof(struct lidx_kernel_info), set by the caller */
    const char *name;    /* the stem: "avx512_bf16", "sm90" */
    const char *backend; /* "cpu" or "cuda" */
    int32_t available;   /* 1 if this machine can run it */
    int32_t chosen_bf16; /* 1 if bf16 tensors get it when nothing is forced */
    int32_t chosen_fp16;
    const char *reason; /* why it is, or is not, available and chosen: a sentence */
};

/* Kernels of all backends, those of the CPU first; `index` counts from 0 through them. Errors:
 * LIDX_ERR_ARGUMENT. */
LIDX_API int lidx_kernel_count(void);
LIDX_API int lidx_kernel_info(int index, struct lidx_kernel_info *info);

/* The CPU's features as this library reads them: "avx2 fma f16c ..."; never NULL. */
LIDX_API const char *lidx_cpu_features(void);

#ifdef __cplusplus
}
#endif

#endif
