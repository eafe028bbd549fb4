/* SPDX-License-Identifier: Apache-2.0
 *
 * Every row of the kernel table that this CPU can run, against the scalar reference.
 *
 *     test_kernels [KERNEL...]           checks all rows, or those named
 *     test_kernels --bench [KERNEL...]   times the same calls, as a fraction of the core's peak
 *
 * With LIDX_TEST_CASES set (emulators, sanitizers) a fifth of the head counts is checked.
 *
 * A score may differ from the reference by what two orders of fp32 summation can: with u = 2^-24,
 * each of the two is within (D + H + 2) u sum_h |w_h| sum_d |q_hd k_d| of the exact value. Units
 * that flush denormals (VDPBF16PS, TDPBF16PS) may also lose each product that has a denormal
 * factor, and up to 2^-126 in each of their additions; the tolerance adds just that. Infinities
 * must be the same infinity, and a NaN a NaN.
 */
#include "test.h"

#include <stdlib.h>
#include <time.h>

#include "../src/cpu/kernels.h"
#include "../tools/peak.h"
#include "lightning_indexer.h"

#if defined(__x86_64__)
/* amx.c on tile instructions in plain C, for machines that have none. */
extern const struct kernel lidx_kernel_amx_emulated;
#endif

enum {
    MAX_KEYS = 160, /* at least MAX_HEAD_DIM, so that a bad value visits every position */
    MAX_BLOCKS = MAX_KEYS / KEY_BLOCK,
    MAX_STRIDE = 2 * MAX_HEAD_DIM + 64,
    AHEAD = 40
};

static const int head_counts[] = {1,  2,  3,  5,  7,  8,  13, 16, 17,  31, 32,
                                  33, 40, 48, 63, 64, 65, 96, 100, 127, 128};

enum values { NORMAL, TINY, HUGE_, DENORMAL, ZEROS, WITH_INF, WITH_NAN, QUERY_BAD, N_VALUES };
static const char *const values_name[N_VALUES] = {
    "normal", "tiny", "huge", "denormal", "zeros", "keys with inf", "keys with NaN",
    "a query with inf or NaN"};

enum layout { DENSE, DENSE_SHIFTED, STRIDED, STRIDED_SHIFTED, SCATTERED, N_LAYOUTS };
static const char *const layout_name[N_LAYOUTS] = {
    "dense", "dense, aligned to an element only", "strided",
    "strided, aligned to an element only", "scattered blocks"};

/* One query token, the keys, what the reference says, and how far from it one may be. */
struct problem_data {
    int dtype, n_heads, head_dim;
    uint16_t query[MAX_HEADS * MAX_HEAD_DIM];
    float weights[MAX_HEADS];
    uint16_t keys[MAX_KEYS][MAX_HEAD_DIM];
    float want[MAX_KEYS], bound[MAX_KEYS];
};

/* Buffers made once; each call places its data against their ends. */
struct arena {
    struct guard query, weights, packed, score, list, dense, front, block[MAX_BLOCKS];
};

static struct arena arena_make(void) {
    struct arena a;
    a.query = guard_after(sizeof(uint16_t) * (MAX_HEADS * MAX_HEAD_DIM + 1));
    a.weights = guard_after(sizeof(float) * MAX_HEADS);
    a.packed = guard_after(PACKED_MAX);
    a.score = guard_after(sizeof(float) * MAX_KEYS);
    a.list = guard_after(sizeof(void *) * (MAX_BLOCKS + AHEAD));
    a.dense = guard_after((size_t)MAX_KEYS * MAX_STRIDE);
    a.front = guard_before((size_t)MAX_KEYS * MAX_STRIDE);
    for (int i = 0; i < MAX_BLOCKS; i++)
        a.block[i] = guard_after((size_t)KEY_BLOCK * MAX_STRIDE);
    return a;
}

static void arena_free(struct arena *a) {
    guard_free(&a->query);
    guard_free(&a->weights);
    guard_free(&a->packed);
    guard_free(&a->score);
    guard_free(&a->list);
    guard_free(&a->dense);
    guard_free(&a->front);
    for (int i = 0; i < MAX_BLOCKS; i++)
        guard_free(&a->block[i]);
}

/* The last `size` bytes before the guard page. */
static unsigned char *tail(const struct guard *g, size_t size) {
    return g->data + g->size - size;
}

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

