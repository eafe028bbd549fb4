/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend's host side where there is no GPU: src/cuda/cuda.c on a runtime and launchers
 * that only take notes. Which kernel runs on which device, how a run is divided into slabs and the
 * workspace among them, what is refused, that a failure is reported and the caller's device is
 * current again.
 */
#include "test.h"

#include "cuda_notes.h"
#include "lightning_indexer.h"

enum { LIMIT = 256 << 20 }; /* of a workspace */

/* ---- a call ---------------------------------------------------------------------------------- */

/* Addresses of a device, which nobody here reads. */
static void *const memory = (void *)(uintptr_t)0x10000000, *const workspace =
                                                               (void *)(uintptr_t)0x7000000000;
static char stream_of_caller;

struct setup {
    struct lidx_args args;
    int64_t shape[4][4];
    struct lidx_tensor tensor[4]; /* query, key, weights, indices */
};

static struct lidx_tensor tensor(int64_t *shape, int code, int bits, int ndim, int device) {
    return (struct lidx_tensor){
        memory, {LIDX_CUDA, device}, ndim, {(uint8_t)code, (uint8_t)bits, 1}, shape, NULL, 0};
}

static void setup_make(struct setup *s, int device, int64_t n_batch, int64_t n_query, int64_t n_key,
                       int top_k) {
    const int64_t shape[4][4] = {{n_batch, n_query, 64, 128},
                                 {n_batch, n_key, 1, 128},
                                 {n_batch, n_query, 64},
                                 {n_batch, n_query, 1, top_k}};
    memcpy(s->shape, shape, sizeof shape);
    s->tensor[0] = tensor(s->shape[0], LIDX_BFLOAT, 16, 4, device);
    s->tensor[1] = tensor(s->shape[1], LIDX_BFLOAT, 16, 4, device);
    s->tensor[2] = tensor(s->shape[2], LIDX_FLOAT, 32, 3, device);
    s->tensor[3] = tensor(s->shape[3], LIDX_INT, 32, 4, device);
    s->args = (struct lidx_args)LIDX_ARGS_INIT;
    s->args.query = &s->tensor[0], s->args.key = &s->tensor[1];
    s->args.weights = &s->tensor[2], s->args.sparse_indices = &s->tensor[3];
    s->args.sparse_count = top_k;
    s->args.stream = &stream_of_caller;
    s->args.workspace = workspace;
}

static struct lidx_context *make_context(const char *kernel) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context = NULL;
    options.kernel = kernel;
    options.n_threads = 1;
    CHECK(lidx_create(&context, &options) == LIDX_OK, "%s", lidx_last_error());
    return context;
}

static int run(struct lidx_context *context, struct setup *s) {
    n_launched = 0;
    int status = lidx_workspace_size(context, &s->args, &s->args.workspace_size);
    return status ? status : lidx_run(context, &s->args);
}

static void refuse(int got, int status, const char *mention) {
    CHECK(got == status && strstr(lidx_last_error(), mention), "%s, \"%s\"; it should be %s, %s",
          lidx_status_name(got), lidx_last_error(), lidx_status_name(status), mention);
    CHECK(n_launched == 0, "%s: %d launches", mention, n_launched);
}

/* ---- slabs ----------------------------------------------------------------------------------- */

/* A slab's scores and the selection's scratch lie in the workspace and apart. */
static void check_division(const struct setup *s, const struct slab *slab, const char *what) {
    const unsigned char *begin = workspace, *scratch = slab->scratch;
    int64_t rows = slab->row_end - slab->row_begin, n_key = s->shape[1][1];
    size_t scores = sizeof(float) * (size_t)(rows * slab->scores_stride);
    size_t needed = lidx_topk_scratch(rows, n_key, s->args.sparse_count, slab->n_sm);
    CHECK(slab->scores == (float *)workspace, "%s: where scores begin", what);
    CHECK(slab->scores_stride >= n_key && slab->scores_stride % 64 == 0, "%s: stride %lld", what,
          (long long)slab->scores_stride);
    CHECK(begin + scores <= scratch && (uintptr_t)scratch % 256 == 0, "%s: scratch on scores",
          what);
    CHECK(scratch + needed <= begin + s->args.workspace_size, "%s: scratch behind the workspace",
          what);
    if (slab->row_begin == 0)
        CHECK(begin + scores + 256 > scratch && scratch + needed == begin + s->args.workspace_size,
              "%s: the workspace has %zu bytes, more than a slab of %lld rows needs", what,
              s->args.workspace_size, (long long)rows);
}

