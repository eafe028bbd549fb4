/* SPDX-License-Identifier: Apache-2.0
 *
 * A serving-style decode loop over a paged key cache: three sequences of different lengths share
 * one pool of pages; each step appends one key to every sequence, taking a free page when the last
 * one is full, and asks for the best keys of one new query token a sequence.
 *
 *     cc examples/paged_decode.c -o paged_decode $(pkg-config --cflags --libs lightning_indexer)
 */
#include <lightning_indexer.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SEQUENCES = 3,
    HEADS = 64,
    DIM = 128,
    BLOCK = 64,
    POOL = 96,
    MAX_PAGES = 32,
    TOP_K = 256,
    STEPS = 100
};

/* The cache: pages in any order, and for each sequence which pages hold it. */
static uint16_t pool[POOL][BLOCK][DIM];
static int32_t block_table[SEQUENCES][MAX_PAGES];
static int32_t length[SEQUENCES];
static int32_t free_pages[POOL];
static int n_free;

/* What a model would compute for one step. */
static uint16_t query[SEQUENCES][HEADS][DIM];
static float weights[SEQUENCES][HEADS];

static int32_t best[SEQUENCES][TOP_K];
static float score[SEQUENCES][TOP_K];

/* Uniform in [-1, 1), as bf16. */
static uint16_t random_bf16(void) {
    float x = (float)rand() / ((float)RAND_MAX / 2 + 1) - 1;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Returns 0 when the pool is empty: a server would now evict a sequence. */
static int append_key(int sequence) {
    int32_t at = length[sequence];
    if (at % BLOCK == 0) {
        if (n_free == 0 || at / BLOCK == MAX_PAGES)
            return 0;
        block_table[sequence][at / BLOCK] = free_pages[--n_free];
    }
    uint16_t *key = pool[block_table[sequence][at / BLOCK]][at % BLOCK];
    for (int d = 0; d < DIM; d++)
        key[d] = random_bf16();
    length[sequence]++;
    return 1;
}

static void next_queries(void) {
    for (int s = 0; s < SEQUENCES; s++)
        for (int h = 0; h < HEADS; h++) {
            weights[s][h] = (float)rand() / (float)RAND_MAX;
            for (int d = 0; d < DIM; d++)
                query[s][h][d] = random_bf16();
        }
}

static int decode(struct lidx_context *context) {
    struct lidx_device cpu = {LIDX_CPU, 0};
    struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, f32 = {LIDX_FLOAT, 32, 1};
    struct lidx_dtype i32 = {LIDX_INT, 32, 1};
    int64_t out_shape[] = {SEQUENCES, 1, 1, TOP_K};
    struct lidx_tensor q = {query, cpu, 4, bf16, (int64_t[]){SEQUENCES, 1, HEADS, DIM}, NULL, 0};
    struct lidx_tensor k = {pool, cpu, 4, bf16, (int64_t[]){POOL, BLOCK, 1, DIM}, NULL, 0};
    struct lidx_tensor w = {weights, cpu, 3, f32, (int64_t[]){SEQUENCES, 1, HEADS}, NULL, 0};
    struct lidx_tensor n = {length, cpu, 1, i32, (int64_t[]){SEQUENCES}, NULL, 0};
    struct lidx_tensor table = {block_table, cpu, 2, i32, (int64_t[]){SEQUENCES, MAX_PAGES},
                                NULL,        0};
    struct lidx_tensor indices = {best, cpu, 4, i32, out_shape, NULL, 0};
    struct lidx_tensor values = {score, cpu, 4, f32, out_shape, NULL, 0};
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &q;
    args.key = &k;
    args.weights = &w;
    args.actual_seq_lengths_key = &n;
    args.block_table = &table;
    args.layout_key = LIDX_PA_BSND;
    args.sparse_count = TOP_K;
    args.sparse_indices = &indices;
    args.sparse_values = &values;
    return lidx_run(context, &args);
}

int main(void) {
    struct lidx_context *context; /* made once; runs allocate nothing */
    if (lidx_create(&context, NULL)) {
        fprintf(stderr, "%s\n", lidx_last_error());
        return 1;
    }
    for (int p = 0; p < POOL; p++)
        free_pages[n_free++] = (p * 37 + 11) % POOL; /* scattered, as after some hours of service */
    for (int s = 0; s < SEQUENCES; s++)
        for (int prompt = 0; prompt < 100 + 700 * s; prompt++)
            append_key(s);
    for (int step = 0; step < STEPS; step++) {
        next_queries();
        for (int s = 0; s < SEQUENCES; s++)
            if (!append_key(s)) {
                fprintf(stderr, "the pool of %d pages is used up\n", POOL);
                return 1;
            }
        if (decode(context)) {
            fprintf(stderr, "%s\n", lidx_last_error());
            return 1;
        }
    }
    for (int s = 0; s < SEQUENCES; s++) {
        int chosen = 0;
        while (chosen < TOP_K && best[s][chosen] >= 0) /* a -1 ends the row */
            chosen++;
        printf("sequence %d: %d keys, %d chosen, best is key %d with score %.3f\n", s,
               (int)length[s], chosen, (int)best[s][0], (double)score[s][0]);
    }
    lidx_destroy(context);
    return 0;
}
