/* SPDX-License-Identifier: Apache-2.0 */
#include "test.h"

#include <stdlib.h>

#include "../tools/numbers.h"
#include "../tools/peak.h"
#include "kernel_speed.h"
#include "lightning_indexer.h"

enum { ROUNDS = 9 };

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
    double flop = 2.0 * heads * dim * n_keys, highest = 0;
    for (int i = 0; i < ROUNDS; i++)
        highest = peak[i] > highest ? peak[i] : highest;
    const char *instruction = peak_instruction(kernel->name, type_code);
    printf("%-12s %-9s %5d %5d %8d %10.2f", kernel->name,
           dtype == DTYPE_BF16 ? "bfloat16" : "float16", heads, dim, n_keys,
           fastest / n_keys * 1e9);
    if (instruction)
        printf(" %8.3f %8.3f  %s\n", flop / median(mean, ROUNDS) / median(peak, ROUNDS),
               flop / fastest / highest, instruction);
    else
        printf(" %8s %8s  %s\n", "-", "-", "-");
    fflush(stdout);
    free(keys);
    free(list);
    free(score);
    free(packed);
}

void kernel_speed(const struct kernel *kernel) {
    static const struct {
        int heads, dim, keys;
    } cases[] = {{64, 128, 4096}, {64, 128, 65536}, {32, 128, 4096}, {16, 128, 4096},
                 {8, 128, 4096},  {128, 128, 4096}, {64, 64, 4096}};
    for (int dtype = 0; dtype < KEY_DTYPES; dtype++) {
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
            bench_case(kernel, dtype, cases[i].heads, cases[i].dim, cases[i].keys);
    }
}

void kernel_speed_heading(void) {
    printf("%-12s %-9s %5s %5s %8s %10s %8s %8s  %s\n", "kernel", "dtype", "heads", "dim", "keys",
           "ns/key", "median", "best", "of the peak of");
}