/* The count of errors and the selection's counters once, then scores and selection of one slab
 * after the other, which are all rows. */
static void check_launches(const struct setup *s, enum launcher score, int device,
                           const char *what) {
    int64_t total = s->shape[0][0] * s->shape[0][1], reached = 0;
    int64_t rows = calls[0].slab.row_end - calls[0].slab.row_begin;
    CHECK(n_launched >= 4 && n_launched % 2 == 0, "%s: %d launches", what, n_launched);
    for (int i = 0; i < n_launched; i++) {
        const struct slab *slab = &calls[i].slab;
        enum launcher want = i == 0 ? COUNT : i == 1 ? PREPARE : i % 2 ? TOPK : score;
        int64_t begin = i < 2 ? 0 : reached, end = begin + rows < total ? begin + rows : total;
        CHECK(calls[i].launcher == want, "%s: launch %d is %d", what, i, (int)calls[i].launcher);
        CHECK(slab->row_begin == begin && slab->row_end == end,
              "%s: launch %d has rows %lld to %lld, should have %lld to %lld", what, i,
              (long long)slab->row_begin, (long long)slab->row_end, (long long)begin,
              (long long)end);
        CHECK(slab->prepared == (i > 1), "%s: launch %d, prepared %d", what, i, slab->prepared);
        CHECK(slab->n_sm == fake.n_sm[device] && slab->compute == fake.compute[device],
              "%s: launch %d is for compute capability %d", what, i, slab->compute);
        CHECK(calls[i].device == device && calls[i].stream == &stream_of_caller,
              "%s: launch %d is on device %d", what, i, calls[i].device);
        check_division(s, slab, what);
        reached = want == TOPK ? end : reached;
    }
    CHECK_INT(reached, total, what);
    if (n_launched > 4 && rows >= 64) { /* blocks of queries stay whole, slabs are alike */
        int64_t n_slabs = n_launched / 2 - 1, each = (total + n_slabs - 1) / n_slabs;
        CHECK(rows % 64 == 0 && rows < each + 64, "%s: %lld slabs of %lld rows", what,
              (long long)n_slabs, (long long)rows);
    }
    CHECK(rows == 1 || s->args.workspace_size <= LIMIT, "%s: a workspace of %zu", what,
          s->args.workspace_size);
}

static void check_slabs(void) {
    struct lidx_context *context = make_context(NULL);
    struct rng rng = rng_seed(1);
    for (int i = 0; i < 400; i++) {
        struct setup s;
        char what[96];
        int64_t n_key = rng_between(&rng, 0, (int64_t)1 << rng_between(&rng, 0, 22));
        int64_t n_batch = rng_between(&rng, 1, 5), n_query = rng_between(&rng, 1, 900);
        n_key = rng_one_in(&rng, 20) ? 70000000 : n_key; /* a row that is larger than the limit */
        n_query = n_key > LIMIT / 4 ? 3 : n_query;
        forget();
        setup_make(&s, 0, n_batch, n_query, n_key, (int)rng_between(&rng, 1, 8192));
        snprintf(what, sizeof what, "case %d, %lld x %lld tokens, %lld keys", i, (long long)n_batch,
                 (long long)n_query, (long long)n_key);
        if (CHECK(run(context, &s) == LIDX_OK, "%s: %s", what, lidx_last_error()))
            check_launches(&s, SM90, 0, what);
    }
    struct setup many;
    forget();
    setup_make(&many, 0, 1 << 20, 1 << 12, 1, 1);
    CHECK_INT(run(context, &many), LIDX_OK, "2^32 tokens");
    check_launches(&many, SM90, 0, "2^32 tokens");
    lidx_destroy(context);
}

/* ---- what is refused ------------------------------------------------------------------------- */

static void check_workspace(void) {
    struct lidx_context *context = make_context(NULL);
    struct setup s;
    forget();
    setup_make(&s, 0, 2, 3, 1000, 64);
    CHECK_INT(run(context, &s), LIDX_OK, "a workspace of the right size");
    size_t needed = s.args.workspace_size;
    n_launched = 0;
    s.args.workspace_size = needed - 1;
    refuse(lidx_run(context, &s.args), LIDX_ERR_WORKSPACE, "workspace has ");
    s.args.workspace_size = needed;
    s.args.workspace = NULL;
    refuse(lidx_run(context, &s.args), LIDX_ERR_WORKSPACE, "workspace has 0 bytes");
    s.args.workspace = (unsigned char *)workspace + 128;
    refuse(lidx_run(context, &s.args), LIDX_ERR_WORKSPACE, "aligned");
    s.args.workspace = (unsigned char *)workspace + 256;
    CHECK_INT(lidx_run(context, &s.args), LIDX_OK, "aligned to 256 bytes");
    setup_make(&s, 0, 2, 0, 1000, 64);
    fake.fail_at = fake.n_calls;
    CHECK_INT(run(context, &s), LIDX_OK, "no tokens");
    CHECK(n_launched == 0 && s.args.workspace_size == 0, "no tokens: %d launches", n_launched);
    lidx_destroy(context);
}

