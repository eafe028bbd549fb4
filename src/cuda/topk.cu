/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection on the device: each output row of a slab becomes its top_k indices, best first. The
 * method, its costs and what limits it are in docs/kernel-topk.md.
 *
 * A score becomes a 32-bit key in which smaller is better; with the position below it, the pair is
 * a 64-bit number that no two keys of a row share. All that follows works on these numbers, so the
 * order in which threads arrive anywhere never shows in the result.
 *
 * Every path ends the same way: a list of at most LIST candidates in shared memory that contains
 * the winners (feed_*), ordered by expected rank (order), written (write_row). The paths differ in
 * how the list is found:
 *   feed_short   rows of up to SHORT keys: held in registers, read once, threshold by histogram
 *   feed_long    longer rows: threshold from a sample of the row, then one streaming pass
 *   split_kernel few long rows: as feed_long, but several blocks per row; the last to arrive orders
 *   exact_select any row, any data: up to three histogram passes and one that collects
 * The last is where the first three go when the data defeats them.
 */
#include <cuda_runtime.h>

#include "launch.h"

enum { BINS = 2048, SHORT = 8192, LANES = 32 };
enum { SAMPLE = 4096, SAMPLE_REACH = 131072 }; /* scores of a row sampled, per so many keys */
enum { WIDE_BIN = 512 }; /* a last bin of more candidates is measured between its own ends */
static const uint32_t KEY_MASKED = 0xFFFFFFFFu; /* never selected; alone in the last bin */
static const uint32_t KEY_NAN = 0xFFC00000u;    /* alone in the bin before; -inf is 0xFF800000 */
static const uint32_t ALL_LANES = 0xFFFFFFFFu;
static const uint32_t ALL_BITS = 0xFFFFFFFFu;
static const uint32_t EACH_BYTE = 0x01010101u;
static const uint32_t KEEP_ALL = 0xFFFFFFFFu;

/* What a kernel gets, beyond the slab: how many blocks share a row. */
struct launch {
    struct slab slab;
    uint32_t *arrived; /* [rows], zero between launches; split_kernel only */
    uint32_t *found;   /* [rows][blocks] candidates of each block */
    uint64_t *region;  /* [rows][blocks][SPLIT_ROOM] */
    uint32_t blocks;
};
enum { SPLIT_ROOM = 4096 };

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
        uint32_t hist[BINS + 4];   /* counts, then the number in the bins before each */
        uint16_t base[Z::WORDS];   /* members of the buckets of earlier words */
    };
    uint32_t warp_sum[2][LANES];
    uint32_t n_list;
    uint32_t crowded;
    uint32_t total;                /* of the histogram */
    uint32_t bin, before, count;   /* where the wanted rank lies */
    uint32_t prefix, better;       /* of the digits so far: what they are, keys before them */
    uint32_t last_low;             /* smallest key of the last bin's candidates, or less */
    uint32_t last_high;            /* no candidate's key is larger; 0: no bin is special */
    uint32_t n_tied;               /* ordered already, to follow the list */
    uint32_t flag;
    struct row row;
};

