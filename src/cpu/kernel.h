/* SPDX-License-Identifier: Apache-2.0
 *
 * The contract of a CPU kernel. A kernel sees one query token (its heads, packed once) and a run
 * of keys; it writes one float per key. It never sees batches, pages, layouts, masks, threads
 * or k.
 *
 * Three promises hold the library up, and tests check them for every row of the table:
 *
 *  1. Bits. The score of one (query token, key) pair depends on those two alone: not on the key's
 *     place in the run, the length of the run, or its neighbours. The order of summation is fixed.
 *  2. Bounds. Only the rows of the run are read, only n_keys floats are written. A prefetch may
 *     name any address; a load may not.
 *  3. Values. Products accumulate in fp32. ReLU keeps a NaN: write max(0, x) as !(x <= 0) ? x : 0.
 *     Lanes that pad the heads must not reach the sum, even where a key holds inf or NaN.
 */
#ifndef LIDX_KERNEL_H
#define LIDX_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "../problem.h"
#include "features.h" /* the bits of struct kernel.needs */

enum {
    KEY_BLOCK = 16,  /* keys of one block: 16 divides every page size */
    TILE_KEYS = 960, /* 60 key blocks, 20 tiles of 48, at most 240 KiB */
    MAX_TILE_KEYS = 2880,
    MAX_HEADS = 128,
    MAX_HEAD_DIM = 128,
    /* Largest packed query: fp32 elements, fp32 weights and slack for alignment. */
    PACKED_MAX = MAX_HEADS * MAX_HEAD_DIM * 4 + 4096,
};

/* Before a loop whose counter names registers, so that none of it may be left at run time. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* One query token. */
struct query_row {
    const void *query;    /* [n_heads][head_dim] of the path's dtype, any alignment */
    const float *weights; /* [n_heads] */
    int n_heads;          /* 1..128 */
    int head_dim;         /* 64 or 128 */
};

/* A run of keys, in place: block[i] points at KEY_BLOCK consecutive rows (any alignment), and in
 * the last block only the first n_keys % KEY_BLOCK rows exist when that is not 0. n_keys >= 1.
 * Behind the run, block[] has n_ahead further entries: the keys that come next, for prefetch
 * only. */
struct key_run {
    const void *const *block;
    int64_t row_stride; /* bytes from key to key inside a block */
    int n_keys;
    int n_ahead;
};

/* One element type of one kernel. */
struct kernel_path {
    /* Bytes that pack() writes; at most PACKED_MAX. */
    size_t (*packed_size)(int n_heads, int head_dim);
    /* Rewrites a query token into the form that score() streams. `packed` is 64-byte aligned. */
    void (*pack)(void *packed, const struct query_row *row);
    /* score[j] for the n_keys keys of the run. `score` is 64-byte aligned. */
    void (*score)(float *score, const void *packed, int n_heads, int head_dim,
                  const struct key_run *run);
};

/* Vector forms of the selection's loops, topk.h. */
struct topk_loops;
#if defined(__x86_64__)
extern const struct topk_loops lidx_topk_avx2;   /* FEATURE_AVX2 */
extern const struct topk_loops lidx_topk_avx512; /* FEATURE_AVX512 */
#endif

struct kernel {
    const char *name; /* the stem of its file */
    uint64_t needs;   /* FEATURE_* bits, all of them required */
    /* Called by each thread before its first and after its last use in a run; may be NULL. */
    void (*enter)(void);
    void (*leave)(void);
    const struct topk_loops *topk;       /* NULL = the portable ones */
    struct kernel_path path[KEY_DTYPES]; /* by enum dtype: bf16 and fp16, both filled */
    /* By enum dtype; NULL where not offered: score() of two query tokens over the same run, each
     * to the same bits. For kernels that gain by using keys twice once they are in registers. */
    void (*score_two[KEY_DTYPES])(float *const score[2], const void *const packed[2], int n_heads,
                                  int head_dim, const struct key_run *run);
    /* By enum dtype: whether few tokens shall share keys even if threads must then share the
     * tokens. What that costs is only worth it where loading keys is much of the time. */
    int shares_keys[KEY_DTYPES];
    /* Most keys of one call of score(): a multiple of 48 up to MAX_TILE_KEYS, 0 = TILE_KEYS. All
     * rows of a block pass over them, so they should stay in L2. */
    int tile_keys;
    /* How fast it is, about: a key takes n_heads x head_dim products. 0 = 100. */
    int products_per_ns;
};

#endif