/* ---- data ------------------------------------------------------------------------------------ */

static float ordinary(struct rng *rng, enum values values, int is_bf16) {
    float x = rng_normal(rng);
    switch (values) {
    case TINY:
        return x * (is_bf16 ? 1e-8f : 1e-4f); /* fp16: down into its denormals */
    case HUGE_:
        return x * (is_bf16 ? 1e16f : 15000.0f); /* sums stay below the largest fp32 */
    case DENORMAL:
        return rng_below(rng, 2) ? x : x * (is_bf16 ? 1e-39f : 1e-6f);
    case ZEROS:
        return rng_below(rng, 3) ? x : rng_below(rng, 2) ? 0.0f : -0.0f;
    default:
        return x;
    }
}

static void fill(struct problem_data *p, struct rng *rng, enum values values) {
    int is_bf16 = p->dtype == DTYPE_BF16;
    for (int i = 0; i < p->n_heads * p->head_dim; i++)
        p->query[i] = test_to_half(ordinary(rng, values, is_bf16), is_bf16);
    for (int h = 0; h < p->n_heads; h++)
        p->weights[h] = values == ZEROS && rng_below(rng, 2) ? 0.0f : rng_normal(rng);
    for (int j = 0; j < MAX_KEYS; j++) {
        for (int d = 0; d < p->head_dim; d++)
            p->keys[j][d] = test_to_half(ordinary(rng, values, is_bf16), is_bf16);
        float sign = rng_below(rng, 2) ? 1.0f : -1.0f;
        if (values == WITH_INF)
            p->keys[j][j % p->head_dim] = test_to_half(sign * INFINITY, is_bf16);
        if (values == WITH_NAN && j % 3)
            p->keys[j][j % p->head_dim] = test_to_half(sign * NAN, is_bf16);
    }
    if (values == QUERY_BAD) {
        int at = (int)rng_below(rng, (uint64_t)(p->n_heads * p->head_dim));
        p->query[at] = test_to_half(rng_below(rng, 2) ? INFINITY : NAN, is_bf16);
    }
}

static int is_denormal(float x) {
    return x != 0 && fabsf(x) < 0x1p-126f;
}

static void widen(float *to, const uint16_t *from, int n, int dtype) {
    for (int i = 0; i < n; i++)
        to[i] = test_from_half(from[i], dtype == DTYPE_BF16);
}

/* The largest difference allowed for one key, as the head of this file derives it. */
static float bound_of(const struct problem_data *p, const float *query, const float *key) {
    double rounding = 0, flushed = 0;
    for (int h = 0; h < p->n_heads; h++, query += p->head_dim) {
        double sum = 0, lost = p->head_dim * 0x1p-126;
        for (int d = 0; d < p->head_dim; d++) {
            double product = fabs((double)query[d] * key[d]);
            sum += product;
            lost += is_denormal(query[d]) || is_denormal(key[d]) ? product : 0;
        }
        rounding += fabs((double)p->weights[h]) * sum;
        flushed += fabs((double)p->weights[h]) * lost;
    }
    return (float)(2 * (p->head_dim + p->n_heads + 2) * 0x1p-24 * rounding + flushed);
}

static void refer(struct problem_data *p) {
    static _Alignas(64) unsigned char packed[PACKED_MAX];
    const struct kernel_path *path = &lidx_kernel_scalar.path[p->dtype];
    struct query_row row = {p->query, p->weights, p->n_heads, p->head_dim};
    const void *list[MAX_BLOCKS];
    for (int i = 0; i < MAX_BLOCKS; i++)
        list[i] = p->keys[i * KEY_BLOCK];
    struct key_run run = {list, sizeof p->keys[0], MAX_KEYS, 0};
    path->pack(packed, &row);
    path->score(p->want, packed, p->n_heads, p->head_dim, &run);
    static float query[MAX_HEADS * MAX_HEAD_DIM], key[MAX_HEAD_DIM];
    widen(query, p->query, p->n_heads * p->head_dim, p->dtype);
    for (int j = 0; j < MAX_KEYS; j++) {
        widen(key, p->keys[j], p->head_dim, p->dtype);
        p->bound[j] = bound_of(p, query, key);
    }
}

/* ---- one call in guarded buffers ------------------------------------------------------------- */

