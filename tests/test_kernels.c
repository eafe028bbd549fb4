/* SPDX-License-Identifier: Apache-2.0
 *
 * Every row of the kernel table that this CPU can run, against the scalar reference.
 *
 *     test_kernels [--case N] [KERNEL...]   checks all rows, or those named
 *     test_kernels --bench [KERNEL...]      times the same calls, as a fraction of the core's peak
 *
 * A case that fails is followed by the command that runs it alone. With LIDX_TEST_CASES set
 * (emulators, sanitizers) a fifth of the head counts is checked.
 *
 * How far a score may be from the reference's is derived in kernel_data.h. Infinities must be the
 * same infinity, and a NaN a NaN.
 */
#include "kernel_data.h"

#include <stdlib.h>

#include "kernel_speed.h"

#if defined(__x86_64__)
/* The AMX kernel on tile instructions in plain C, for machines that have none. */
extern const struct kernel lidx_kernel_amx_emulated;
#endif

static const int head_counts[] = {1,  2,  3,  5,  7,  8,  13, 16,  17,  31, 32,
                                  33, 40, 48, 63, 64, 65, 96, 100, 127, 128};

static const char *const values_name[N_VALUES] = {
    "normal", "tiny",          "huge",          "denormal",
    "zeros",  "keys with inf", "keys with NaN", "a query with inf or NaN"};

static const char *const layout_name[N_LAYOUTS] = {"dense", "dense, aligned to an element only",
                                                   "strided", "strided, aligned to an element only",
                                                   "scattered blocks"};

static int agrees(float got, float want, float bound) {
    if (isnan(got) || isnan(want))
        return isnan(got) && isnan(want);
    if (isinf(got) || isinf(want))
        return got == want;
    return fabsf(got - want) <= bound;
}

static int same_bits(float a, float b) {
    return test_float_bits(a) == test_float_bits(b) || (isnan(a) && isnan(b));
}

static const char *dtype_name(int dtype) {
    return dtype == DTYPE_BF16 ? "bfloat16" : "float16";
}

/* One run, laid out and guarded, against the reference. */
static void check_run(struct arena *a, const struct kernel *kernel, const struct problem_data *p,
                      enum values values, enum layout layout, const void *packed, int first, int n,
                      int n_ahead) {
    struct key_run run = data_place(a, p, layout, first, n, n_ahead);
    const float *got = score_guarded(a, &kernel->path[p->dtype], packed, p, &run);
    if (!CHECK(got, "%s %s: %d heads of %d, %d keys: wrote beyond the scores", kernel->name,
               dtype_name(p->dtype), p->n_heads, p->head_dim, n))
        return;
    int bad = 0;
    while (bad < n && agrees(got[bad], p->want[first + bad], p->bound[first + bad]))
        bad++;
    int at = bad < n ? bad : 0;
    CHECK(bad == n, "%s %s: %d heads of %d, %s, %s, %d keys: key %d is %.9g, want %.9g +- %.3g",
          kernel->name, dtype_name(p->dtype), p->n_heads, p->head_dim, values_name[values],
          layout_name[layout], n, at, (double)got[at], (double)p->want[first + at],
          (double)p->bound[first + at]);
}

/* The same keys in one run and in random pieces, differently laid out: the same bits. */
static void check_pieces(struct arena *a, const struct kernel *kernel, const struct problem_data *p,
                         const void *packed, struct rng *rng) {
    const struct kernel_path *path = &kernel->path[p->dtype];
    float whole[MAX_KEYS];
    struct key_run run = data_place(a, p, DENSE, 0, MAX_KEYS, 0);
    const float *got = score_guarded(a, path, packed, p, &run);
    int first = 0, bad = got == NULL;
    if (got)
        memcpy(whole, got, sizeof whole);
    while (first < MAX_KEYS && !bad) {
        int left = MAX_KEYS - first, n = (int)rng_between(rng, 1, left < 50 ? left : 50);
        run = data_place(a, p, (enum layout)rng_below(rng, N_LAYOUTS), first, n,
                         (int)rng_below(rng, AHEAD + 1));
        got = score_guarded(a, path, packed, p, &run);
        for (int j = 0; j < n && !bad; j++)
            bad = !got || !same_bits(got[j], whole[first + j]);
        first += n;
    }
    CHECK(!bad, "%s %s: %d heads of %d: bits depend on how keys are grouped, before key %d",
          kernel->name, dtype_name(p->dtype), p->n_heads, p->head_dim, first);
}

/* Scores two query tokens in one call, the second output guarded, and each in its own: the same
 * bits. The other token has the same heads and, from the last to the first, the same weights. */
