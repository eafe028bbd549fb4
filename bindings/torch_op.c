/* SPDX-License-Identifier: Apache-2.0
 *
 * The operator for PyTorch: registration, and torch tensors to struct lidx_args.
 *
 * Who owns what in a call: torch hands over each argument (a tensor's handle, a string, an
 * optional's cell), so every one is released before the call ends, also when it is refused. A
 * refusal is thrown by torch's own check function through this file's frames, which is why the
 * file is compiled with -fexceptions and why the throw is the last thing a call does.
 *
 * Contexts: each thread that calls has its own, made at its first call and freed when the thread
 * ends. It has as many threads as torch.get_num_threads() says; when that number changes, the
 * context is made anew. A forked child runs on one thread, since OpenMP's threads do not survive
 * a fork.
 */
#if !defined(_WIN32)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lightning_indexer.h"
#include "torch_shim.h"

/* What Python calls (through ctypes). Each returns NULL, or a sentence that says what failed. */
LIDX_API const char *lidx_torch_load(const char *libtorch_cpu, const char *libtorch_cuda);
LIDX_API const char *lidx_torch_define(const char *ns, const char *op, int owns_namespace);
LIDX_API const char *lidx_torch_implement(const char *ns, const char *op);
LIDX_API const char *lidx_torch_schema(const char *op);
LIDX_API const char *lidx_torch_symbol(int index, const char **library);

/* --- looking up torch ------------------------------------------------------------------------ */

static struct torch_shim torch;

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
    {"torch_delete_string", offsetof(struct torch_shim, delete_string), NEEDED},
    {"torch_get_num_threads", offsetof(struct torch_shim, get_num_threads), NEEDED},
    {"aoti_torch_check", offsetof(struct torch_shim, check), NEEDED},
    {"aoti_torch_dtype_bfloat16", offsetof(struct torch_shim, dtype_bfloat16), NEEDED},
    {"aoti_torch_dtype_float16", offsetof(struct torch_shim, dtype_float16), NEEDED},
    {"aoti_torch_dtype_float32", offsetof(struct torch_shim, dtype_float32), NEEDED},
    {"aoti_torch_dtype_float64", offsetof(struct torch_shim, dtype_float64), NEEDED},
    {"aoti_torch_dtype_int32", offsetof(struct torch_shim, dtype_int32), NEEDED},
    {"aoti_torch_dtype_int64", offsetof(struct torch_shim, dtype_int64), NEEDED},
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

/* What torch calls the element and device types, asked once. */
static struct {
    int32_t bfloat16, float16, float32, float64, int32, int64;
    int32_t cpu, cuda;
} numbers;

const char *lidx_torch_symbol(int index, const char **library) {
    static const char *const libraries[] = {"libtorch_cpu", "libtorch_cpu?", "libtorch_cuda"};
    if (index < 0 || index >= N_SYMBOLS)
        return NULL;
    *library = libraries[symbols[index].use];
    return symbols[index].name;
}