template <class Z> static __device__ __forceinline__ struct shared<Z> *shared_memory(void) {
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

/* ---- which row ------------------------------------------------------------------------------- */

/* The batch that holds row t of packed queries: the first whose end lies beyond t. A list that
 * decreases against its contract makes this end anywhere, but it ends. */
static __device__ int64_t packed_batch(const struct problem *p, int64_t t) {
    int64_t low = 0, high = p->n_batch;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (lidx_clamp(p->query_lengths[middle], 0, p->n_query) > t)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static __device__ __forceinline__ struct row find_row(const struct slab *s, int64_t number) {
    const struct problem *p = &s->p;
    int64_t batch = 0, i = number, visible = 0, slot = number;
    if (p->query_packed) {
        batch = packed_batch(p, number);
    } else if (p->n_batch > 1) {
        batch = number / p->n_query;
        i = slot = number - batch * p->n_query;
    }
    if (batch < p->n_batch) {
        struct extent e = lidx_extent(p, batch);
        if (p->query_packed)
            i = number - e.query_begin;
        if (i >= 0)
            visible = lidx_clamp(lidx_visible(p, &e, i), 0, s->scores_stride);
    }
    int64_t out = p->query_packed ? 0 : batch;
    struct row r;
    r.score = s->scores + (number - s->row_begin) * s->scores_stride;
    r.indices = (int32_t *)((char *)p->indices + out * p->indices_batch_stride) + slot * p->top_k;
    r.values = (char *)p->values;
    if (r.values)
        r.values += out * p->values_batch_stride +
                    slot * p->top_k * (p->values_dtype == DTYPE_F32 ? 4 : 2);
    r.n = (uint32_t)visible;
    r.top_k = (uint32_t)p->top_k;
    return r;
}

/* ---- sums over a block ----------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t lane_id(void) {
    return threadIdx.x % LANES;
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
    } else {
        uint2 v = *(const uint2 *)a;
        c[0] = v.x;
        c[1] = v.y;
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
 * which do not count. Ends with a barrier. */
template <class Z>
static __device__ __forceinline__ void scan_hist(struct shared<Z> *s, uint32_t rank, int masked) {
    const int N = BINS / Z::THREADS;
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
        sums[i] = before;
        before += c[i];
    }
    store_words<N>(s->hist + threadIdx.x * N, sums);
    if (threadIdx.x == 0)
        s->total = total;
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

/* Four scores from position i on; beyond the row's end they are masked. */
static __device__ __forceinline__ float4 load4(const float *score, uint32_t i, uint32_t n) {
    float4 x = make_float4(__uint_as_float(SCORE_MASKED), __uint_as_float(SCORE_MASKED),
                           __uint_as_float(SCORE_MASKED), __uint_as_float(SCORE_MASKED));
    if (i >= n)
        return x;
    float4 y = *(const float4 *)(score + i);
    x.x = y.x;
    if (i + 1 < n)
        x.y = y.y;
    if (i + 2 < n)
        x.z = y.z;
    if (i + 3 < n)
        x.w = y.w;
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

static __device__ __forceinline__ uint64_t pair(uint32_t key, uint32_t position) {
    return (uint64_t)key << 32 | position;
}

/* ---- ordering -------------------------------------------------------------------------------- */

/* How candidates are mapped to buckets in the last bin, which the threshold may have cut anywhere
 * and which may hold most of them: between its own ends, and position parting equal scores. */
struct last_bin {
    uint32_t bin, low, limit;
    float scale, step; /* step: what a position adds to a key, below 1 in all */
};

/* The bucket of a candidate: SPREAD times its expected rank, from the candidates in earlier bins
 * and its place within its own bin. Never decreases with the key: every step is monotone. */
template <class Z>
static __device__ __forceinline__ uint32_t bucket_of(const struct shared<Z> *s, uint64_t item,
                                                     const struct last_bin *last) {
    uint32_t key = item >> 32, bin = key >> 21, before = s->hist[bin], count = s->hist[bin + 1] - before;
    uint32_t place = __umulhi(key << 11, Z::SPREAD * count);
    if (last && bin == last->bin) {
        float x = __fmaf_rn((float)(uint32_t)item, last->step, (float)(key - last->low));
        place = min((uint32_t)(x * last->scale), last->limit);
    }
    return Z::SPREAD * before + place;
}

/* Byte b % 4 of a word, as a shift; the hardware drops the bits above. */
static __device__ __forceinline__ uint32_t byte_up(uint32_t x, uint32_t b) {
    return __funnelshift_l(0, x, 8 * b);
}

static __device__ __forceinline__ uint32_t byte_down(uint32_t x, uint32_t b) {
    return __funnelshift_r(x, 0, 8 * b);
}

/* low, below 65536, with the lowest byte of high above it. */
static __device__ __forceinline__ uint32_t stack(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x2410);
}

/* Counts a candidate in its bucket. Its slot is the bucket, and above it the earlier arrivals. */
template <class Z>
static __device__ __forceinline__ uint32_t enter_bucket(struct shared<Z> *s, uint32_t bucket) {
    uint32_t old = atomicAdd(&s->counter[bucket / 4], byte_up(1, bucket));
    return stack(bucket, byte_down(old, bucket));
}

static __device__ __forceinline__ uint32_t sum_bytes(uint32_t word) {
    return __dp4a(word, EACH_BYTE, 0u);
}

static __device__ __forceinline__ void sort_few(uint64_t *a, uint32_t count) {
    uint64_t x = a[0], y = a[1];
    if (x > y) {
        a[0] = y;
        a[1] = x;
    }
    for (uint32_t j = 2; j < count; j++) {
        uint32_t to = j;
        for (x = a[j]; to && (y = a[to - 1]) > x; to--)
            a[to] = y;
        if (to < j)
            a[to] = x;
    }
}

/* Candidates held in registers, counted in buckets that nobody crowds: sums, scatter, and the
 * first arrival of each bucket sorts it. */
template <class Z>
static __device__ __forceinline__ void scatter(struct shared<Z> *s, uint32_t n_list,
                                               const uint64_t *item, uint32_t *slot) {
    const int N = Z::WORDS / Z::THREADS;
    uint32_t c[N], sum = 0, total;
    bool some = 4 * N * threadIdx.x < Z::SPREAD * n_list; /* no bucket lies beyond */
    if (some) {
        load_words<N>(c, s->counter + threadIdx.x * N);
#pragma unroll
        for (int i = 0; i < N; i++)
            sum += c[i] = sum_bytes(c[i]);
    }
    uint32_t before = block_before(s, sum, 1, &total);
    if (some) {
        uint32_t packed[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            packed[i] = before | (before + c[2 * i]) << 16;
            before += c[2 * i] + c[2 * i + 1];
        }
        store_words<N / 2>((uint32_t *)(s->base + threadIdx.x * N), packed);
    }
    __syncthreads();
    /* A slot becomes the beginning and the size of the bucket that the thread has to sort. */
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        if (i % 2 == 0 && i * Z::THREADS >= n_list)
            break;
        uint32_t bucket = slot[i] & 0xFFFF, word = s->counter[bucket / 4];
        uint32_t earlier = word & ~byte_up(ALL_BITS, bucket), base = s->base[bucket / 4];
        uint32_t begin = __dp4a(earlier, EACH_BYTE, base);
        uint32_t job = stack(begin, byte_down(word, bucket));
        bool mine = i * Z::THREADS + threadIdx.x < n_list;
        if (mine)
            s->list[begin + (slot[i] >> 16)] = item[i];
        slot[i] = mine && slot[i] < 1u << 16 && job >= 2u << 16 ? job : 0;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        if (i % 2 == 0 && i * Z::THREADS >= n_list)
            break;
        if (slot[i])
            sort_few(s->list + (slot[i] & 0xFFFF), slot[i] >> 16);
    }
    __syncthreads();
}

/* Any list, slowly: a bitonic network whose comparators all point the same way, so that what lies
 * past the list can stand for infinity without being there. */
template <class Z> static __device__ void sort_network(struct shared<Z> *s, uint32_t n_list) {
    for (uint32_t size = 2; size / 2 < n_list; size *= 2) {
        for (uint32_t stride = size / 2; stride; stride /= 2) {
            __syncthreads();
            for (uint32_t t = threadIdx.x; t < n_list; t += Z::THREADS) {
                uint32_t i = 2 * t - (t & (stride - 1));
                uint32_t j = stride == size / 2 ? i ^ (size - 1) : i + stride;
                if (j >= n_list)
                    continue;
                uint64_t a = s->list[i], b = s->list[j];
                if (a > b) {
                    s->list[i] = b;
                    s->list[j] = a;
                }
            }
        }
    }
    __syncthreads();
}

enum { SPLITTERS = 256, TOO_MANY = 512 };

/* Orders a list whose values are spread too unevenly for buckets by value: parts between splitters
 * that are members of the list themselves, so that what is dense is cut fine; equal scores have
 * different positions and are cut like all others. Each member then counts those before it. */
template <class Z> static __device__ __noinline__ void order_crowded(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const uint32_t n_list = s->n_list, share = SPLITTERS * SPLITTERS / Z::THREADS;
    uint64_t *drawn = (uint64_t *)s->counter, *splitter = drawn + SPLITTERS;
    uint32_t *end = s->hist, *rank = end + BINS / 2; /* of each part, of each splitter */
    uint64_t item[Z::ITEMS];
    uint32_t part[Z::ITEMS];
    __syncthreads();
    zero<Z, BINS>(s->hist);
    if (threadIdx.x == 0)
        s->crowded = 0;
    if (threadIdx.x < SPLITTERS)
        drawn[threadIdx.x] = s->list[threadIdx.x * n_list / SPLITTERS];
    __syncthreads();
    uint32_t mine = threadIdx.x % SPLITTERS, from = threadIdx.x / SPLITTERS * share, before = 0;
    uint64_t x = drawn[mine];
    for (uint32_t j = from; j < from + share; j++) /* short lists draw some twice */
        before += drawn[j] < x || (drawn[j] == x && j < mine);
    atomicAdd(&rank[mine], before);
    __syncthreads();
    if (threadIdx.x < SPLITTERS) {
        splitter[rank[mine]] = x;
        rank[mine] = 0; /* lies where scan_hist will sum */
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        uint32_t j = i * Z::THREADS + threadIdx.x;
        item[i] = j < n_list ? s->list[j] : 0;
        part[i] = 0;
    }
    /* Halving: how many splitters are at or before an item. */
#pragma unroll 1
    for (uint32_t step = SPLITTERS / 2; step; step /= 2)
#pragma unroll
        for (uint32_t i = 0; i < Z::ITEMS; i++)
            part[i] += splitter[part[i] + step - 1] <= item[i] ? step : 0;
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        part[i] += splitter[part[i]] <= item[i];
        if (i * Z::THREADS + threadIdx.x < n_list && atomicAdd(&end[part[i]], 1u) >= TOO_MANY)
            s->crowded = 1;
    }
    __syncthreads();
    if (s->crowded) {
        sort_network(s, n_list);
        return;
    }
    scan_hist(s, 1, 0);
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++)
        if (i * Z::THREADS + threadIdx.x < n_list)
            s->list[atomicAdd(&end[part[i]], 1u)] = item[i];
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        if (i * Z::THREADS + threadIdx.x >= n_list)
            continue;
        uint32_t stop = end[part[i]], to = part[i] ? end[part[i] - 1] : 0;
        for (uint32_t j = to; j < stop; j++)
            to += s->list[j] < item[i];
        part[i] = to;
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++)
        if (i * Z::THREADS + threadIdx.x < n_list)
            s->list[part[i]] = item[i];
    __syncthreads();
}

