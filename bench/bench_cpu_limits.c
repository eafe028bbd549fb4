/* SPDX-License-Identifier: Apache-2.0
 *
 * How near a CPU with many cores comes to its limits: one thread beside a peak loop timed on the
 * same core right before and after, the gain from more threads, batches of unequal lengths beside
 * equal ones, and decode by the number of threads. Needs a C compiler and nothing else:
 *
 *     cc -std=c11 -O2 -ffp-contract=off -fopenmp -Iinclude -Itools bench/bench_cpu_limits.c \
 *        tools/peak.c tools/numbers.c src/[a-z]*.c src/cpu/[a-z]*.c -lm -o bench_cpu_limits
 *     ./bench_cpu_limits [threads [milliseconds for each figure]]
 *
 * Cores of shared machines slow down and recover within milliseconds. So what is compared takes
 * turns, and a round counts as quiet when both its peak loops came within 12 % of the best of all.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lightning_indexer.h"
#include "numbers.h"
#include "peak.h"

enum {
    HEADS = 64,
    DIM = 128,
    TOP_K = 2048,
    MOST_KEYS = 1 << 19, /* 128 MiB of keys */
    MOST_TOKENS = 1024,
    MOST_BATCHES = 1024,
    ROUNDS = 400
};

static uint16_t *keys, *queries, *weights;
static int32_t *indices;
static double patience = 0.4; /* seconds for each figure */

static struct random generator = {1};

static uint16_t *numbers(size_t n) {
    uint16_t *list = aligned_alloc(4096, (n * sizeof *list + 4095) / 4096 * 4096);
    if (!list)
        exit(EXIT_FAILURE);
    for (size_t i = 0; i < n && i < 1 << 23; i++)
        list[i] = float_to_bf16(random_normal(&generator));
    for (size_t i = 1 << 23; i < n; i++) /* enough of them; again from other places */
        list[i] = list[i - (1 << 23) + 64];
    return list;
}

/* One call: batches that lie one behind the other in the packed layout. */
struct shape {
    int batches, mode;
    int32_t query_ends[MOST_BATCHES], key_ends[MOST_BATCHES];
    int64_t key_offset; /* first key, in keys */
};

static struct shape one_batch(int tokens, int n_keys) {
    struct shape s = {1, LIDX_MODE_FULL, {tokens}, {n_keys}, 0};
    return s;
}

static struct lidx_tensor tensor(void *data, int code, int bits, int64_t *shape, int ndim) {
    struct lidx_tensor t = {data,  {LIDX_CPU, 0}, ndim, {(uint8_t)code, (uint8_t)bits, 1},
                            shape, NULL,          0};
    return t;
}

static double call(struct lidx_context *context, struct shape *s) {
    int64_t tokens = s->query_ends[s->batches - 1], n_keys = s->key_ends[s->batches - 1];
    int64_t q[] = {tokens, HEADS, DIM}, k[] = {n_keys, 1, DIM}, w[] = {tokens, HEADS},
            i[] = {tokens, 1, TOP_K}, b[] = {s->batches};
    struct lidx_tensor query = tensor(queries, LIDX_BFLOAT, 16, q, 3),
                       key = tensor(keys + s->key_offset * DIM, LIDX_BFLOAT, 16, k, 3),
                       weight = tensor(weights, LIDX_BFLOAT, 16, w, 2),
                       query_length = tensor(s->query_ends, LIDX_INT, 32, b, 1),
                       key_length = tensor(s->key_ends, LIDX_INT, 32, b, 1),
                       out = tensor(indices, LIDX_INT, 32, i, 3);
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &query, args.key = &key, args.weights = &weight;
    args.actual_seq_lengths_query = &query_length, args.actual_seq_lengths_key = &key_length;
    args.layout_query = args.layout_key = LIDX_TND;
    args.sparse_count = TOP_K, args.sparse_mode = s->mode;
    args.sparse_indices = &out;
    double begin = now();
    if (lidx_run(context, &args)) {
        fprintf(stderr, "%s\n", lidx_last_error());
        exit(EXIT_FAILURE);
    }
    return now() - begin;
}

