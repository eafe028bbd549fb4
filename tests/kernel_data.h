/* SPDX-License-Identifier: Apache-2.0
 *
 * Data for one call of a kernel, what the reference says of it, and buffers that end at guard
 * pages.
 *
 * A score may differ from the reference by what two orders of fp32 summation can: with u = 2^-24,
 * each of the two is within (D + H + 2) u sum_h |w_h| sum_d |q_hd k_d| of the exact value. Units
 * that flush denormals (VDPBF16PS, TDPBF16PS) may also lose each product that has a denormal
 * factor, and up to 2^-126 in each of their additions; the tolerance adds just that.
 */
#ifndef TEST_KERNEL_DATA_H
#define TEST_KERNEL_DATA_H

#include "test.h"

#include "../src/cpu/kernels.h"

enum {
    MAX_KEYS = 160, /* at least MAX_HEAD_DIM, so that a bad value visits every position */
    MAX_BLOCKS = MAX_KEYS / KEY_BLOCK,
    MAX_STRIDE = 2 * MAX_HEAD_DIM + 64,
    AHEAD = 40
};

enum values { NORMAL, TINY, HUGE_, DENORMAL, ZEROS, WITH_INF, WITH_NAN, QUERY_BAD, N_VALUES };

enum layout { DENSE, DENSE_SHIFTED, STRIDED, STRIDED_SHIFTED, SCATTERED, N_LAYOUTS };

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

struct arena arena_make(void);
void arena_free(struct arena *a);

/* Fills in all but dtype, n_heads and head_dim, the reference's answers too. */
void data_fill(struct problem_data *p, struct rng *rng, enum values values);

/* Lays out keys first .. first + n - 1 as `layout` says and lists their blocks. The last row ends
 * against a guard page (each block does, when scattered); half of the dense runs begin behind one
 * instead. What follows in the list, n_ahead entries, may only be prefetched: it points into a
 * guard page. */
struct key_run data_place(struct arena *a, const struct problem_data *p, enum layout layout,
                          int first, int n, int n_ahead);

/* Packs the query in guarded buffers; NULL when pack() wrote past packed_size(). */
const void *pack_guarded(struct arena *a, const struct kernel_path *path,
                         const struct problem_data *p, int shifted);

/* Scores a run into a guarded buffer; NULL when more than n_keys floats were written. */
const float *score_guarded(struct arena *a, const struct kernel_path *path, const void *packed,
                           const struct problem_data *p, const struct key_run *run);

/* The last `size` bytes before the guard page. */
unsigned char *guard_tail(const struct guard *g, size_t size);

/* Whether the bytes that guarded calls set before still stand. */
int untouched(const unsigned char *from, const unsigned char *end);

static inline size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

#endif
