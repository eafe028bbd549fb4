/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend, each kernel that this GPU can run, through the public interface.
 *
 *     test_cuda [--kernel NAME] [--cases N] [--first N] [--quick] [--exact] [--sanitizer]
 *
 *   random     scenarios in every layout against the float64 oracle; then the same rows in other
 *              layouts, batches, pages and pieces, down to single decode steps: bit for bit
 *   data       each kind of adversarial numbers at lengths where the selection works hard
 *   slabs      the same rows through a workspace that holds few of them
 *   repeat     50 launches, one answer
 *   graph      captured once, replayed with other lengths, pages and queries in the same buffers
 *   hostile    lengths and page ids out of range: nothing read out of bounds, errors counted
 *   full       relaunches at full size, and sampled rows against the CPU
 *
 * --exact gives every buffer an allocation of its own, so that a memory checker sees its bounds;
 * --quick leaves out most cases and the full sizes; --sanitizer leaves out more. A failure names
 * its case; `--first CASE --cases 1` runs it alone.
 */
#include "scenario.h"

#include <cuda_runtime_api.h>

#include "oracle.h"

enum { MAX_KERNELS = 4, TEXT = 400, VARIANTS = 3, WORKSPACE_GUARD = 4096, REPEATS = 50 };

static const size_t arena_size = (size_t)448 << 20;
static const size_t workspace_room = (size_t)256 << 20;

struct kernel {
    char name[32];
    struct lidx_context *context;
    long runs;
    long refused; /* problems that a forced kernel does not take */
};

static struct kernel kernels[MAX_KERNELS];
static int n_kernels;
static int exact, quick, sanitizer;
static unsigned char *arena, *workspace;
static size_t arena_used;
static void *owned[64];
static int n_owned;

/* ---- the device ------------------------------------------------------------------------------ */

static void must(cudaError_t code, const char *what, int line) {
    if (code == cudaSuccess)
        return;
    printf("%s:%d: %s: %s\n", __FILE__, line, what, cudaGetErrorString(code));
    printf("%ld passed, %ld failed\n", test_passed, test_failed + 1);
    exit(EXIT_FAILURE); /* a context that has faulted answers nothing any more */
}

#define MUST(call) must((call), #call, __LINE__)

/* Device memory until forget(). `offset` bytes into a 256-byte line. */
static unsigned char *give(size_t size, size_t offset) {
    if (exact) {
        void *p;
        MUST(cudaMalloc(&p, size + offset ? size + offset : 1));
        owned[n_owned++] = p;
        return (unsigned char *)p + offset;
    }
    unsigned char *p = arena + arena_used + offset;
    arena_used += (size + offset + 511) / 256 * 256;
    if (arena_used > arena_size) {
        printf("the tests' device memory is too small\n");
        exit(EXIT_FAILURE);
    }
    return p;
}

static void forget(void) {
    while (n_owned > 0)
        MUST(cudaFree(owned[--n_owned]));
    arena_used = 0;
}

static void copy_in(void *to, const void *from, size_t size) {
    if (size)
        MUST(cudaMemcpy(to, from, size, cudaMemcpyHostToDevice));
}

static void copy_out(void *to, const void *from, size_t size) {
    if (size)
        MUST(cudaMemcpy(to, from, size, cudaMemcpyDeviceToHost));
}

/* Enqueues a run with a poisoned workspace of exactly the wanted size. */
static int enqueue(struct kernel *kernel, struct lidx_args *args, cudaStream_t stream) {
    size_t wanted;
    int status = lidx_workspace_size(kernel->context, args, &wanted);
    if (status)
        return status;
    CHECK(wanted <= workspace_room, "workspace of %zu bytes", wanted);
    args->workspace = workspace;
    args->workspace_size = wanted;
    args->stream = stream;
    return lidx_run(kernel->context, args);
}

static int workspace_guard_intact(const struct lidx_args *args) {
    static unsigned char guard[WORKSPACE_GUARD];
    copy_out(guard, workspace + args->workspace_size, sizeof guard);
    for (size_t i = 0; i < sizeof guard; i++)
        if (guard[i] != 0xA5)
            return 0;
    return 1;
}

/* Runs to the end. LIDX_ERR_OPTION is a forced kernel's refusal. */
static int run_device(struct kernel *kernel, struct lidx_args *args) {
    size_t wanted;
    int status = lidx_workspace_size(kernel->context, args, &wanted);
    if (status == LIDX_OK) {
        MUST(cudaMemset(workspace, 0xA5, wanted + WORKSPACE_GUARD));
        status = enqueue(kernel, args, NULL);
    }
    MUST(cudaDeviceSynchronize());
    kernel->runs++;
    if (status == LIDX_ERR_OPTION)
        kernel->refused++;
    else if (status)
        printf("%s: %s\n", lidx_status_name(status), lidx_last_error());
    else
        CHECK(workspace_guard_intact(args), "%s wrote behind its workspace", kernel->name);
    return status;
}

