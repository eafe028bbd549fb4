/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection on the device, alone: score slabs are filled directly, every row is compared with
 * a sort on the host, and every launch is repeated and compared byte for byte.
 *
 *     nvcc -std=c++17 -O3 -arch=native -Xcompiler -fopenmp tests/test_topk.cu \
 *         src/cuda/topk.cu -o test_topk
 *     ./test_topk [check | quick | sanitize] [time] [profile]
 *
 * Without a GPU: tests/emulated/cuda_runtime.h.
 */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "../src/cuda/launch.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        int must_e = (int)(call);                                                                  \
        if (must_e) {                                                                              \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                                   \
                   cudaGetErrorString((cudaError_t)must_e));                                       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#ifdef __CUDACC__
enum { ON_DEVICE = 1 };
#else
enum { ON_DEVICE = 0 };
#endif

static long passed, failed;
static int32_t compute = 90; /* 80: without clusters */

/* ---- data ------------------------------------------------------------------------------------ */

static uint32_t hash32(uint64_t x) {
    x = (x ^ x >> 31) * 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9ull;
    return (uint32_t)((x ^ x >> 32) >> 16);
}

static float uniform(uint64_t seed) {
    return (hash32(seed) + 0.5f) * 2.3283064e-10f;
}

static float normal(uint64_t seed) {
    return sqrtf(-2 * logf(uniform(2 * seed) * 0.99999f + 1e-10f)) *
           cosf(6.2831853f * uniform(2 * seed + 1));
}

static float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static uint32_t to_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static const char *const data_names[] = {
    "normal",   "x1e-8",  "heavy",   "+100",     "relu84", "relu99", "equal", "rising",   "falling",
    "late",     "levels", "ulps",    "outliers", "nan",    "masked", "mixed", "negative", "zeros",
    "periodic", "spikes", "anybits", "steps",    "tight",  "crowd",  "share"};
enum { DATA_KINDS = sizeof data_names / sizeof *data_names };

/* Score of key j among n. */
static float datum(int kind, uint64_t seed, int64_t j, int64_t n) {
    float x = normal(seed + j);
    /* A line for each kind. */
    /* clang-format off */
    switch (kind) {
    case 1: return x * 1e-8f;
    case 2: return copysignf(powf(10, 15 * fabsf(x) - 30), x);
    case 3: return x + 100;
    case 4: return x > 1 ? x - 1 : 0;
    case 5: return x > 2.51f ? x - 2.51f : 0;
    case 6: return 0.75f;
    case 7: return (float)j + 0.25f * x;
    case 8: return (float)(n - j) * 1e-3f + 0.001f * x;
    case 9: return j >= n - 2500 ? 10 + x : x;
    case 10: return rintf(4 * x) * 0.25f;
    case 11: return from_bits(0x3F800000u + (uint32_t)lrintf(fabsf(x) * 8));
    case 12: return hash32(seed * 77 + j) % 50 == 0 ? 1e3f * (1 + hash32(seed + j) % 7) : 1e-3f * x;
    case 13: return from_bits(j % 2 ? 0x7FFFFFFFu : 0x7FC00001u);
    case 14: return from_bits(SCORE_MASKED);
    case 15:
        switch (hash32(seed * 31 + j) % 8) {
        case 0: return from_bits(0x7FFFFFFFu);
        case 1: return from_bits(SCORE_MASKED);
        case 2: return -INFINITY;
        case 3: return INFINITY;
        case 4: return -0.0f;
        case 5: return 0.0f;
        default: return x;
        }
    case 16: return -fabsf(x);
    case 17: return j % 3 ? -0.0f : 0.0f;
    case 18: return j * (n / 512 + 1) % n < n / 32 ? 5 + x : x;
    case 19: return hash32(seed * 13 + j) % 3 ? 1.0f : 1 + 1e-3f * x;
    case 20: return from_bits(hash32(seed * 7 + j));
    case 21: return x > 1 ? rintf(16 * x) / 16 : x;
    case 22: return j >= n - 3000 ? 1 + 0.01f * uniform(2 * (seed + j)) : -1 - fabsf(x);
    /* In a cluster: more candidates than some warps' lists hold, though few enough in all ... */
    case 23: return j % 8192 < 512 ? 1 + 0.2f * uniform(2 * (seed + j)) : -1 - fabsf(x);
    /* ... and in the first block one more than it may send to one block. */
    case 24:
        return j % 256 < 32 && j / 256 * 32 + j % 32 < 513 ? 1 + 1e-6f * (float)j : -1 - fabsf(x);
    default: return x;
    }
    /* clang-format on */
}