/* All candidates into registers and their buckets, in pairs so that one's latency covers the
 * other's. What lies past the list is read, but not counted. */
template <class Z>
static __device__ __forceinline__ void enter_all(struct shared<Z> *s, uint32_t n_list,
                                                 const struct last_bin *last, uint64_t *item,
                                                 uint32_t *slot, uint32_t *worst) {
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i += 2) {
        if (i * Z::THREADS >= n_list)
            break;
        uint32_t bucket[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            item[i + j] = s->list[(i + j) * Z::THREADS + threadIdx.x];
            bucket[j] = bucket_of(s, item[i + j], last);
            slot[i + j] = 0;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if ((i + j) * Z::THREADS + threadIdx.x < n_list) {
                slot[i + j] = enter_bucket(s, bucket[j]);
                *worst = max(*worst, slot[i + j]);
            }
        }
    }
}

/* Sorts the list. Needs the table of sums over the candidates' bins, last_low and last_high, and
 * counters that are zero. */
template <class Z>
static __device__ __forceinline__ void order(struct shared<Z> *s, uint32_t n_list) {
    uint64_t item[Z::ITEMS];
    uint32_t slot[Z::ITEMS], worst = 0;
    if (s->last_high) {
        struct last_bin last;
        last.bin = s->last_high >> 21;
        last.low = s->last_low;
        uint32_t buckets = Z::SPREAD * (n_list - s->hist[last.bin]);
        last.limit = buckets - 1;
        last.step = __fdividef(0.999f, (float)s->row.n);
        last.scale = __fdividef((float)buckets, (float)(s->last_high - last.low + 1));
        enter_all(s, n_list, &last, item, slot, &worst);
    } else {
        enter_all(s, n_list, (const struct last_bin *)NULL, item, slot, &worst);
    }
    if (worst >= (uint32_t)Z::CROWD << 16)
        s->crowded = 1;
    __syncthreads();
    if (s->crowded)
        order_crowded<Z>();
    else
        scatter(s, n_list, item, slot);
}

