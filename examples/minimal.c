/* SPDX-License-Identifier: Apache-2.0
 *
 * One query token, 1,000 keys, the 8 best of them.
 *
 *     cc examples/minimal.c -o minimal $(pkg-config --cflags --libs lightning_indexer)
 */
#include <lightning_indexer.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint16_t query[64 * 128], key[1000 * 128]; /* bf16: the upper half of a float's bits */
static float weights[64];

int main(void) {
    for (int i = 0; i < 64 * 128; i++)
        query[i] = (uint16_t)(0x3F80 | (rand() & 1) << 15); /* +1 or -1 */
    for (int i = 0; i < 1000 * 128; i++)
        key[i] = (uint16_t)(0x3F80 | (rand() & 1) << 15);
    for (int h = 0; h < 64; h++)
        weights[h] = 1.0f / 64;

    int32_t best[8];
    struct lidx_device cpu = {LIDX_CPU, 0};
    struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, f32 = {LIDX_FLOAT, 32, 1},
                      i32 = {LIDX_INT, 32, 1};
    struct lidx_tensor q = {query, cpu, 4, bf16, (int64_t[]){1, 1, 64, 128}, NULL, 0};
    struct lidx_tensor k = {key, cpu, 4, bf16, (int64_t[]){1, 1000, 1, 128}, NULL, 0};
    struct lidx_tensor w = {weights, cpu, 3, f32, (int64_t[]){1, 1, 64}, NULL, 0};
    struct lidx_tensor out = {best, cpu, 4, i32, (int64_t[]){1, 1, 1, 8}, NULL, 0};

    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &q;
    args.key = &k;
    args.weights = &w;
    args.sparse_indices = &out;
    args.sparse_count = 8;

    struct lidx_context *context;
    if (lidx_create(&context, NULL) || lidx_run(context, &args)) {
        fprintf(stderr, "%s\n", lidx_last_error());
        return 1;
    }
    for (int s = 0; s < 8; s++)
        printf("%d%s", (int)best[s], s < 7 ? " " : "\n");
    lidx_destroy(context);
    return 0;
}
