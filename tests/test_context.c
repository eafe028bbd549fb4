/* SPDX-License-Identifier: Apache-2.0
 *
 * What is around a run: sizes of structs, contexts and their options, kernels, names, sentences.
 */
#include "valid_call.h"

#include <pthread.h>

static struct lidx_context *context;

static void check_struct_size(void) {
    struct call c;
    struct {
        struct lidx_args args;
        unsigned char later[64];
    } newer;
    static const size_t bad[] = {0, 1, 8, sizeof(struct lidx_args) - 1, 4097, SIZE_MAX};
    for (int i = 0; i < 6; i++) {
        valid_call(&c, BSND_BSND);
        c.args.size = bad[i];
        refuse(context, &c, LIDX_ERR_ARGUMENT, "size", "args.size");
    }
    memset(&newer, 0, sizeof newer);
    valid_call(&c, BSND_BSND);
    newer.args = c.args;
    newer.args.size = sizeof newer;
    CHECK_INT(lidx_run(context, &newer.args), LIDX_OK, "a newer caller that leaves new fields 0");
    for (size_t i = 0; i < sizeof newer.later; i += 21) {
        valid_call(&c, BSND_BSND);
        memset(newer.later, 0, sizeof newer.later);
        newer.later[i] = 1;
        check_sentence(lidx_run(context, &newer.args), LIDX_ERR_ARGUMENT, "lidx_args",
                       "a newer caller that sets a new field");
        CHECK(outputs_untouched(&c), "a newer caller: an output was touched");
    }
}

static void check_context(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    size_t bytes = 77;
    check_sentence(lidx_run(NULL, &c.args), LIDX_ERR_ARGUMENT, "context", "context NULL");
    check_sentence(lidx_run(context, NULL), LIDX_ERR_ARGUMENT, "args", "args NULL");
    CHECK(outputs_untouched(&c), "context NULL: an output was touched");
    check_sentence(lidx_workspace_size(NULL, &c.args, &bytes), LIDX_ERR_ARGUMENT, "context",
                   "workspace of no context");
    check_sentence(lidx_workspace_size(context, NULL, &bytes), LIDX_ERR_ARGUMENT, "args",
                   "workspace of no args");
    check_sentence(lidx_workspace_size(context, &c.args, NULL), LIDX_ERR_ARGUMENT, "bytes",
                   "workspace to nowhere");
    c.args.sparse_mode = 1;
    check_sentence(lidx_workspace_size(context, &c.args, &bytes), LIDX_ERR_OPTION, "sparse_mode",
                   "workspace of a bad call");
    CHECK_INT(bytes, 77, "workspace of a bad call");
    for (int pair = 0; pair < N_PAIRS; pair++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].data = NULL;
        bytes = 77;
        CHECK_INT(lidx_workspace_size(context, &c.args, &bytes), LIDX_OK, pair_name[pair]);
        CHECK_INT(bytes, 0, "workspace on the CPU");
    }
    lidx_destroy(NULL);
}

static void refuse_options(const struct lidx_options *options, int status, const char *mention,
                           const char *what) {
    struct lidx_context *made = context;
    check_sentence(lidx_create(&made, options), status, mention, what);
    CHECK(made == NULL, "%s: there is a context", what);
}