/* Where the j-th best is: the ties that follow the list lie at its far end, in reverse. */
template <class Z>
static __device__ __forceinline__ uint32_t place_of(uint32_t j, uint32_t n_list) {
    return j < n_list ? j : Z::LIST - 1 - (j - n_list);
}

template <class Z>
static __device__ __forceinline__ void write_row(struct shared<Z> *s, const struct problem *p) {
    const struct row *r = &s->row;
    uint32_t n_list = s->n_list, n = n_list + s->n_tied;
    for (uint32_t j = threadIdx.x; j < r->top_k; j += Z::THREADS)
        r->indices[j] = j < n ? (int32_t)s->list[place_of<Z>(j, n_list)] : -1;
    if (!r->values)
        return;
    for (uint32_t j = threadIdx.x; j < r->top_k; j += Z::THREADS)
        store_value(r->values, j, p->values_dtype,
                    j < n ? score_of(s->list[place_of<Z>(j, n_list)] >> 32)
                          : __uint_as_float(0xFF800000u));
}

/* Builds the table of sums from the list itself. `high` bounds its keys. */
template <class Z> static __device__ __noinline__ void table_from_list(uint32_t high) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t n_list = s->n_list;
    zero<Z, BINS>(s->hist);
    if (threadIdx.x == 0) {
        s->last_low = high;
        s->last_high = high;
    }
    __syncthreads();
    uint32_t low = high;
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        uint32_t j = i * Z::THREADS + threadIdx.x;
        if (j < n_list) {
            uint32_t key = s->list[j] >> 32;
            atomicAdd(&s->hist[key >> 21], 1u);
            if (key >> 21 == high >> 21)
                low = min(low, key);
        }
    }
    low = __reduce_min_sync(ALL_LANES, low);
    if (lane_id() == 0)
        atomicMin(&s->last_low, low);
    __syncthreads();
    scan_hist(s, 1, 0);
}

/* ---- exact selection ------------------------------------------------------------------------- */

/* What to collect: all keys better than `edge`, and of those equal to it the first `keep`. */
struct cut {
    uint32_t edge;
    uint32_t keep; /* KEEP_ALL: they may all come, in any order */
};

/* Collects from four neighbouring keys of each thread. Ties that are counted go in their order to
 * the far end of the list, where they need no further sorting. All threads take part; `seen` and
 * `turn` are the same in all. */
template <class Z>
static __device__ __forceinline__ void collect4(struct shared<Z> *s, const uint32_t *key,
                                                uint32_t position, struct cut cut, uint32_t *seen,
                                                uint32_t *turn) {
    uint32_t all = cut.keep == KEEP_ALL ? cut.edge + 1 : cut.edge, take = 0, equal = 0, total;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        take += key[j] < all;
        equal += key[j] == cut.edge;
    }
    uint32_t at = reserve(s, take), room = cut.keep == KEEP_ALL ? Z::LIST : Z::LIST - cut.keep;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (key[j] < all && at < room)
            s->list[at] = pair(key[j], position + j);
        at += key[j] < all;
    }
    if (cut.keep == KEEP_ALL || *seen >= cut.keep)
        return;
    uint32_t tie = *seen + block_before(s, equal, (int)*turn, &total);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (key[j] == cut.edge && tie < cut.keep)
            s->list[Z::LIST - 1 - tie] = pair(key[j], position + j);
        tie += key[j] == cut.edge;
    }
    *seen += total;
    *turn ^= 1;
}

template <class Z>
static __device__ __forceinline__ void end_collect(struct shared<Z> *s, struct cut cut,
                                                   uint32_t seen) {
    if (threadIdx.x == 0)
        s->n_tied = cut.keep == KEEP_ALL ? 0 : min(seen, cut.keep);
    __syncthreads();
}

/* Collects from the row in memory into an empty list. */
template <class Z> static __device__ __noinline__ void collect(uint32_t edge, uint32_t keep) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cut cut = {edge, keep};
    const float *score = s->row.score;
    uint32_t n = s->row.n, seen = 0, turn = 0;
    __syncthreads();
    if (threadIdx.x == 0)
        s->n_list = 0;
    __syncthreads();
    for (uint32_t begin = 0; begin < n; begin += 4 * Z::THREADS) {
        uint32_t i = begin + 4 * threadIdx.x;
        float4 x = load4(score, i, n);
        uint32_t key[4] = {key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w)};
        collect4(s, key, i, cut, &seen, &turn);
    }
    end_collect(s, cut, seen);
}

/* Counts the digit at `shift` of those keys whose earlier digits are `prefix`. */
template <class Z>
static __device__ __forceinline__ void count_digit(struct shared<Z> *s, uint32_t key,
                                                   uint32_t prefix, int shift) {
    if (shift == 21)
        atomicAdd(&s->hist[key >> 21], 1u);
    else if (shift == 10 && key >> 21 == prefix)
        atomicAdd(&s->hist[key >> 10 & 2047], 1u);
    else if (shift == 0 && key >> 10 == prefix)
        atomicAdd(&s->hist[key & 1023], 1u);
}

template <class Z> static __device__ __noinline__ void count_row(int shift) {
    struct shared<Z> *s = shared_memory<Z>();
    const float *score = s->row.score;
    uint32_t n = s->row.n, prefix = s->prefix;
    for (uint32_t begin = threadIdx.x / LANES * 512; begin < n; begin += 16 * Z::THREADS) {
        float4 x[4];
        load16(x, score, begin, n);
#pragma unroll
        for (int g = 0; g < 4; g++) {
            count_digit(s, key_of(x[g].x), prefix, shift);
            count_digit(s, key_of(x[g].y), prefix, shift);
            count_digit(s, key_of(x[g].z), prefix, shift);
            count_digit(s, key_of(x[g].w), prefix, shift);
        }
    }
    __syncthreads();
}