static void find_kernels(const char *only) {
    for (int i = 0; i < lidx_kernel_count() && n_kernels < MAX_KERNELS; i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        CHECK_INT(lidx_kernel_info(i, &info), LIDX_OK, "kernel info");
        if (strcmp(info.backend, "cuda") != 0 || !info.available)
            continue;
        if (only && strcmp(only, info.name) != 0)
            continue;
        struct kernel *kernel = &kernels[n_kernels++];
        snprintf(kernel->name, sizeof kernel->name, "%s", info.name);
        struct lidx_options options = LIDX_OPTIONS_INIT;
        options.kernel = kernel->name;
        CHECK_INT(lidx_create(&kernel->context, &options), LIDX_OK, kernel->name);
    }
    CHECK(n_kernels > 0, "no kernel to test");
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

static int run_rendering(struct kernel *kernel, struct rendering *r, struct rng *rng) {
    struct clone c;
    rendering_poison(r);
    clone_make(&c, r, rng);
    int status = run_device(kernel, &c.args);
    if (status == LIDX_OK) {
        fetch(&c, r, r->args.sparse_indices);
        fetch(&c, r, r->args.sparse_values);
    }
    return status;
}

/* ---- random scenarios ------------------------------------------------------------------------ */

/* Each row's answer in the first form, by batch. */
struct answers {
    int32_t *index[MAX_BATCH];
    float *value[MAX_BATCH];
};

static void make_answers(struct answers *a, const struct scenario *s) {
    for (int b = 0; b < s->n_batch; b++) {
        size_t n = (size_t)s->n_query[b] * (size_t)s->top_k + 1;
        a->index[b] = malloc(sizeof(int32_t) * n);
        a->value[b] = malloc(sizeof(float) * n);
    }
}

static void free_answers(struct answers *a, const struct scenario *s) {
    for (int b = 0; b < s->n_batch; b++) {
        free(a->index[b]);
        free(a->value[b]);
    }
}

static void keep_answers(struct answers *a, const struct scenario *s, const struct rendering *r,
                         const struct form *f) {
    size_t k = (size_t)s->top_k;
    for (int g = 0; g < f->n_segments; g++)
        for (int64_t i = 0; i < f->segment[g].n_rows; i++) {
            size_t at = (size_t)i * k;
            memcpy(a->index[g] + at, rendering_indices(r, f, g, i), sizeof(int32_t) * k);
            memcpy(a->value[g] + at, rendering_values(r, f, g, i), sizeof(float) * k);
        }
}

static int same_value(const struct scenario *s, const struct form *f, const unsigned char *got,
                      int64_t i, float want) {
    uint16_t half;
    if (f->values == 1)
        return memcmp(got + 4 * i, &want, sizeof want) == 0;
    memcpy(&half, got + 2 * i, sizeof half);
    if (isnan(want))
        return isnan(test_from_half(half, s->is_bf16));
    return half == test_to_half(want, s->is_bf16);
}

/* The first slot in which a row differs from the first form's; -1 if none does. */
static int64_t difference(const struct answers *a, const struct scenario *s,
                          const struct rendering *r, const struct form *f, int g, int64_t i) {
    const struct segment *e = &f->segment[g];
    int64_t k = s->top_k, row = (e->row + i) * k;
    const int32_t *index = rendering_indices(r, f, g, i);
    for (int64_t j = 0; j < k; j++)
        if (index[j] != a->index[e->batch][row + j])
            return j;
    const unsigned char *value = f->values ? rendering_values(r, f, g, i) : NULL;
    for (int64_t j = 0; value && j < k; j++)
        if (!same_value(s, f, value, j, a->value[e->batch][row + j]))
            return j;
    return -1;
}

/* All rows of another form against the first form's, bit by bit. */
static void check_variant(long number, const struct scenario *s, const char *name,
                          struct kernel *kernel, const struct answers *a, struct rng *rng) {
    struct form f = {0};
    struct rendering r;
    char text[TEXT];
    form_random_layout(&f, rng);
    form_random_segments(&f, s, rng);
    form_text(&f, text, sizeof text);
    rendering_make(&r, s, &f, rng);
    int status = run_rendering(kernel, &r, rng);
    if (status == LIDX_ERR_OPTION || !CHECK(status == LIDX_OK, "case %ld, %s: %s", number, name,
                                            text))
        return;
    for (int g = 0; g < f.n_segments; g++)
        for (int64_t i = 0; i < f.segment[g].n_rows; i++) {
            int64_t slot = difference(a, s, &r, &f, g, i);
            const int32_t *index = rendering_indices(&r, &f, g, i);
            int64_t row = f.segment[g].row + i, at = slot < 0 ? 0 : slot;
            if (!CHECK(slot < 0,
                       "case %ld, %s, %s: row %lld of batch %d differs in slot %lld (got %d, want "
                       "%d) when run as %s",
                       number, kernel->name, name, (long long)row, f.segment[g].batch,
                       (long long)slot, (int)index[at],
                       (int)a->index[f.segment[g].batch][row * s->top_k + at], text))
                return;
        }
    CHECK(rendering_gaps_intact(&r), "case %ld, %s: bytes between rows were written", number,
          kernel->name);
}

/* One scenario on all kernels: against the oracle in a first form, then in other forms. */
static void run_scenario(long number, const struct scenario *s, struct rng *rng, int variants) {
    char name[TEXT], why[TEXT], text[TEXT];
    struct answers answers;
    struct form f = {0};
    struct rendering r;
    scenario_text(s, name, sizeof name);
    make_answers(&answers, s);
    form_whole(&f, s);
    form_random_layout(&f, rng);
    f.values = 1;
    f.strided = f.strided && number % 3 == 0; /* gaps of any size keep TMA away */
    form_text(&f, text, sizeof text);
    struct rng form_rng = *rng;
    rendering_make(&r, s, &f, &form_rng);
    struct oracle *oracle = oracle_make(&r.args);
    for (int i = 0; i < n_kernels; i++) {
        form_rng = *rng;
        rendering_make(&r, s, &f, &form_rng);
        int status = run_rendering(&kernels[i], &r, &form_rng);
        if (status == LIDX_ERR_OPTION)
            continue;
        if (!CHECK(status == LIDX_OK, "case %ld, %s: %s", number, name, text) ||
            !CHECK(!oracle_check(oracle, &r.args, why, sizeof why), "case %ld, %s, %s, %s: %s",
                   number, kernels[i].name, name, text, why))
            continue;
        CHECK(rendering_gaps_intact(&r), "case %ld, %s: bytes between rows were written", number,
              kernels[i].name);
        keep_answers(&answers, s, &r, &f);
        for (int v = 0; v < variants; v++)
            check_variant(number, s, name, &kernels[i], &answers, &form_rng);
    }
    oracle_free(oracle);
    free_answers(&answers, s);
}

static void check_random(long first, long cases) {
    for (long number = first; number < first + cases; number++) {
        struct rng rng = rng_seed((uint64_t)number * 6151 + 3);
        struct scenario s;
        scenario_make(&s, &rng, number % 20 == 19 ? 2e7 : 6e5);
        run_scenario(number, &s, &rng, sanitizer ? 1 : VARIANTS);
        scenario_free(&s);
    }
}

/* ---- each kind of data at lengths where the selection works hard ----------------------------- */

static void check_data(void) {
    static const struct {
        int n_heads, head_dim, top_k, n_batch;
        int64_t n_query, n_key;
    } shapes[] = {
        {8, 64, 2048, 2, 20, 9000}, {1, 64, 8192, 1, 3, 40000}, {64, 128, 600, 1, 70, 1500},
        {3, 128, 2048, 1, 2, 70000}, {128, 128, 64, 2, 5, 900},
    };
    int n_shapes = (int)(sizeof shapes / sizeof shapes[0]);
    for (int i = 0; i < DATA_KINDS * n_shapes; i++) {
        if ((quick && i % n_shapes > 1) || (sanitizer && i % (7 * n_shapes) != 0))
            continue;
        struct rng rng = rng_seed((uint64_t)i + 1000);
        struct scenario s = {.is_bf16 = i % 2,
                             .weights_f32 = i / 2 % 2,
                             .n_heads = shapes[i % n_shapes].n_heads,
                             .head_dim = shapes[i % n_shapes].head_dim,
                             .top_k = shapes[i % n_shapes].top_k,
                             .mode = i % 4 ? LIDX_MODE_CAUSAL : LIDX_MODE_FULL,
                             .n_batch = shapes[i % n_shapes].n_batch,
                             .kind = (enum data_kind)(i / n_shapes)};
        for (int b = 0; b < s.n_batch; b++) {
            s.n_query[b] = shapes[i % n_shapes].n_query;
            s.n_key[b] = shapes[i % n_shapes].n_key - 77 * b;
        }
        scenario_fill(&s, &rng);
        run_scenario(100000 + i, &s, &rng, 1);
        scenario_free(&s);
    }
}

/* ---- problems made on the device ------------------------------------------------------------- */

/* A problem of one dtype for weights and elements, and its buffers on the device. */
struct setup {
    struct lidx_args args;
    struct lidx_tensor query, key, weights, query_lengths, key_lengths, table, indices, values;
    int64_t query_shape[4], key_shape[4], weights_shape[3], batches[1], table_shape[2];
    int64_t out_shape[4];
    int64_t rows, n_batch;
};

static struct lidx_tensor tensor_of(void *data, int ndim, struct lidx_dtype dtype, int64_t *shape) {
    return (struct lidx_tensor){data, {LIDX_CUDA, 0}, ndim, dtype, shape, NULL, 0};
}

static size_t elements(const int64_t *shape, int n) {
    size_t product = 1;
    for (int i = 0; i < n; i++)
        product *= (size_t)shape[i];
    return product;
}

/* Normal numbers as 16-bit elements, quickly: at full size there are half a billion. */
static void fill_halves(uint16_t *to, size_t n, int is_bf16, uint64_t seed) {
    enum { POOL = 1 << 16 };
    static uint16_t pool[2][POOL];
    struct rng rng = rng_seed(seed);
    if (!pool[is_bf16][1])
        for (int i = 0; i < POOL; i++)
            pool[is_bf16][i] = test_to_half(rng_normal(&rng), is_bf16);
    for (size_t i = 0; i < n; i += 4) {
        uint64_t x = rng_next(&rng);
        for (size_t j = i; j < n && j < i + 4; j++, x >>= 16)
            to[j] = pool[is_bf16][x & (POOL - 1)];
    }
}

static void *give_halves(size_t n, int is_bf16, uint64_t seed) {
    uint16_t *host = malloc(2 * n + 1);
    void *data = give(2 * n, 0);
    fill_halves(host, n, is_bf16, seed);
    copy_in(data, host, 2 * n);
    free(host);
    return data;
}

/* `page_size` 0: keys as the queries are, packed or by batch. `width` is the table's. */
static void setup_make(struct setup *s, int packed, int is_bf16, int64_t n_batch, int64_t n_query,
                       int64_t n_key, int n_heads, int head_dim, int top_k, int64_t page_size,
                       int64_t n_pages, int64_t width) {
    const struct lidx_dtype half = {(uint8_t)(is_bf16 ? LIDX_BFLOAT : LIDX_FLOAT), 16, 1};
    const struct lidx_dtype int32 = {LIDX_INT, 32, 1}, f32 = {LIDX_FLOAT, 32, 1};
    int q = packed ? 1 : 0, k = packed && !page_size ? 1 : 0;
    memset(s, 0, sizeof *s);
    memcpy(s->query_shape, (int64_t[]){n_batch, n_query, n_heads, head_dim}, sizeof s->query_shape);
    memcpy(s->key_shape, (int64_t[]){n_batch, n_key, 1, head_dim}, sizeof s->key_shape);
    if (page_size)
        memcpy(s->key_shape, (int64_t[]){n_pages, page_size, 1, head_dim}, sizeof s->key_shape);
    memcpy(s->weights_shape, s->query_shape, sizeof s->weights_shape);
    memcpy(s->out_shape, (int64_t[]){n_batch, n_query, 1, top_k}, sizeof s->out_shape);
    s->batches[0] = n_batch;
    s->table_shape[0] = n_batch, s->table_shape[1] = width;
    s->n_batch = n_batch;
    s->rows = packed ? n_query : n_batch * n_query;
    size_t n_out = (size_t)s->rows * (size_t)top_k;
    s->query = tensor_of(give_halves(elements(s->query_shape + q, 4 - q), is_bf16, 11), 4 - q, half,
                         s->query_shape + q);
    s->key = tensor_of(give_halves(elements(s->key_shape + k, 4 - k), is_bf16, 12), 4 - k, half,
                       s->key_shape + k);
    s->weights = tensor_of(give_halves(elements(s->weights_shape + q, 3 - q), is_bf16, 13), 3 - q,
                           half, s->weights_shape + q);
    s->query_lengths = tensor_of(give(4 * (size_t)n_batch, 0), 1, int32, s->batches);
    s->key_lengths = tensor_of(give(4 * (size_t)n_batch, 0), 1, int32, s->batches);
    s->table = tensor_of(give(4 * (size_t)(n_batch * width), 0), 2, int32, s->table_shape);
    s->indices = tensor_of(give(4 * n_out, 0), 4 - q, int32, s->out_shape + q);
    s->values = tensor_of(give(4 * n_out, 0), 4 - q, f32, s->out_shape + q);
    s->args = (struct lidx_args)LIDX_ARGS_INIT;
    s->args.query = &s->query, s->args.key = &s->key, s->args.weights = &s->weights;
    s->args.actual_seq_lengths_query = &s->query_lengths;
    s->args.actual_seq_lengths_key = &s->key_lengths;
    s->args.block_table = page_size ? &s->table : NULL;
    s->args.sparse_indices = &s->indices, s->args.sparse_values = &s->values;
    s->args.layout_query = packed ? LIDX_TND : LIDX_BSND;
    s->args.layout_key = page_size ? LIDX_PA_BSND : packed ? LIDX_TND : LIDX_BSND;
    s->args.sparse_count = top_k;
}

static void set_lengths(const struct setup *s, const int32_t *query, const int32_t *key) {
    copy_in(s->query_lengths.data, query, 4 * (size_t)s->n_batch);
    copy_in(s->key_lengths.data, key, 4 * (size_t)s->n_batch);
}

static size_t output_bytes(const struct setup *s) {
    return 4 * (size_t)(s->rows * s->args.sparse_count);
}

/* Indices, then values, of a run into poisoned outputs; NULL when the kernel refuses. */
static unsigned char *answer(struct setup *s, struct kernel *kernel) {
    size_t n = output_bytes(s);
    MUST(cudaMemset(s->indices.data, 0xA5, n));
    MUST(cudaMemset(s->values.data, 0xA5, n));
    int status = run_device(kernel, &s->args);
    if (status == LIDX_ERR_OPTION || !CHECK(status == LIDX_OK, "%s ran", kernel->name))
        return NULL;
    unsigned char *out = malloc(2 * n + 1);
    copy_out(out, s->indices.data, n);
    copy_out(out + n, s->values.data, n);
    return out;
}

/* Row and slot of the first difference, for a sentence; 1 when there is none. */
static int same_answers(const struct setup *s, const unsigned char *a, const unsigned char *b,
                        char text[TEXT]) {
    int64_t k = s->args.sparse_count;
    const int32_t *x = (const int32_t *)(const void *)a, *y = (const int32_t *)(const void *)b;
    for (int64_t i = 0; i < 2 * s->rows * k; i++)
        if (x[i] != y[i]) {
            int64_t slot = i % (s->rows * k);
            snprintf(text, TEXT, "%s, row %lld slot %lld: got %d (%08x), want %d (%08x)",
                     i == slot ? "index" : "value", (long long)(slot / k), (long long)(slot % k),
                     (int)x[i], (unsigned)x[i], (int)y[i], (unsigned)y[i]);
            return 0;
        }
    return 1;
}

static void shuffled_table(int32_t *table, int64_t entries, int64_t n_pages, struct rng *rng) {
    for (int64_t i = 0; i < entries; i++)
        table[i] = (int32_t)rng_below(rng, (uint64_t)n_pages);
}

/* ---- slabs ----------------------------------------------------------------------------------- */

/* A page table far wider than the lengths leaves room for a few rows of scores at a time. */
static void check_slabs(struct kernel *kernel) {
    enum { B = 3, S1 = 30, PAGE = 64, WIDTH = 50, WIDE = 40000, PAGES = 90 };
    static int32_t table[B * WIDTH], wide[B * WIDE];
    struct rng rng = rng_seed(21);
    struct setup s;
    char text[TEXT] = "";
    for (int heads = 8; heads <= (sanitizer ? 8 : 64); heads *= 8) {
        forget();
        setup_make(&s, 0, 1, B, S1, 0, heads, 128, 700, PAGE, PAGES, WIDTH);
        set_lengths(&s, (int32_t[]){S1, 7, S1}, (int32_t[]){WIDTH * PAGE, 3000, 41});
        shuffled_table(table, B * WIDTH, PAGES, &rng);
        copy_in(s.table.data, table, sizeof table);
        unsigned char *want = answer(&s, kernel);
        if (!want)
            return;
        memset(wide, 0x7F, sizeof wide);
        for (int b = 0; b < B; b++)
            memcpy(wide + b * WIDE, table + b * WIDTH, 4 * WIDTH);
        s.table.data = give(sizeof wide, 0);
        s.table_shape[1] = WIDE;
        copy_in(s.table.data, wide, sizeof wide);
        unsigned char *got = answer(&s, kernel);
        CHECK(got && same_answers(&s, got, want, text), "%s, slabs of few rows: %s", kernel->name,
              text);
        free(got);
        free(want);
    }
}

/* ---- repeated launches, graphs --------------------------------------------------------------- */

static void check_repeat(struct kernel *kernel) {
    struct setup s;
    char text[TEXT] = "";
    for (int form = 0; form < 4; form++) {
        int packed = form % 2;
        int32_t ends[2] = {300, 700}, each[2] = {300, 400}, table[2 * 60];
        struct rng rng = rng_seed(31);
        forget();
        setup_make(&s, packed, form < 2, 2, packed ? 700 : 400, packed ? 6000 : 3500, 64, 128, 2048,
                   form < 2 ? 0 : 64, 100, 60);
        if (form < 2)
            set_lengths(&s, packed ? ends : each, packed ? (int32_t[]){2500, 6000}
                                                         : (int32_t[]){2500, 3500});
        else
            set_lengths(&s, packed ? ends : each, (int32_t[]){2500, 3840});
        shuffled_table(table, 2 * 60, 100, &rng);
        copy_in(s.table.data, table, sizeof table);
        unsigned char *want = answer(&s, kernel);
        for (int i = 1; want && i < (quick ? 5 : REPEATS); i++) {
            unsigned char *got = answer(&s, kernel);
            if (!CHECK(got && same_answers(&s, got, want, text), "%s, launch %d of form %d: %s",
                       kernel->name, i, form, text))
                i = REPEATS;
            free(got);
        }
        free(want);
    }
}

/* Lengths, table and queries number `turn`, in the same buffers. */
static void change(struct setup *s, int turn) {
    enum { MOST_BATCH = 5, MOST_WIDTH = 40 };
    struct rng rng = rng_seed((uint64_t)turn + 41);
    int32_t query[MOST_BATCH], key[MOST_BATCH], table[MOST_BATCH * MOST_WIDTH];
    int64_t width = s->table_shape[1];
    int packed = s->args.layout_query == LIDX_TND, sum = 0;
    for (int b = 0; b < s->n_batch; b++) {
        int64_t left = packed ? s->rows - sum : s->query_shape[1];
        query[b] = (int32_t)rng_between(&rng, 0, left);
        sum += query[b];
        query[b] = packed ? sum : query[b];
        key[b] = (int32_t)rng_between(&rng, 0, width * s->key_shape[1]);
    }
    set_lengths(s, query, key);
    shuffled_table(table, s->n_batch * width, s->key_shape[0], &rng);
    copy_in(s->table.data, table, 4 * (size_t)(s->n_batch * width));
    uint16_t first[64];
    fill_halves(first, 64, 1, (uint64_t)turn + 51);
    copy_in(s->query.data, first, sizeof first);
}

static void check_graph(struct kernel *kernel) {
    for (int packed = 0; packed < 2; packed++) {
        struct setup s;
        char text[TEXT] = "";
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t replay;
        forget();
        setup_make(&s, packed, 1, 5, packed ? 60 : 9, 0, 32, 128, 333, 48, 70, 40);
        change(&s, 0);
        size_t n = output_bytes(&s);
        unsigned char *got = malloc(2 * n);
        MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        int status = enqueue(kernel, &s.args, stream);
        MUST(cudaStreamEndCapture(stream, &graph));
        if (!CHECK(status == LIDX_OK, "%s under capture: %s", kernel->name, lidx_last_error()))
            return;
        MUST(cudaGraphInstantiate(&replay, graph, 0));
        for (int turn = 1; turn < 8; turn++) {
            change(&s, turn);
            unsigned char *want = answer(&s, kernel);
            MUST(cudaMemset(s.indices.data, 0x5A, n));
            MUST(cudaMemset(s.values.data, 0x5A, n));
            MUST(cudaDeviceSynchronize());
            MUST(cudaGraphLaunch(replay, stream));
            MUST(cudaStreamSynchronize(stream));
            copy_out(got, s.indices.data, n);
            copy_out(got + n, s.values.data, n);
            CHECK(want && same_answers(&s, got, want, text), "%s, replay %d, packed %d: %s",
                  kernel->name, turn, packed, text);
            free(want);
        }
        free(got);
        MUST(cudaGraphExecDestroy(replay));
        MUST(cudaGraphDestroy(graph));
        MUST(cudaStreamDestroy(stream));
    }
}

/* ---- hostile lists and tables ---------------------------------------------------------------- */

static uint32_t *error_word;

static uint32_t errors_of_last_run(void) {
    uint32_t n;
    copy_out(&n, error_word, sizeof n);
    MUST(cudaMemset(error_word, 0, sizeof n));
    return n;
}

/* Bad lengths must act like the nearest good ones. Prefix sums that fall make batches overlap:
 * their rows then are anybody's, but stay within bounds. */
static void check_bad_lengths(struct kernel *kernel) {
    static const struct {
        int packed;
        int32_t query[3], key[3], good_query[3], good_key[3];
        uint32_t errors;
        int overlap;
    } cases[] = {
        {0, {9, -1, 4}, {500, 700, -3}, {9, 0, 4}, {500, 500, 0}, 3, 0},
        {0, {INT32_MAX, INT32_MIN, 9}, {INT32_MIN, INT32_MAX, 1}, {9, 0, 9}, {0, 500, 1}, 4, 0},
        {0, {10, 9, 0}, {501, 0, 500}, {9, 9, 0}, {500, 0, 500}, 2, 0},
        {1, {5, 3, 9}, {100, 90, 500}, {5, 5, 9}, {100, 100, 500}, 2, 1},
        {1, {-7, 20, 9}, {INT32_MIN, INT32_MAX, 400}, {0, 9, 9}, {0, 500, 500}, 5, 0},
        {1, {9, 9, 9}, {500, 600, 500}, {9, 9, 9}, {500, 500, 500}, 1, 0},
    };
    struct setup s;
    char text[TEXT] = "";
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        forget();
        setup_make(&s, cases[i].packed, 1, 3, 9, 500, 16, 64, 200, 0, 0, 0);
        s.args.error_word = error_word;
        set_lengths(&s, cases[i].good_query, cases[i].good_key);
        unsigned char *want = answer(&s, kernel);
        CHECK_INT(errors_of_last_run(), 0, "errors counted for good lengths");
        set_lengths(&s, cases[i].query, cases[i].key);
        unsigned char *got = answer(&s, kernel);
        CHECK(got && want && (cases[i].overlap || same_answers(&s, got, want, text)),
              "%s, bad lengths %zu: %s", kernel->name, i, text);
        CHECK_INT(errors_of_last_run(), cases[i].errors, "errors counted for bad lengths");
        free(got);
        free(want);
    }
}

