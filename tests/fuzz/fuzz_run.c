/* SPDX-License-Identifier: Apache-2.0
 *
 * lidx_run on arguments made from bytes: shapes, strides, dtypes, lengths, tables, options and
 * elements, most of them valid or nearly so, some hostile.
 *
 * What must hold: lidx_workspace_size and lidx_run agree on the structure; a refused call touches
 * no data at all (every pointer leads nowhere) and has a sentence; an accepted one writes every
 * slot and nothing else, agrees with the float64 oracle on every CPU kernel, and has the same bits
 * with three threads.
 */
#include "../test.h"

#include "../contexts.h"
#include "../oracle.h"

enum { Q, K, W, QL, KL, TABLE, INDICES, VALUES, N_TENSORS };

/* Beyond this a case is legal and tells nothing that a smaller one does not. */
static const double MOST_BYTES = 1 << 22, MOST_WORK = 3e5;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct bytes {
    const uint8_t *data;
    size_t size, at;
};

static unsigned take(struct bytes *b) {
    return b->at < b->size ? b->data[b->at++] : 0;
}

struct call {
    struct lidx_args args;
    struct lidx_tensor t[N_TENSORS];
    int64_t shape[N_TENSORS][6], stride[N_TENSORS][6];
    unsigned char *memory[N_TENSORS];
    size_t bytes[N_TENSORS];
    int dim;
};

static struct lidx_context *contexts[MAX_KERNELS], *threaded[MAX_KERNELS];
static char names[MAX_KERNELS][KERNEL_NAME];
static int n_contexts;

__attribute__((noreturn)) static void complain(const char *what, const char *detail) {
    fprintf(stderr, "fuzz_run: %s: %s\n", what, detail);
    abort();
}

static void make_contexts(void) {
    if (n_contexts)
        return;
    n_contexts = find_kernels("cpu", NULL, names);
    for (int i = 0; i < n_contexts; i++) {
        contexts[i] = make_context(names[i], 1);
        threaded[i] = make_context(names[i], 3);
    }
}

/* ---- a call that is valid but for what the bytes make of it ---------------------------------- */

static void describe(struct call *c, int which, struct lidx_dtype dtype, int ndim,
                     const int64_t *shape, unsigned gap) {
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        c->shape[which][i] = shape[i];
        c->stride[which][i] = stride;
        stride *= shape[i];
    }
    c->stride[which][0] += ndim > 1 && gap > 128 ? gap - 128 : 0;
    c->t[which] = (struct lidx_tensor){
        NULL, {LIDX_CPU, 0}, ndim, dtype, c->shape[which], gap > 64 ? c->stride[which] : NULL, 0};
}

static const struct lidx_dtype INT32 = {LIDX_INT, 32, 1};