/* Leaves in the list the top_k best, or all if there are fewer, whatever the data: digits of 11,
 * 11 and 10 bits until the candidates fit, then one pass that collects. `known` says that the first
 * digit has been counted and scanned: the wanted rank is in s->bin. */
template <class Z> static __device__ __noinline__ void exact_select(int known) {
    struct shared<Z> *s = shared_memory<Z>();
    int shift = 21;
    __syncthreads();
    if (threadIdx.x == 0)
        s->prefix = s->better = 0;
    for (;;) {
        if (!known) {
            zero<Z, BINS>(s->hist);
            __syncthreads();
            count_row<Z>(shift);
            scan_hist(s, s->row.top_k - s->better, shift == 21);
        }
        known = 0;
        __syncthreads();
        if (threadIdx.x == 0) {
            s->prefix = s->prefix << (shift ? 11 : 10) | s->bin;
            s->better += s->before;
        }
        __syncthreads();
        if (s->total == 0) { /* all are masked */
            if (threadIdx.x == 0)
                s->n_list = s->n_tied = 0;
            __syncthreads();
            return;
        }
        if (shift == 0 || s->better + s->count <= Z::LIST)
            break;
        shift = shift == 21 ? 10 : 0;
    }
    uint32_t edge = s->prefix << shift | ((1u << shift) - 1);
    collect<Z>(edge, s->better + s->count <= Z::LIST ? KEEP_ALL : s->row.top_k - s->better);
    table_from_list<Z>(edge);
}

/* Where a threshold let more pass than the list holds, equal scores are the usual cause. If most
 * of the listed (raw) items equal the worst of them, one pass takes all that are better and the
 * first top_k of the equals. Returns 0, with the list lost, if it was not so. */
template <class Z> static __device__ __noinline__ int plateau_select(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t top_k = s->row.top_k;
    const uint32_t listed = Z::LIST - 512; /* what lies beyond may not have been written */
    if (2 * top_k > Z::LIST)
        return 0;
    uint32_t worst = 0, equal = 0, total;
    for (uint32_t j = threadIdx.x; j < listed; j += Z::THREADS)
        worst = max(worst, key_of(__uint_as_float((uint32_t)(s->list[j] >> 32))));
    worst = __reduce_max_sync(ALL_LANES, worst);
    __syncthreads();
    if (threadIdx.x == 0)
        s->last_high = 0;
    __syncthreads();
    if (lane_id() == 0)
        atomicMax(&s->last_high, worst);
    __syncthreads();
    worst = s->last_high;
    for (uint32_t j = threadIdx.x; j < listed; j += Z::THREADS)
        equal += key_of(__uint_as_float((uint32_t)(s->list[j] >> 32))) == worst;
    block_before(s, equal, 0, &total);
    if (2 * total < listed)
        return 0;
    collect<Z>(worst, top_k);
    uint32_t n_list = s->n_list;
    if (n_list > Z::LIST - top_k || n_list + s->n_tied < top_k)
        return 0;
    table_from_list<Z>(worst);
    return 1;
}

/* ---- short rows ------------------------------------------------------------------------------ */

/* The smallest and the largest key of this thread, over the block. */
template <class Z>
static __device__ __forceinline__ void block_ends(struct shared<Z> *s, uint32_t best,
                                                  uint32_t worst) {
    best = __reduce_min_sync(ALL_LANES, best);
    worst = __reduce_max_sync(ALL_LANES, worst);
    if (lane_id() == 0) {
        atomicMin(&s->last_low, best);
        atomicMax(&s->last_high, worst);
    }
    __syncthreads();
}

/* Finds the ends of the threshold's bin from the list. */
template <class Z> static __device__ __noinline__ void measure_last_bin(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t bin = s->bin, best = KEY_MASKED, worst = 0;
    for (uint32_t j = threadIdx.x; j < s->n_list; j += Z::THREADS) {
        uint32_t key = s->list[j] >> 32;
        if (key >> 21 == bin) {
            best = min(best, key);
            worst = max(worst, key);
        }
    }
    block_ends(s, best, worst);
}

/* Where the candidates of the first digit do not fit the list: equal scores are the usual cause.
 * Reads the row again, because keys kept for this in registers would spill. */
template <class Z> static __device__ __noinline__ void narrow_short(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t bin = s->bin, best = KEY_MASKED, worst = 0, n = s->row.n;
    for (uint32_t i = 4 * threadIdx.x; i < n; i += 4 * Z::THREADS) {
        float4 x = load4(s->row.score, i, n);
        uint32_t key[4] = {key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (key[j] >> 21 == bin) {
                best = min(best, key[j]);
                worst = max(worst, key[j]);
            }
        }
    }
    __syncwarp();
    block_ends(s, best, worst);
    if (s->last_low < s->last_high) {
        exact_select<Z>(1);
        return;
    }
    collect<Z>(s->last_low, s->row.top_k - s->before); /* the table of the bins before is right */
    if (threadIdx.x == 0)
        s->last_high = 0;
    __syncthreads();
}