static void check_create(void) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *made = NULL;
    check_sentence(lidx_create(NULL, NULL), LIDX_ERR_ARGUMENT, "context", "create to nowhere");
    CHECK_INT(lidx_create(&made, NULL), LIDX_OK, "options NULL");
    lidx_destroy(made);
    static const int bad_threads[] = {-1, LIDX_MAX_THREADS + 1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 4; i++) {
        options.n_threads = bad_threads[i];
        refuse_options(&options, LIDX_ERR_OPTION, "n_threads", "n_threads");
    }
    options.n_threads = 0;
    static const char *const bad_kernels[] = {"nonsense", "Scalar", "scalar ", "avx", "cpu"};
    for (int i = 0; i < 5; i++) {
        options.kernel = bad_kernels[i];
        refuse_options(&options, LIDX_ERR_OPTION, "kernel", "kernel");
        char sentence[512]; /* lidx_kernel_info may leave another */
        snprintf(sentence, sizeof sentence, "%s", lidx_last_error());
        for (int k = 0; k < lidx_kernel_count(); k++) {
            struct lidx_kernel_info info = {.size = sizeof info};
            lidx_kernel_info(k, &info);
            CHECK(strstr(sentence, info.name), "\"%s\" lists %s", sentence, info.name);
        }
        setenv("LIDX_KERNEL", bad_kernels[i], 1);
        refuse_options(NULL, LIDX_ERR_OPTION, "kernel", "LIDX_KERNEL");
        unsetenv("LIDX_KERNEL");
    }
    setenv("LIDX_KERNEL", "nonsense", 1);
    options.kernel = "scalar";
    CHECK_INT(lidx_create(&made, &options), LIDX_OK, "an option goes before LIDX_KERNEL");
    lidx_destroy(made);
    setenv("LIDX_KERNEL", "", 1);
    CHECK_INT(lidx_create(&made, NULL), LIDX_OK, "an empty LIDX_KERNEL");
    lidx_destroy(made);
    unsetenv("LIDX_KERNEL");
    static const size_t bad_sizes[] = {0, 4, sizeof(struct lidx_options) - 1, SIZE_MAX};
    for (int i = 0; i < 4; i++) {
        options = (struct lidx_options)LIDX_OPTIONS_INIT;
        options.size = bad_sizes[i];
        refuse_options(&options, LIDX_ERR_ARGUMENT, "size", "options.size");
    }
}

static void check_kernel_info(void) {
    struct lidx_kernel_info info = {.size = sizeof info};
    int n = lidx_kernel_count(), usable = 0, chosen_bf16 = 0, chosen_fp16 = 0, scalar = 0;
    CHECK(n >= 1, "%d kernels", n);
    check_sentence(lidx_kernel_info(-1, &info), LIDX_ERR_ARGUMENT, "index", "kernel -1");
    check_sentence(lidx_kernel_info(n, &info), LIDX_ERR_ARGUMENT, "index", "kernel past the end");
    check_sentence(lidx_kernel_info(INT32_MIN, &info), LIDX_ERR_ARGUMENT, "index", "least kernel");
    check_sentence(lidx_kernel_info(0, NULL), LIDX_ERR_ARGUMENT, "info", "info NULL");
    info.size = sizeof info - 1;
    check_sentence(lidx_kernel_info(0, &info), LIDX_ERR_ARGUMENT, "info", "info.size");
    info.size = SIZE_MAX;
    check_sentence(lidx_kernel_info(0, &info), LIDX_ERR_ARGUMENT, "info", "info.size too large");
    struct {
        struct lidx_kernel_info info;
        unsigned char later[16];
    } newer;
    memset(&newer, 0x5A, sizeof newer);
    newer.info.size = sizeof newer - 8;
    CHECK_INT(lidx_kernel_info(0, &newer.info), LIDX_OK, "kernel info for a newer caller");
    CHECK(newer.info.size == sizeof newer - 8 && newer.info.name, "a newer caller: its own fields");
    for (int i = 0; i < 16; i++)
        CHECK_INT(newer.later[i], i < 8 ? 0 : 0x5A, "kernel info for a newer caller: byte behind");
    for (int i = 0; i < n; i++) {
        info = (struct lidx_kernel_info){.size = sizeof info};
        CHECK_INT(lidx_kernel_info(i, &info), LIDX_OK, "kernel info");
        CHECK(info.name && info.backend && info.reason && is_sentence(info.reason),
              "kernel %d says why", i);
        CHECK(info.available || (!info.chosen_bf16 && !info.chosen_fp16),
              "%s is chosen and not available", info.name);
        struct lidx_options options = LIDX_OPTIONS_INIT;
        char name[32];
        snprintf(name, sizeof name, "%s", info.name);
        options.kernel = name;
        if (!info.available)
            refuse_options(&options, LIDX_ERR_OPTION, name, "a kernel of another machine");
        if (strcmp(info.backend, "cpu") != 0)
            continue;
        int is_slow = strcmp(name, "avx512_bf16") == 0 &&
                      strstr(lidx_cpu_features(), "slow_vdpbf16ps") != NULL;
        if (info.available && !is_slow && usable++ == 0)
            CHECK(info.chosen_bf16 && info.chosen_fp16, "%s comes first and is not chosen", name);
        chosen_bf16 += info.chosen_bf16;
        chosen_fp16 += info.chosen_fp16;
        scalar += strcmp(name, "scalar") == 0 && info.available;
    }
    CHECK(chosen_bf16 == 1 && chosen_fp16 == 1 && scalar == 1,
          "of the CPU's kernels %d are chosen for bf16, %d for fp16, %d are scalar", chosen_bf16,
          chosen_fp16, scalar);
}

