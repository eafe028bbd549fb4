/* SPDX-License-Identifier: Apache-2.0
 *
 * Orders the list of candidates in shared memory: buckets by expected rank, or, if these are
 * crowded, parts between splitters drawn from the list.
 */
#ifndef LIDX_TOPK_ORDER_CUH
#define LIDX_TOPK_ORDER_CUH

#include "topk_block.cuh"

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
    uint32_t key = item >> 32, bin = key >> 21, range = s->hist[bin];
    uint32_t place = __umulhi(key << 11, range >> 16);
    if (last && bin == last->bin) {
        float x = __fmaf_rn((float)(uint32_t)item, last->step, (float)(key - last->low));
        place = min((uint32_t)(x * last->scale), last->limit);
    }
    return (range & 0xFFFF) + place;
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
        if (i * Z::THREADS + warp_begin() >= n_list)
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
        if (i * Z::THREADS + warp_begin() >= n_list)
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

/* Draws members of the list and puts them in order: the splitters, which it returns. Leaves the
 * histogram, which it uses, at zero. */
template <class Z>
static __device__ __forceinline__ const uint64_t *draw_splitters(struct shared<Z> *s,
                                                                 uint32_t n_list) {
    const uint32_t share = SPLITTERS * SPLITTERS / Z::THREADS;
    uint64_t *drawn = (uint64_t *)s->counter, *splitter = drawn + SPLITTERS;
    uint32_t *rank = s->hist + BINS / 2; /* of each splitter */
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
        rank[mine] = 0;
    }
    __syncthreads();
    return splitter;
}

/* The list into registers; of each member, by halving, its part: how many splitters are at or
 * before it. Counts the members of each part; crowded, if one has too many. */
template <class Z>
static __device__ __forceinline__ void find_parts(struct shared<Z> *s, uint32_t n_list,
                                                  const uint64_t *splitter, uint64_t *item,
                                                  uint32_t *part) {
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        uint32_t j = i * Z::THREADS + threadIdx.x;
        item[i] = j < n_list ? s->list[j] : 0;
        part[i] = 0;
    }
#pragma unroll 1
    for (uint32_t step = SPLITTERS / 2; step; step /= 2)
#pragma unroll
        for (uint32_t i = 0; i < Z::ITEMS; i++)
            part[i] += splitter[part[i] + step - 1] <= item[i] ? step : 0;
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i++) {
        part[i] += splitter[part[i]] <= item[i];
        if (i * Z::THREADS + threadIdx.x < n_list && atomicAdd(&s->hist[part[i]], 1u) >= TOO_MANY)
            s->crowded = 1;
    }
    __syncthreads();
}

/* Moves each member to its part; there it counts those before it, and so finds its place. */
template <class Z>
static __device__ __forceinline__ void place_in_parts(struct shared<Z> *s, uint32_t n_list,
                                                      const uint64_t *item, uint32_t *part) {
    uint32_t *end = s->hist; /* where each part ends, once its members have moved there */
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

/* Orders a list whose values are spread too unevenly for buckets by value: parts between splitters
 * that are members of the list themselves, so that what is dense is cut fine; equal scores have
 * different positions and are cut like all others. */
template <class Z> static __device__ __noinline__ void order_crowded(void) {
    struct shared<Z> *s = shared_memory<Z>();
    const uint32_t n_list = s->n_list;
    uint64_t item[Z::ITEMS];
    uint32_t part[Z::ITEMS];
    const uint64_t *splitter = draw_splitters(s, n_list);
    find_parts(s, n_list, splitter, item, part);
    if (s->crowded) {
        sort_network(s, n_list);
        return;
    }
    scan_hist(s, 1, 0);
    place_in_parts(s, n_list, item, part);
}

/* All candidates into registers and their buckets, in pairs so that one's latency covers the
 * other's. What lies past the list is read, but not counted. */
template <class Z>
static __device__ __forceinline__ void enter_all(struct shared<Z> *s, uint32_t n_list,
                                                 const struct last_bin *last, uint64_t *item,
                                                 uint32_t *slot, uint32_t *worst) {
#pragma unroll
    for (uint32_t i = 0; i < Z::ITEMS; i += 2) {
        if (i * Z::THREADS + warp_begin() >= n_list)
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
        uint32_t buckets = s->hist[last.bin] >> 16;
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

/* Writes the slots `begin` to `end` of the row, which is in the list. */
template <class Z>
static __device__ __forceinline__ void write_row(struct shared<Z> *s, const struct problem *p,
                                                 uint32_t begin, uint32_t end) {
    const struct row *r = &s->row;
    uint32_t n_list = s->n_list, n = n_list + s->n_tied;
    for (uint32_t j = begin + threadIdx.x; j < end; j += Z::THREADS)
        r->indices[j] = j < n ? (int32_t)s->list[place_of<Z>(j, n_list)] : -1;
    if (!r->values)
        return;
    for (uint32_t j = begin + threadIdx.x; j < end; j += Z::THREADS)
        store_value(r->values, j, p->values_dtype,
                    j < n ? score_of(s->list[place_of<Z>(j, n_list)] >> 32)
                          : __uint_as_float(0xFF800000u));
}

/* What an output slot without a key gets, as an item: index -1 and value -inf. */
static const uint64_t NOTHING = 0xFF800000FFFFFFFFull;

static __device__ __forceinline__ void write_slot(const struct row *r, int dtype, uint32_t j,
                                                  uint64_t item) {
    if (j >= r->top_k)
        return;
    r->indices[j] = (int32_t)item;
    if (r->values)
        store_value(r->values, j, dtype, score_of(item >> 32));
}

/* Builds the table of sums from the list itself, `raw` if it holds scores that are not keys yet.
 * `high` bounds its keys. */
template <class Z> static __device__ __noinline__ void table_from_list(uint32_t high, int raw) {
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
            if (raw) {
                key = key_of(__uint_as_float(key));
                s->list[j] = pair(key, (uint32_t)s->list[j]);
            }
            atomicAdd(&s->hist[key >> 21], 1u);
            if (key >> 21 == high >> 21)
                low = min(low, key);
        }
    }
    low = __reduce_min_sync(ALL_LANES, low);
    if (lane_id() == 0)
        atomicMin(&s->last_low, low);
    __syncthreads();
    scan_hist(s, 1, 0, 1);
}

#endif
