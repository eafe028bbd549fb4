/* SPDX-License-Identifier: Apache-2.0
 *
 * libxsmm's small matrix product, bfloat16 to float. It is column-major, C = A B with A packed in
 * pairs along the inner dimension, so the lanes of A's vectors are the tile's fastest dimension.
 */
#include <libxsmm.h>
#include <stdlib.h>

#include "rivals.h"

struct op {
    libxsmm_bsmmfunction run;
    int lanes; /* rows of the packed operand */
    enum order order;
};

static const char *version(void) {
    return LIBXSMM_VERSION;
}

static void *open_op(const struct tile *tile) {
    int heads = tile->tokens * HEADS;
    int m = tile->order == HEADS_FASTEST ? heads : tile->keys;
    int n = tile->order == HEADS_FASTEST ? tile->keys : heads;
    int lda = m, ldb = DIM, ldc = m, flags = LIBXSMM_GEMM_FLAG_VNNI_A;
    float alpha = 1, beta = 0;
    struct op *op = malloc(sizeof *op);
    if (!op)
        return NULL;
    op->lanes = m;
    op->order = tile->order;
    op->run = libxsmm_bsmmdispatch(m, n, DIM, &lda, &ldb, &ldc, &alpha, &beta, &flags, NULL);
    if (!op->run) {
        free(op);
        return NULL;
    }
    return op;
}

static void close_op(void *op) {
    free(op);
}

static size_t packed_bytes(void *op) {
    return (size_t)((struct op *)op)->lanes * DIM * sizeof(uint16_t);
}

static void pack(void *op, const uint16_t *rows, void *packed) {
    int lanes = ((struct op *)op)->lanes;
    uint16_t *to = packed;
    for (int row = 0; row < lanes; row++) {
        for (int d = 0; d < DIM; d++)
            to[(d / 2 * lanes + row) * 2 + d % 2] = rows[row * DIM + d];
    }
}

static void multiply(void *op, const void *query, const void *key, float *dots) {
    struct op *o = op;
    if (o->order == HEADS_FASTEST)
        o->run(query, key, dots);
    else
        o->run(key, query, dots);
}

static const char *implementation(void *op) {
    (void)op;
    return libxsmm_get_target_arch();
}

const struct library libxsmm = {"libxsmm",    version, open_op,  close_op,
                                packed_bytes, pack,    multiply, implementation};
