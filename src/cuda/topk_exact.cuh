/* SPDX-License-Identifier: Apache-2.0
 *
 * Finds the candidates of a row exactly, whatever the data: digits of its keys by histograms until
 * the candidates fit the list, then a pass that collects these.
 */
#ifndef LIDX_TOPK_EXACT_CUH
#define LIDX_TOPK_EXACT_CUH

#include "topk_order.cuh"

static const uint32_t KEEP_ALL = 0xFFFFFFFFu;

/* Neighbouring keys that a thread collects from in a step, so that one sum serves; as many as do
 * not spill. */
template <class Z> struct span {
    static const uint32_t SIZE = Z::THREADS == 512 ? 8 : 16;
    uint32_t first, key[SIZE];
};

template <class Z>
static __device__ __forceinline__ struct span<Z> load_span(const float *score, uint32_t first,
                                                           uint32_t n) {
    struct span<Z> x;
    x.first = first;
#pragma unroll
    for (uint32_t j = 0; j < x.SIZE; j += 4) {
        float4 y = load4(score, first + j, n);
        x.key[j] = key_of(y.x);
        x.key[j + 1] = key_of(y.y);
        x.key[j + 2] = key_of(y.z);
        x.key[j + 3] = key_of(y.w);
    }
    return x;
}

/* Lists the span's `take` keys below `limit`, as long as there is room. By all lanes. */
template <class Z>
static __device__ __forceinline__ void list_span(struct shared<Z> *s, const struct span<Z> &x,
                                                 uint32_t take, uint32_t limit, uint32_t room) {
    if (!__any_sync(ALL_LANES, take))
        return;
    uint32_t at = reserve(s, take);
#pragma unroll
    for (uint32_t j = 0; j < x.SIZE; j++) {
        if (x.key[j] < limit && at < room)
            s->list[at] = pair(x.key[j], x.first + j);
        at += x.key[j] < limit;
    }
}

/* Keeps at the far end of the list the span's `equal` keys that are the edge, in the order of the
 * block's spans, up to number `keep`; `seen` have been before. Returns how many the block has. One
 * barrier inside. */
template <class Z>
static __device__ __forceinline__ uint32_t keep_equal(struct shared<Z> *s, const struct span<Z> &x,
                                                      uint32_t equal, uint32_t edge, uint32_t keep,
                                                      uint32_t seen, uint32_t turn) {
    uint32_t total;
    uint32_t tie = seen + block_before(s, equal, (int)turn, &total);
    if (equal && tie < keep) {
#pragma unroll
        for (uint32_t j = 0; j < x.SIZE; j++) {
            if (x.key[j] == edge && tie < keep)
                s->list[Z::LIST - 1 - tie] = pair(x.key[j], x.first + j);
            tie += x.key[j] == edge;
        }
    }
    return total;
}

/* Collects from the row into an empty list: all keys better than `edge`, and of those equal to it
 * the first `keep`. These go in their order to the far end of the list, where they need no
 * further sorting. KEEP_ALL: the equal ones may all come, as the others do. */
template <class Z> static __device__ __noinline__ void collect(uint32_t edge, uint32_t keep) {
    struct shared<Z> *s = shared_memory<Z>();
    const uint32_t SPAN = span<Z>::SIZE;
    const uint32_t limit = keep == KEEP_ALL ? edge + 1 : edge;
    const uint32_t room = keep == KEEP_ALL ? Z::LIST : Z::LIST - keep;
    const float *score = s->row.score;
    uint32_t n = s->row.n, seen = 0, turn = 0;
    __syncthreads();
    if (threadIdx.x == 0)
        s->n_list = 0;
    __syncthreads();
    for (uint32_t begin = 0; begin < n; begin += SPAN * Z::THREADS) {
        const struct span<Z> x = load_span<Z>(score, begin + SPAN * threadIdx.x, n);
        uint32_t take = 0, equal = 0;
#pragma unroll
        for (uint32_t j = 0; j < SPAN; j++) {
            take += x.key[j] < limit;
            equal += x.key[j] == edge;
        }
        list_span(s, x, take, limit, room);
        if (keep == KEEP_ALL || seen >= keep)
            continue;
        seen += keep_equal(s, x, equal, edge, keep, seen, turn);
        turn ^= 1;
    }
    if (threadIdx.x == 0)
        s->n_tied = keep == KEEP_ALL ? 0 : min(seen, keep);
    __syncthreads();
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
    table_from_list<Z>(edge, 0);
}

/* Where a threshold let more pass than the list holds, equal scores are the usual cause. If most
 * of the listed items equal the worst of them, one pass takes all that are better and the
 * first top_k of the equals. Returns 0, with the list lost, if it was not so. */
template <class Z> static __device__ __noinline__ int plateau_select(void) {
    struct shared<Z> *s = shared_memory<Z>();
    uint32_t top_k = s->row.top_k;
    const uint32_t listed = Z::LIST - 512; /* what lies beyond may not have been written */
    if (2 * top_k > Z::LIST)
        return 0;
    uint32_t worst = 0, equal = 0, total;
    for (uint32_t j = threadIdx.x; j < listed; j += Z::THREADS)
        worst = max(worst, (uint32_t)(s->list[j] >> 32));
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
        equal += s->list[j] >> 32 == worst;
    block_before(s, equal, 0, &total);
    if (2 * total < listed)
        return 0;
    collect<Z>(worst, top_k);
    uint32_t n_list = s->n_list;
    if (n_list > Z::LIST - top_k || n_list + s->n_tied < top_k)
        return 0;
    table_from_list<Z>(worst, 0);
    return 1;
}

#endif