/* The row in registers: histogram, threshold bin, and all candidates of it and the bins before. */
template <class Z> static __device__ __noinline__ void feed_short(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const float *score = s->row.score;
    uint32_t n = s->row.n, top_k = s->row.top_k;
    const uint32_t GROUPS = SHORT / 4 / Z::THREADS;
    float4 x[GROUPS];
    uint32_t key[GROUPS * 4];
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        uint32_t i = 4 * (g * Z::THREADS + threadIdx.x);
        x[g] = 4 * (g + 1) * Z::THREADS <= n ? *(const float4 *)(score + i)
                                             : load4(score, i, n);
    }
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; g++) {
        key[4 * g] = key_of(x[g].x);
        key[4 * g + 1] = key_of(x[g].y);
        key[4 * g + 2] = key_of(x[g].z);
        key[4 * g + 3] = key_of(x[g].w);
        if (4 * g * Z::THREADS < n) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                atomicAdd(&s->hist[key[4 * g + i] >> 21], 1u);
        }
    }
    __syncthreads();
    scan_hist(s, top_k, 1);
    if (s->total == 0)
        return;
    uint32_t bin = s->bin, before = s->before, count = s->count;
    uint32_t edge = bin << 21 | 0x1FFFFFu, take = 0;
    if (before + count > Z::LIST) {
        narrow_short<Z>();
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < GROUPS * 4; i++)
        take += key[i] <= edge;
    uint64_t *to = s->list + reserve(s, take);
#pragma unroll
    for (uint32_t i = 0; i < GROUPS * 4; i++)
        if (key[i] <= edge)
            *to++ = pair(key[i], 4 * (i / 4 * Z::THREADS + threadIdx.x) + i % 4);
    __syncthreads();
    if (count > WIDE_BIN)
        measure_last_bin<Z>();
}

/* ---- long rows ------------------------------------------------------------------------------- */

/* This thread's part of a round of the sample: neighbouring scores, so that a sector serves. */
template <class Z>
static __device__ __forceinline__ void load_sample(uint32_t *key, const float *score, uint32_t n,
                                                   uint32_t round, uint32_t doublings) {
    const uint32_t EACH = SAMPLE / Z::THREADS;
    const int log_threads = Z::THREADS == 512 ? 9 : 10;
    uint32_t which = (round * Z::THREADS + threadIdx.x) << (32 - log_threads - doublings);
    const float *from = score + (uint64_t)__umulhi(which, n / EACH) * EACH;
#pragma unroll
    for (uint32_t j = 0; j < EACH; j += 4) {
        float4 x = *(const float4 *)(from + j);
        key[j] = key_of(x.x);
        key[j + 1] = key_of(x.y);
        key[j + 2] = key_of(x.z);
        key[j + 3] = key_of(x.w);
    }
}

/* A key that, by a sample spread over the row, about the top_k best and a margin reach. The margin
 * is 3.3 standard deviations of the sample's count. KEY_MASKED: the sample gives no number to
 * compare with, or more than the list would reach it. */
template <class Z>
static __device__ __forceinline__ uint32_t sampled_edge(struct shared<Z> *s, const float *score,
                                                        uint32_t n, uint32_t top_k) {
    const uint32_t EACH = SAMPLE / Z::THREADS;
    uint32_t doublings = 0;
    while (doublings < 14 && n >> doublings > SAMPLE_REACH)
        doublings++;
    uint32_t rounds = 1u << doublings;
    uint32_t key[EACH];
    for (uint32_t r = 0; r < rounds; r++) {
        load_sample<Z>(key, score, n, r, doublings);
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            atomicAdd(&s->hist[key[j] >> 21], 1u);
    }
    float mean = __fdividef((float)top_k * SAMPLE * (float)rounds, (float)n);
    uint32_t rank = (uint32_t)(mean + 3.3f * mean * rsqrtf(mean) + 4.0f);
    __syncthreads();
    scan_hist(s, rank, 1);
    uint32_t bin = s->bin, rest = rank - s->before;
    if (s->total < rank || (float)rank * (float)n > 0.97f * Z::LIST * SAMPLE * (float)rounds)
        return KEY_MASKED;
    __syncthreads();
    zero<Z, BINS>(s->hist);
    __syncthreads();
    for (uint32_t r = rounds; r-- > 0;) {
        if (r + 1 < rounds) /* the last round is still there */
            load_sample<Z>(key, score, n, r, doublings);
#pragma unroll
        for (uint32_t j = 0; j < EACH; j++)
            if (key[j] >> 21 == bin)
                atomicAdd(&s->hist[key[j] >> 10 & 2047], 1u);
    }
    __syncthreads();
    scan_hist(s, rest, 0);
    uint32_t edge = bin << 21 | s->bin << 10 | 1023;
    return edge < 0xFF800000u ? edge : KEY_MASKED;
}

/* Bit j: score j reaches the threshold. NaN, and so a masked key, never does. */
static __device__ __forceinline__ uint32_t reach(float4 x, float threshold) {
    return (x.x >= threshold) | (x.y >= threshold) << 1 | (x.z >= threshold) << 2 |
           (x.w >= threshold) << 3;
}

static __device__ __forceinline__ void append(uint64_t *list, uint32_t *at, uint32_t mask,
                                              float x, uint32_t position) {
    if (mask)
        list[(*at)++] = pair(__float_as_uint(x), position);
}

/* Sixteen scores a thread, neighbouring warps on neighbouring KiB: what reaches the threshold goes
 * to the list as raw scores. A list that is full loses them, but the count goes on. */
template <class Z>
static __device__ __forceinline__ void stream(struct shared<Z> *s, const float *score, uint32_t n,
                                              float threshold) {
    for (uint32_t begin = threadIdx.x / LANES * 512; begin < n; begin += 16 * Z::THREADS) {
        float4 x[4];
        uint32_t first = begin + 4 * lane_id(), mask = 0;
        load16(x, score, begin, n);
#pragma unroll
        for (int g = 0; g < 4; g++)
            mask |= reach(x[g], threshold) << 4 * g;
        uint32_t at = reserve(s, __popc(mask));
        if (__any_sync(ALL_LANES, at + __popc(mask) > Z::LIST))
            continue;
#pragma unroll
        for (int g = 0; g < 4; g++) {
            append(s->list, &at, mask & 1u << 4 * g, x[g].x, first + 128 * g);
            append(s->list, &at, mask & 2u << 4 * g, x[g].y, first + 128 * g + 1);
            append(s->list, &at, mask & 4u << 4 * g, x[g].z, first + 128 * g + 2);
            append(s->list, &at, mask & 8u << 4 * g, x[g].w, first + 128 * g + 3);
        }
    }
    __syncthreads();
}