/* A feature that is there and not found leaves its kernels out of every test without a word. */
static void check_feature(const char *name, int is_there) {
    char found[256], word[32];
    snprintf(found, sizeof found, " %s ", lidx_cpu_features());
    snprintf(word, sizeof word, " %s ", name);
    CHECK((strstr(found, word) != NULL) == !!is_there, "features found:%s; %s is %sthere", found,
          name, is_there ? "" : "not ");
}

/* Against the compiler's own look at this CPU. */
static void check_features(void) {
    CHECK(lidx_cpu_features() != NULL, "features");
#if defined(__x86_64__)
    int avx2 = __builtin_cpu_supports("avx2"),
        avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    check_feature("avx2", avx2);
    check_feature("fma", __builtin_cpu_supports("fma"));
    check_feature("f16c", avx2); /* no CPU has AVX2 without it */
    check_feature("avx512", avx512);
    check_feature("avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"));
#elif defined(__aarch64__)
    check_feature("neon", 1);
#else
    (void)check_feature;
#endif
}

static void check_names(void) {
    static const char *const name[] = {
        "LIDX_OK",         "LIDX_ERR_ARGUMENT",  "LIDX_ERR_LAYOUT", "LIDX_ERR_SHAPE",
        "LIDX_ERR_DTYPE",  "LIDX_ERR_STRIDE",    "LIDX_ERR_OPTION", "LIDX_ERR_VALUE",
        "LIDX_ERR_DEVICE", "LIDX_ERR_WORKSPACE", "LIDX_ERR_MEMORY", "LIDX_ERR_CUDA"};
    char version[32];
    for (int i = 0; i < 12; i++)
        CHECK_STRING(lidx_status_name(i), name[i], "status name");
    CHECK(lidx_status_name(-1) && lidx_status_name(12) && lidx_status_name(INT32_MAX) &&
              lidx_status_name(INT32_MIN),
          "names of numbers that are no status");
    snprintf(version, sizeof version, "%d.%d.%d", LIDX_VERSION_MAJOR, LIDX_VERSION_MINOR,
             LIDX_VERSION_PATCH);
    CHECK_STRING(lidx_version(), version, "version");
}

static void *fail_elsewhere(void *sentence) {
    lidx_run(NULL, NULL);
    snprintf(sentence, 512, "%s", lidx_last_error());
    return NULL;
}

static void check_error_is_per_thread(void) {
    struct call c;
    char mine[512], theirs[512] = "";
    pthread_t thread;
    valid_call(&c, BSND_BSND);
    c.args.sparse_mode = 77;
    refuse(context, &c, LIDX_ERR_OPTION, "sparse_mode", "sparse_mode");
    snprintf(mine, sizeof mine, "%s", lidx_last_error());
    CHECK_INT(pthread_create(&thread, NULL, fail_elsewhere, theirs), 0, "thread");
    pthread_join(thread, NULL);
    CHECK_STRING(lidx_last_error(), mine, "this thread's sentence");
    CHECK(strstr(theirs, "context"), "the other thread's is \"%s\"", theirs);
}

int main(void) {
    CHECK(lidx_last_error() != NULL, "a sentence before any error");
    if (!CHECK(lidx_create(&context, NULL) == LIDX_OK, "%s", lidx_last_error()))
        return test_end();
    check_struct_size();
    check_context();
    check_create();
    check_kernel_info();
    check_features();
    check_names();
    check_error_is_per_thread();
    lidx_destroy(context);
    return test_end();
}
