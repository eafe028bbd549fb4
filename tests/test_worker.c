/* SPDX-License-Identifier: Apache-2.0
 *
 * What the worker owes a kernel, on machines without AMX too, whose kernel alone takes two query
 * tokens at once: a kernel of two rows that stands beside scalar in a table of its own, does what
 * scalar does and watches how it is called. Its answers must be scalar's, bit by bit.
 *
 *     test_worker [CASES]
 */
#include "test.h"

#include "../src/cpu/kernels.h"

#include "answers.h"
#include "contexts.h"

enum { TILE = 96, AHEAD = 64 }; /* small tiles, so that small cases have many */

/* ---- the table ------------------------------------------------------------------------------- */

static struct kernel pairs; /* scalar, and what follows below */

const struct kernel *const lidx_kernels[] = {&pairs, &lidx_kernel_scalar, NULL};

const struct kernel *lidx_kernel_choose(const char *forced) {
    return forced && strcmp(forced, "scalar") == 0 ? &lidx_kernel_scalar : &pairs;
}

int lidx_kernel_usable(const struct kernel *kernel) {
    return kernel != NULL;
}

const char *lidx_kernel_reason(const struct kernel *kernel) {
    return kernel->name;
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Counted by all threads, and looked at between runs. */
static _Atomic long n_twos, n_aheads;
static _Atomic long n_misaligned, n_too_long, n_not_fetched, n_outside;
static _Atomic long n_inside; /* threads between enter() and leave() */

static _Thread_local int is_inside;

/* What a thread was last told comes next. */
static _Thread_local const void *next[AHEAD];
static _Thread_local int n_next;

static void enter(void) {
    n_inside++;
    is_inside++;
}

static void leave(void) {
    n_inside--;
    is_inside--;
}

static void watch(const float *score, const void *packed, const struct key_run *run) {
    const int blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    n_misaligned += ((uintptr_t)score | (uintptr_t)packed) % 64 != 0;
    n_outside += is_inside != 1;
    n_too_long += run->n_keys < 1 || run->n_keys > TILE || run->n_ahead > AHEAD;
    for (int i = 0; i < n_next && i < blocks; i++)
        n_not_fetched += run->block[i] != next[i];
    n_next = run->n_ahead;
    for (int i = 0; i < n_next && i < AHEAD; i++)
        next[i] = run->block[blocks + i];
    n_aheads += run->n_ahead > 0;
}

static void score_one(int dtype, float *score, const void *packed, int n_heads, int head_dim,
                      const struct key_run *run) {
    watch(score, packed, run);
    lidx_kernel_scalar.path[dtype].score(score, packed, n_heads, head_dim, run);
}

static void score_bf16(float *score, const void *packed, int n_heads, int head_dim,
                       const struct key_run *run) {
    score_one(DTYPE_BF16, score, packed, n_heads, head_dim, run);
}

static void score_fp16(float *score, const void *packed, int n_heads, int head_dim,
                       const struct key_run *run) {
    score_one(DTYPE_FP16, score, packed, n_heads, head_dim, run);
}

static void score_two(int dtype, float *const score[2], const void *const packed[2], int n_heads,
                      int head_dim, const struct key_run *run) {
    n_twos++;
    watch(score[0], packed[0], run);
    n_misaligned += ((uintptr_t)score[1] | (uintptr_t)packed[1]) % 64 != 0;
    for (int i = 0; i < 2; i++)
        lidx_kernel_scalar.path[dtype].score(score[i], packed[i], n_heads, head_dim, run);
}

static void score_two_bf16(float *const score[2], const void *const packed[2], int n_heads,
                           int head_dim, const struct key_run *run) {
    score_two(DTYPE_BF16, score, packed, n_heads, head_dim, run);
}

static void score_two_fp16(float *const score[2], const void *const packed[2], int n_heads,
                           int head_dim, const struct key_run *run) {
    score_two(DTYPE_FP16, score, packed, n_heads, head_dim, run);
}

static void make_kernel(void) {
    pairs = lidx_kernel_scalar;
    pairs.name = "pairs";
    pairs.enter = enter;
    pairs.leave = leave;
    pairs.path[DTYPE_BF16].score = score_bf16;
    pairs.path[DTYPE_FP16].score = score_fp16;
    pairs.score_two[DTYPE_BF16] = score_two_bf16;
    pairs.score_two[DTYPE_FP16] = score_two_fp16;
    pairs.shares_keys[DTYPE_BF16] = pairs.shares_keys[DTYPE_FP16] = 1;
    pairs.tile_keys = TILE;
}

/* ---- cases ----------------------------------------------------------------------------------- */

/* More keys than scores can wait in the rows' buffers, so that the last go through the worker's. */
static void make_long(struct scenario *s, struct rng *rng) {
    *s = (struct scenario){.is_bf16 = 1,
                           .weights_f32 = 1,
                           .n_heads = 2,
                           .head_dim = 64,
                           .top_k = (int)rng_between(rng, 1, 100),
                           .mode = rng_below(rng, 2) ? 3 : 0,
                           .n_batch = 1,
                           .kind = DATA_NORMAL,
                           .n_query = {rng_between(rng, 2, 5)},
                           .n_key = {rng_between(rng, 3000, 5000)}};
    scenario_fill(s, rng);
}

static void check_case(long number, struct lidx_context *scalar,
                       struct lidx_context *const watched[2]) {
    struct rng rng = rng_seed((uint64_t)number * 13 + 5);
    struct scenario s;
    struct form f = {0};
    struct rendering r;
    struct answers answers;
    if (number % 20 == 19)
        make_long(&s, &rng);
    else
        scenario_make(&s, &rng, 3e5);
    form_whole(&f, &s);
    form_random_layout(&f, &rng);
    f.values = 1;
    rendering_make(&r, &s, &f, &rng);
    answers_make(&answers, &s);
    if (CHECK(lidx_run(scalar, &r.args) == LIDX_OK, "case %ld: %s", number, lidx_last_error())) {
        answers_keep(&answers, &s, &r, &f);
        for (int i = 0; i < 2; i++) {
            n_misaligned = n_too_long = n_not_fetched = n_outside = 0;
            rendering_poison(&r);
            CHECK_INT(lidx_run(watched[i], &r.args), LIDX_OK, "a case");
            answers_check(&answers, &s, &r, &f, "case %ld, %s", number,
                          i ? "4 threads" : "1 thread");
            CHECK(!n_misaligned, "case %ld: scores or queries not aligned", number);
            CHECK(!n_outside && !n_inside, "case %ld: called before enter() or after leave()",
                  number);
            CHECK(!n_too_long, "case %ld: a tile of more keys than were asked for", number);
            CHECK(!n_not_fetched, "case %ld: keys ahead are not those that come next", number);
        }
    }
    answers_free(&answers, &s);
    scenario_free(&s);
}

int main(int argc, char **argv) {
    const char *text = argc > 1 ? argv[1] : getenv("LIDX_TEST_CASES");
    long cases = text ? atol(text) : 300;
    make_kernel();
    struct lidx_context *scalar = make_context("scalar", 1);
    struct lidx_context *watched[2] = {make_context("pairs", 1), make_context("pairs", 4)};
    for (long number = 0; number < cases; number++)
        check_case(number, scalar, watched);
    CHECK(n_twos > 0 && n_aheads > 0, "%ld calls for two tokens, %ld with keys ahead", (long)n_twos,
          (long)n_aheads);
    lidx_destroy(scalar);
    lidx_destroy(watched[0]);
    lidx_destroy(watched[1]);
    rendering_release();
    return test_end();
}
