/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include <stdlib.h>

#include "../tools/numbers.h"
#include "../tools/peak.h"
#include "kernel_speed.h"
#include "lightning_indexer.h"

enum { ROUNDS = 9 };

/* One call of score(): a random query token, and random keys that lie one behind the other. */
struct subject {
    int dtype, heads, dim, n_keys;
    unsigned char *keys;
    const void **list;
    float *score;
    void *packed;
};

static void subject_make(struct subject *t, const struct kernel *kernel) {
    uint16_t query[MAX_HEADS * MAX_HEAD_DIM];
    float weights[MAX_HEADS];
    int is_bf16 = t->dtype == DTYPE_BF16, blocks = t->n_keys / KEY_BLOCK;
    size_t block_bytes = (size_t)(KEY_BLOCK * 2 * t->dim);
    struct rng rng = rng_seed((uint64_t)t->n_keys);
    t->keys = aligned_alloc(4096, (size_t)blocks * block_bytes);
    t->list = malloc(sizeof *t->list * (size_t)blocks);
    t->score = aligned_alloc(64, sizeof *t->score * (size_t)t->n_keys);
    t->packed = aligned_alloc(64, PACKED_MAX);
    if (!t->keys || !t->list || !t->score || !t->packed)
        exit(EXIT_FAILURE);
    for (int i = 0; i < t->heads * t->dim; i++)
        query[i] = test_to_half(rng_normal(&rng), is_bf16);
    for (int h = 0; h < t->heads; h++)
        weights[h] = rng_normal(&rng);
    for (size_t i = 0; i < (size_t)t->n_keys * (size_t)t->dim; i++) {
        uint16_t half = test_to_half(rng_normal(&rng), is_bf16);
        memcpy(t->keys + 2 * i, &half, 2);
    }
    for (int i = 0; i < blocks; i++)
        t->list[i] = t->keys + (size_t)i * block_bytes;
    const struct query_row row = {query, weights, t->heads, t->dim};
    kernel->path[t->dtype].pack(t->packed, &row);
}

static void subject_free(struct subject *t) {
    free(t->keys);
    free(t->list);
    free(t->score);
    free(t->packed);
}

/* Calls for some 20 ms: the mean; *fastest falls to the fastest. */
static double time_calls(const struct subject *t, const struct kernel *kernel, double *fastest) {
    const struct key_run run = {t->list, 2 * t->dim, t->n_keys, 0};
    double begin = now(), last = begin;
    int calls = 0;
    do {
        kernel->path[t->dtype].score(t->score, t->packed, t->heads, t->dim, &run);
        double end = now();
        *fastest = end - last < *fastest ? end - last : *fastest;
        last = end;
        calls++;
    } while (last - begin < 0.02);
    return (last - begin) / calls;
}

/* Times a call in rounds, the peak before each: the median round against the median peak, and the
 * fastest call against the best peak, which a busy machine disturbs least. */
static void bench_case(const struct kernel *kernel, struct subject *t) {
    int type_code = t->dtype == DTYPE_BF16 ? LIDX_BFLOAT : LIDX_FLOAT;
    double mean[ROUNDS], peak[ROUNDS], fastest = INFINITY, highest = 0;
    double flop = 2.0 * t->heads * t->dim * t->n_keys;
    subject_make(t, kernel);
    for (int i = 0; i < ROUNDS; i++) {
        /* The tile loops set up and release tile state, so the kernel enters after them. */
        peak[i] = peak_flops(kernel->name, type_code, 0.01);
        highest = peak[i] > highest ? peak[i] : highest;
        if (kernel->enter)
            kernel->enter();
        mean[i] = time_calls(t, kernel, &fastest);
        if (kernel->leave)
            kernel->leave();
    }
    const char *instruction = peak_instruction(kernel->name, type_code);
    printf("%-12s %-9s %5d %5d %8d %10.2f", kernel->name,
           t->dtype == DTYPE_BF16 ? "bfloat16" : "float16", t->heads, t->dim, t->n_keys,
           fastest / t->n_keys * 1e9);
    if (instruction)
        printf(" %8.3f %8.3f  %s\n", flop / median(mean, ROUNDS) / median(peak, ROUNDS),
               flop / fastest / highest, instruction);
    else
        printf(" %8s %8s  %s\n", "-", "-", "-");
    fflush(stdout);
    subject_free(t);
}

void kernel_speed(const struct kernel *kernel) {
    static const struct {
        int heads, dim, keys;
    } cases[] = {{64, 128, 4096}, {64, 128, 65536}, {32, 128, 4096}, {16, 128, 4096},
                 {8, 128, 4096},  {128, 128, 4096}, {64, 64, 4096}};
    for (int dtype = 0; dtype < KEY_DTYPES; dtype++) {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
            bench_case(kernel, &(struct subject){.dtype = dtype,
                                                 .heads = cases[i].heads,
                                                 .dim = cases[i].dim,
                                                 .n_keys = cases[i].keys});
    }
}

void kernel_speed_heading(void) {
    printf("%-12s %-9s %5s %5s %8s %10s %8s %8s  %s\n", "kernel", "dtype", "heads", "dim", "keys",
           "ns/key", "median", "best", "of the peak of");
}