static void check_choice(void) {
    static const struct {
        const char *forced;
        int compute, accepts, status;
        enum launcher score;
        const char *mention;
    } cases[] = {
        {NULL, 90, 1, LIDX_OK, SM90, ""},
        {NULL, 90, 0, LIDX_OK, SMXX, ""},
        {NULL, 80, 1, LIDX_OK, SMXX, ""},
        {NULL, 89, 1, LIDX_OK, SMXX, ""},
        {NULL, 100, 1, LIDX_OK, SMXX, ""},
        {NULL, 75, 1, LIDX_ERR_DEVICE, SMXX, "compute capability 7.5"},
        {NULL, 79, 1, LIDX_ERR_DEVICE, SMXX, "compute capability 7.9"},
        {"smxx", 90, 1, LIDX_OK, SMXX, ""},
        {"sm90", 90, 1, LIDX_OK, SM90, ""},
        {"sm90", 90, 0, LIDX_ERR_OPTION, SM90, "does not take this problem"},
        {"sm90", 89, 1, LIDX_ERR_OPTION, SM90, "the device has 8.9"},
        {"sm90", 100, 1, LIDX_ERR_OPTION, SM90, "the device has 10.0"},
        {"smxx", 75, 1, LIDX_ERR_OPTION, SMXX, "the device has 7.5"},
        {"scalar", 90, 1, LIDX_OK, SM90, ""}, /* the CPU's */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct setup s;
        char what[64];
        forget();
        struct lidx_context *context = make_context(cases[i].forced);
        fake.compute[0] = cases[i].compute; /* where it is forced, there was a Hopper GPU before */
        fake.accepts = cases[i].accepts;
        setup_make(&s, 0, 1, 5, 900, 64);
        snprintf(what, sizeof what, "%s on %d", cases[i].forced ? cases[i].forced : "the best",
                 cases[i].compute);
        int status = run(context, &s);
        if (cases[i].status)
            refuse(status, cases[i].status, cases[i].mention);
        else if (CHECK(status == LIDX_OK, "%s: %s", what, lidx_last_error()))
            check_launches(&s, cases[i].score, 0, what);
        lidx_destroy(context);
    }
}

/* ---- devices --------------------------------------------------------------------------------- */

static void check_devices(void) {
    struct lidx_context *context = make_context(NULL);
    struct setup s;
    static const int unknown[] = {DEVICES, -1, 64, INT32_MAX, INT32_MIN};
    forget();
    setup_make(&s, 1, 2, 7, 500, 32);
    CHECK_INT(run(context, &s), LIDX_OK, "tensors on the device that is not current");
    check_launches(&s, SMXX, 1, "tensors on the device that is not current");
    CHECK_INT(fake.current, 0, "the device that is current after a run on another");
    long asked = fake.n_asked;
    CHECK_INT(run(context, &s), LIDX_OK, "a second run");
    CHECK_INT(fake.n_asked, asked, "questions about a device that is known");
    for (int i = 0; i < 5; i++) {
        setup_make(&s, unknown[i], 2, 7, 500, 32);
        refuse(run(context, &s), LIDX_ERR_DEVICE, "it should be 0 to 2");
    }
    for (int which = 0; which < 4; which++) {
        setup_make(&s, 0, 2, 7, 500, 32);
        s.tensor[which].device.device_type = LIDX_CPU;
        refuse(run(context, &s), LIDX_ERR_DEVICE, "device");
    }
    setup_make(&s, 0, 2, 7, 500, 32);
    for (int which = 0; which < 4; which++)
        s.tensor[which].device.device_type = LIDX_CUDA_MANAGED;
    CHECK_INT(run(context, &s), LIDX_OK, "managed memory");
    check_launches(&s, SM90, 0, "managed memory");
    lidx_destroy(context);
}