static int two_as_one(struct arena *a, const struct kernel *kernel, const struct problem_data *p,
                      const void *const packed[2], const struct key_run *run) {
    static _Alignas(64) float first[MAX_KEYS], want[2][MAX_KEYS];
    const size_t bytes = sizeof(float) * (size_t)run->n_keys;
    unsigned char *second = guard_tail(&a->score, round_up(bytes, 64));
    for (int i = 0; i < 2; i++)
        kernel->path[p->dtype].score(want[i], packed[i], p->n_heads, p->head_dim, run);
    memset(a->score.data, 0xA5, a->score.size);
    memset(first, 0xA5, sizeof first);
    float *const got[2] = {first, (float *)(void *)second};
    kernel->score_two[p->dtype](got, packed, p->n_heads, p->head_dim, run);
    for (int j = 0; j < run->n_keys; j++)
        if (!same_bits(got[0][j], want[0][j]) || !same_bits(got[1][j], want[1][j]))
            return 0;
    return untouched((unsigned char *)first + bytes, (unsigned char *)first + sizeof first) &&
           untouched(second + bytes, a->score.data + a->score.size) &&
           untouched(a->score.data, second);
}

static void check_two(struct arena *a, const struct kernel *kernel, const struct problem_data *p,
                      const void *packed, struct rng *rng) {
    static _Alignas(64) unsigned char other[PACKED_MAX];
    float weights[MAX_HEADS];
    if (!kernel->score_two[p->dtype])
        return;
    for (int h = 0; h < p->n_heads; h++)
        weights[h] = p->weights[p->n_heads - 1 - h];
    kernel->path[p->dtype].pack(other,
                                &(struct query_row){p->query, weights, p->n_heads, p->head_dim});
    for (int i = 0; i < 8; i++) {
        int n = i ? (int)rng_between(rng, 1, 100) : MAX_KEYS, swap = i % 2;
        const void *const both[2] = {swap ? other : packed, swap ? packed : other};
        struct key_run run = data_place(a, p, (enum layout)rng_below(rng, N_LAYOUTS), 0, n, 0);
        CHECK(two_as_one(a, kernel, p, both, &run),
              "%s %s: %d heads of %d, %d keys: two tokens "
              "at once are not what they are one by one",
              kernel->name, dtype_name(p->dtype), p->n_heads, p->head_dim, n);
    }
}

static void check_case(struct arena *a, const struct kernel *kernel, const struct problem_data *p,
                       enum values values, struct rng *rng) {
    for (int shifted = 0; shifted < 2; shifted++) {
        const void *packed = pack_guarded(a, &kernel->path[p->dtype], p, shifted);
        if (!CHECK(packed, "%s %s: %d heads of %d: pack() wrote beyond packed_size()", kernel->name,
                   dtype_name(p->dtype), p->n_heads, p->head_dim))
            return;
        for (int layout = 0; layout < N_LAYOUTS; layout++)
            check_run(a, kernel, p, values, (enum layout)layout, packed, 0, MAX_KEYS - shifted,
                      shifted ? AHEAD : 0);
        for (int n = 1; n <= 100; n++) {
            int first = (int)rng_below(rng, MAX_KEYS - 100 + 1);
            if (values == NORMAL || n % 16 == 15)
                check_run(a, kernel, p, values, (enum layout)rng_below(rng, N_LAYOUTS), packed,
                          first, n, n % 3 ? 0 : n % AHEAD);
        }
        check_pieces(a, kernel, p, packed, rng);
        check_two(a, kernel, p, packed, rng);
    }
}

/* The kernels under test, and what each of them was found to do. */
struct row {
    const struct kernel *kernel;
    long passed, failed;
};

enum { MAX_ROWS = 32 };

struct rows {
    struct row row[MAX_ROWS];
    int n;
};

/* ---- cases, by number ------------------------------------------------------------------------ */

enum {
    HEAD_COUNTS = sizeof head_counts / sizeof head_counts[0],
    N_DIMS = 2, /* 64 and 128 */
    N_CASES = KEY_DTYPES * N_DIMS * HEAD_COUNTS * N_VALUES
};

/* Emulators and sanitizers, for which LIDX_TEST_CASES is set, get every fifth head count: 1, 8, 32,
 * 64, 128 with bf16 and head dimension 128, and others with the others. */
static int is_due(int number) {
    int heads = number / N_VALUES % HEAD_COUNTS, type = number / N_VALUES / HEAD_COUNTS;
    return !getenv("LIDX_TEST_CASES") || heads % 5 == (type + 4) % 5;
}

