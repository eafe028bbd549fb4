/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole operator, on every CPU kernel of this machine, against the float64 oracle, and against
 * itself: the same rows alone, in a batch, in another order, in each layout, on other pages, with
 * 1 to 8 threads, as pieces of a prefill and as decode steps must have the same bits.
 *
 *     test_operator [--cases N] [--first N] [--kernel NAME] [--environment 0]
 *
 * A failure names its case; `--first CASE --cases 1` runs it alone. LIDX_TEST_CASES sets N too.
 * `--environment 0` leaves rounding modes alone, which valgrind does not model.
 */
#include "scenario.h"

#include <fenv.h>

#include "answers.h"
#include "oracle.h"

enum { MAX_KERNELS = 16, N_THREADS = 6, TEXT = 400, VARIANTS = 3 };

static const int thread_counts[N_THREADS] = {1, 2, 3, 4, 7, 8};

struct kernel {
    char name[32];
    struct lidx_context *context[N_THREADS];
};

static struct kernel kernels[MAX_KERNELS];
static int n_kernels;
static long n_runs, n_rows, n_exact_rows;

static struct lidx_context *context_of(struct kernel *kernel, int i) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    options.n_threads = thread_counts[i];
    options.kernel = kernel->name;
    if (!kernel->context[i] && lidx_create(&kernel->context[i], &options) != LIDX_OK) {
        printf("no context for %s with %d threads: %s\n", kernel->name, thread_counts[i],
               lidx_last_error());
        exit(EXIT_FAILURE);
    }
    return kernel->context[i];
}

static void find_kernels(const char *only) {
    for (int i = 0; i < lidx_kernel_count() && n_kernels < MAX_KERNELS; i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        CHECK_INT(lidx_kernel_info(i, &info), LIDX_OK, "kernel info");
        if (strcmp(info.backend, "cpu") != 0 || !info.available)
            continue;
        if (only && strcmp(only, info.name) != 0)
            continue;
        snprintf(kernels[n_kernels++].name, sizeof kernels[0].name, "%s", info.name);
    }
    CHECK(n_kernels > 0, "no kernel to test");
}

static int run(struct kernel *kernel, int threads, struct rendering *r) {
    rendering_poison(r);
    n_runs++;
    int status = lidx_run(context_of(kernel, threads), &r->args);
    if (status != LIDX_OK)
        printf("%s: %s\n", lidx_status_name(status), lidx_last_error());
    return status;
}

struct trial {
    long number;
    struct scenario scenario;
    char text[TEXT];
};

/* All rows of another form against the first form's, bit by bit. */
static void check_variant(struct trial *t, struct kernel *kernel, const struct answers *a,
                          struct rng *rng) {
    const struct scenario *s = &t->scenario;
    struct form f = {0};
    struct rendering r;
    char text[TEXT];
    form_random_layout(&f, rng);
    form_random_segments(&f, s, rng);
    form_text(&f, text, sizeof text);
    rendering_make(&r, s, &f, rng);
    int threads = (int)rng_below(rng, N_THREADS);
    if (!CHECK(run(kernel, threads, &r) == LIDX_OK, "case %ld, %s: %s", t->number, t->text, text))
        return;
    for (int g = 0; g < f.n_segments; g++)
        for (int64_t i = 0; i < f.segment[g].n_rows; i++) {
            int64_t slot = answers_difference(a, s, &r, &f, g, i);
            if (!CHECK(slot < 0,
                       "case %ld, %s, %s, %d threads: row %lld of batch %d differs in slot %lld "
                       "when run as %s",
                       t->number, kernel->name, t->text, thread_counts[threads],
                       (long long)(f.segment[g].row + i), f.segment[g].batch, (long long)slot,
                       text))
                return;
        }
    CHECK(rendering_gaps_intact(&r), "case %ld, %s: bytes between rows were written", t->number,
          kernel->name);
}

