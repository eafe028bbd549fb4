/* SPDX-License-Identifier: Apache-2.0
 *
 * One rival's operator. With a query tile or more for each thread, threads divide the queries,
 * and a thread takes its queries past one chunk of keys after the other, so that the chunk stays in
 * its cache. With fewer, threads divide the keys and the passes of the selection.
 */
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "rivals.h"

enum { MAX_THREADS = 1024 };

struct composition {
    const struct library *library;
    struct problem problem;
    struct tile tile;
    int n_chunks, n_tiles; /* of keys, of queries */
    size_t packed_stride;
    unsigned char *packed;
    float *scores; /* [n_query][n_key] */
    void *ops[MAX_THREADS];
    float *dots[MAX_THREADS];
    uint64_t *scratch[MAX_THREADS];
    struct share *shares;
};

void *allocate(size_t bytes) {
    return aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
}

/* ---- ReLU, weights, sum over heads ----------------------------------------------------------- */

/* From dots[key][stride] with the heads first to last. */
static void sum_heads_plain(const float *dots, int stride, const float *weights, int n,
                            float *scores) {
    for (int j = 0; j < n; j++, dots += stride) {
        float sum = 0;
        for (int h = 0; h < HEADS; h++)
            sum += weights[h] * (dots[h] > 0 ? dots[h] : 0);
        scores[j] = sum;
    }
}

/* From dots[head][n]. */
static void sum_rows_plain(const float *dots, const float *weights, int n, float *scores) {
    memset(scores, 0, (size_t)n * sizeof *scores);
    for (int h = 0; h < HEADS; h++, dots += n) {
        for (int j = 0; j < n; j++)
            scores[j] += weights[h] * (dots[j] > 0 ? dots[j] : 0);
    }
}

#ifdef __x86_64__

__attribute__((target("avx512f"))) static void
sum_heads_avx512(const float *dots, int stride, const float *weights, int n, float *scores) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 w[HEADS / 16];
    for (int i = 0; i < HEADS / 16; i++)
        w[i] = _mm512_loadu_ps(weights + 16 * i);
    for (int j = 0; j < n; j++, dots += stride) {
        __m512 a = _mm512_mul_ps(w[0], _mm512_max_ps(zero, _mm512_loadu_ps(dots)));
        __m512 b = _mm512_mul_ps(w[1], _mm512_max_ps(zero, _mm512_loadu_ps(dots + 16)));
        a = _mm512_fmadd_ps(w[2], _mm512_max_ps(zero, _mm512_loadu_ps(dots + 32)), a);
        b = _mm512_fmadd_ps(w[3], _mm512_max_ps(zero, _mm512_loadu_ps(dots + 48)), b);
        scores[j] = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
    }
}

__attribute__((target("avx512f"))) static void
sum_rows_avx512(const float *dots, const float *weights, int n, float *scores) {
    const __m512 zero = _mm512_setzero_ps();
    for (int j = 0; j < n; j += 64) {
        __m512 a = zero, b = zero, c = zero, d = zero;
        for (int h = 0; h < HEADS; h++) {
            const float *row = dots + (size_t)h * (size_t)n + j;
            __m512 w = _mm512_set1_ps(weights[h]);
            a = _mm512_fmadd_ps(w, _mm512_max_ps(zero, _mm512_loadu_ps(row)), a);
            b = _mm512_fmadd_ps(w, _mm512_max_ps(zero, _mm512_loadu_ps(row + 16)), b);
            c = _mm512_fmadd_ps(w, _mm512_max_ps(zero, _mm512_loadu_ps(row + 32)), c);
            d = _mm512_fmadd_ps(w, _mm512_max_ps(zero, _mm512_loadu_ps(row + 48)), d);
        }
        _mm512_storeu_ps(scores + j, a);
        _mm512_storeu_ps(scores + j + 16, b);
        _mm512_storeu_ps(scores + j + 32, c);
        _mm512_storeu_ps(scores + j + 48, d);
    }
}

#endif