/* The list without the keys of bad pages. */
static void drop_masked(const int32_t *from, const unsigned char *bad, int64_t page_size, int64_t n,
                        int32_t *to, int64_t k) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n && kept < k && from[i] >= 0; i++)
        if (!bad[from[i] / page_size])
            to[kept++] = from[i];
    while (kept < k)
        to[kept++] = -1;
}

static void check_bad_pages(struct kernel *kernel) {
    enum { B = 2, S1 = 6, PAGE = 16, WIDTH = 50, PAGES = 64, ALL = WIDTH * PAGE, K = 300 };
    static int32_t table[B * WIDTH], want_row[K];
    unsigned char bad[B * WIDTH] = {0};
    const int32_t good_lengths[2] = {ALL, ALL - 5}, queries[2] = {S1, S1 - 1};
    struct rng rng = rng_seed(61);
    uint32_t n_bad = 0;
    struct setup s;
    forget();
    setup_make(&s, 0, 0, B, S1, 0, 64, 128, ALL, PAGE, PAGES, WIDTH);
    shuffled_table(table, B * WIDTH, PAGES, &rng);
    copy_in(s.table.data, table, sizeof table);
    set_lengths(&s, queries, good_lengths);
    int32_t *all = (int32_t *)(void *)answer(&s, kernel);
    if (!all)
        return;
    static const int32_t ids[] = {-1, PAGES, INT32_MAX, INT32_MIN, PAGES + 7};
    for (int i = 0; i < B * WIDTH; i++)
        if (rng_below(&rng, 4) == 0) {
            bad[i] = 1;
            n_bad++;
            table[i] = ids[i % 5];
        }
    copy_in(s.table.data, table, sizeof table);
    s.args.sparse_count = K;
    s.out_shape[3] = K;
    s.args.error_word = error_word;
    int32_t *got = (int32_t *)(void *)answer(&s, kernel);
    CHECK_INT(errors_of_last_run(), n_bad, "bad pages counted");
    for (int row = 0; got && row < B * S1; row++) {
        drop_masked(all + row * ALL, bad + row / S1 * WIDTH, PAGE, ALL, want_row, K);
        CHECK(memcmp(got + row * K, want_row, sizeof want_row) == 0,
              "%s: row %d with bad pages is not the good row without their keys", kernel->name,
              row);
    }
    free(got);
    free(all);
}

