/* SPDX-License-Identifier: Apache-2.0
 *
 * The line between cuda.c (C, host) and the kernels (.cu). A run is a sequence of slabs: output
 * rows [row_begin, row_end) are scored into `scores`, then selected from it, all on one stream.
 *
 * An output row is a number 0 .. lidx_rows(p) - 1: token t of a packed query, or b * n_query + i
 * of batch b otherwise. Lengths are on the device, so a launch is sized by maxima and the kernels
 * find batches and visible ranges themselves, with visible.h.
 *
 * Score slab: the score of key j for row r lies at scores[(r - row_begin) * scores_stride + j],
 * fp32, j counted from the first key of the row's batch. A score kernel writes every j below the
 * row's visible count; what lies beyond is not read. A key on a page whose id is out of range gets
 * SCORE_MASKED. Kernels' own NaN are canonical, so the pattern is free.
 */
#ifndef LIDX_LAUNCH_H
#define LIDX_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#include "../problem.h"
#include "../visible.h"

#define SCORE_MASKED 0xFFFFFFFFu

struct slab {
    struct problem p;
    int64_t row_begin; /* output rows of this slab */
    int64_t row_end;
    float *scores;         /* [row_end - row_begin][scores_stride], 256-byte aligned */
    int64_t scores_stride; /* floats from row to row: at least the most keys a row can see,
                            * a multiple of 64 */
    void *scratch;         /* the selection's own, see lidx_topk_scratch */
    int32_t n_sm;          /* multiprocessors of the device */
    int32_t compute;       /* compute capability, 90 for 9.0 */
    int32_t prepared;      /* lidx_prepare_topk has been called for the run */
};

LIDX_INLINE int64_t lidx_rows(const struct problem *p) {
    return p->query_packed ? p->n_query : p->n_batch * p->n_query;
}

#ifdef __cplusplus
extern "C" {
#endif

/* Launchers return a cudaError_t (0 is success). None allocates or synchronises. `stream` is a
 * cudaStream_t. */

/* Any GPU from SM80 on, any accepted problem, any alignment. */
int lidx_launch_score_smxx(const struct slab *s, void *stream);

/* Hopper. lidx_score_sm90_accepts says whether this problem suits it (shapes, strides and
 * pointers that TMA can address); the answer depends on the problem alone, never on lengths. */
int lidx_score_sm90_accepts(const struct problem *p);
int lidx_launch_score_sm90(const struct slab *s, void *stream);

/* Adds to p.error_word, if there is one, how many lengths of the whole problem were out of range
 * and how many visible pages had an id out of range. Once a run; score kernels only clamp. */
int lidx_launch_count(const struct slab *s, void *stream);

/* Clears the counters in the scratch of a run, if it will need them, given its first slab; the
 * caller then sets `prepared` in all of its slabs. Without that each lidx_launch_topk that needs
 * them clears them itself, between scores and selection, so that these two do not overlap. */
int lidx_prepare_topk(const struct slab *s, void *stream);

/* Orders and writes every output row of the slab: indices, and values if asked for. On SM90 and
 * later it may start before the kernel ahead of it in the stream has ended; it reads lengths, then
 * waits. So that one, the score kernel, must itself begin only when all ahead of it has ended. */
int lidx_launch_topk(const struct slab *s, void *stream);

/* Bytes of scratch the selection needs for slabs of up to `rows` rows of up to `max_key` keys. */
size_t lidx_topk_scratch(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm);

#ifdef __cplusplus
}
#endif

#endif