static void sum_heads(const float *dots, int stride, const float *weights, int n, float *scores) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        sum_heads_avx512(dots, stride, weights, n, scores);
        return;
    }
#endif
    sum_heads_plain(dots, stride, weights, n, scores);
}

static void sum_rows(const float *dots, const float *weights, int n, float *scores) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) {
        sum_rows_avx512(dots, weights, n, scores);
        return;
    }
#endif
    sum_rows_plain(dots, weights, n, scores);
}

/* ---- one tile -------------------------------------------------------------------------------- */

static float *scores_of(const struct composition *c, int token) {
    return c->scores + (size_t)token * (size_t)c->problem.n_key;
}

static void score_tile(const struct composition *c, int thread, int query_tile, int chunk) {
    int token = query_tile * c->tile.tokens, key = chunk * c->tile.keys, n = c->tile.keys;
    const void *query = c->problem.query + (size_t)token * HEADS * DIM;
    const void *keys = c->problem.key + (size_t)key * DIM;
    float *dots = c->dots[thread];
    if (c->tile.order == HEADS_FASTEST)
        query = c->packed + (size_t)query_tile * c->packed_stride;
    else
        keys = c->packed + (size_t)chunk * c->packed_stride;
    c->library->multiply(c->ops[thread], query, keys, dots);
    for (int t = 0; t < c->tile.tokens; t++) {
        const float *weights = c->problem.weights + (size_t)(token + t) * HEADS;
        float *scores = scores_of(c, token + t) + key;
        if (c->tile.order == HEADS_FASTEST)
            sum_heads(dots + t * HEADS, c->tile.tokens * HEADS, weights, n, scores);
        else
            sum_rows(dots + (size_t)t * HEADS * (size_t)n, weights, n, scores);
    }
}

/* ---- threads --------------------------------------------------------------------------------- */

static int part(int n, int thread, int n_threads) {
    return (int)((int64_t)n * thread / n_threads);
}

static void run_queries(struct composition *c, int thread, int n_threads, int32_t *indices,
                        float *values) {
    int begin = part(c->n_tiles, thread, n_threads), end = part(c->n_tiles, thread + 1, n_threads);
    struct share *share = &c->shares[thread];
    for (int chunk = 0; chunk < c->n_chunks; chunk++) {
        for (int tile = begin; tile < end; tile++)
            score_tile(c, thread, tile, chunk);
    }
    for (int token = begin * c->tile.tokens; token < end * c->tile.tokens; token++) {
        const float *scores = scores_of(c, token);
        share_count(share, scores, 0, c->problem.n_key);
        share_collect(share, scores, 0, c->problem.n_key, selection_cut(share, 1, TOP_K));
        selection_finish(share, 1, TOP_K, c->scratch[thread], indices + (size_t)token * TOP_K,
                         values + (size_t)token * TOP_K);
    }
}

static void run_keys(struct composition *c, int thread, int n_threads, int32_t *indices,
                     float *values) {
    int begin = part(c->n_chunks, thread, n_threads);
    int end = part(c->n_chunks, thread + 1, n_threads), n = c->tile.keys;
    struct share *share = &c->shares[thread];
    for (int chunk = begin; chunk < end; chunk++) {
        for (int tile = 0; tile < c->n_tiles; tile++)
            score_tile(c, thread, tile, chunk);
    }
    for (int token = 0; token < c->problem.n_query; token++) {
        const float *scores = scores_of(c, token);
        share_count(share, scores, begin * n, end * n);
#ifdef _OPENMP
#pragma omp barrier
#endif
        share_collect(share, scores, begin * n, end * n,
                      selection_cut(c->shares, n_threads, TOP_K));
#ifdef _OPENMP
#pragma omp barrier
#endif
        if (thread == token % n_threads)
            selection_finish(c->shares, n_threads, TOP_K, c->scratch[0],
                             indices + (size_t)token * TOP_K, values + (size_t)token * TOP_K);
#ifdef _OPENMP
        if (token + 1 < c->problem.n_query) {
#pragma omp barrier
        }
#endif
    }
}