/* ---- full size ------------------------------------------------------------------------------- */

static double dot_score(const struct setup *s, const uint16_t *query, const uint16_t *weights,
                        const uint16_t *key, int is_bf16) {
    double sum = 0;
    int64_t heads = s->query_shape[2], dim = s->query_shape[3];
    for (int64_t h = 0; h < heads; h++) {
        double dot = 0;
        for (int64_t d = 0; d < dim; d++)
            dot += (double)test_from_half(query[h * dim + d], is_bf16) *
                   (double)test_from_half(key[d], is_bf16);
        sum += dot > 0 ? dot * (double)test_from_half(weights[h], is_bf16) : 0;
    }
    return sum;
}

/* One row of a causal prefill of one batch against a run of the CPU backend on that row alone:
 * indices that only one of them has must score like the true k-th. */
static void check_row(const struct setup *s, struct lidx_context *cpu, const int32_t *got,
                      int64_t row, int is_bf16, const char *name) {
    int64_t heads = s->query_shape[2], dim = s->query_shape[3], k = s->args.sparse_count;
    int64_t visible = s->key_shape[1] - s->query_shape[1] + row + 1, n = heads * dim;
    uint16_t *query = malloc(2 * (size_t)n), *weights = malloc(2 * (size_t)heads);
    uint16_t *key = malloc(2 * (size_t)(visible * dim));
    int32_t *want = malloc(4 * (size_t)k);
    unsigned char *chosen = calloc((size_t)visible, 1);
    copy_out(query, (unsigned char *)s->query.data + 2 * row * n, 2 * (size_t)n);
    copy_out(weights, (unsigned char *)s->weights.data + 2 * row * heads, 2 * (size_t)heads);
    copy_out(key, s->key.data, 2 * (size_t)(visible * dim));
    struct setup alone = *s;
    alone.args.query = &alone.query, alone.args.key = &alone.key;
    alone.args.weights = &alone.weights, alone.args.sparse_indices = &alone.indices;
    alone.args.actual_seq_lengths_query = alone.args.actual_seq_lengths_key = NULL;
    alone.args.sparse_values = NULL;
    alone.query_shape[1] = alone.weights_shape[1] = alone.out_shape[1] = 1;
    alone.key_shape[1] = visible;
    struct lidx_tensor *tensors[4] = {&alone.query, &alone.key, &alone.weights, &alone.indices};
    void *data[4] = {query, key, weights, want};
    int64_t *shapes[4] = {alone.query_shape, alone.key_shape, alone.weights_shape,
                          alone.out_shape};
    for (int i = 0; i < 4; i++) {
        tensors[i]->data = data[i];
        tensors[i]->device.device_type = LIDX_CPU;
        tensors[i]->shape = shapes[i];
    }
    CHECK(lidx_run(cpu, &alone.args) == LIDX_OK, "CPU run of row %lld: %s", (long long)row,
          lidx_last_error());
    int64_t shared = visible < k ? visible : k, differing = 0;
    double bound = dot_score(s, query, weights, key + want[shared - 1] * dim, is_bf16);
    double top = dot_score(s, query, weights, key + want[0] * dim, is_bf16);
    double slack = fmax(1e-4 * fabs(bound), 1e-6 * fabs(top));
    for (int64_t i = 0; i < shared; i++)
        chosen[want[i]] ^= 1;
    for (int64_t i = 0; i < shared; i++) {
        if (!CHECK(got[i] >= 0 && got[i] < visible, "%s: row %lld has index %d of %lld keys", name,
                   (long long)row, (int)got[i], (long long)visible))
            break;
        chosen[got[i]] ^= 2;
    }
    for (int64_t j = 0; j < visible; j++)
        if (chosen[j] == 1 || chosen[j] == 2)
            differing += fabs(dot_score(s, query, weights, key + j * dim, is_bf16) - bound) > slack;
    CHECK(differing == 0, "%s: row %lld of %lld has %lld wrong indices", name, (long long)row,
          (long long)s->query_shape[1], (long long)differing);
    free(query);
    free(weights);
    free(key);
    free(want);
    free(chosen);
}

