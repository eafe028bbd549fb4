/* SPDX-License-Identifier: Apache-2.0
 *
 * What the selection of a row is made of: shared memory, keys, sums over the block, loads.
 */
#ifndef LIDX_TOPK_BLOCK_CUH
#define LIDX_TOPK_BLOCK_CUH

#include <cuda_runtime.h>

#include "launch.h"

enum { BINS = 2048, SHORT = 8192, LANES = 32 };
static const uint32_t KEY_MASKED = 0xFFFFFFFFu; /* never selected; alone in the last bin */
static const uint32_t KEY_NAN = 0xFFC00000u;    /* alone in the bin before; -inf is 0xFF800000 */
static const uint32_t ALL_LANES = 0xFFFFFFFFu;
static const uint32_t ALL_BITS = 0xFFFFFFFFu;
static const uint32_t EACH_BYTE = 0x01010101u;

/* Sizes of one kernel. SPREAD buckets per candidate; a bucket of more than CROWD members makes the
 * row take the refined path. */
template <int THREADS_, int LIST_, int SPREAD_, int CROWD_> struct sizes {
    static const uint32_t THREADS = THREADS_, LIST = LIST_, SPREAD = SPREAD_, CROWD = CROWD_;
    static const uint32_t WARPS = THREADS / LANES, ITEMS = LIST / THREADS;
    static const int WORDS = LIST * SPREAD / 4; /* byte counters, four to a word */
};

/* One row of work. */
struct row {
    const float *score;
    int32_t *indices;
    char *values;
    uint32_t n; /* visible keys */
    uint32_t top_k;
};

template <class Z> struct shared {
    uint64_t list[Z::LIST];
    uint32_t counter[Z::WORDS];
    union {
        uint32_t hist[BINS];     /* counts, then sums or a table, see scan_hist */
        uint16_t base[Z::WORDS]; /* members of the buckets of earlier words */
    };
    uint32_t warp_sum[2][LANES];
    uint32_t n_list;
    uint32_t crowded;
    uint32_t total;              /* of the histogram */
    uint32_t bin, before, count; /* where the wanted rank lies */
    uint32_t prefix, better;     /* of the digits so far: what they are, keys before them */
    uint32_t last_low;           /* smallest key of the last bin's candidates, or less */
    uint32_t last_high;          /* no candidate's key is larger; 0: no bin is special */
    uint32_t n_tied;             /* ordered already, to follow the list */
    uint32_t flag;
    struct row row;
};

template <class Z> static __device__ __forceinline__ shared<Z> *shared_memory(void) {
    extern __shared__ uint4 dynamic_shared[];
    return (struct shared<Z> *)dynamic_shared;
}

/* ---- keys ------------------------------------------------------------------------------------ */

static __device__ __forceinline__ uint32_t key_of(float x) {
    uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f)); /* -0 becomes +0 */
    uint32_t key = bits ^ (~(uint32_t)((int32_t)bits >> 31) & 0x7FFFFFFFu);
    return x == x ? key : __float_as_uint(x) == SCORE_MASKED ? KEY_MASKED : KEY_NAN;
}

static __device__ __forceinline__ float score_of(uint32_t key) {
    if (key == KEY_NAN)
        return __uint_as_float(0x7FC00000u);
    return __uint_as_float(key & 0x80000000u ? key : key ^ 0x7FFFFFFFu);
}

static __device__ __forceinline__ uint16_t bf16_of(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x)
        return 0x7FC0;
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

/* Round to nearest even in integers, so that every compiler and chip gives the same bits. */
static __device__ __forceinline__ uint16_t fp16_of(float x) {
    uint32_t bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u)
        return 0x7E00;
    if (size >= 0x477FF000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7C00u);
    if (size >= 0x38800000u) /* normal: 2^-14 and above */
        return (uint16_t)(sign | ((size + 0xFFFu + ((size >> 13) & 1) - 0x38000000u) >> 13));
    /* Subnormal: adding 0.5 puts the unit of 2^-24 in the last place of the sum. */
    float sum = __fadd_rn(__uint_as_float(size), 0.5f);
    return (uint16_t)(sign | (__float_as_uint(sum) - 0x3F000000u));
}

static __device__ __forceinline__ void store_value(char *values, uint32_t j, int dtype, float x) {
    if (dtype == DTYPE_F32)
        ((float *)values)[j] = x;
    else
        ((uint16_t *)values)[j] = dtype == DTYPE_BF16 ? bf16_of(x) : fp16_of(x);
}

/* ---- sums over a block ----------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t lane_id(void) {
    return threadIdx.x % LANES;
}

/* The first thread of this thread's warp: by it warps tell whether work that ends within the
 * block's threads leaves them any. */
static __device__ __forceinline__ uint32_t warp_begin(void) {
    return threadIdx.x - lane_id();
}

static __device__ __forceinline__ uint32_t warp_inclusive(uint32_t x) {
#pragma unroll
    for (uint32_t d = 1; d < LANES; d *= 2) {
        uint32_t y = __shfl_up_sync(ALL_LANES, x, d);
        x += lane_id() >= d ? y : 0;
    }
    return x;
}

/* Sum of x over the threads before this one. One barrier inside; the caller needs one before
 * the same `turn` is used again. */