/* ---- host reference -------------------------------------------------------------------------- */

/* Smaller is better; SCORE_MASKED has no key. */
static uint64_t rank_of(float x, uint32_t position) {
    uint32_t u = to_bits(x), key;
    if (x != x)
        key = 0xFFFFFFFEu;
    else if (x == 0)
        key = 0x7FFFFFFFu;
    else
        key = u >> 31 ? u : 0x7FFFFFFFu - u;
    return (uint64_t)key << 32 | position;
}

/* 16-bit float as a double; infinity as the next power of two, so that rounding can reach it. */
static double decode16(int dtype, uint32_t h) {
    int mantissa = dtype == DTYPE_BF16 ? 7 : 10, bias = dtype == DTYPE_BF16 ? 127 : 15;
    int e = (int)(h >> mantissa), m = (int)(h & ((1u << mantissa) - 1));
    return e ? ldexp((1 << mantissa) + m, e - bias - mantissa) : ldexp(m, 1 - bias - mantissa);
}

static uint16_t encode16(int dtype, float x) {
    uint32_t top = dtype == DTYPE_BF16 ? 0x7F80 : 0x7C00, low = 0, high = top;
    if (x != x)
        return dtype == DTYPE_BF16 ? 0x7FC0 : 0x7E00;
    double size = fabs((double)x);
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (decode16(dtype, middle) <= size)
            low = middle;
        else
            high = middle;
    }
    double below = size - decode16(dtype, low), above = decode16(dtype, high) - size;
    uint32_t h = above < below || (above == below && low % 2) ? high : low;
    return (uint16_t)(h | (x < 0 ? 0x8000 : 0));
}

static void expect_row(const float *score, int64_t n, const struct problem *p, int32_t *indices,
                       unsigned char *values) {
    std::vector<uint64_t> all;
    for (int64_t j = 0; j < n; j++)
        if (to_bits(score[j]) != SCORE_MASKED)
            all.push_back(rank_of(score[j], (uint32_t)j));
    size_t k = std::min((size_t)p->top_k, all.size());
    std::nth_element(all.begin(), all.begin() + (k ? k - 1 : 0), all.end());
    std::sort(all.begin(), all.begin() + k);
    for (size_t j = 0; j < (size_t)p->top_k; j++) {
        indices[j] = j < k ? (int32_t)(uint32_t)all[j] : -1;
        float x = j < k ? score[indices[j]] : -INFINITY;
        x = x != x ? from_bits(0x7FC00000u) : x == 0 ? 0.0f : x;
        if (p->values_dtype == DTYPE_F32)
            memcpy(values + 4 * j, &x, 4);
        else {
            uint16_t h = encode16(p->values_dtype, x);
            memcpy(values + 2 * j, &h, 2);
        }
    }
}

/* ---- one case -------------------------------------------------------------------------------- */

struct test_case {
    int kind;
    std::vector<int32_t> query_lengths, key_lengths; /* empty: none */
    int64_t n_batch, n_query, n_key;
    int packed, mode, top_k, values_dtype;
    int32_t n_sm;      /* decides how rows are shared out */
    int64_t slab_rows; /* 0: all at once */
    int hostile;       /* lists against their contract: only the range of the output is checked */
};

/* The batch of a packed row, found without the library's help. */
static int64_t batch_of(const struct test_case &c, int64_t t) {
    for (int64_t b = 0; b < c.n_batch; b++)
        if (t < std::min(std::max((int64_t)c.query_lengths[b], (int64_t)0), c.n_query))
            return b;
    return c.n_batch;
}

