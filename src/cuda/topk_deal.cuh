/* SPDX-License-Identifier: Apache-2.0
 *
 * A few rows of up to 131,072 keys: a cluster of eight blocks holds a row in its registers. Each
 * block takes the same sample, so that all agree without a word on which keys are candidates and
 * where in the row each is likely to come. That says which block will write it; it is put into that
 * block's inbox, where each sender has room of its own and counts by itself, so that nothing is
 * asked back over the cluster. Each block then orders and writes its share, in buckets of its own.
 * No second reading, no list that one block orders alone, nothing through global memory.
 */
#ifndef LIDX_TOPK_DEAL_CUH
#define LIDX_TOPK_DEAL_CUH

#include "cluster.cuh"
#include "topk_guess.cuh"
#include "topk_row.cuh"

enum {
    CLUSTER = 8,           /* the most that every GPU with clusters takes */
    CLUSTER_GROUPS = 4,    /* of four scores of a thread, at most */
    CLUSTER_KEYS = 131072, /* that its registers hold: 8 x 1024 threads x 16 */
    PLACES = 256,          /* buckets of a block: two words of counts for each lane */
    CROWDED_PLACE = 64,    /* candidates of a bucket that are too many to be compared */
    WARP_ROOM = 128,       /* candidates of a warp */
    SHARE = 512,           /* candidates that a block can send to another */
    SENDER_THREADS = 128,  /* 1024 / CLUSTER: they see to what one block has sent */
};

/* What becomes of a share. */
enum { EVEN, CROWDED, UNEVEN };

template <class Z> struct cluster_shared {
    struct shared<Z> row;            /* hist: of the sample; of the cluster */
    uint32_t count[BINS];            /* of this block's part */
    uint64_t inbox[CLUSTER][SHARE];  /* what each block has sent to this one */
    uint32_t sent[CLUSTER][CLUSTER]; /* candidates that each block has for each: [from][to] */
    uint32_t dealt[CLUSTER];         /* the same of this block */
    uint32_t last[PLACES];           /* of a bucket's members: one more than its number, or 0 */
    uint16_t next[CLUSTER * SHARE];  /* the one before it, likewise */
    uint32_t way;                    /* EVEN, or the worst that some thread has found */
    uint32_t base;                   /* where in the list this block's candidates go */
};

/* Lists a score and, LIST further on, its position. Returns where the next goes. */
template <class Z>
static __device__ __forceinline__ uint32_t *put(uint32_t *to, uint32_t taken, float x,
                                                uint32_t position) {
    if (taken) {
        to[0] = __float_as_uint(x);
        to[Z::LIST] = position;
        to++;
    }
    return to;
}

/* Lists the warp's candidates, and brings each to the inbox of the block that has its bucket, the
 * bucket below its position; then tells all blocks how many went where: more than SHARE, if some
 * did not. */
template <class Z, int GROUPS>
static __device__ __forceinline__ void deal_part(struct cluster_shared<Z> *c, const float4 *x,
                                                 uint32_t first, const struct guess *g,
                                                 uint32_t rank) {
    struct shared<Z> *s = &c->row;
    static_assert(WARP_ROOM * Z::WARPS <= Z::LIST, "room in the list");
    static_assert(ROW_PARTS % (CLUSTER * PLACES) == 0, "buckets of equal parts");
    const float threshold = score_of(g->edge);
    uint32_t *list = (uint32_t *)s->list + threadIdx.x / LANES * WARP_ROOM;
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
        mask |= reach(x[i], threshold) << 4 * i;
    uint32_t upto = warp_inclusive(__popc(mask));
    uint32_t number = __shfl_sync(ALL_LANES, upto, LANES - 1);
    if (number <= WARP_ROOM) {
        uint32_t *to = list + upto - __popc(mask);
        first = kept(first);
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            uint32_t position = first + i * CLUSTER * 4 * Z::THREADS;
            to = put<Z>(to, mask & 1u << 4 * i, x[i].x, position);
            to = put<Z>(to, mask & 2u << 4 * i, x[i].y, position + 1);
            to = put<Z>(to, mask & 4u << 4 * i, x[i].z, position + 2);
            to = put<Z>(to, mask & 8u << 4 * i, x[i].w, position + 3);
        }
        __syncwarp();
    } else {
        number = 0;
        if (lane_id() == 0)
            atomicAdd(&c->dealt[0], SHARE + 1u);
    }
    cluster_wait(); /* all have begun */