static void make_call(struct call *c, struct bytes *b) {
    static const int counts[] = {1, 2, 3, 5, 16, 17, 64, 300, 2048, 8192, 0, -1, 8193};
    static const int heads[] = {1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 65, 127, 128, 0, 129};
    memset(c, 0, sizeof *c);
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    unsigned options = take(b), more = take(b);
    int tnd = options & 1, paged = options >> 1 & 1, bf16 = options >> 2 & 1;
    const struct lidx_dtype half = {bf16 ? LIDX_BFLOAT : LIDX_FLOAT, 16, 1},
                            f32 = {LIDX_FLOAT, 32, 1};
    int64_t n_batch = take(b) % 6, n_query = take(b) % 7, n_key = take(b) % 200;
    int64_t n1 = heads[take(b) % 15], dim = options & 8 ? 64 : 128;
    int64_t page = 16 * (1 + take(b) % 5), pages = take(b) % 12, columns = take(b) % 8;
    int k = counts[take(b) % 13];
    const int64_t query[] = {n_batch, n_query, n1, dim}, packed_query[] = {n_query * 2, n1, dim};
    const int64_t key[] = {n_batch, n_key, 1, dim}, packed_key[] = {n_key, 1, dim};
    const int64_t paged_key[] = {pages, page, 1, dim}, table[] = {n_batch, columns};
    const int64_t out[] = {n_batch, n_query, 1, k}, packed_out[] = {n_query * 2, 1, k};
    describe(c, Q, half, tnd ? 3 : 4, tnd ? packed_query : query, tnd ? 0 : take(b));
    if (paged)
        describe(c, K, half, 4, paged_key, take(b));
    else
        describe(c, K, half, tnd ? 3 : 4, tnd ? packed_key : key, tnd ? 0 : take(b));
    describe(c, W, options & 16 ? f32 : half, tnd ? 2 : 3, tnd ? packed_query : query,
             tnd ? 0 : take(b));
    describe(c, QL, INT32, 1, &n_batch, 0);
    describe(c, KL, INT32, 1, &n_batch, 0);
    describe(c, TABLE, INT32, 2, table, take(b));
    describe(c, INDICES, INT32, tnd ? 3 : 4, tnd ? packed_out : out, tnd ? 0 : take(b));
    describe(c, VALUES, options & 32 ? half : f32, tnd ? 3 : 4, tnd ? packed_out : out,
             tnd ? 0 : take(b));
    c->dim = (int)dim;
    c->args.layout_query = tnd ? LIDX_TND : LIDX_BSND;
    c->args.layout_key = paged ? LIDX_PA_BSND : c->args.layout_query;
    c->args.sparse_count = k;
    c->args.sparse_mode = options & 64 ? LIDX_MODE_FULL : LIDX_MODE_CAUSAL;
    c->args.query = &c->t[Q];
    c->args.key = &c->t[K];
    c->args.weights = &c->t[W];
    c->args.actual_seq_lengths_query = tnd || more & 1 ? &c->t[QL] : NULL;
    c->args.actual_seq_lengths_key = tnd || paged || more & 2 ? &c->t[KL] : NULL;
    c->args.block_table = paged ? &c->t[TABLE] : NULL;
    c->args.sparse_indices = &c->t[INDICES];
    c->args.sparse_values = more & 4 ? &c->t[VALUES] : NULL;
}

/* A number to break things with. */
static int64_t hostile(struct bytes *b) {
    /* clang-format off */
    static const int64_t numbers[] = {
        0, 1, -1, 2, 3, 15, 16, 63, 64, 127, 128, 129, 1024, 8191, INT32_MAX, INT32_MIN,
        1LL << 31, 1LL << 32, 1LL << 33, 1LL << 40, 1LL << 62, INT64_MAX, INT64_MIN,
        INT64_MAX / 2, INT64_MAX / 8, INT64_MAX / 128, 1LL << 57, -64};
    /* clang-format on */
    unsigned x = take(b);
    return x < 128 ? numbers[x % 28] : (int64_t)(int8_t)x;
}

static void mutate(struct call *c, struct bytes *b) {
    unsigned count = take(b);
    for (count = count < 100 ? 0 : count % 5; count > 0; count--) {
        unsigned which = take(b) % N_TENSORS, field = take(b) % 14, axis = take(b) % 4;
        int64_t x = hostile(b);
        struct lidx_tensor *t = &c->t[which];
        switch (field) {
        case 0:
            t->ndim = (int32_t)x;
            break;
        case 1:
        case 2:
        case 3:
            c->shape[which][axis] = x;
            break;
        case 4:
        case 5:
            c->stride[which][axis] = x;
            t->strides = c->stride[which];
            break;
        case 6:
            t->dtype.code = (uint8_t)x;
            break;
        case 7:
            t->dtype.bits = (uint8_t)(axis ? 16 * axis : x);
            break;
        case 8:
            t->dtype.lanes = (uint16_t)x;
            break;
        case 9:
            t->device.device_type = (int32_t)(x == LIDX_CUDA || x == LIDX_CUDA_MANAGED ? 9 : x);
            break;
        case 10:
            c->args.layout_query = (int32_t)(axis & 1 ? x : c->args.layout_query);
            c->args.layout_key = (int32_t)(axis & 2 ? x : c->args.layout_key);
            break;
        case 11:
            c->args.sparse_count = (int32_t)(axis & 1 ? x : c->args.sparse_count);
            c->args.sparse_mode = (int32_t)(axis & 2 ? x : c->args.sparse_mode);
            break;
        case 12:
            c->args.size = (size_t)(axis & 1 ? x : (int64_t)c->args.size);
            t->byte_offset = axis & 2 ? (uint64_t)(x & 63) : 0;
            break;
        default:
            t->shape = axis & 1 ? NULL : t->shape;
            t->strides = axis & 2 ? NULL : t->strides;
        }
    }
}

