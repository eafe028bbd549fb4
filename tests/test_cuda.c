/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend, each kernel that this GPU can run, through the public interface:
 *
 *   random     scenarios in every layout against the float64 oracle; then the same rows in other
 *              layouts, batches, pages and pieces, down to single decode steps: bit for bit
 *   data       each kind of adversarial numbers at lengths where the selection works hard
 *
 * The options are cuda_device.h's.
 */
#include "cuda_device.h"

#include "answers.h"
#include "oracle.h"

enum { VARIANTS = 3 };

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
    if (run_rendering(kernel, &r, rng))
        answers_check(a, s, &r, &f, "case %ld, %s, %s, run as %s", number, kernel->name, name,
                      text);
}

/* One scenario on all kernels: against the oracle in a first form, then in other forms. */
static void run_scenario(long number, const struct scenario *s, struct rng *rng, int variants) {
    char name[TEXT], why[TEXT], text[TEXT];
    struct answers answers;
    struct form f = {0};
    struct rendering r;
    scenario_text(s, name, sizeof name);
    answers_make(&answers, s);
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
        if (!run_rendering(&kernels[i], &r, &form_rng))
            continue;
        if (!CHECK(!oracle_check(oracle, &r.args, why, sizeof why), "case %ld, %s, %s, %s: %s",
                   number, kernels[i].name, name, text, why))
            continue;
        CHECK(rendering_gaps_intact(&r), "case %ld, %s: bytes between rows were written", number,
              kernels[i].name);
        answers_keep(&answers, s, &r, &f);
        for (int v = 0; v < variants; v++)
            check_variant(number, s, name, &kernels[i], &answers, &form_rng);
    }
    oracle_free(oracle);
    answers_free(&answers, s);
}

static void check_random(long first, long cases) {
    for (long number = first; number < first + cases; number++) {
        struct rng rng = rng_seed((uint64_t)number * 6151 + 3);
        struct scenario s;
        scenario_make(&s, &rng, number % 20 == 19 ? 2e7 : 6e5);
        run_scenario(number, &s, &rng, options.sanitizer ? 1 : VARIANTS);
        scenario_free(&s);
    }
}

/* ---- each kind of data at lengths where the selection works hard ----------------------------- */

static void check_data(void) {
    static const struct {
        int n_heads, head_dim, top_k, n_batch;
        int64_t n_query, n_key;
    } shapes[] = {
        {8, 64, 2048, 2, 20, 9000},  {1, 64, 8192, 1, 3, 40000}, {64, 128, 600, 1, 70, 1500},
        {3, 128, 2048, 1, 2, 70000}, {128, 128, 64, 2, 5, 900},
    };
    int n_shapes = (int)(sizeof shapes / sizeof shapes[0]);
    for (int i = 0; i < DATA_KINDS * n_shapes; i++) {
        if ((options.quick && i % n_shapes > 1) || (options.sanitizer && i % (7 * n_shapes) != 0))
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

int main(int argc, char **argv) {
    if (!device_open(argc, argv))
        return 77;
    long cases = options.sanitizer ? 8 : options.quick ? 100 : 1200;
    check_random(options.first, options.cases >= 0 ? options.cases : cases);
    SAY("random");
    if (options.first == 0)
        check_data();
    SAY("data");
    CHECK(device_close(), "a kernel took nothing");
    return test_end();
}