template <class T> static T *device_copy(const std::vector<T> &v) {
    void *p;
    MUST(cudaMalloc(&p, v.size() * sizeof(T)));
    MUST(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return (T *)p;
}

static void report(const struct test_case &c, int64_t row, int64_t n, const int32_t *want,
                   const int32_t *got, const float *score) {
    int shown = 0, differ = 0;
    for (int j = 0; j < c.top_k; j++)
        differ += want[j] != got[j];
    printf("FAIL %s n_key %lld k %d packed %d mode %d n_sm %d row %lld visible %lld: %d differ:",
           data_names[c.kind], (long long)c.n_key, c.top_k, c.packed, c.mode, c.n_sm,
           (long long)row, (long long)n, differ);
    for (int j = 0; j < c.top_k && shown < 4; j++)
        if (want[j] != got[j]) {
            shown++;
            printf(" [%d] want %d (%g) got %d (%g)", j, want[j], want[j] < 0 ? 0 : score[want[j]],
                   got[j], got[j] < 0 || got[j] >= n ? 0 : score[got[j]]);
        }
    printf("\n");
    fflush(stdout);
}

/* Scores of a case, and what the selection is to make of them. */
struct expectation {
    int64_t rows, stride;
    std::vector<float> score;
    std::vector<int64_t> visible; /* keys of each row */
    std::vector<int32_t> indices;
    std::vector<unsigned char> values;
};

/* What the selection has written. */
struct answer {
    std::vector<int32_t> indices;
    std::vector<unsigned char> values;
    bool operator==(const struct answer &a) const {
        return indices == a.indices && values == a.values;
    }
};

static struct problem problem_of(const struct test_case &c) {
    struct problem p;
    memset(&p, 0, sizeof p);
    p.values_dtype = c.values_dtype;
    p.top_k = c.top_k;
    p.sparse_mode = c.mode;
    p.n_batch = c.n_batch;
    p.n_query = c.n_query;
    p.n_key = c.n_key;
    p.query_packed = c.packed;
    return p;
}

static size_t bytes_of_value(const struct test_case &c) {
    return c.values_dtype == DTYPE_F32 ? 4 : 2;
}

/* Rows of one launch, of `rows` in all. */
static int64_t rows_of_slab(const struct test_case &c, int64_t rows) {
    return c.slab_rows ? c.slab_rows : std::max(rows, (int64_t)1);
}

static int64_t visible_keys(const struct test_case &c, const struct problem *p, int64_t row) {
    int64_t b = c.packed ? batch_of(c, row) : row / c.n_query;
    if (b >= c.n_batch)
        return 0;
    struct extent e = lidx_extent(p, b);
    int64_t i = c.packed ? row - e.query_begin : row % c.n_query;
    return i < 0 ? 0 : lidx_visible(p, &e, i);
}

static void expect_rows(const struct test_case &c, struct expectation *e) {
    struct problem p = problem_of(c);
    p.query_lengths = c.query_lengths.empty() ? NULL : c.query_lengths.data();
    p.key_lengths = c.key_lengths.empty() ? NULL : c.key_lengths.data();
    e->rows = lidx_rows(&p);
    e->stride = (c.n_key + 63) / 64 * 64 + 64;
    size_t k = (size_t)c.top_k, bytes = bytes_of_value(c);
    e->score.resize(e->rows * e->stride);
    e->visible.resize(e->rows);
    e->indices.resize(e->rows * k);
    e->values.resize(e->rows * k * bytes);
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < e->rows; row++) {
        int64_t n = e->visible[row] = visible_keys(c, &p, row);
        float *x = &e->score[row * e->stride];
        for (int64_t j = 0; j < e->stride; j++) /* whoever reads past the end takes the bait */
            x[j] = j < n ? datum(c.kind, row * 1000003ull + c.kind * 7919 + 1, j, n) : INFINITY;
        expect_row(x, n, &p, &e->indices[row * k], &e->values[row * k * bytes]);
    }
}

/* The problem with its lists and outputs on the device, the scores and the scratch there. */
static struct slab upload(const struct test_case &c, const struct expectation &e) {
    struct slab s;
    memset(&s, 0, sizeof s);
    struct problem *p = &s.p;
    *p = problem_of(c);
    size_t k = (size_t)c.top_k, bytes = bytes_of_value(c);
    size_t room = lidx_topk_scratch(rows_of_slab(c, e.rows), c.n_key, c.top_k, c.n_sm);
    void *indices;
    p->query_lengths = c.query_lengths.empty() ? NULL : device_copy(c.query_lengths);
    p->key_lengths = c.key_lengths.empty() ? NULL : device_copy(c.key_lengths);
    MUST(cudaMalloc(&indices, e.rows * k * 4 + 4));
    p->indices = (int32_t *)indices;
    MUST(cudaMalloc(&p->values, e.rows * k * bytes + 4));
    MUST(cudaMalloc(&s.scratch, room + 4));
    MUST(cudaMemset(s.scratch, 0xA7, room + 4));
    p->indices_batch_stride = c.packed ? 0 : (int64_t)(c.n_query * k * 4);
    p->values_batch_stride = c.packed ? 0 : (int64_t)(c.n_query * k * bytes);
    s.scores = device_copy(e.score);
    s.scores_stride = e.stride;
    s.n_sm = c.n_sm;
    s.compute = compute;
    return s;
}