#pragma unroll 1
    for (uint32_t j = lane_id(); j < number; j += LANES) {
        uint32_t key = key_of(__uint_as_float(list[j]));
        uint32_t place = fine_place(s, key, g) / (ROW_PARTS / CLUSTER / PLACES);
        uint32_t owner = place / PLACES;
        uint64_t item = pair(key, list[j + Z::LIST] * PLACES + place % PLACES);
        uint32_t to = atomicAdd(&c->dealt[owner], 1u);
        if (to < SHARE)
            remote_store(remote(&c->inbox[rank][to], owner), item);
    }
    __syncthreads();
    if (threadIdx.x < CLUSTER * CLUSTER / 2) { /* two counts at a time */
        uint32_t owner = threadIdx.x % (CLUSTER / 2) * 2, to = threadIdx.x / (CLUSTER / 2);
        remote_store(remote(&c->sent[rank][owner], to), pair(c->dealt[owner + 1], c->dealt[owner]));
    }
}

/* Where in the row the block's share begins, and how many candidates there are in all; whether
 * these are too few, or something did not fit into an inbox. By one warp. */
template <class Z>
static __device__ __forceinline__ void sum_shares(struct cluster_shared<Z> *c, uint32_t rank) {
    struct shared<Z> *s = &c->row;
    uint32_t sum = 0, most = 0;
    if (lane_id() < CLUSTER) {
#pragma unroll
        for (uint32_t from = 0; from < CLUSTER; from++) {
            uint32_t number = c->sent[from][lane_id()];
            sum += number;
            most = max(most, number);
        }
    }
    uint32_t first = __reduce_add_sync(ALL_LANES, lane_id() < rank ? sum : 0);
    uint32_t total = __reduce_add_sync(ALL_LANES, sum);
    most = __reduce_max_sync(ALL_LANES, most);
    if (lane_id() == 0) {
        s->before = first;
        s->total = total;
        if (most > SHARE || total < min(s->row.n, s->row.top_k))
            atomicMax(&c->way, (uint32_t)UNEVEN);
    }
}

/* An item of an inbox without its bucket. */
static __device__ __forceinline__ uint64_t without_place(uint64_t item) {
    return pair(item >> 32, (uint32_t)item / PLACES);
}

/* A block's buckets, as a warp has them: eight to a lane. */
struct buckets {
    uint2 size;      /* of each, a byte */
    uint32_t before; /* members of those of earlier lanes */
};

template <class Z>
static __device__ __forceinline__ struct buckets take_buckets(const struct shared<Z> *s) {
    struct buckets b;
    b.size = ((const uint2 *)s->counter)[lane_id()];
    uint32_t sum = sum_bytes(b.size.x) + sum_bytes(b.size.y);
    b.before = warp_inclusive(sum) - sum;
    return b;
}

/* Where in the share a bucket begins. By all lanes. */
static __device__ __forceinline__ uint32_t find_bucket(const struct buckets *b, uint32_t bucket) {
    uint32_t low = __shfl_sync(ALL_LANES, b->size.x, bucket / 8);
    uint32_t word = __shfl_sync(ALL_LANES, b->size.y, bucket / 8);
    uint32_t begin = __shfl_sync(ALL_LANES, b->before, bucket / 8);
    if (bucket & 4)
        begin += sum_bytes(low);
    else
        word = low;
    return __dp4a(word & ~byte_up(ALL_BITS, bucket), EACH_BYTE, begin);
}

/* Counts in buckets what one block has sent, `count` candidates, and links the members of each. */
template <class Z>
static __device__ __forceinline__ void enter_inbox(struct cluster_shared<Z> *c, uint32_t count) {
    uint32_t from = threadIdx.x / SENDER_THREADS, worst = 0;
#pragma unroll 1
    for (uint32_t j = threadIdx.x % SENDER_THREADS; j < count; j += SENDER_THREADS) {
        uint32_t bucket = (uint32_t)c->inbox[from][j] % PLACES, number = from * SHARE + j;
        worst = max(worst, enter_bucket(&c->row, bucket));
        c->next[number] = (uint16_t)atomicExch(&c->last[bucket], number + 1);
    }
    if (worst >= (uint32_t)CROWDED_PLACE << 16)
        atomicMax(&c->way, (uint32_t)CROWDED);
}

/* Writes what one block has sent; number `first` of the row is where the share begins. Each counts
 * those before it in its bucket. */
template <class Z>
static __device__ __forceinline__ void write_share(const struct cluster_shared<Z> *c,
                                                   uint32_t count, const struct row *r,
                                                   uint32_t first, int dtype) {
    const uint64_t *inbox = c->inbox[0], *from = c->inbox[threadIdx.x / SENDER_THREADS];
    const uint32_t own = threadIdx.x % SENDER_THREADS;
    if (own - lane_id() >= count)
        return; /* the warp has none */
    const struct buckets b = take_buckets(&c->row);
#pragma unroll 1
    for (uint32_t j = own; j - lane_id() < count; j += SENDER_THREADS) {
        uint64_t item = j < count ? from[j] : 0;
        uint32_t bucket = (uint32_t)item % PLACES, to = first + find_bucket(&b, bucket);
        if (j >= count || to >= r->top_k)
            continue;
#pragma unroll 1
        for (uint32_t k = c->last[bucket]; k; k = c->next[k - 1])
            to += inbox[k - 1] < item;
        write_slot(r, dtype, to, without_place(item));
    }
}