/* Raw scores in the list become keys. */
template <class Z>
static __device__ __forceinline__ void make_keys(struct shared<Z> *s, uint32_t n_list) {
    for (uint32_t j = threadIdx.x; j < n_list; j += Z::THREADS) {
        uint64_t item = s->list[j];
        s->list[j] = pair(key_of(__uint_as_float((uint32_t)(item >> 32))), (uint32_t)item);
    }
}

template <class Z> static __device__ __noinline__ void feed_long(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const float *score = s->row.score;
    uint32_t n = s->row.n, top_k = s->row.top_k;
    uint32_t edge = sampled_edge(s, score, n, top_k);
    if (edge != KEY_MASKED) {
        stream(s, score, n, score_of(edge));
        uint32_t n_list = s->n_list;
        if (n_list >= top_k && n_list <= Z::LIST) {
            make_keys(s, n_list);
            table_from_list<Z>(edge);
            return;
        }
        if (n_list > Z::LIST && plateau_select<Z>())
            return;
    }
    exact_select<Z>(0);
}

/* ---- kernels --------------------------------------------------------------------------------- */

static __device__ __forceinline__ void wait_for_scores(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Zeroes what a row's work expects to be zero and finds the row. Nothing in global memory is touched
 * before the wait: the kernel may have been started before those ahead of it have ended. */
template <class Z>
static __device__ __forceinline__ void begin_row(struct shared<Z> *s, const struct slab *slab,
                                                 int64_t number) {
    zero<Z, BINS>(s->hist);
    zero<Z, Z::WORDS>(s->counter);
    if (threadIdx.x == 0) {
        s->n_list = 0;
        s->n_tied = 0;
        s->crowded = 0;
        s->last_low = 0xFFFFFFFFu;
        s->last_high = 0;
        wait_for_scores();
        s->row = find_row(slab, number);
    }
    wait_for_scores();
    __syncthreads();
}

template <class Z>
static __device__ __forceinline__ void finish_row(struct shared<Z> *s, const struct problem *p) {
    if (s->n_list)
        order(s, s->n_list);
    write_row(s, p);
}

/* One block, one row. Causal rows grow, so the last comes first. */
template <class Z, int PER_SM>
static __global__ void __launch_bounds__(Z::THREADS, PER_SM)
row_kernel(const __grid_constant__ struct launch l) {
    struct shared<Z> *s = shared_memory<Z>();
    const struct problem *p = &l.slab.p;
    begin_row(s, &l.slab, l.slab.row_end - 1 - blockIdx.x);
    uint32_t n = s->row.n;
    if (n > SHORT)
        feed_long<Z>();
    else if (n)
        feed_short<Z>();
    finish_row(s, p);
}

/* This block's part of a row: what reaches the threshold goes to its region, raw. The first four
 * scores of each thread have been read ahead. */
template <class Z>
static __device__ __forceinline__ void filter_part(struct shared<Z> *s, uint64_t *region,
                                                   const float *score, uint32_t begin,
                                                   uint32_t end, float4 x, float threshold) {
    for (uint32_t b = begin; b < end; b += 4 * Z::THREADS) {
        uint32_t i = b + 4 * threadIdx.x;
        if (b != begin)
            x = load4(score, i, end);
        uint32_t mask = reach(x, threshold);
        uint32_t at = reserve(s, __popc(mask));
        if (at + 4 > SPLIT_ROOM)
            continue;
        append(region, &at, mask & 1, x.x, i);
        append(region, &at, mask & 2, x.y, i + 1);
        append(region, &at, mask & 4, x.z, i + 2);
        append(region, &at, mask & 8, x.w, i + 3);
    }
    __syncthreads();
}

/* Brings the regions of all blocks of a row into the list. */
template <class Z>
static __device__ __forceinline__ void gather(struct shared<Z> *s, const uint64_t *region,
                                              const uint32_t *found, uint32_t blocks) {
    for (uint32_t b = threadIdx.x / LANES; b < blocks; b += Z::WARPS) {
        uint32_t count = __ldcg(found + b), kept = min(count, (uint32_t)SPLIT_ROOM - 4), at = 0;
        if (lane_id() == 0) {
            at = atomicAdd(&s->n_list, kept);
            if (kept < count)
                s->flag = 1; /* the region lost some */
        }
        at = __shfl_sync(ALL_LANES, at, 0);
        for (uint32_t j = lane_id(); j < kept && at + j < Z::LIST; j += LANES)
            s->list[at + j] = __ldcg((const unsigned long long *)region + b * SPLIT_ROOM + j);
    }
    __syncthreads();
}

/* Several blocks, one row: each takes the same sample, so they agree on the threshold without a
 * word; the last to arrive, whichever it is, orders what all have found. Nobody waits. */
template <class Z>
static __global__ void __launch_bounds__(Z::THREADS, 1)
split_kernel(const __grid_constant__ struct launch l) {
    struct shared<Z> *s = shared_memory<Z>();
    const struct problem *p = &l.slab.p;
    uint32_t number = blockIdx.x / l.blocks, block = blockIdx.x % l.blocks;
    begin_row(s, &l.slab, l.slab.row_begin + number);
    const float *score = s->row.score;
    uint32_t n = s->row.n;
    if (n <= SHORT) {
        if (block)
            return;
        if (n)
            feed_short<Z>();
        finish_row(s, p);
        return;
    }
    uint32_t part = ((n - 1) / l.blocks + 64) / 64 * 64; /* at least n / blocks, rounded up */
    uint32_t busy = (n - 1) / part + 1;
    if (block >= busy)
        return;
    uint32_t begin = block * part, end = min(n - begin, part) + begin;
    uint64_t *region = l.region + (uint64_t)number * l.blocks * SPLIT_ROOM;
    uint32_t *found = l.found + number * l.blocks;

    float4 ahead = load4(score, begin + 4 * threadIdx.x, end);
    uint32_t edge = sampled_edge(s, score, n, p->top_k);
    if (edge != KEY_MASKED)
        filter_part(s, region + block * SPLIT_ROOM, score, begin, end, ahead, score_of(edge));
    if (threadIdx.x == 0) {
        found[block] = s->n_list;
        __threadfence();
        s->flag = atomicAdd(l.arrived + number, 1u) + 1 == busy;
        __threadfence();
    }
    __syncthreads();
    if (!s->flag)
        return;
    __syncthreads();
    if (threadIdx.x == 0) {
        l.arrived[number] = 0;
        s->n_list = 0;
        s->flag = 0;
    }
    __syncthreads();
    if (edge != KEY_MASKED)
        gather(s, region, found, busy);
    uint32_t n_list = s->n_list;
    if (n_list >= (uint32_t)p->top_k && n_list <= Z::LIST && !s->flag) {
        make_keys(s, n_list);
        table_from_list<Z>(edge);
    } else if (n_list <= Z::LIST || !plateau_select<Z>()) {
        exact_select<Z>(0);
    }
    finish_row(s, p);
}

/* ---- launching ------------------------------------------------------------------------------- */

typedef struct sizes<512, 4096, 4, 10> crowd_sizes;  /* many rows */
typedef struct sizes<1024, 4096, 4, 10> alone_sizes; /* at most a row per multiprocessor */
typedef struct sizes<1024, 8192, 1, 40> large_sizes; /* top_k above 2048 */
enum { SMALL_K = 2048 };

static const int64_t SPLIT_MIN_PART = 4096; /* keys that are worth a block */

/* Blocks that a row of max_key keys can occupy. */
static int64_t useful_blocks(int64_t max_key) {
    return (max_key + SPLIT_MIN_PART - 1) / SPLIT_MIN_PART;
}

/* Blocks per row: 1, or more where rows are so few that they leave the device idle. */
static uint32_t blocks_per_row(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm) {
    if (rows < 1 || max_key <= SHORT || top_k > SMALL_K || rows * 3 > n_sm)
        return 1;
    int64_t blocks = n_sm / rows, useful = useful_blocks(max_key);
    return (uint32_t)(blocks < useful ? blocks : useful);
}

/* Counters first. A split launch leaves them as it found them, clear. */
static size_t counter_bytes(int32_t n_sm) {
    return ((size_t)n_sm * sizeof(uint32_t) + 255) / 256 * 256;
}

size_t lidx_topk_scratch(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm) {
    if (max_key <= SHORT || top_k > SMALL_K || rows < 1)
        return 0;
    /* Slabs of fewer rows may be split where larger ones are not, but into no more blocks. */
    int64_t useful = useful_blocks(max_key);
    int64_t blocks = rows < n_sm / useful ? rows * useful : n_sm;
    return 2 * counter_bytes(n_sm) + (size_t)blocks * SPLIT_ROOM * sizeof(uint64_t);
}

template <class Z>
static cudaError_t start(void (*kernel)(struct launch), struct launch *l, int64_t blocks,
                         cudaStream_t stream) {
    int bytes = (int)sizeof(struct shared<Z>);
    cudaError_t e = cudaFuncSetAttribute((const void *)kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return e;
    void *arguments[] = {l};
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(Z::THREADS);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = l->slab.compute >= 90;
    return cudaLaunchKernelExC(&config, (const void *)kernel, arguments);
}

int lidx_prepare_topk(const struct slab *s, void *stream) {
    if (!s->scratch)
        return cudaSuccess;
    return cudaMemsetAsync(s->scratch, 0, counter_bytes(s->n_sm), (cudaStream_t)stream);
}

int lidx_launch_topk(const struct slab *s, void *stream) {
    cudaStream_t on = (cudaStream_t)stream;
    int64_t rows = s->row_end - s->row_begin;
    int64_t max_key = s->p.n_key < s->scores_stride ? s->p.n_key : s->scores_stride;
    struct launch l;
    l.slab = *s;
    l.blocks = blocks_per_row(rows, max_key, s->p.top_k, s->n_sm);
    l.arrived = (uint32_t *)s->scratch;
    l.found = (uint32_t *)((char *)s->scratch + counter_bytes(s->n_sm));
    l.region = (uint64_t *)((char *)s->scratch + 2 * counter_bytes(s->n_sm));
    if (rows <= 0)
        return cudaSuccess;
    if (s->p.top_k > SMALL_K)
        return start<large_sizes>(row_kernel<large_sizes, 1>, &l, rows, on);
    if (l.blocks > 1) {
        cudaError_t e = s->prepared ? cudaSuccess : (cudaError_t)lidx_prepare_topk(s, stream);
        if (e != cudaSuccess)
            return e;
        return start<alone_sizes>(split_kernel<alone_sizes>, &l, rows * l.blocks, on);
    }
    if (rows <= s->n_sm)
        return start<alone_sizes>(row_kernel<alone_sizes, 1>, &l, rows, on);
    return start<crowd_sizes>(row_kernel<crowd_sizes, 3>, &l, rows, on);
}