/* Against the oracle, in a form with float32 values; keeps the answers. */
static int check_first(struct trial *t, struct kernel *kernel, struct rendering *r,
                       const struct form *f, const struct oracle *oracle) {
    char why[TEXT], text[TEXT];
    form_text(f, text, sizeof text);
    int ran = run(kernel, (int)(t->number % N_THREADS), r) == LIDX_OK;
    if (!CHECK(ran, "case %ld, %s: %s", t->number, t->text, text))
        return 0;
    int is_wrong = oracle_check(oracle, &r->args, why, sizeof why);
    if (!CHECK(!is_wrong, "case %ld, %s, %s, %s: %s", t->number, kernel->name, t->text, text, why))
        return 0;
    return CHECK(rendering_gaps_intact(r), "case %ld, %s: bytes between rows were written",
                 t->number, kernel->name);
}

static void run_trial(long number) {
    struct rng rng = rng_seed((uint64_t)number * 7919 + 1);
    struct trial t = {.number = number};
    struct answers answers;
    scenario_make(&t.scenario, &rng, number % 50 == 49 ? 1e7 : 6e5);
    scenario_text(&t.scenario, t.text, sizeof t.text);
    answers_make(&answers, &t.scenario);
    struct form f = {0};
    struct rendering r;
    form_whole(&f, &t.scenario);
    form_random_layout(&f, &rng);
    f.values = 1;
    struct rng form_rng = rng;
    rendering_make(&r, &t.scenario, &f, &form_rng);
    struct oracle *oracle = oracle_make(&r.args);
    n_rows += oracle_rows(oracle);
    n_exact_rows += oracle_exact_rows(oracle);
    for (int i = 0; i < n_kernels; i++) {
        form_rng = rng;
        rendering_make(&r, &t.scenario, &f, &form_rng);
        if (!check_first(&t, &kernels[i], &r, &f, oracle))
            continue;
        if ((number + i) % 2 && n_kernels > 1)
            continue; /* half of the kernels each time */
        answers_keep(&answers, &t.scenario, &r, &f);
        for (int v = 0; v < VARIANTS; v++)
            check_variant(&t, &kernels[i], &answers, &form_rng);
    }
    oracle_free(oracle);
    answers_free(&answers, &t.scenario);
    scenario_free(&t.scenario);
}

/* A broadcast key: batch stride 0, all batches read the same keys. */
static void check_broadcast(void) {
    enum { B = 3, S1 = 2, S2 = 200, H = 5, D = 64, K = 17 };
    struct rng rng = rng_seed(5);
    static uint16_t query[B * S1 * H * D], key[S2 * D], weights[B * S1 * H];
    static int32_t indices[B * S1 * K];
    for (int i = 0; i < B * S1 * H * D; i++)
        query[i] = test_to_bf16(rng_normal(&rng));
    for (int i = 0; i < S2 * D; i++)
        key[i] = test_to_bf16(rng_normal(&rng));
    for (int i = 0; i < B * S1 * H; i++)
        weights[i] = test_to_bf16(rng_normal(&rng));
    const struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, int32 = {LIDX_INT, 32, 1};
    int64_t query_shape[] = {B, S1, H, D}, key_shape[] = {B, S2, 1, D}, weights_shape[] = {B, S1, H};
    int64_t out_shape[] = {B, S1, 1, K}, key_stride[] = {0, D, D, 1};
    struct lidx_tensor q = {query, {LIDX_CPU, 0}, 4, bf16, query_shape, NULL, 0};
    struct lidx_tensor k = {key, {LIDX_CPU, 0}, 4, bf16, key_shape, key_stride, 0};
    struct lidx_tensor w = {weights, {LIDX_CPU, 0}, 3, bf16, weights_shape, NULL, 0};
    struct lidx_tensor o = {indices, {LIDX_CPU, 0}, 4, int32, out_shape, NULL, 0};
    struct lidx_args args = LIDX_ARGS_INIT;
    char why[TEXT];
    args.query = &q, args.key = &k, args.weights = &w, args.sparse_indices = &o;
    args.sparse_count = K;
    struct oracle *oracle = oracle_make(&args);
    for (int i = 0; i < n_kernels; i++) {
        CHECK_INT(lidx_run(context_of(&kernels[i], 1), &args), LIDX_OK, "broadcast key");
        CHECK(!oracle_check(oracle, &args, why, sizeof why), "broadcast key, %s: %s",
              kernels[i].name, why);
    }
    oracle_free(oracle);
}

