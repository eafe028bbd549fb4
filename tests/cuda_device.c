/* SPDX-License-Identifier: Apache-2.0 */
#include "cuda_device.h"

enum { WORKSPACE_GUARD = 4096 };

static const size_t arena_size = (size_t)448 << 20;

struct kernel kernels[MAX_KERNELS];
int n_kernels;
struct device_options options = {.cases = -1};
static unsigned char *arena, *shared_workspace;
static size_t arena_used;
static void *owned[64];
static int n_owned;

static void stop(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n%ld passed, %ld failed\n", test_passed, test_failed + 1);
    exit(EXIT_FAILURE);
}

void must(cudaError_t code, const char *what, const char *file, int line) {
    if (code != cudaSuccess)
        stop("%s:%d: %s: %s", file, line, what, cudaGetErrorString(code));
}

/* ---- memory ---------------------------------------------------------------------------------- */

unsigned char *give(size_t size, size_t offset) {
    if (options.exact) {
        void *p;
        MUST(cudaMalloc(&p, size + offset ? size + offset : 1));
        owned[n_owned++] = p;
        return (unsigned char *)p + offset;
    }
    unsigned char *p = arena + arena_used + offset;
    arena_used += (size + offset + 511) / 256 * 256;
    if (arena_used > arena_size)
        stop("the tests' device memory is too small");
    return p;
}

void forget(void) {
    while (n_owned > 0)
        MUST(cudaFree(owned[--n_owned]));
    arena_used = 0;
}

void copy_in(void *to, const void *from, size_t size) {
    if (size)
        MUST(cudaMemcpy(to, from, size, cudaMemcpyHostToDevice));
}

void copy_out(void *to, const void *from, size_t size) {
    if (size)
        MUST(cudaMemcpy(to, from, size, cudaMemcpyDeviceToHost));
}

/* ---- runs ------------------------------------------------------------------------------------ */

int enqueue(struct kernel *kernel, struct lidx_args *args, void *workspace, cudaStream_t stream) {
    size_t wanted;
    int status = lidx_workspace_size(kernel->context, args, &wanted);
    if (status)
        return status;
    if (wanted > WORKSPACE_ROOM)
        stop("%s wants a workspace of %zu bytes", kernel->name, wanted);
    args->workspace = workspace ? workspace : shared_workspace;
    args->workspace_size = wanted;
    args->stream = stream;
    return lidx_run(kernel->context, args);
}

static int workspace_guard_intact(const struct lidx_args *args) {
    static unsigned char guard[WORKSPACE_GUARD];
    copy_out(guard, shared_workspace + args->workspace_size, sizeof guard);
    for (size_t i = 0; i < sizeof guard; i++)
        if (guard[i] != 0xA5)
            return 0;
    return 1;
}

int run_device(struct kernel *kernel, struct lidx_args *args) {
    size_t wanted;
    int status = lidx_workspace_size(kernel->context, args, &wanted);
    if (status == LIDX_OK) {
        MUST(cudaMemset(shared_workspace, 0xA5, wanted + WORKSPACE_GUARD));
        status = enqueue(kernel, args, NULL, NULL);
    }
    MUST(cudaDeviceSynchronize());
    kernel->runs++;
    if (status == LIDX_ERR_OPTION) {
        kernel->refused++;
        return 0;
    }
    if (status)
        stop("%s: %s: %s", kernel->name, lidx_status_name(status), lidx_last_error());
    if (!workspace_guard_intact(args))
        stop("%s wrote behind its workspace", kernel->name);
    return 1;
}

/* ---- a rendering on the device --------------------------------------------------------------- */

struct clone {
    struct lidx_args args;
    struct lidx_tensor tensor[N_BUFFERS];
    unsigned char *data[N_BUFFERS];
};

static const struct lidx_tensor *clone_tensor(struct clone *c, const struct rendering *r,
                                              const struct lidx_tensor *tensor) {
    if (!tensor)
        return NULL;
    struct lidx_tensor *t = &c->tensor[tensor - r->tensor];
    *t = *tensor;
    t->device = (struct lidx_device){LIDX_CUDA, 0};
    t->data = tensor->data ? c->data[tensor - r->tensor] - t->byte_offset : NULL;
    return t;
}