/* The same where a bucket is crowded: the share becomes the list, which is ordered by splitters. */
template <class Z> static __device__ __noinline__ void write_crowded(uint32_t first, int dtype) {
    struct shared<Z> *s = shared_memory<Z>();
    struct cluster_shared<Z> *c = (struct cluster_shared<Z> *)s;
    const uint32_t rank = cluster_rank();
    uint32_t total = 0;
#pragma unroll 1
    for (uint32_t from = 0; from < CLUSTER; from++) {
        uint32_t count = c->sent[from][rank];
        for (uint32_t j = threadIdx.x; j < count; j += Z::THREADS)
            s->list[total + j] = without_place(c->inbox[from][j]);
        total += count;
    }
    if (threadIdx.x == 0)
        s->n_list = total;
    __syncthreads();
    order_crowded<Z>();
    for (uint32_t j = threadIdx.x; j < total; j += Z::THREADS)
        write_slot(&s->row, dtype, first + j, s->list[j]);
}

/* Orders and writes what is in the inbox. False, in all blocks alike, if something did not fit into
 * one, or if the guess has left too few. */
template <class Z>
static __device__ __forceinline__ bool write_dealt(struct cluster_shared<Z> *c, uint32_t rank,
                                                   const struct row *r, int dtype) {
    struct shared<Z> *s = &c->row;
    uint32_t count = min(c->sent[threadIdx.x / SENDER_THREADS][rank], (uint32_t)SHARE);
    if (threadIdx.x / LANES == Z::WARPS - 1)
        sum_shares(c, rank);
    enter_inbox(c, count);
    __syncthreads();
    uint32_t way = c->way, first = s->before, found = s->total;
    if (way == UNEVEN)
        return false;
    if (way == CROWDED)
        write_crowded<Z>(first, dtype);
    else
        write_share(c, count, r, first, dtype);
    if (rank == 0)
#pragma unroll 1
        for (uint32_t j = found + threadIdx.x; j < r->top_k; j += Z::THREADS)
            write_slot(r, dtype, j, NOTHING);
    return true;
}

/* This thread's part of the row: eight threads take 128 bytes, and blocks take these in turn. */
template <class Z, int GROUPS>
static __device__ __forceinline__ void load_dealt(float4 *x, const float *score, uint32_t first,
                                                  uint32_t n) {
    const uint32_t STEP = CLUSTER * 4 * Z::THREADS;
    bool whole = first + (GROUPS - 1) * STEP + 4 <= n;
#pragma unroll
    for (uint32_t i = 0; i < GROUPS; i++)
        x[i] = whole ? __ldcg((const float4 *)(score + first + i * STEP))
                     : load4(score, first + i * STEP, n);
}

/* The whole row, by all blocks alike, if the sample tells well enough what is in it. Returns
 * whether it was so; all blocks agree. */
template <class Z, int GROUPS>
static __device__ __forceinline__ bool deal_row(struct cluster_shared<Z> *c, int dtype) {
    struct shared<Z> *s = &c->row;
    const struct row r = s->row;
    const uint32_t rank = cluster_rank(), n = r.n, warp = threadIdx.x / LANES;
    const uint32_t wanted = n ? sample_rank(n, r.top_k) : 1;
    const uint32_t first =
        lane_id() / 8 * CLUSTER * Z::THREADS + (warp * CLUSTER + rank) * LANES + lane_id() % 8 * 4;
    struct guess g;
    wait_for_scores();
    float4 x[GROUPS], sampled = load_sampled(r.score, n);
    const uint32_t key[4] = {key_of(sampled.x), key_of(sampled.y), key_of(sampled.z),
                             key_of(sampled.w)};
    find_range(s, key, wanted, &g);
    /* Only now: what all blocks load comes the same way, and for the sample they wait. */
    load_dealt<Z, GROUPS>(x, r.score, first, n);
    count_sample(s, key, &g);
    scan_hist<Z, SAMPLE_BINS>(s, wanted, 0);
    take_guess(s, wanted, &g);
    deal_part<Z, GROUPS>(c, x, first, &g, rank);
    cluster_sync();
    return write_dealt(c, rank, &r, dtype);
}

#endif