static void check_full(void) {
    static const struct {
        int64_t n_query, n_key;
        int relaunches;
    } shapes[] = {{2048, 65536, 12}, {8192, 8192, 12}};
    struct lidx_context *cpu;
    CHECK_INT(lidx_create(&cpu, NULL), LIDX_OK, "CPU context");
    for (int i = 0; i < 8; i++) {
        int is_bf16 = i % 2, heads = i / 2 % 2 ? 32 : 64;
        int64_t n_query = shapes[i / 4].n_query, n_key = shapes[i / 4].n_key;
        struct setup s;
        char text[TEXT], name[TEXT];
        forget();
        setup_make(&s, 0, is_bf16, 1, n_query, n_key, heads, 128, 2048, 0, 0, 0);
        s.args.actual_seq_lengths_query = s.args.actual_seq_lengths_key = NULL;
        s.args.sparse_values = NULL;
        unsigned char *got, *want;
        size_t n = output_bytes(&s);
        MUST(cudaMallocHost((void **)&got, n));
        MUST(cudaMallocHost((void **)&want, n));
        for (int j = 0; j < n_kernels; j++) {
            snprintf(name, sizeof name, "%s, %lld x %lld, %d heads, %s", kernels[j].name,
                     (long long)n_query, (long long)n_key, heads, is_bf16 ? "bf16" : "fp16");
            int differing = 0;
            for (int launch = 0; launch < shapes[i / 4].relaunches; launch++) {
                MUST(cudaMemset(s.indices.data, 0xA5, n));
                if (run_device(&kernels[j], &s.args) != LIDX_OK)
                    break;
                copy_out(launch ? got : want, s.indices.data, n);
                differing += launch && memcmp(got, want, n) != 0;
            }
            CHECK(differing == 0, "%s: %d relaunches differ", name, differing);
            const int32_t *rows = (const int32_t *)(const void *)want;
            for (int sample = 0; sample < 4; sample++) {
                int64_t row = sample ? n_query * sample / 3 - 1 : 5;
                snprintf(text, sizeof text, "%.200s", name);
                check_row(&s, cpu, rows + row * 2048, row, is_bf16, text);
            }
        }
        MUST(cudaFreeHost(got));
        MUST(cudaFreeHost(want));
    }
    lidx_destroy(cpu);
}