static void check_row(struct arena *a, struct row *row, const struct problem_data *p,
                      enum values values, struct rng rng, int number) {
    long passed = test_passed, failed = test_failed;
    if (row->kernel->enter)
        row->kernel->enter();
    check_case(a, row->kernel, p, values, &rng);
    if (row->kernel->leave)
        row->kernel->leave();
    if (test_failed > failed && failed < TEST_SHOWN)
        printf("    again: test_kernels --case %d %s\n", number, row->kernel->name);
    row->passed += test_passed - passed;
    row->failed += test_failed - failed;
}

/* What is random depends on the number alone, whichever kernels are asked. Data and reference are
 * made once for all of them: they take longer than the checks. */
static void check_number(struct arena *a, struct rows *rows, int number) {
    static struct problem_data p;
    int type = number / N_VALUES / HEAD_COUNTS;
    enum values values = (enum values)(number % N_VALUES);
    struct rng rng = rng_seed((uint64_t)number);
    p.n_heads = head_counts[number / N_VALUES % HEAD_COUNTS];
    p.head_dim = type % N_DIMS ? 128 : 64;
    p.dtype = type / N_DIMS;
    data_fill(&p, &rng, values);
    for (int i = 0; i < rows->n; i++)
        check_row(a, &rows->row[i], &p, values, rng, number);
}

/* Sizes are within what callers reserve, for every head count. */
static void check_sizes(const struct kernel *kernel) {
    for (int dtype = 0; dtype < KEY_DTYPES; dtype++) {
        size_t most = 0;
        for (int heads = 1; heads <= MAX_HEADS; heads++) {
            for (int dim = 64; dim <= MAX_HEAD_DIM; dim += 64) {
                size_t size = kernel->path[dtype].packed_size(heads, dim);
                most = size > most ? size : most;
            }
        }
        CHECK(most > 0 && most <= PACKED_MAX, "%s %s: packs up to %zu bytes", kernel->name,
              dtype_name(dtype), most);
    }
}

static void check_table(void) {
    int n = 0;
    for (; lidx_kernels[n]; n++) {
        for (int i = 0; i < n; i++)
            CHECK(strcmp(lidx_kernels[i]->name, lidx_kernels[n]->name) != 0, "two rows are %s",
                  lidx_kernels[n]->name);
        CHECK(lidx_kernel_choose(lidx_kernels[n]->name) == lidx_kernels[n],
              "%s is not chosen by name", lidx_kernels[n]->name);
    }
    CHECK(n > 0 && lidx_kernels[n - 1] == &lidx_kernel_scalar, "scalar is not the last row");
    CHECK(lidx_kernel_usable(&lidx_kernel_scalar), "scalar is not usable");
    CHECK(!lidx_kernel_choose("no such kernel"), "a name that is none finds a kernel");
}

static int wanted(const char *name, int argc, char **argv, int first) {
    for (int i = first; i < argc; i++) {
        if (strcmp(argv[i], name) == 0)
            return 1;
    }
    return first == argc;
}

static void add_row(struct rows *rows, const struct kernel *kernel, int argc, char **argv,
                    int first) {
    if (!wanted(kernel->name, argc, argv, first))
        return;
    if (lidx_kernel_usable(kernel) && rows->n < MAX_ROWS)
        rows->row[rows->n++].kernel = kernel;
    else
        printf("%s: %s\n", kernel->name, lidx_kernel_reason(kernel));
}

int main(int argc, char **argv) {
    int bench = argc > 1 && strcmp(argv[1], "--bench") == 0;
    int only = argc > 2 && strcmp(argv[1], "--case") == 0 ? atoi(argv[2]) : -1;
    int names = bench ? 2 : only >= 0 ? 3 : 1; /* where they begin */
    struct rows rows = {.n = 0};
    for (int i = 0; lidx_kernels[i]; i++)
        add_row(&rows, lidx_kernels[i], argc, argv, names);
#if defined(__x86_64__)
    if (!bench)
        add_row(&rows, &lidx_kernel_amx_emulated, argc, argv, names);
#endif
    if (rows.n == 0) {
        fprintf(stderr, "test_kernels: no such kernel, or none that this CPU can run\n");
        return 2;
    }
    if (bench) {
        kernel_speed_heading();
        for (int i = 0; i < rows.n; i++)
            kernel_speed(rows.row[i].kernel);
        return EXIT_SUCCESS;
    }
    check_table();
    for (int i = 0; i < rows.n; i++)
        check_sizes(rows.row[i].kernel);
    struct arena arena = arena_make();
    for (int number = 0; number < N_CASES; number++)
        if (only < 0 ? is_due(number) : number == only)
            check_number(&arena, &rows, number);
    arena_free(&arena);
    for (int i = 0; i < rows.n; i++)
        printf("%s: %ld passed, %ld failed\n", rows.row[i].kernel->name, rows.row[i].passed,
               rows.row[i].failed);
    return test_end();
}