static void free_slab(const struct slab &s) {
    cudaFree(s.scores);
    cudaFree(s.scratch);
    cudaFree(s.p.indices);
    cudaFree(s.p.values);
    if (s.p.query_lengths)
        cudaFree((void *)s.p.query_lengths);
    if (s.p.key_lengths)
        cudaFree((void *)s.p.key_lengths);
}

static struct answer select_rows(const struct test_case &c, const struct expectation &e,
                                 struct slab s) {
    struct answer a = {std::vector<int32_t>(e.indices.size()),
                       std::vector<unsigned char>(e.values.size())};
    float *scores = s.scores;
    int64_t step = rows_of_slab(c, e.rows);
    MUST(cudaMemset(s.p.indices, 0x5A, a.indices.size() * 4));
    MUST(cudaMemset(s.p.values, 0x5A, a.values.size()));
    for (int64_t begin = 0; begin < e.rows; begin += step) {
        s.row_begin = begin;
        s.row_end = std::min(begin + step, e.rows);
        s.scores = scores + begin * e.stride;
        MUST(lidx_launch_topk(&s, NULL));
    }
    MUST(cudaGetLastError());
    MUST(cudaDeviceSynchronize());
    MUST(cudaMemcpy(a.indices.data(), s.p.indices, a.indices.size() * 4, cudaMemcpyDeviceToHost));
    MUST(cudaMemcpy(a.values.data(), s.p.values, a.values.size(), cudaMemcpyDeviceToHost));
    return a;
}

static void compare(const struct test_case &c, const struct expectation &e,
                    const struct answer &a) {
    size_t k = (size_t)c.top_k, bytes = k * bytes_of_value(c);
    int shown = 0;
    for (int64_t row = 0; row < e.rows; row++) {
        const int32_t *want = &e.indices[row * k], *got = &a.indices[row * k];
        if (c.hostile) {
            for (size_t j = 0; j < k; j++)
                failed += got[j] < -1 || got[j] >= c.n_key;
        } else if (memcmp(want, got, k * 4)) {
            failed++;
            if (shown++ < 2)
                report(c, row, e.visible[row], want, got, &e.score[row * e.stride]);
        } else if (memcmp(&e.values[row * bytes], &a.values[row * bytes], bytes)) {
            failed++;
            if (shown++ < 2)
                printf("FAIL %s row %lld: values of type %d differ\n", data_names[c.kind],
                       (long long)row, c.values_dtype);
        } else {
            passed++;
        }
    }
}

static void run_case(const struct test_case &c, int launches) {
    struct expectation e;
    expect_rows(c, &e);
    struct slab s = upload(c, e);
    struct answer first = select_rows(c, e, s);
    compare(c, e, first);
    for (int turn = 1; turn < launches; turn++)
        if (!(select_rows(c, e, s) == first)) {
            printf("FAIL %s n_key %lld k %d: launch %d differs from the first\n",
                   data_names[c.kind], (long long)c.n_key, c.top_k, turn);
            failed++;
        }
    free_slab(s);
}

/* ---- all cases ------------------------------------------------------------------------------- */

/* Every kind of data at one size, with batches of different lengths; regime by n_sm. */
static void check_lengths(const std::vector<int32_t> &lengths, int64_t n_key, int top_k,
                          int32_t n_sm, int launches) {
    for (int kind = 0; kind < DATA_KINDS; kind++) {
        /* clang-format off */
        struct test_case c = {kind, {}, lengths, (int64_t)lengths.size(), 1, n_key, 0, 0, top_k,
                              kind % DTYPE_COUNT, n_sm, 0, 0};
        /* clang-format on */
        run_case(c, launches);
    }
}