/* ---- memory and its content ------------------------------------------------------------------ */

/* Bytes from the first element to the last, or more than MOST_BYTES when it is too many. */
static double extent(const struct lidx_tensor *t) {
    double last = 0, compact = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] == 0)
            return 0;
        last += (double)(t->shape[i] - 1) * (t->strides ? (double)t->strides[i] : compact);
        compact *= (double)t->shape[i];
    }
    return (last + 1) * (t->dtype.bits / 8);
}

static double work_of(const struct call *c) {
    int tnd = c->args.layout_query == LIDX_TND;
    double rows = (double)c->shape[Q][0] * (tnd ? 1.0 : (double)c->shape[Q][1]);
    double keys = (double)c->shape[K][tnd && c->args.layout_key == LIDX_TND ? 0 : 1];
    if (c->args.layout_key == LIDX_PA_BSND)
        keys *= (double)c->shape[TABLE][1];
    double batches = tnd ? (double)c->shape[QL][0] : (double)c->shape[Q][0];
    return rows * (keys * (double)c->shape[W][tnd ? 1 : 2] * 64 + c->args.sparse_count) + batches;
}

/* Room of exactly the right size, so that a sanitizer sees the first byte too many. */
static int allocate(struct call *c) {
    double sum = work_of(c) > MOST_WORK ? MOST_BYTES + 1 : 0;
    for (int i = 0; i < N_TENSORS; i++) {
        int used = i == QL      ? c->args.actual_seq_lengths_query != NULL
                   : i == KL    ? c->args.actual_seq_lengths_key != NULL
                   : i == TABLE ? c->args.block_table != NULL
                                : i != VALUES || c->args.sparse_values != NULL;
        double size = used ? extent(&c->t[i]) : 0;
        sum += size;
        if (!(sum >= 0 && sum <= MOST_BYTES))
            return 0;
        c->bytes[i] = (size_t)size;
    }
    for (int i = 0; i < N_TENSORS; i++) {
        size_t offset = c->t[i].byte_offset;
        c->memory[i] = malloc(c->bytes[i] + offset + (c->bytes[i] + offset == 0));
        c->t[i].data = c->memory[i];
        memset(c->memory[i], 0xA5, c->bytes[i] + offset);
    }
    return 1;
}

static void release(struct call *c) {
    for (int i = 0; i < N_TENSORS; i++)
        free(c->memory[i]);
}

static uint16_t element(struct rng *rng, struct bytes *b, unsigned kind, int bf16) {
    switch (kind % 6) {
    case 0:
        return test_to_half((float)rng_between(rng, -2, 2), bf16);
    case 1:
        return (uint16_t)rng_next(rng);
    case 2:
        return (uint16_t)(take(b) << 8 | take(b));
    case 3:
        return test_to_half(rng_below(rng, 3) ? -1.0f : 0.5f, bf16);
    case 4:
        return rng_below(rng, 60) ? test_to_half(rng_normal(rng), bf16)
                                  : (uint16_t)((bf16 ? 0x7F80 : 0x7C00) | (rng_next(rng) & 0x8001));
    default:
        return test_to_half(rng_normal(rng), bf16);
    }
}

static void fill(struct call *c, struct bytes *b) {
    struct rng rng = rng_seed(take(b));
    unsigned kind = take(b);
    int bf16 = c->t[Q].dtype.code == LIDX_BFLOAT;
    for (int which = Q; which <= W; which++)
        for (size_t i = 0; i + 1 < c->bytes[which]; i += 2) {
            uint16_t half = element(&rng, b, kind, bf16);
            float x = test_from_half(half, bf16);
            if (c->t[which].dtype.bits == 16)
                memcpy(c->memory[which] + c->t[which].byte_offset + i, &half, 2);
            else if (i % 4 == 0)
                memcpy(c->memory[which] + c->t[which].byte_offset + i, &x, 4);
        }
    for (int which = QL; which <= TABLE; which++) {
        int32_t sum = 0;
        int packed = which == QL   ? c->args.layout_query == LIDX_TND
                     : which == KL ? c->args.layout_key == LIDX_TND
                                   : 0;
        for (size_t i = 0; i + 3 < c->bytes[which]; i += 4) {
            unsigned x = take(b);
            int32_t small = (int32_t)(x % (which == QL ? 7 : which == KL ? 100 : 12));
            int32_t value = x < 250 ? small : x == 255 ? INT32_MAX : -(int32_t)(x - 249);
            sum = packed && x < 250 && sum >= 0 && sum < INT32_MAX / 2 ? sum + small : value;
            memcpy(c->memory[which] + c->t[which].byte_offset + i, &sum, 4);
        }
    }
}