static double flop(const struct shape *s) {
    double pairs = 0;
    for (int b = 0; b < s->batches; b++) {
        double tokens = s->query_ends[b] - (b ? s->query_ends[b - 1] : 0);
        double n_keys = s->key_ends[b] - (b ? s->key_ends[b - 1] : 0);
        pairs += tokens * n_keys;
        if (s->mode == LIDX_MODE_CAUSAL)
            pairs -= tokens * (tokens - 1) / 2;
    }
    return pairs * 2 * HEADS * DIM;
}

static struct lidx_context *context_of(int threads) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    options.n_threads = threads;
    if (lidx_create(&context, &options)) {
        fprintf(stderr, "%s\n", lidx_last_error());
        exit(EXIT_FAILURE);
    }
    return context;
}

static const char *kernel_name(void) {
    static struct lidx_kernel_info info;
    for (int i = 0; i < lidx_kernel_count(); i++) {
        info.size = sizeof info;
        if (lidx_kernel_info(i, &info) == LIDX_OK && info.chosen_bf16 && info.backend[1] == 'p')
            return info.name;
    }
    return "scalar";
}

/* ---- one thread beside its peak -------------------------------------------------------------- */

static void one_thread(const char *name, int tokens, int n_keys) {
    struct lidx_context *context = context_of(1);
    struct shape s = one_batch(tokens, n_keys);
    double peak[ROUNDS + 1], seconds[ROUNDS], fraction[ROUNDS], quiet[ROUNDS], best = 0;
    double quiet_us[ROUNDS], begin = now();
    int n = 0, n_quiet = 0;
    call(context, &s);
    peak[0] = peak_flops(kernel_name(), LIDX_BFLOAT, 0.002);
    do {
        call(context, &s); /* brings back what the peak loop displaced */
        int calls = tokens == 1 ? 8 : 1;
        seconds[n] = 0;
        for (int i = 0; i < calls; i++)
            seconds[n] += call(context, &s) / calls;
        n++;
        peak[n] = peak_flops(kernel_name(), LIDX_BFLOAT, 0.002);
    } while (n < ROUNDS && now() - begin < 3 * patience);
    for (int i = 0; i <= n; i++)
        best = peak[i] > best ? peak[i] : best;
    for (int i = 0; i < n; i++) {
        fraction[i] = flop(&s) / seconds[i] / ((peak[i] + peak[i + 1]) / 2);
        if (peak[i] > 0.88 * best && peak[i + 1] > 0.88 * best) {
            quiet_us[n_quiet] = seconds[i] * 1e6;
            quiet[n_quiet++] = flop(&s) / seconds[i] / best;
        }
    }
    double middle_us = n_quiet ? median(quiet_us, n_quiet) : NAN;
    double middle = n_quiet ? median(quiet, n_quiet) : NAN;
    printf(
        "%-12s 1 thread: peak %.2f TFLOP/s; quiet rounds %d of %d: median %.1f us, %.3f of peak, "
        "best %.3f; all rounds: median %.3f of the peak around them\n",
        name, best * 1e-12, n_quiet, n, middle_us, middle, n_quiet ? quiet[n_quiet - 1] : NAN,
        median(fraction, n));
    lidx_destroy(context);
}

/* ---- more threads ---------------------------------------------------------------------------- */

/* What a context and a shape take: the median of a few calls in a row. They follow calls that are
 * not counted, since OpenMP ends and starts threads when their number changes, and new ones share
 * cores for a while until the system has spread them. */
static double turn(struct lidx_context *context, struct shape *s) {
    enum { CALLS = 16 };
    double seconds[CALLS], begin = now();
    int n = 0;
    do
        call(context, s);
    while (now() - begin < 0.01);
    begin = now();
    do
        seconds[n++] = call(context, s);
    while (n < CALLS && now() - begin < 0.01);
    return median(seconds, n);
}

/* The shapes take turns, each with its context; medians and best times in seconds. */
static void take_turns(struct lidx_context **context, struct shape *s, int n_shapes, double *middle,
                       double *best) {
    static double seconds[8][ROUNDS];
    double begin = now();
    int n = 0;
    do {
        for (int i = 0; i < n_shapes; i++)
            seconds[i][n] = turn(context[i], &s[i]);
        n++;
    } while (n < ROUNDS && (n < 3 || now() - begin < patience * n_shapes));
    for (int i = 0; i < n_shapes; i++) {
        middle[i] = median(seconds[i], n);
        best[i] = seconds[i][0];
    }
}