static void place_row(unsigned char *to, const struct problem_data *p, int j) {
    memcpy(to, p->keys[j], sizeof(uint16_t) * (size_t)p->head_dim);
}

/* Lays out keys first .. first + n - 1 as `layout` says and lists their blocks. The last row ends
 * against a guard page (each block does, when scattered); half of the dense runs begin behind one
 * instead. What follows in the list, n_ahead entries, may only be prefetched: it points into a
 * guard page. */
static struct key_run place(struct arena *a, const struct problem_data *p, enum layout layout,
                            int first, int n, int n_ahead) {
    int64_t row = 2 * p->head_dim;
    int64_t stride = layout == STRIDED ? row + 64 : layout == STRIDED_SHIFTED ? row + 2 : row;
    int blocks = (n + KEY_BLOCK - 1) / KEY_BLOCK;
    const void **list = (const void **)(void *)tail(&a->list,
                                                    sizeof(void *) * (size_t)(blocks + n_ahead));
    size_t bytes = (size_t)((n - 1) * stride + row);
    unsigned char *base = layout == DENSE && first % 2 ? a->front.data
                          : layout == DENSE_SHIFTED    ? tail(&a->dense, bytes + 2)
                                                       : tail(&a->dense, bytes);
    for (int i = 0; i < blocks; i++) {
        int in_block = n - i * KEY_BLOCK < KEY_BLOCK ? n - i * KEY_BLOCK : KEY_BLOCK;
        unsigned char *block = base + i * KEY_BLOCK * stride;
        if (layout == SCATTERED)
            block = tail(&a->block[(i * 7 + first) % MAX_BLOCKS], (size_t)(in_block * row));
        for (int j = 0; j < in_block; j++)
            place_row(block + j * stride, p, first + i * KEY_BLOCK + j);
        list[i] = block;
    }
    for (int i = 0; i < n_ahead; i++)
        list[blocks + i] = a->dense.data + a->dense.size;
    return (struct key_run){list, stride, n, n_ahead};
}

static int untouched(const unsigned char *from, const unsigned char *end) {
    for (; from < end; from++) {
        if (*from != 0xA5)
            return 0;
    }
    return 1;
}

/* Packs the query in guarded buffers; NULL when pack() wrote past packed_size(). */
static const void *pack_guarded(struct arena *a, const struct kernel_path *path,
                                const struct problem_data *p, int shifted) {
    size_t query_bytes = sizeof(uint16_t) * (size_t)(p->n_heads * p->head_dim);
    size_t weight_bytes = sizeof(float) * (size_t)p->n_heads;
    size_t packed_bytes = path->packed_size(p->n_heads, p->head_dim);
    unsigned char *query = tail(&a->query, query_bytes + (shifted ? 2 : 0));
    float *weights = (float *)(void *)tail(&a->weights, weight_bytes);
    unsigned char *packed = tail(&a->packed, round_up(packed_bytes, 64));
    memcpy(query, p->query, query_bytes);
    memcpy(weights, p->weights, weight_bytes);
    memset(a->packed.data, 0xA5, a->packed.size);
    path->pack(packed, &(struct query_row){query, weights, p->n_heads, p->head_dim});
    if (!untouched(packed + packed_bytes, a->packed.data + a->packed.size) ||
        !untouched(a->packed.data, packed))
        return NULL;
    return packed;
}

/* Scores a run into a guarded buffer; NULL when more than n_keys floats were written. */
static const float *score_guarded(struct arena *a, const struct kernel_path *path,
                                  const void *packed, const struct problem_data *p,
                                  const struct key_run *run) {
    size_t bytes = sizeof(float) * (size_t)run->n_keys;
    unsigned char *score = tail(&a->score, round_up(bytes, 64));
    memset(a->score.data, 0xA5, a->score.size);
    path->score((float *)(void *)score, packed, p->n_heads, p->head_dim, run);
    if (!untouched(score + bytes, a->score.data + a->score.size) ||
        !untouched(a->score.data, score))
        return NULL;
    return (const float *)(const void *)score;
}