static void check_layouts(int32_t n_sm) {
    /* Packed queries, an empty batch, rows past the last prefix, short and long batches. */
    struct test_case packed = {
        0, {3, 3, 10, 17}, {9000, 9100, 9100, 12000}, 4, 20, 12000, 1, 3, 64, DTYPE_F32, n_sm, 0,
        0};
    run_case(packed, 2);
    packed.slab_rows = 7;
    packed.mode = 0;
    run_case(packed, 2);
    packed.query_lengths = {15, 4, -3, 2000000000}; /* must end; any batch will do */
    packed.key_lengths = {100, 2000000000, -5, 50};
    packed.hostile = 1;
    run_case(packed, 2);
    /* Not packed: rows past their length, a causal edge, more queries than keys. */
    struct test_case plain = {
        4, {4, 0, 9, 100}, {30, 5000, 4, 9000}, 4, 9, 9000, 0, 3, 300, DTYPE_BF16, n_sm, 5, 0};
    run_case(plain, 2);
    plain.query_lengths = {};
    plain.key_lengths = {};
    plain.slab_rows = 0;
    run_case(plain, 2);
    plain.n_key = 0;
    run_case(plain, 2);
}

/* Few rows that leave the device idle: a cluster of blocks each, or blocks that never meet. */
static void check_few(const std::vector<int32_t> &lengths, int64_t n_key, int top_k) {
    const int32_t many = 4096; /* multiprocessors: always split */
    check_lengths(lengths, n_key, top_k, many, 3);
    compute = 80;
    check_lengths(lengths, n_key, top_k, many, 3);
    compute = 90;
}

/* One row for a cluster, or for 32 blocks if n_key is short. */
static void check_row(int kind, int n_key, int length, int top_k) {
    struct test_case c = {kind, {}, {length}, 1, 1, n_key, 0, 0, top_k, DTYPE_F32, 4096, 0, 0};
    run_case(c, 1);
}

/* The four paths of other rows: one block, split, and for top_k above 2048. */
static void check_paths(int kind) {
    struct test_case c = {kind, {}, {}, 1, 3, 4200, 0, 3, 2048, DTYPE_F32, 3, 0, 0};
    run_case(c, 1);
    c.n_key = 9000;
    c.n_sm = 1;
    run_case(c, 1);
    c.n_sm = 4096;
    compute = 80;
    run_case(c, 1);
    compute = 90;
    c.top_k = 4096;
    run_case(c, 1);
}

/* Where what a cluster or 32 blocks have room for is exceeded. */
static void check_limits(void) {
    check_paths(15);
    check_row(11, 70000, 9000, 2048);
    check_row(15, 9000, 9000, 2048);
    check_row(23, 36000, 36000, 2048); /* some warps' lists */
    check_row(24, 9000, 9000, 512);    /* an inbox, by one */
    check_row(6, 3000, 2000, 2048);    /* a part */
}

static void check(int32_t n_sm, int full) {
    static const int32_t ks[] = {1, 7, 64, 512, 1000, 2047, 2048, 2049, 4096, 8192};
    int32_t few = 1, many = 4096; /* never split; always split */
    check_limits();
    check_layouts(few);
    check_layouts(n_sm);
    check_layouts(many);
    for (int i = 0; i < (int)(sizeof ks / sizeof *ks); i++) {
        int k = ks[i];
        if (!full && i % 3)
            continue;
        check_lengths({0, 1, k - 1, k, k + 1, 4096, 5003, 8192}, 8192, k, n_sm, 3);
        check_lengths({0, 1, k - 1, k, k + 1, 4096, 5003, 8192}, 8192, k, many, 3);
        check_lengths({8191, 8193, 12345, 20000}, 20000, k, few, 3);
        check_few({8191, 8193, 12345, 20000}, 20000, k);
        if (full) {
            check_lengths({65536, 50001, 3000, 131072}, 131072, k, few, 3);
            check_lengths({65536, 50001, 3000, 131072}, 131072, k, many, 3);
            check_lengths({16384, 16383, 8000, 0, 60000, 65536, 65535, 65536}, 65536, k, n_sm, 3);
        }
    }
    if (full) {
        check_lengths({1048576, 1000003}, 1048576, 2048, few, 2);
        check_lengths({1048576, 1000003}, 1048576, 2048, many, 2);
        check_lengths({1048576}, 1048576, 8192, n_sm, 2);
        check_few({131071}, 131071, 2048);
        for (int kind = 0; kind < DATA_KINDS; kind++) { /* the crowd kernel, causal */
            struct test_case c = {kind, {}, {}, 1, 700, 8192, 0, 3, 2048, DTYPE_F32, n_sm, 300, 0};
            run_case(c, 3);
            c.n_key = 20000;
            run_case(c, 3);
        }
    }
}