static void ask_numbers(void) {
    numbers.bfloat16 = torch.dtype_bfloat16();
    numbers.float16 = torch.dtype_float16();
    numbers.float32 = torch.dtype_float32();
    numbers.float64 = torch.dtype_float64();
    numbers.int32 = torch.dtype_int32();
    numbers.int64 = torch.dtype_int64();
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

/* --- contexts -------------------------------------------------------------------------------- */

struct thread_context {
    struct lidx_context *context;
    uint32_t n_threads;
    unsigned generation;
};

static pthread_key_t context_key;
static pthread_once_t context_once = PTHREAD_ONCE_INIT;
static unsigned fork_generation; /* forks that lie between the first process and this one */
static _Thread_local struct thread_context own;

static void free_context(void *memory) {
    struct thread_context *t = memory;
    /* What a parent process made is left alone: a device's part of it is not ours to free. */
    if (t->generation == fork_generation)
        lidx_destroy(t->context);
    t->context = NULL;
}

static void count_fork(void) {
    fork_generation++;
}

static void prepare_contexts(void) {
    pthread_key_create(&context_key, free_context);
    pthread_atfork(NULL, NULL, count_fork);
}

/* This thread's context, or NULL, and then lidx_last_error() says why. */
static struct lidx_context *get_context(void) {
    uint32_t n_threads = 1;
    if (fork_generation == 0)
        torch.get_num_threads(&n_threads);
    if (n_threads > LIDX_MAX_THREADS)
        n_threads = LIDX_MAX_THREADS;
    if (own.context && own.n_threads == n_threads && own.generation == fork_generation)
        return own.context;

    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    options.n_threads = (int32_t)n_threads;
    if (lidx_create(&context, &options))
        return NULL;
    pthread_once(&context_once, prepare_contexts);
    if (own.context)
        free_context(&own);
    own = (struct thread_context){context, n_threads, fork_generation};
    pthread_setspecific(context_key, &own);
    return context;
}

/* --- arguments ------------------------------------------------------------------------------- */

enum { QUERY, KEY, WEIGHTS, QUERY_LENGTHS, KEY_LENGTHS, BLOCK_TABLE, INDICES, VALUES, N_TENSORS };

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

struct call {
    struct lidx_args args;
    struct torch_tensor *handle[N_TENSORS]; /* owned */
    int64_t sparse_count, sparse_mode, pre_tokens, next_tokens;
    int return_values;
    int32_t device_type, device_index; /* query's, as torch numbers them */
    const char *error;                 /* NULL while all is well */

    /* What follows is written before it is read, so a call does not begin by clearing it. */
    struct lidx_tensor tensor[N_TENSORS];
    int64_t output_shape[4], output_strides[4];
    char sentence[256]; /* where the operator's own refusals are written */
};

static void free_cell(torch_value *cell) {
    if (torch.delete_cell)
        torch.delete_cell(cell);
    else
        torch.operator_delete(cell);
}

/* The value of an optional argument; 0 and *value untouched when it is None. */
static int take_optional(torch_value argument, torch_value *value) {
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
    if (take_optional(argument, &value))
        take_tensor(c, which, value);
}

/* Consumes the string. */
static void take_layout(struct call *c, const char *name, torch_value argument, int32_t *layout) {
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

static void run(struct call *c) {
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
    struct lidx_context *context = get_context();
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

/* Releases all that is owned; on failure throws, else leaves the outputs to the caller. */
static void finish(struct call *c) {
    release(c, QUERY, INDICES);
    if (!c->error)
        return;
    release(c, INDICES, N_TENSORS);
    torch.check(false, "lightning_indexer", __FILE__, __LINE__, c->error);
}

/* Takes the three tensors that every operator begins with. */
static void begin(struct call *c, const torch_value *stack) {
    memset(c, 0, offsetof(struct call, tensor));
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    c->sparse_count = LIDX_DEFAULT_TOP_K;
    c->sparse_mode = LIDX_MODE_CAUSAL;
    c->pre_tokens = c->next_tokens = INT64_MAX;
    for (int i = QUERY; i <= WEIGHTS; i++)
        take_tensor(c, i, stack[i]);
}

static void take_lists(struct call *c, const torch_value *stack) {
    for (int i = QUERY_LENGTHS; i <= BLOCK_TABLE; i++)
        take_optional_tensor(c, i, stack[i]);
}

/* --- the operators --------------------------------------------------------------------------- */

static const char schema_op[] =
    "lightning_indexer(Tensor query, Tensor key, Tensor weights, "
    "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, "
    "Tensor? block_table=None, str? layout_query=None, str? layout_key=None, "
    "int? sparse_count=None, int? sparse_mode=None) -> Tensor";

static void kernel_op(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    torch_value value;
    (void)n_arguments;
    (void)n_results;
    begin(&c, stack);
    take_lists(&c, stack);
    if (take_optional(stack[6], &value))
        take_layout(&c, "layout_query", value, &c.args.layout_query);
    if (take_optional(stack[7], &value))
        take_layout(&c, "layout_key", value, &c.args.layout_key);
    if (take_optional(stack[8], &value))
        c.sparse_count = (int64_t)value;
    if (take_optional(stack[9], &value))
        c.sparse_mode = (int64_t)value;
    if (!c.error)
        run(&c);
    finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
}

static const char schema_npu[] =
    "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, "
    "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, "
    "Tensor? block_table=None, str layout_query='BSND', str layout_key='BSND', "
    "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, "
    "int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)";

static void kernel_npu(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    (void)n_arguments;
    (void)n_results;
    begin(&c, stack);
    take_lists(&c, stack);
    take_layout(&c, "layout_query", stack[6], &c.args.layout_query);
    take_layout(&c, "layout_key", stack[7], &c.args.layout_key);
    c.sparse_count = (int64_t)stack[8];
    c.sparse_mode = (int64_t)stack[9];
    c.pre_tokens = (int64_t)stack[10];
    c.next_tokens = (int64_t)stack[11];
    c.return_values = (stack[12] & 0xff) != 0; /* a bool fills one byte of its 64 bits */
    if (!c.error)
        run(&c);
    if (!c.error && !c.return_values) {
        const int64_t none = 0, stride = 1;
        allocate(&c, VALUES, 1, &none, &stride, query_dtype(&c));
    }
    finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
    stack[1] = (torch_value)(uintptr_t)c.handle[VALUES];
}

/* The first operator without what most calls leave out, for the Python function: torch takes 0.1 us
 * over each argument that is not given. */
static const char schema_dense[] =
    "_dense(Tensor query, Tensor key, Tensor weights, int sparse_count=2048) -> Tensor";

static void kernel_dense(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    (void)n_arguments;
    (void)n_results;
    begin(&c, stack);
    c.sparse_count = (int64_t)stack[3];
    run(&c);
    finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
}

static const struct op {
    const char *name;
    const char *schema;
    torch_kernel kernel;
} ops[] = {
    {"lightning_indexer", schema_op, kernel_op},
    {"npu_lightning_indexer", schema_npu, kernel_npu},
    {"_dense", schema_dense, kernel_dense},
};

static const struct op *find_op(const char *name) {
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (strcmp(name, ops[i].name) == 0)
            return &ops[i];
    return NULL;
}

const char *lidx_torch_schema(const char *name) {
    const struct op *op = find_op(name);
    return op ? op->schema : NULL;
}

const char *lidx_torch_implement(const char *ns, const char *name) {
    static const char *const keys[] = {"CPU", "CUDA"};
    const struct op *op = find_op(name);
    if (!op)
        return "there is no such operator";
    for (int i = 0; i < 2; i++) {
        struct torch_library *library;
        if (torch.library_init_impl(ns, keys[i], __FILE__, __LINE__, &library) ||
            torch.library_impl(library, op->name, op->kernel))
            return "torch refused to register the operator's implementation";
    }
    return NULL;
}

const char *lidx_torch_define(const char *ns, const char *name, int owns_namespace) {
    const struct op *op = find_op(name);
    struct torch_library *library;
    torch_error error;
    if (!op)
        return "there is no such operator";
    error = owns_namespace ? torch.library_init_def(ns, __FILE__, __LINE__, &library)
                           : torch.library_init_fragment(ns, __FILE__, __LINE__, &library);
    if (error || torch.library_def(library, op->schema))
        return "torch refused to define the operator";
    return lidx_torch_implement(ns, name);
}