/* What lies in a device's memory is for kernels to read, lists and the word that they count in. */
static void check_device_memory(void) {
    struct lidx_context *context = make_context(NULL);
    uint32_t *word = (uint32_t *)memory + 64;
    int64_t n_batch = 2;
    for (int managed = 0; managed < 2; managed++) {
        const char *what = managed ? "lists in managed memory" : "lists on a device";
        struct setup s;
        forget();
        setup_make(&s, 0, n_batch, 3, 1000, 64);
        struct lidx_tensor list = tensor(&n_batch, LIDX_INT, 32, 1, 0);
        s.args.actual_seq_lengths_query = s.args.actual_seq_lengths_key = &list;
        s.args.error_word = word;
        for (int which = 0; which < 4 && managed; which++)
            s.tensor[which].device.device_type = LIDX_CUDA_MANAGED;
        list.device = s.tensor[0].device;
        CHECK_INT(run(context, &s), LIDX_OK, what);
        check_launches(&s, SM90, 0, what);
        for (int i = 0; i < n_launched; i++) {
            const struct problem *p = &calls[i].slab.p;
            CHECK(p->error_word == word && p->query_lengths == memory && p->key_lengths == memory,
                  "%s: launch %d is told of others", what, i);
        }
    }
    lidx_destroy(context);
}

/* Whatever fails, the sentence says so, nothing is launched behind it, no error is left for a later
 * launch of the caller's, and the caller's device is current. */
static void check_failures(void) {
    struct setup s;
    long n = 1;
    for (long at = 0; at < n; at++) {
        forget();
        struct lidx_context *context = make_context(NULL);
        setup_make(&s, 1, 4, 100, 900000, 32);
        fake.n_calls = 0;
        fake.fail_at = at == 0 ? -1 : at - 1; /* first none, which counts them */
        int status = run(context, &s);
        if (at == 0) {
            CHECK_INT(status, LIDX_OK, "a run without a failure");
            n = fake.n_calls + 1;
        } else {
            CHECK(status == LIDX_ERR_CUDA &&
                      strstr(lidx_last_error(), "failed: unknown error (cudaErrorUnknown)"),
                  "call %ld of %ld fails: %s, \"%s\"", at, n - 1, lidx_status_name(status),
                  lidx_last_error());
            CHECK(!fake.is_error_left, "call %ld fails: the error is left", at);
            CHECK(fake.n_calls <= at + 1, "call %ld fails: %ld more", at, fake.n_calls - at);
            CHECK(fake.current == 0 || at == n - 1, "call %ld fails: device %d", at, fake.current);
        }
        lidx_destroy(context);
    }
    CHECK(n > 15, "a run of several slabs makes %ld calls", n - 1);
}

static void check_info(void) {
    static const char *const kernel_needs[] = {"needs a Hopper GPU", "8.0 or newer"};
    static const struct {
        int compute, sm90, smxx, best; /* -1: none */
    } cases[] = {{90, 1, 1, 0}, {86, 0, 1, 1}, {120, 0, 1, 1}, {75, 0, 0, -1}, {0, 0, 0, -1}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        forget();
        fake.compute[0] = cases[i].compute;
        fake.fail_at = cases[i].compute ? -1 : 1; /* none can be counted */
        for (int k = 0; k < 2; k++) {
            struct lidx_kernel_info info = {.size = sizeof info};
            int index = lidx_kernel_count() - 2 + k, is_best = cases[i].best == k;
            fake.n_calls = 0;
            CHECK_INT(lidx_kernel_info(index, &info), LIDX_OK, "kernel info");
            CHECK_STRING(info.name, k ? "smxx" : "sm90", "name");
            CHECK_STRING(info.backend, "cuda", "backend");
            CHECK(info.available == (k ? cases[i].smxx : cases[i].sm90) &&
                      info.chosen_bf16 == is_best && info.chosen_fp16 == is_best,
                  "%s on %d: available %d, chosen %d; %s", info.name, cases[i].compute,
                  info.available, info.chosen_bf16, info.reason);
            const char *mention = cases[i].compute == 0    ? "no CUDA device can be used"
                                  : cases[i].compute == 86 ? "compute capability 8.6"
                                                           : kernel_needs[k];
            CHECK(strstr(info.reason, mention), "\"%s\" does not say %s", info.reason, mention);
        }
    }
}

int main(void) {
    forget();
    check_slabs();
    check_workspace();
    check_choice();
    check_devices();
    check_device_memory();
    check_failures();
    check_info();
    return test_end();
}