/* Every path, by few and short rows: racecheck takes seconds for each of a cluster or 32 blocks. */
static void check_small(void) {
    for (int kind : {0, 4, 10, 11, 13})
        check_paths(kind);
    /* Clusters that hold 8 scores a thread, or 16: candidates that spread, share buckets, crowd
     * them, or are too many. */
    check_row(0, 70000, 9000, 2048);
    check_row(7, 20000, 9000, 2048);
    check_row(6, 20000, 8200, 2048);
    check_row(21, 20000, 9000, 2048);
    check_row(22, 70000, 9000, 2048);
    struct test_case uneven = {4, {},   {3000, 0, 9000}, 3,    1, 9000, 0,
                               0, 2048, DTYPE_BF16,      4096, 0, 0};
    run_case(uneven, 1);
    check_row(0, 8192, 3000, 2048); /* 32 blocks: even, and a last part that ends too early */
    check_row(11, 3000, 2500, 2048);
    struct test_case crowd = {0, {}, {}, 1, 20, 9000, 0, 3, 64, DTYPE_F32, 1, 0, 0};
    run_case(crowd, 1);
}

/* ---- timing ---------------------------------------------------------------------------------- */

#ifdef __CUDACC__
static __global__ void fill(float *score, int64_t n, int64_t stride, int kind) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t a = (uint64_t)i * 2654435761u + 12345;
        a = (a ^ a >> 31) * 0x9E3779B97F4A7C15ull;
        a = (a ^ a >> 29) * 0xBF58476D1CE4E5B9ull;
        a ^= a >> 32;
        float u = ((uint32_t)a + 0.5f) * 2.3283064e-10f, v = (uint32_t)(a >> 32) * 2.3283064e-10f;
        float x = sqrtf(-2 * logf(u * 0.99999f + 1e-10f)) * cosf(6.2831853f * v);
        int64_t j = i % stride;
        /* A line for each kind. */
        /* clang-format off */
        switch (kind) {
        case 3: x += 100; break;
        case 4: x = x > 1 ? x - 1 : 0; break;
        case 5: x = x > 2.51f ? x - 2.51f : 0; break;
        case 6: x = 0.75f; break;
        case 7: x = (float)j + 0.25f * x; break;
        case 9: x = j >= stride - 2500 ? 10 + x : x; break;
        case 10: x = rintf(4 * x) * 0.25f; break;
        case 11: x = __uint_as_float(0x3F800000u + (uint32_t)lrintf(fabsf(x) * 8)); break;
        case 12: x = a % 50 == 0 ? 1e3f * (1 + (a >> 20) % 7) : 1e-3f * x; break;
        case 13: x = __uint_as_float(0x7FFFFFFFu); break;
        case 19: x = a % 3 ? 1.0f : 1 + 1e-3f * x; break;
        default: break;
        }
        /* clang-format on */
        score[i] = x;
    }
}

static double time_one(int64_t rows, int64_t n_key, int top_k, int kind, int values, int32_t n_sm,
                       int repeat, int prepared) {
    struct slab s;
    memset(&s, 0, sizeof s);
    struct problem *p = &s.p;
    void *a, *flush;
    size_t flush_bytes = 192 << 20;
    int decode = rows <= 256;
    p->values_dtype = DTYPE_F32;
    p->top_k = top_k;
    p->sparse_mode = 3;
    p->n_batch = decode ? rows : 1;
    p->n_query = decode ? 1 : rows;
    p->n_key = n_key;
    p->indices_batch_stride = p->values_batch_stride = (int64_t)p->n_query * top_k * 4;
    s.row_end = rows;
    s.scores_stride = n_key;
    s.n_sm = n_sm;
    s.compute = 90;
    size_t room = lidx_topk_scratch(rows, n_key, top_k, n_sm);
    MUST(cudaMalloc(&a, rows * n_key * 4));
    s.scores = (float *)a;
    MUST(cudaMalloc(&a, rows * top_k * 4));
    p->indices = (int32_t *)a;
    MUST(cudaMalloc(&p->values, rows * top_k * 4));
    void *values_memory = p->values;
    if (!values)
        p->values = NULL;
    MUST(cudaMalloc(&s.scratch, room + 4));
    MUST(cudaMalloc(&flush, flush_bytes));
    MUST(cudaMemset(s.scratch, 0, room + 4));
    fill<<<2048, 256>>>(s.scores, rows * n_key, n_key, kind);
    s.prepared = prepared;
    std::vector<float> t;
    cudaEvent_t e[2];
    MUST(cudaEventCreate(&e[0]));
    MUST(cudaEventCreate(&e[1]));
    for (int i = 0; i < repeat + 2; i++) {
        float ms;
        MUST(cudaMemsetAsync(flush, i, flush_bytes, 0));
        MUST(cudaEventRecord(e[0], 0));
        if (rows)
            MUST(lidx_launch_topk(&s, NULL));
        MUST(cudaEventRecord(e[1], 0));
        MUST(cudaDeviceSynchronize());
        MUST(cudaEventElapsedTime(&ms, e[0], e[1]));
        if (i >= 2)
            t.push_back(ms * 1000);
    }
    std::sort(t.begin(), t.end());
    cudaFree(s.scores);
    cudaFree(p->indices);
    cudaFree(values_memory);
    cudaFree(s.scratch);
    cudaFree(flush);
    return t[t.size() / 2];
}