static void speed_up(const char *name, struct shape s, int threads) {
    struct lidx_context *context[2] = {context_of(1), context_of(threads)};
    struct shape both[2] = {s, s};
    double middle[2], best[2];
    take_turns(context, both, 2, middle, best);
    printf("%-20s 1 thread %.0f us (best %.0f), %d threads %.0f us (best %.0f): %.1f times as "
           "fast (best by best %.1f), %.2f TFLOP/s\n",
           name, middle[0] * 1e6, best[0] * 1e6, threads, middle[1] * 1e6, best[1] * 1e6,
           middle[0] / middle[1], best[0] / best[1], flop(&s) / middle[1] * 1e-12);
    lidx_destroy(context[0]);
    lidx_destroy(context[1]);
}

/* One number of threads after the other, not in turns: new threads take a while to spread. */
static void decode(int threads) {
    printf("one token, us by keys:");
    for (int n = 512; n <= 65536; n *= 2)
        printf("%9d", n);
    for (int t = 1; t <= threads; t *= 2) {
        struct lidx_context *context = context_of(t);
        printf("\n%3d threads           ", t);
        for (int n = 512; n <= 65536; n *= 2) {
            struct shape s = one_batch(1, n);
            double seconds[5], begin = now();
            while (n == 512 && now() - begin < patience)
                call(context, &s);
            for (int i = 0; i < 5; i++)
                seconds[i] = turn(context, &s);
            printf("%9.1f", median(seconds, 5) * 1e6);
        }
        lidx_destroy(context);
    }
    printf("\n");
}

/* Lengths whose logarithm is normal, beside as many equal ones of the same sum. */
static void ragged(const char *name, int batches, int tokens, double mean, int threads) {
    struct shape s[2];
    int32_t sum = 0;
    for (int i = 0; i < 2; i++)
        s[i] = (struct shape){.batches = batches, .mode = LIDX_MODE_FULL};
    for (int b = 0; b < batches; b++) {
        double length = mean * exp(0.8 * random_normal(&generator) - 0.32);
        sum += length < 64 ? 64 : (int32_t)length;
        s[0].key_ends[b] = sum;
        s[0].query_ends[b] = s[1].query_ends[b] = tokens * (b + 1);
    }
    for (int b = 0; b < batches; b++)
        s[1].key_ends[b] = (int32_t)((int64_t)sum * (b + 1) / batches);
    struct lidx_context *context = context_of(threads), *both[2] = {context, context};
    double middle[2], best[2];
    take_turns(both, s, 2, middle, best);
    printf("%-28s lognormal %.0f us (best %.0f), equal %.0f us (best %.0f): ratio %.3f (%.3f)\n",
           name, middle[0] * 1e6, best[0] * 1e6, middle[1] * 1e6, best[1] * 1e6,
           middle[0] / middle[1], best[0] / best[1]);
    lidx_destroy(context);
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 0;
#ifdef _OPENMP
    threads = threads ? threads : omp_get_max_threads();
#else
    threads = 1;
#endif
    if (argc > 2)
        patience = atof(argv[2]) * 1e-3;
    keys = numbers((size_t)MOST_KEYS * DIM);
    queries = numbers((size_t)MOST_TOKENS * HEADS * DIM);
    weights = numbers((size_t)MOST_TOKENS * HEADS);
    indices = malloc(sizeof *indices * MOST_TOKENS * TOP_K);
    if (!indices)
        return EXIT_FAILURE;
    printf("kernel %s, %d threads, 64 heads x 128, top 2048 in order\n", kernel_name(), threads);
    one_thread("64 x 8192", 64, 8192);
    one_thread("1 x 8192", 1, 8192);
    one_thread("1 x 4096", 1, 4096);
    decode(threads);
    struct shape causal = one_batch(512, 8192);
    causal.mode = LIDX_MODE_CAUSAL;
    speed_up("64 x 8192", one_batch(64, 8192), threads);
    speed_up("512 x 8192", one_batch(512, 8192), threads);
    speed_up("512 x 8192 causal", causal, threads);
    ragged("32 x (1 x about 8192)", 32, 1, 8192, threads);
    ragged("32 x (16 x about 4096)", 32, 16, 4096, threads);
    ragged("1024 x (1 x about 400)", 1024, 1, 400, threads);
    return EXIT_SUCCESS;
}
