/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole operator, on every CPU kernel of this machine, against the float64 oracle, and against
 * itself: the same rows alone, in a batch, in another order, in each layout, on other pages, with
 * 1 to 8 threads, as pieces of a prefill and as decode steps must have the same bits.
 *
 *     test_operator [--cases N] [--first N] [--kernel NAME]
 *
 * A case that fails is followed by the command that runs it alone. LIDX_TEST_CASES sets N too.
 */
#include "scenario.h"

#include "answers.h"
#include "contexts.h"
#include "oracle.h"

enum { N_THREADS = 6, TEXT = 400, VARIANTS = 3 };

static const int thread_counts[N_THREADS] = {1, 2, 3, 4, 7, 8};

struct kernel {
    const char *name;
    struct lidx_context *context[N_THREADS];
};

static struct kernel kernels[MAX_KERNELS];
static int n_kernels;
static long n_runs, n_rows, n_exact_rows;

static struct lidx_context *context_of(struct kernel *kernel, int i) {
    if (!kernel->context[i])
        kernel->context[i] = make_context(kernel->name, thread_counts[i]);
    return kernel->context[i];
}

static void open_kernels(const char *only) {
    static char names[MAX_KERNELS][KERNEL_NAME];
    n_kernels = find_kernels("cpu", only, names);
    for (int i = 0; i < n_kernels; i++)
        kernels[i].name = names[i];
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
    if (CHECK(run(kernel, threads, &r) == LIDX_OK, "case %ld, %s: %s", t->number, t->text, text))
        answers_check(a, s, &r, &f, "case %ld, %s, %s, %d threads, run as %s", t->number,
                      kernel->name, t->text, thread_counts[threads], text);
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

/* All kernels on one case; random data depend on its number alone. */
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
        long failed = test_failed;
        form_rng = rng;
        rendering_make(&r, &t.scenario, &f, &form_rng);
        int is_right = check_first(&t, &kernels[i], &r, &f, oracle);
        if (is_right && (n_kernels == 1 || (number + i) % 2 == 0)) { /* half of them each time */
            answers_keep(&answers, &t.scenario, &r, &f);
            for (int v = 0; v < VARIANTS; v++)
                check_variant(&t, &kernels[i], &answers, &form_rng);
        }
        if (test_failed > failed && failed < TEST_SHOWN)
            printf("    again: test_operator --first %ld --cases 1 --kernel %s\n", number,
                   kernels[i].name);
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
    int64_t query_shape[] = {B, S1, H, D}, key_shape[] = {B, S2, 1, D},
            weights_shape[] = {B, S1, H};
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

/* One batch, everything visible. */
struct small_case {
    int n_query, n_heads, head_dim, n_key;
    uint16_t *query, *key;
    float *weights;
    int32_t *indices;
    float *values;
};

static void run_case(const struct small_case *c, struct kernel *kernel, int is_bf16, int threads,
                     int top_k) {
    const struct lidx_dtype half = {(uint8_t)(is_bf16 ? LIDX_BFLOAT : LIDX_FLOAT), 16, 1},
                            int32 = {LIDX_INT, 32, 1}, f32 = {LIDX_FLOAT, 32, 1};
    int64_t query_shape[] = {1, c->n_query, c->n_heads, c->head_dim};
    int64_t key_shape[] = {1, c->n_key, 1, c->head_dim}, out_shape[] = {1, c->n_query, 1, top_k};
    struct lidx_tensor q = {c->query, {LIDX_CPU, 0}, 4, half, query_shape, NULL, 0};
    struct lidx_tensor k = {c->key, {LIDX_CPU, 0}, 4, half, key_shape, NULL, 0};
    struct lidx_tensor w = {c->weights, {LIDX_CPU, 0}, 3, f32, query_shape, NULL, 0};
    struct lidx_tensor o = {c->indices, {LIDX_CPU, 0}, 4, int32, out_shape, NULL, 0};
    struct lidx_tensor v = {c->values, {LIDX_CPU, 0}, 4, f32, out_shape, NULL, 0};
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &q, args.key = &k, args.weights = &w;
    args.sparse_indices = &o, args.sparse_values = &v;
    args.sparse_count = top_k, args.sparse_mode = LIDX_MODE_FULL;
    CHECK_INT(lidx_run(context_of(kernel, threads), &args), LIDX_OK, "a small case");
}

static void fill_nan_case(struct small_case *c, struct rng *rng, int is_bf16) {
    for (int i = 0; i < c->n_query * c->n_heads * c->head_dim; i++)
        c->query[i] = test_to_half(rng_normal(rng), is_bf16);
    for (int i = 0; i < c->n_key * c->head_dim; i++)
        c->key[i] = test_to_half(rng_normal(rng), is_bf16);
    for (int i = 0; i < c->n_query * c->n_heads; i++)
        c->weights[i] = rng_below(rng, 4) ? rng_normal(rng) : 0.0f;
}

/* Either all scores are NaN, or those of the keys from nan_keys on. */
static void check_nan_rows(const struct small_case *c, int all_nan, int nan_keys,
                           const char *what) {
    int wrong = 0;
    for (int i = 0; i < c->n_query; i++)
        for (int j = all_nan ? 0 : nan_keys; j < c->n_key; j++) {
            int at = i * c->n_key + j;
            wrong += !isnan(c->values[at]) || c->indices[at] != j;
        }
    for (int i = 0; i < c->n_query && !all_nan; i++)
        for (int j = 0; j < nan_keys; j++)
            wrong += isnan(c->values[i * c->n_key + j]);
    CHECK(wrong == 0, "%s: %d slots are wrong", what, wrong);
}

/* A NaN in any position of a query, a key or the weights makes the score NaN, which ranks last and
 * by position. Rows, or keys behind some clean ones, have it in each place in turn. */
static void check_nan_everywhere(struct kernel *kernel, int is_bf16, int head_dim) {
    enum { HEADS = 5, CLEAN = 7, MOST = HEADS * 128, QUERY = 0, KEY = 1, WEIGHTS = 2 };
    static const char *const name[] = {"query", "key", "weights"};
    static uint16_t query[MOST * HEADS * 128], key[(CLEAN + 128) * 128];
    static float weights[MOST * HEADS], values[MOST * (CLEAN + 128)];
    static int32_t indices[MOST * (CLEAN + 128)];
    uint16_t nan = is_bf16 ? 0x7FC1 : 0x7E01;
    struct rng rng = rng_seed(3);
    for (int place = QUERY; place <= WEIGHTS; place++) {
        int n_query = place == QUERY ? HEADS * head_dim : place == KEY ? 2 : HEADS;
        struct small_case c = {n_query, HEADS,   head_dim, CLEAN, query,
                               key,     weights, indices,  values};
        c.n_key += place == KEY ? head_dim : 0;
        fill_nan_case(&c, &rng, is_bf16);
        for (int i = 0; place == QUERY && i < n_query; i++)
            query[i * HEADS * head_dim + i] = nan;
        for (int j = CLEAN; j < c.n_key; j++)
            key[j * head_dim + j - CLEAN] = nan;
        for (int i = 0; place == WEIGHTS && i < n_query; i++)
            weights[i * HEADS + i] = NAN;
        run_case(&c, kernel, is_bf16, 1, c.n_key);
        char what[TEXT];
        snprintf(what, sizeof what, "%s, %s, D %d, NaN in every place of %s", kernel->name,
                 is_bf16 ? "bf16" : "fp16", head_dim, name[place]);
        check_nan_rows(&c, place != KEY, CLEAN, what);
    }
}

/* Scores of one to n times the least float32 denormal: products of normal numbers and a denormal
 * weight. Nothing on the way may take them for 0. */
static void check_denormal_scores(struct kernel *kernel, int is_bf16) {
    enum { D = 64, N = 40 };
    static uint16_t query[D], key[N * D];
    float weight = 0x1p-149f, values[N];
    int32_t indices[N];
    struct small_case c = {1, 1, D, N, query, key, &weight, indices, values};
    query[0] = test_to_half(1, is_bf16);
    for (int j = 0; j < N; j++)
        key[j * D] = test_to_half((float)(j + 1), is_bf16);
    run_case(&c, kernel, is_bf16, 1, c.n_key);
    int wrong = 0;
    for (int i = 0; i < N; i++)
        wrong += indices[i] != N - 1 - i || values[i] != (float)(N - i) * 0x1p-149f;
    CHECK(wrong == 0, "%s, %s: %d denormal scores are wrong", kernel->name,
          is_bf16 ? "bf16" : "fp16", wrong);
}

/* The answer of several threads, in n slots, against that of one: the same bits. */
static void check_team(const struct small_case *c, const struct small_case *one, int n,
                       const char *what) {
    int at = 0;
    while (at < n && c->indices[at] == one->indices[at] &&
           test_float_bits(c->values[at]) == test_float_bits(one->values[at]))
        at++;
    CHECK(at == n, "%s: slot %d is key %d (%g), of one thread %d (%g)", what, at,
          c->indices[at % n], (double)c->values[at % n], one->indices[at % n],
          (double)one->values[at % n]);
}

/* One row of many keys, long enough for every thread to take part in it, with its best keys all in
 * one place: what one thread found is then the answer, to its last key, whatever the rest bring. */
static void check_one_place(struct kernel *kernel, int n_key, int first, int repeats) {
    enum { HEADS = 32, D = 64, N = 16000, K = 100, BEST = 120, THREADS = 2 };
    static uint16_t query[HEADS * D], key[N * D];
    static float weights[HEADS], loud[HEADS], values[2][K];
    static int32_t indices[2][K];
    struct rng rng = rng_seed((uint64_t)first);
    for (int h = 0; h < HEADS; h++) {
        query[h * D] = query[h * D + 1] = test_to_bf16(1);
        weights[h] = h % 2 ? 0.5f : 1;
        loud[h] = 1024 * weights[h];
    }
    for (int j = 0; j < n_key; j++) {
        key[j * D] = test_to_bf16((float)rng_below(&rng, 100));
        key[j * D + 1] = test_to_bf16(j >= first && j < first + BEST ? 200 : 0);
    }
    struct small_case one = {1, HEADS, D, n_key, query, key, weights, indices[0], values[0]};
    run_case(&one, kernel, 1, 0, K);
    for (int i = 0; i < K; i++)
        CHECK(indices[0][i] >= first && indices[0][i] < first + BEST, "%s: slot %d is %d",
              kernel->name, i, indices[0][i]);
    struct small_case c = one;
    c.indices = indices[1], c.values = values[1];
    for (int repeat = 0; repeat < repeats; repeat++)
        for (int threads = THREADS; threads < N_THREADS; threads++) {
            char what[TEXT];
            snprintf(what, sizeof what, "%s, %d threads, best keys from %d on", kernel->name,
                     thread_counts[threads], first);
            /* Leaves higher scores behind in the context's memory, which must not be seen. */
            c.weights = loud;
            run_case(&c, kernel, 1, threads, K);
            c.weights = weights;
            run_case(&c, kernel, 1, threads, K);
            check_team(&c, &one, K, what);
        }
}

/* Many tokens and the largest k: fewer rows than else make a block, so that all of them fit into
 * the memory of the thread that is at it and leave its neighbour's alone. */
static void check_wide_rows(struct kernel *kernel) {
    enum { D = 64, TOKENS = 72, N = 30000, K = LIDX_MAX_TOP_K, SLOTS = TOKENS * K };
    static uint16_t query[TOKENS * D], key[N * D];
    static float weights[TOKENS], values[2][SLOTS];
    static int32_t indices[2][SLOTS];
    struct rng rng = rng_seed(4);
    for (int i = 0; i < TOKENS * D; i++)
        query[i] = test_to_bf16(rng_normal(&rng));
    for (int i = 0; i < N * D; i++)
        key[i] = test_to_bf16(rng_normal(&rng));
    for (int i = 0; i < TOKENS; i++)
        weights[i] = 1;
    struct small_case one = {TOKENS, 1, D, N, query, key, weights, indices[0], values[0]}, c = one;
    c.indices = indices[1], c.values = values[1];
    run_case(&one, kernel, 1, 0, K);
    run_case(&c, kernel, 1, 1, K);
    check_team(&c, &one, SLOTS, "72 tokens, k 8192, 2 threads");
}

int main(int argc, char **argv) {
    const char *cases_text = getenv("LIDX_TEST_CASES"), *only = NULL;
    long cases = cases_text ? atol(cases_text) : 2000, first = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--cases") == 0)
            cases = atol(argv[i + 1]);
        else if (strcmp(argv[i], "--first") == 0)
            first = atol(argv[i + 1]);
        else if (strcmp(argv[i], "--kernel") == 0)
            only = argv[i + 1];
    }
    int n_key = cases_text ? 4000 : 16000; /* emulators, sanitizers */
    open_kernels(only);
    check_broadcast();
    for (int i = 0; i < n_kernels; i++) {
        for (int type = 0; type < 4; type++)
            check_nan_everywhere(&kernels[i], type & 1, type & 2 ? 64 : 128);
        check_denormal_scores(&kernels[i], 0);
        check_denormal_scores(&kernels[i], 1);
        for (int place = 0; place < 3; place++)
            check_one_place(&kernels[i], n_key, place * (n_key - 120) / 2, cases_text ? 1 : 4);
        if (!cases_text)
            check_wide_rows(&kernels[i]);
    }
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