#if defined(__SSE2__)
#include <xmmintrin.h>
#define FLUSH_TO_ZERO 0x8040u
static void flush_denormals(int on) {
    _mm_setcsr(on ? _mm_getcsr() | FLUSH_TO_ZERO : _mm_getcsr() & ~FLUSH_TO_ZERO);
}
static int flushes_denormals(void) {
    return (_mm_getcsr() & FLUSH_TO_ZERO) == FLUSH_TO_ZERO;
}
#else
static void flush_denormals(int on) {
    (void)on;
}
static int flushes_denormals(void) {
    return 1;
}
#endif

/* The calling thread's rounding mode and flush-to-zero are its own affair: they neither reach the
 * scores nor change through a run. */
static void check_float_environment(void) {
    static const int modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    for (int c = 0; c < 40; c++) {
        struct rng rng = rng_seed((uint64_t)c + 77);
        struct scenario s;
        struct answers answers;
        scenario_make(&s, &rng, 2e5);
        answers_make(&answers, &s);
        struct form f = {0};
        struct rendering r;
        form_whole(&f, &s);
        form_random_layout(&f, &rng);
        f.values = 1;
        rendering_make(&r, &s, &f, &rng);
        for (int i = 0; i < n_kernels; i++) {
            run(&kernels[i], 0, &r);
            answers_keep(&answers, &s, &r, &f);
            fesetround(modes[c % 3]);
            flush_denormals(1);
            int status = run(&kernels[i], c % N_THREADS, &r);
            int kept = fegetround() == modes[c % 3] && flushes_denormals();
            flush_denormals(0);
            fesetround(FE_TONEAREST);
            CHECK_INT(status, LIDX_OK, "run under another rounding mode");
            CHECK(kept, "%s changed the caller's floating-point environment", kernels[i].name);
            int64_t differing = 0;
            for (int g = 0; g < f.n_segments; g++)
                for (int64_t row = 0; row < f.segment[g].n_rows; row++)
                    differing += answers_difference(&answers, &s, &r, &f, g, row) >= 0;
            CHECK(differing == 0, "%s: %lld rows depend on the caller's rounding mode (%s)",
                  kernels[i].name, (long long)differing, data_kind_name[s.kind]);
        }
        answers_free(&answers, &s);
        scenario_free(&s);
    }
}

int main(int argc, char **argv) {
    const char *cases_text = getenv("LIDX_TEST_CASES"), *only = NULL;
    long cases = cases_text ? atol(cases_text) : 2000, first = 0, environment = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--cases") == 0)
            cases = atol(argv[i + 1]);
        else if (strcmp(argv[i], "--first") == 0)
            first = atol(argv[i + 1]);
        else if (strcmp(argv[i], "--kernel") == 0)
            only = argv[i + 1];
        else if (strcmp(argv[i], "--environment") == 0)
            environment = atol(argv[i + 1]);
    }
    find_kernels(only);
    check_broadcast();
    if (environment)
        check_float_environment();
    for (long number = first; number < first + cases; number++)
        run_trial(number);
    for (int i = 0; i < n_kernels; i++) {
        printf("%s%s", i ? ", " : "kernels: ", kernels[i].name);
        for (int j = 0; j < N_THREADS; j++)
            lidx_destroy(kernels[i].context[j]);
    }
    rendering_release();
    printf("\n%ld cases, %ld runs, %ld rows against the oracle, %ld of them exact\n", cases, n_runs,
           n_rows, n_exact_rows);
    return test_end();
}