void composition_run(struct composition *c, int32_t *indices, float *values) {
    int n_threads = c->problem.n_threads;
    int by_queries = c->n_tiles >= n_threads;
#ifdef _OPENMP
#pragma omp parallel num_threads(n_threads)
    {
        int thread = omp_get_thread_num(), n = omp_get_num_threads();
#else
    {
        int thread = 0, n = n_threads;
#endif
        if (by_queries)
            run_queries(c, thread, n, indices, values);
        else
            run_keys(c, thread, n, indices, values);
    }
}

/* ---- making one ------------------------------------------------------------------------------ */

/* A thread's own part, made on that thread: what a library builds for one thread, and memory where
 * this thread touches it first. */
static int open_thread(struct composition *c, int thread) {
    size_t n_key = (size_t)c->problem.n_key;
    size_t tile = (size_t)c->tile.tokens * HEADS * (size_t)c->tile.keys;
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    c->ops[thread] = c->library->open(&c->tile);
    c->dots[thread] = allocate(tile * sizeof(float));
    c->scratch[thread] = allocate(2 * (n_key + 2 * TOP_K) * sizeof(uint64_t));
    c->shares[thread].above = allocate((n_key + 1) * sizeof(uint64_t));
    c->shares[thread].within = allocate((n_key + 1) * sizeof(uint64_t));
    if (!c->ops[thread] || !c->dots[thread] || !c->scratch[thread] || !c->shares[thread].above ||
        !c->shares[thread].within)
        return 1;
    memset(c->dots[thread], 0, tile * sizeof(float));
    return 0;
}

static int pack_all(struct composition *c) {
    int is_keys = c->tile.order == KEYS_FASTEST, n = is_keys ? c->n_chunks : c->n_tiles;
    size_t rows = (size_t)(is_keys ? c->tile.keys : c->tile.tokens * HEADS);
    const uint16_t *from = is_keys ? c->problem.key : c->problem.query;
    c->packed_stride = (c->library->packed_bytes(c->ops[0]) + 63) / 64 * 64;
    c->packed = allocate(c->packed_stride * (size_t)n);
    if (!c->packed)
        return 1;
    for (int i = 0; i < n; i++)
        c->library->pack(c->ops[0], from + (size_t)i * rows * DIM,
                         c->packed + (size_t)i * c->packed_stride);
    return 0;
}

struct composition *composition_create(const struct library *library, const struct problem *problem,
                                       const struct tile *tile) {
    struct composition *c = calloc(1, sizeof *c);
    int failed = 0;
    if (!c)
        return NULL;
    c->library = library;
    c->problem = *problem;
    c->tile = *tile;
    c->n_chunks = problem->n_key / tile->keys;
    c->n_tiles = problem->n_query / tile->tokens;
    c->shares = calloc((size_t)problem->n_threads, sizeof *c->shares);
    c->scores = allocate((size_t)problem->n_query * (size_t)problem->n_key * sizeof(float));
    if (!c->shares || !c->scores || problem->n_threads > MAX_THREADS) {
        composition_destroy(c);
        return NULL;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(problem->n_threads) reduction(| : failed)
    failed |= open_thread(c, omp_get_thread_num());
#else
    failed = open_thread(c, 0);
#endif
    if (failed || pack_all(c)) {
        composition_destroy(c);
        return NULL;
    }
    return c;
}

const char *composition_implementation(const struct composition *c) {
    return c->library->implementation(c->ops[0]);
}

void composition_destroy(struct composition *c) {
    if (!c)
        return;
    for (int thread = 0; c->shares && thread < c->problem.n_threads; thread++) {
        if (c->ops[thread])
            c->library->close(c->ops[thread]);
        free(c->dots[thread]);
        free(c->scratch[thread]);
        free(c->shares[thread].above);
        free(c->shares[thread].within);
    }
    free(c->shares);
    free(c->scores);
    free(c->packed);
    free(c);
}