/* Half of all buffers begin at any multiple of their element, which TMA and 16-byte loads do not
 * like. */
static void clone_make(struct clone *c, const struct rendering *r, struct rng *rng) {
    forget();
    *c = (struct clone){.args = r->args};
    int odd = rng_below(rng, 3) == 0;
    for (int i = 0; i < N_BUFFERS; i++) {
        size_t element = r->tensor[i].dtype.bits / 8, offset = 0;
        if (!r->data[i])
            continue;
        if (odd && rng_below(rng, 2))
            offset = element * rng_below(rng, 9);
        c->data[i] = give(r->bytes[i], offset);
        copy_in(c->data[i], r->data[i], r->bytes[i]);
    }
    struct lidx_args *a = &c->args;
    a->query = clone_tensor(c, r, a->query);
    a->key = clone_tensor(c, r, a->key);
    a->weights = clone_tensor(c, r, a->weights);
    a->actual_seq_lengths_query = clone_tensor(c, r, a->actual_seq_lengths_query);
    a->actual_seq_lengths_key = clone_tensor(c, r, a->actual_seq_lengths_key);
    a->block_table = clone_tensor(c, r, a->block_table);
    a->sparse_indices = clone_tensor(c, r, a->sparse_indices);
    a->sparse_values = clone_tensor(c, r, a->sparse_values);
}

/* The device's outputs, poison and all, into the rendering's buffers. */
static void fetch(const struct clone *c, struct rendering *r, const struct lidx_tensor *tensor) {
    if (!tensor)
        return;
    ptrdiff_t i = tensor - r->tensor;
    copy_out(r->data[i], c->data[i], r->bytes[i]);
}

int run_rendering(struct kernel *kernel, struct rendering *r, struct rng *rng) {
    struct clone c;
    rendering_poison(r);
    clone_make(&c, r, rng);
    if (!run_device(kernel, &c.args))
        return 0;
    fetch(&c, r, r->args.sparse_indices);
    fetch(&c, r, r->args.sparse_values);
    return 1;
}

/* ---- begin and end --------------------------------------------------------------------------- */

static void open_kernels(const char *only) {
    static char names[MAX_KERNELS][KERNEL_NAME];
    n_kernels = find_kernels("cuda", only, names);
    for (int i = 0; i < n_kernels; i++)
        kernels[i] = (struct kernel){names[i], make_context(names[i], 1), 0, 0};
    if (n_kernels == 0)
        stop("no kernel to test");
}

static const char *read_options(int argc, char **argv) {
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0)
            options.quick = 1;
        else if (strcmp(argv[i], "--sanitizer") == 0)
            options.quick = options.sanitizer = 1;
        else if (strcmp(argv[i], "--exact") == 0)
            options.exact = 1;
        else if (i + 1 < argc && strcmp(argv[i], "--kernel") == 0)
            only = argv[++i];
        else if (i + 1 < argc && strcmp(argv[i], "--cases") == 0)
            options.cases = atol(argv[++i]);
        else if (i + 1 < argc && strcmp(argv[i], "--first") == 0)
            options.first = atol(argv[++i]);
        else
            stop("what is %s?", argv[i]);
    }
    return only;
}

int device_open(int argc, char **argv) {
    int count = 0;
    const char *only = read_options(argc, argv);
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("no CUDA device here: skipped\n");
        return 0;
    }
    MUST(cudaMalloc((void **)&arena, options.exact ? 1 : arena_size));
    MUST(cudaMalloc((void **)&shared_workspace, WORKSPACE_ROOM + WORKSPACE_GUARD));
    open_kernels(only);
    return 1;
}

int device_close(void) {
    int all = 1;
    for (int i = 0; i < n_kernels; i++) {
        printf("%s: %ld runs, %ld problems that it does not take\n", kernels[i].name,
               kernels[i].runs, kernels[i].refused);
        all = all && kernels[i].runs > kernels[i].refused;
        lidx_destroy(kernels[i].context);
    }
    rendering_release();
    return all;
}