/* ---- checks ---------------------------------------------------------------------------------- */

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
    struct key_run run = place(a, p, layout, first, n, n_ahead);
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
    struct key_run run = place(a, p, DENSE, 0, MAX_KEYS, 0);
    const float *got = score_guarded(a, path, packed, p, &run);
    int first = 0, bad = got == NULL;
    if (got)
        memcpy(whole, got, sizeof whole);
    while (first < MAX_KEYS && !bad) {
        int left = MAX_KEYS - first, n = (int)rng_between(rng, 1, left < 50 ? left : 50);
        run = place(a, p, (enum layout)rng_below(rng, N_LAYOUTS), first, n,
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
    unsigned char *second = tail(&a->score, round_up(bytes, 64));
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
    kernel->path[p->dtype].pack(
        other, &(struct query_row){p->query, weights, p->n_heads, p->head_dim});
    for (int i = 0; i < 8; i++) {
        int n = i ? (int)rng_between(rng, 1, 100) : MAX_KEYS, swap = i % 2;
        const void *const both[2] = {swap ? other : packed, swap ? packed : other};
        struct key_run run = place(a, p, (enum layout)rng_below(rng, N_LAYOUTS), 0, n, 0);
        CHECK(two_as_one(a, kernel, p, both, &run), "%s %s: %d heads of %d, %d keys: two tokens "
              "at once are not what they are one by one", kernel->name, dtype_name(p->dtype),
              p->n_heads, p->head_dim, n);
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

/* Data and reference are made once for all kernels: they take longer than the checks. */
static void check_rows(struct arena *a, struct rows *rows, const struct problem_data *p,
                       enum values values, struct rng *rng) {
    for (int i = 0; i < rows->n; i++) {
        struct row *row = &rows->row[i];
        long passed = test_passed, failed = test_failed;
        if (row->kernel->enter)
            row->kernel->enter();
        check_case(a, row->kernel, p, values, rng);
        if (row->kernel->leave)
            row->kernel->leave();
        row->passed += test_passed - passed;
        row->failed += test_failed - failed;
    }
}

/* Emulators and sanitizers, for which LIDX_TEST_CASES is set, get every fifth head count: 1, 8, 32,
 * 64, 128 with bf16 and head dimension 128, and others with the others. */
static size_t head_step(void) {
    return getenv("LIDX_TEST_CASES") ? 5 : 1;
}

static void check_all(struct arena *a, struct rows *rows) {
    static struct problem_data p;
    struct rng rng = rng_seed(2048);
    size_t n_counts = sizeof head_counts / sizeof head_counts[0], first = 4;
    for (p.dtype = 0; p.dtype < KEY_DTYPES; p.dtype++) {
        for (p.head_dim = 64; p.head_dim <= MAX_HEAD_DIM; p.head_dim += 64, first++) {
            for (size_t i = first % head_step(); i < n_counts; i += head_step()) {
                p.n_heads = head_counts[i];
                for (int values = 0; values < N_VALUES; values++) {
                    fill(&p, &rng, (enum values)values);
                    refer(&p);
                    check_rows(a, rows, &p, (enum values)values, &rng);
                }
            }
        }
    }
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

/* ---- timing ---------------------------------------------------------------------------------- */

enum { ROUNDS = 9 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Passes over the run for some 20 ms: the fastest, and the mean. */
static void time_passes(const struct kernel_path *path, float *score, const void *packed, int heads,
                        int dim, const struct key_run *run, double *fastest, double *mean) {
    double begin = now(), last = begin;
    int passes = 0;
    do {
        path->score(score, packed, heads, dim, run);
        double t = now();
        *fastest = t - last < *fastest ? t - last : *fastest;
        last = t;
        passes++;
    } while (last - begin < 0.02);
    *mean = (last - begin) / passes;
}

/* Times a run in rounds, the peak before each: the median round against the median peak, and the
 * fastest pass against the best peak, which a busy machine disturbs least. */
static void bench_case(const struct kernel *kernel, int dtype, int heads, int dim, int n_keys) {
    const struct kernel_path *path = &kernel->path[dtype];
    int type_code = dtype == DTYPE_BF16 ? LIDX_BFLOAT : LIDX_FLOAT;
    int blocks = n_keys / KEY_BLOCK, block_bytes = KEY_BLOCK * 2 * dim;
    struct rng rng = rng_seed((uint64_t)n_keys);
    unsigned char *keys = aligned_alloc(4096, (size_t)blocks * (size_t)block_bytes);
    const void **list = malloc(sizeof *list * (size_t)blocks);
    float *score = aligned_alloc(64, sizeof *score * (size_t)n_keys);
    void *packed = aligned_alloc(64, PACKED_MAX);
    uint16_t query[MAX_HEADS * MAX_HEAD_DIM];
    float weights[MAX_HEADS];
    double mean[ROUNDS], peak[ROUNDS], fastest = INFINITY;
    if (!keys || !list || !score || !packed)
        exit(EXIT_FAILURE);
    for (int i = 0; i < heads * dim; i++)
        query[i] = test_to_half(rng_normal(&rng), dtype == DTYPE_BF16);
    for (int h = 0; h < heads; h++)
        weights[h] = rng_normal(&rng);
    for (size_t i = 0; i < (size_t)n_keys * (size_t)dim; i++) {
        uint16_t half = test_to_half(rng_normal(&rng), dtype == DTYPE_BF16);
        memcpy(keys + 2 * i, &half, 2);
    }
    for (int i = 0; i < blocks; i++)
        list[i] = keys + (size_t)i * (size_t)block_bytes;
    struct key_run run = {list, 2 * dim, n_keys, 0};
    path->pack(packed, &(struct query_row){query, weights, heads, dim});
    for (int i = 0; i < ROUNDS; i++) {
        /* The tile loops set up and release tile state, so the kernel enters after them. */
        peak[i] = peak_flops(kernel->name, type_code, 0.01);
        if (kernel->enter)
            kernel->enter();
        time_passes(path, score, packed, heads, dim, &run, &fastest, &mean[i]);
        if (kernel->leave)
            kernel->leave();
    }
    qsort(mean, ROUNDS, sizeof *mean, ascending);
    qsort(peak, ROUNDS, sizeof *peak, ascending);
    double flop = 2.0 * heads * dim * n_keys;
    const char *instruction = peak_instruction(kernel->name, type_code);
    printf("%-12s %-9s %5d %5d %8d %10.2f", kernel->name, dtype_name(dtype), heads, dim, n_keys,
           fastest / n_keys * 1e9);
    if (instruction)
        printf(" %8.3f %8.3f  %s\n", flop / mean[ROUNDS / 2] / peak[ROUNDS / 2],
               flop / fastest / peak[ROUNDS - 1], instruction);
    else
        printf(" %8s %8s  %s\n", "-", "-", "-");
    fflush(stdout);
    free(keys);
    free(list);
    free(score);
    free(packed);
}

static void bench_kernel(const struct kernel *kernel) {
    static const struct {
        int heads, dim, keys;
    } cases[] = {{64, 128, 4096}, {64, 128, 65536}, {32, 128, 4096}, {16, 128, 4096},
                 {8, 128, 4096},  {128, 128, 4096}, {64, 64, 4096}};
    for (int dtype = 0; dtype < KEY_DTYPES; dtype++) {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
            bench_case(kernel, dtype, cases[i].heads, cases[i].dim, cases[i].keys);
    }
}

static void bench_all(const struct rows *rows) {
    printf("%-12s %-9s %5s %5s %8s %10s %8s %8s  %s\n", "kernel", "dtype", "heads", "dim", "keys",
           "ns/key", "median", "best", "of the peak of");
    for (int i = 0; i < rows->n; i++)
        bench_kernel(rows->row[i].kernel);
}

/* ---- main ------------------------------------------------------------------------------------ */

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
    struct rows rows = {.n = 0};
    for (int i = 0; lidx_kernels[i]; i++)
        add_row(&rows, lidx_kernels[i], argc, argv, 1 + bench);
#if defined(__x86_64__)
    if (!bench)
        add_row(&rows, &lidx_kernel_amx_emulated, argc, argv, 1);
#endif
    if (rows.n == 0) {
        fprintf(stderr, "test_kernels: no such kernel, or none that this CPU can run\n");
        return 2;
    }
    if (bench) {
        bench_all(&rows);
        return EXIT_SUCCESS;
    }
    check_table();
    for (int i = 0; i < rows.n; i++)
        check_sizes(rows.row[i].kernel);
    struct arena arena = arena_make();
    check_all(&arena, &rows);
    arena_free(&arena);
    for (int i = 0; i < rows.n; i++)
        printf("%s: %ld passed, %ld failed\n", rows.row[i].kernel->name, rows.row[i].passed,
               rows.row[i].failed);
    return test_end();
}