static void time_all(int32_t n_sm) {
    static const struct {
        int64_t rows, n_key;
        double goal;
    } shapes[] = {{2048, 8192, 60}, {8192, 8192, 176},  {2048, 65536, 273}, {1, 8192, 9},
                  {1, 131072, 15},  {8, 65536, 16},     {64, 65536, 25},    {128, 65536, 30},
                  {64, 8192, 10},   {256, 16384, 24},   {16, 65536, 0},     {32, 65536, 0},
                  {1, 1048576, 0},  {1024, 131072, 240}};
    for (auto &x : shapes)
        printf("%5lld x %-7lld %7.1f us (goal %.0f), with values %.1f, unprepared %.1f\n",
               (long long)x.rows, (long long)x.n_key,
               time_one(x.rows, x.n_key, 2048, 0, 0, n_sm, 15, 1), x.goal,
               time_one(x.rows, x.n_key, 2048, 0, 1, n_sm, 15, 1),
               time_one(x.rows, x.n_key, 2048, 0, 0, n_sm, 15, 0));
    printf("k on 2048 x 8192, 2048 x 65536, 1 x 131072:");
    for (int k : {64, 512, 2049, 4096, 8192})
        printf("  %d: %.0f %.0f %.1f", k, time_one(2048, 8192, k, 0, 0, n_sm, 7, 1),
               time_one(2048, 65536, k, 0, 0, n_sm, 5, 1),
               time_one(1, 131072, k, 0, 0, n_sm, 7, 1));
    printf("\nbad data: 8192 x 8192, 2048 x 65536, 1 x 131072, 64 x 65536\n");
    for (int kind : {0, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 19})
        printf("%-9s %6.0f %6.0f %6.1f %6.1f\n", data_names[kind],
               time_one(8192, 8192, 2048, kind, 0, n_sm, 5, 1),
               time_one(2048, 65536, 2048, kind, 0, n_sm, 5, 1),
               time_one(1, 131072, 2048, kind, 0, n_sm, 9, 1),
               time_one(64, 65536, 2048, kind, 0, n_sm, 9, 1));
}
#endif

int main(int argc, char **argv) {
    int32_t n_sm = 132;
    bool all = argc < 2;
#ifdef __CUDACC__
    int device = 0;
    MUST(cudaGetDevice(&device));
    MUST(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device));
#endif
    for (int i = all ? 0 : 1; i < argc; i++) {
        std::string what = argv[i];
        if (all || what == "check")
            check(n_sm, 1);
        if (what == "quick")
            check(n_sm, 0);
        if (what == "sanitize") { /* few rows, for compute-sanitizer and for a CPU */
            check_small();
            if (!ON_DEVICE)
                check_limits();
        }
#ifdef __CUDACC__
        if (all || what == "time")
            time_all(n_sm);
        if (what == "profile") { /* one launch of each regime, for a profiler */
            time_one(8192, 8192, 2048, 0, 0, n_sm, 1, 1);
            time_one(2048, 65536, 2048, 0, 0, n_sm, 1, 1);
            time_one(1, 131072, 2048, 0, 0, n_sm, 1, 1);
        }
#endif
    }
    printf("%ld rows passed, %ld failures\n", passed, failed);
    return failed != 0;
}