/* ---- what must hold -------------------------------------------------------------------------- */

static void check_refused(const struct call *c, int status) {
    if (status < LIDX_OK || status > LIDX_ERR_CUDA)
        complain("unknown status", lidx_status_name(status));
    if (strlen(lidx_last_error()) < 15)
        complain("no sentence", lidx_last_error());
    for (int which = INDICES; which <= VALUES; which++)
        for (size_t i = 0; c->memory[which] && i < c->bytes[which]; i++)
            if (c->memory[which][c->t[which].byte_offset + i] != 0xA5)
                complain("a refused call wrote", lidx_last_error());
}

static void poison(struct call *c) {
    for (int which = INDICES; which <= VALUES; which++)
        memset(c->memory[which], 0xA5, c->bytes[which] + c->t[which].byte_offset);
}

/* Both outputs, whole: gaps between batches hold poison in each. */
static int same_outputs(const struct call *c, unsigned char *const copy[2]) {
    for (int which = INDICES; which <= VALUES; which++)
        if (c->bytes[which] && memcmp(copy[which - INDICES], c->memory[which],
                                      c->bytes[which] + c->t[which].byte_offset) != 0)
            return 0;
    return 1;
}

static void keep_outputs(const struct call *c, unsigned char *copy[2]) {
    for (int which = INDICES; which <= VALUES; which++)
        if (c->bytes[which])
            memcpy(copy[which - INDICES], c->memory[which],
                   c->bytes[which] + c->t[which].byte_offset);
}

static void check_accepted(struct call *c, unsigned options) {
    char why[400];
    struct oracle *oracle = oracle_make(&c->args);
    unsigned char *copy[2];
    for (int i = 0; i < 2; i++)
        copy[i] = malloc(c->bytes[INDICES + i] + c->t[INDICES + i].byte_offset + 1);
    for (int i = 0; i < n_contexts; i++) {
        poison(c);
        if (lidx_run(contexts[i], &c->args) != LIDX_OK)
            complain(names[i], lidx_last_error());
        if (oracle_check(oracle, &c->args, why, sizeof why))
            complain(names[i], why);
        keep_outputs(c, copy);
        if ((options + (unsigned)i) % 8 != 0)
            continue;
        poison(c);
        if (lidx_run(threaded[i], &c->args) != LIDX_OK || !same_outputs(c, copy))
            complain(names[i], "three threads answer otherwise than one");
    }
    for (int i = 0; i < 2; i++)
        free(copy[i]);
    oracle_free(oracle);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct bytes b = {data, size, 0};
    struct call c;
    size_t needed = 1;
    make_contexts();
    make_call(&c, &b);
    mutate(&c, &b);
    /* Pointers that lead nowhere: whoever reads through one is found out. */
    for (int i = 0; i < N_TENSORS; i++)
        c.t[i].data = (void *)(uintptr_t)64;
    int status = lidx_workspace_size(contexts[0], &c.args, &needed);
    if (status != LIDX_OK) {
        check_refused(&c, status);
        if (lidx_run(contexts[0], &c.args) == LIDX_OK)
            complain("lidx_run accepts what lidx_workspace_size refuses", "");
        return 0;
    }
    if (!allocate(&c))
        return -1;
    fill(&c, &b);
    status = lidx_run(contexts[0], &c.args);
    if (status == LIDX_OK)
        check_accepted(&c, take(&b));
    else
        check_refused(&c, status);
    release(&c);
    return 0;
}