/* ---- main ------------------------------------------------------------------------------------ */

static void say(const char *section) {
    printf("%-8s %ld passed, %ld failed\n", section, test_passed, test_failed);
    fflush(stdout);
}

static void run_all(long first, long cases, int only_cases) {
    void (*const sections[])(struct kernel *) = {check_slabs,       check_repeat,   check_graph,
                                                 check_bad_lengths, check_bad_pages};
    static const char *const names[] = {"slabs", "repeat", "graph", "lengths", "pages"};
    check_random(first, cases);
    say("random");
    if (only_cases)
        return;
    check_data();
    say("data");
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < n_kernels && !(sanitizer && sections[i] == check_repeat); j++)
            sections[i](&kernels[j]);
        say(names[i]);
    }
    if (!quick)
        check_full();
    say("full");
}

int main(int argc, char **argv) {
    const char *only = NULL;
    long cases = -1, first = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0)
            quick = 1;
        else if (strcmp(argv[i], "--sanitizer") == 0)
            quick = sanitizer = 1;
        else if (strcmp(argv[i], "--exact") == 0)
            exact = 1;
        else if (i + 1 < argc && strcmp(argv[i], "--kernel") == 0)
            only = argv[++i];
        else if (i + 1 < argc && strcmp(argv[i], "--cases") == 0)
            cases = atol(argv[++i]);
        else if (i + 1 < argc && strcmp(argv[i], "--first") == 0)
            first = atol(argv[++i]);
    }
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("no CUDA device here: skipped\n");
        return 77;
    }
    MUST(cudaMalloc((void **)&arena, exact ? 1 : arena_size));
    MUST(cudaMalloc((void **)&workspace, workspace_room + WORKSPACE_GUARD));
    MUST(cudaMalloc((void **)&error_word, sizeof *error_word));
    MUST(cudaMemset(error_word, 0, sizeof *error_word));
    find_kernels(only);
    run_all(first, cases >= 0 ? cases : sanitizer ? 8 : quick ? 100 : 1200, first > 0);
    for (int i = 0; i < n_kernels; i++) {
        printf("%s: %ld runs, %ld problems that it does not take\n", kernels[i].name,
               kernels[i].runs, kernels[i].refused);
        CHECK(kernels[i].runs > kernels[i].refused, "%s took nothing", kernels[i].name);
        lidx_destroy(kernels[i].context);
    }
    rendering_release();
    return test_end();
}