template <class Z>
static __device__ __forceinline__ uint32_t block_before(struct shared<Z> *s, uint32_t x, int turn,
                                                        uint32_t *total) {
    uint32_t sum = warp_inclusive(x), warp = threadIdx.x / LANES;
    if (lane_id() == LANES - 1)
        s->warp_sum[turn][warp] = sum;
    __syncthreads();
    uint32_t v = lane_id() < Z::WARPS ? s->warp_sum[turn][lane_id()] : 0;
    *total = __reduce_add_sync(ALL_LANES, v);
    return __reduce_add_sync(ALL_LANES, lane_id() < warp ? v : 0) + sum - x;
}

/* N consecutive words of this thread, in accesses as wide as they come. */
template <int N> static __device__ __forceinline__ void load_words(uint32_t *c, const uint32_t *a) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            uint4 v = ((const uint4 *)a)[i];
            c[4 * i] = v.x;
            c[4 * i + 1] = v.y;
            c[4 * i + 2] = v.z;
            c[4 * i + 3] = v.w;
        }
    } else if (N == 2) {
        uint2 v = *(const uint2 *)a;
        c[0] = v.x;
        c[1] = v.y;
    } else {
        c[0] = a[0];
    }
}

template <int N>
static __device__ __forceinline__ void store_words(uint32_t *a, const uint32_t *c) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; i++)
            ((uint4 *)a)[i] = make_uint4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]);
    } else if (N == 2) {
        *(uint2 *)a = make_uint2(c[0], c[1]);
    } else {
        a[0] = c[0];
    }
}

template <class Z, int WORDS> static __device__ __forceinline__ void zero(uint32_t *words) {
    const int N = (WORDS / 4 + Z::THREADS - 1) / Z::THREADS;
#pragma unroll
    for (int i = 0; i < N; i++) {
        int j = i * Z::THREADS + threadIdx.x;
        if (WORDS / 4 % Z::THREADS == 0 || j < WORDS / 4)
            ((uint4 *)words)[j] = make_uint4(0, 0, 0, 0);
    }
}

/* Turns counts into sums of the bins before, and finds the bin that holds the rank-th (from 1),
 * or the last one of all if there are fewer. `masked` says that the last bin holds masked keys,
 * which do not count. With `table` a sum becomes what bucket_of looks up: the bucket where the bin
 * begins and, above it, the bin's number of buckets (there are at most SHORT or LIST keys then, so
 * that both fit 16 bits). If only the first USED bins are used, one more gets the sum of all. Ends
 * with a barrier. */
template <class Z, int USED = BINS>
static __device__ __forceinline__ void scan_hist(struct shared<Z> *s, uint32_t rank, int masked,
                                                 int table = 0) {
    const int N = USED / Z::THREADS;
    uint32_t c[N], sums[N], sum = 0, total;
    load_words<N>(c, s->hist + threadIdx.x * N);
    if (masked && threadIdx.x == Z::THREADS - 1)
        c[N - 1] = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += c[i];
    uint32_t before = block_before(s, sum, 0, &total);
    rank = min(rank, total);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (before < rank && rank <= before + c[i]) {
            s->bin = threadIdx.x * N + i;
            s->before = before;
            s->count = c[i];
        }
        sums[i] = table ? Z::SPREAD * before | Z::SPREAD * c[i] << 16 : before;
        before += c[i];
    }
    store_words<N>(s->hist + threadIdx.x * N, sums);
    if (threadIdx.x == 0) {
        s->total = total;
        if (USED < BINS)
            s->hist[USED] = total;
    }
    __syncthreads();
}

/* Room in the list for `count` candidates of this thread; all lanes take part. */
template <class Z>
static __device__ __forceinline__ uint32_t reserve(struct shared<Z> *s, uint32_t count) {
    uint32_t sum = warp_inclusive(count), at = 0;
    if (lane_id() == LANES - 1)
        at = atomicAdd(&s->n_list, sum);
    return __shfl_sync(ALL_LANES, at, LANES - 1) + sum - count;
}

/* Four scores from position i on; beyond the row's end they are masked, and not read. */
static __device__ __forceinline__ float4 load4(const float *score, uint32_t i, uint32_t n) {
    if (i + 4 <= n)
        return __ldcg((const float4 *)(score + i));
    float masked = __uint_as_float(SCORE_MASKED);
    float4 x = make_float4(masked, masked, masked, masked);
    if (i < n)
        x.x = score[i];
    if (i + 1 < n)
        x.y = score[i + 1];
    if (i + 2 < n)
        x.z = score[i + 2];
    return x;
}

/* Sixteen scores a lane, 2 KiB a warp: float4 g of the lane lies at begin + 128 g + 4 lane. */
static __device__ __forceinline__ void load16(float4 *x, const float *score, uint32_t begin,
                                              uint32_t n) {
    uint32_t first = begin + 4 * lane_id();
    if (begin + 512 <= n) {
#pragma unroll
        for (int g = 0; g < 4; g++)
            x[g] = *(const float4 *)(score + first + 128 * g);
    } else {
#pragma unroll
        for (int g = 0; g < 4; g++)
            x[g] = load4(score, first + 128 * g, n);
    }
}

/* x, which the compiler then keeps in a register instead of making it again at every use. */
static __device__ __forceinline__ uint32_t kept(uint32_t x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

static __device__ __forceinline__ uint64_t pair(uint32_t key, uint32_t position) {
    return (uint64_t)key << 32 | position;
}

#endif
