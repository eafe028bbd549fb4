/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores on any GPU from SM80 on, by the matrix instruction that all of them have (m16n8k16).
 *
 * Work. Heads of queries are the rows of a product (M), keys its columns (N). A warp owns 64
 * rows: one query of 64 heads, 2 of 32, 4 of 16, 8 of 8 (other head counts are padded with heads
 * that count nothing), or half a query of more than 64. It holds their 64 x D elements in
 * registers for as long as it stays with them, so keys are all that the inner loop reads, and what
 * a 16-byte read of a key brings is the instruction's operand as it stands. (Keys as rows would
 * need two keys' words side by side: a move for every word.)
 *
 *     registers per thread, D 128     heads 128 | sums of 64 heads x 32 keys 64 | keys 16 to 32 |
 *                                     weights 8 | the rest about 20
 *
 * A block is 8 warps; an item of work is the block of queries that they hold (8 groups of 64
 * heads) against a run of keys, found by schedule.h from lengths on the device. Keys stream
 * through a ring of slots of 32 in shared memory; every warp fills every 8th slot. With 8 groups
 * every warp reads every slot; with fewer (decode has 1 or 2) the slots are dealt out: a warp
 * reads every 8th, 4th or 2nd. A barrier says when a slot is full, another when it has been read,
 * so that warps may be several slots apart. Two warps share a scheduler and take turns at its
 * products, so that one's sums hide behind the other's.
 *
 * Order of summation, the same for a pair of query and key whatever else is in the launch:
 * products by the instruction over k-steps in order; then in thread g of 8 the heads g, 8 + g,
 * 16 + g ... ascending; then the 8 threads, as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)); for more
 * than 64 heads, lower half + upper half.
 *
 * The elements of a head are permuted alike for queries and keys: in a pair of k-steps lane l of
 * a quad has the 8 neighbours 32t + 8l + {0..7}, so that one 16-byte load serves two steps. A dot
 * product does not mind.
 */
#include <cuda_runtime.h>

#include "allow_shared.cuh"
#include "smxx_passage.cuh"

/* ---- the kernel ------------------------------------------------------------------------------ */

/* One item, whose first slot has place `first` in the ring and is number `used` of the block's.
 *
 * With 2^spread groups, rounded up, a slot has as many readers, and a warp reads every `stride`th
 * slot, stride * 2^spread = 8. Each reader arrives `stride` times at the slot's barrier, which so
 * always waits for 8. A warp fills slots up to `ahead` beyond the one it reads: that is 8 less
 * than the ring has, so that it waits for readers who are 8 slots behind, if at all. The last of
 * all warps finds full what it wants to read and read what it wants to fill: no deadlock.
 * The first of all must not be two rounds of the ring ahead, since a barrier's parity does not tell
 * a round from the one before last. With 8 readers of a slot it cannot be. With fewer, the warps
 * that share a place of the ring depend on each other within an item, and all meet at its end.
 *
 * Turns do not change this: a warp awaits one that is at an earlier slot, or in an earlier round at
 * the same one. Both of a pair have equally many turns in an item.
 *
 * N_OCTETS 8 or 4: a query has just so many octets of heads, no pad heads. 0: any number. */
template <typename T, int D, bool ALIGNED, int N_OCTETS>
static __device__ __forceinline__ void
run_item(const struct slab *s, const struct plan *plan, const struct item *item,
         struct shared_state *state, uint32_t ring_address, struct ring first, uint32_t used) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    struct passage<D, ALIGNED> way(s, plan, item, state, ring_address);
    way.begin_filling(first, (warp - used) % WARPS);

    int n_groups =
        plan->split ? item->rows * 2 : ((item->rows << plan->head_shift) + GROUP - 1) / GROUP;
    int spread = n_groups > 4 ? 3 : n_groups > 2 ? 2 : n_groups - 1;
    int group = warp & ((1 << spread) - 1), stride = WARPS >> spread;

    uint32_t a[HEAD_TILES][D / 16][4];
    float w[OCTETS];
    load_heads<D, ALIGNED>(s, plan, item, group, a);
    uint32_t heads = load_weights(s, plan, item, group, w);
    bool padded = s->p.n_heads != (plan->split ? 2 * GROUP : 1 << plan->head_shift);
    struct sink *sink = &state->sink[warp];
    if (lane == 0)
        *sink = make_sink(s, plan, item, group);
    __syncwarp();

    way.read = first;
    advance(&way.read, warp >> spread, plan->n_slots);
    int32_t slot = warp >> spread;
    if (group >= n_groups) {
        for (; slot < way.n_slots; slot += stride) {
            way.begin_slot(slot);
            await_turn();
            give_turn();
            way.end_slot(stride);
        }
    } else {
        for (; slot < way.n_slots; slot += stride) {
            struct lane_target target = way.begin_slot(slot);
            float left[HEAD_TILES][2][4], right[HEAD_TILES][2][4];
            multiply_slot<T, D, N_OCTETS == 0>(left, right, a, way.slot_address());
            way.end_slot(stride);
            int turn = (slot & stride) != 0; /* alternates */
            sum_slot<N_OCTETS>(plan, state, left, right, w, heads, padded, sink, target, turn);
        }
    }
    while (way.filled < way.n_slots)
        way.fill_next();
    if (slot < (way.n_slots + stride - 1) / stride * stride) { /* the other warp has a slot more */
        await_turn();
        give_turn();
    }
    if (stride > 1) /* or one might run on and be two rounds ahead */
        named_barrier(BARRIER_ITEM, THREADS);
    else if (plan->split) /* the next item's turns begin anew */
        named_barrier(BARRIER_SPLIT + warp / 2, 64);
}

template <typename T, int D, bool ALIGNED, int N_OCTETS>
__global__ void __launch_bounds__(THREADS, 1)
    score_kernel(const __grid_constant__ struct slab s, const __grid_constant__ struct plan plan) {
    extern __shared__ __align__(128) unsigned char memory[];
    struct shared_state *state =
        (struct shared_state *)(memory + plan.n_slots * (SLOT_KEYS * D * 2));
    if (threadIdx.x < plan.n_slots) {
        mbarrier_init(smem_address(&state->full[threadIdx.x]), 32);
        mbarrier_init(smem_address(&state->empty[threadIdx.x]), WARPS);
    }
    allow_next_kernel();
    find_run(&s, &plan.line, state);
    struct ring first = {0, 0};
    uint32_t used = 0;
    int warp = threadIdx.x / 32;
    if (warp >= WARPS / 2)
        give_turn();
    for (;;) {
        struct item *item = &state->item[warp];
        __syncwarp();
        bool more = false;
        if (threadIdx.x % 32 == 0)
            more = next_item(&s, &plan.line, &state->walk[warp], item);
        if (!__shfl_sync(~0u, more, 0))
            break;
        run_item<T, D, ALIGNED, N_OCTETS>(&s, &plan, item, state, smem_address(memory), first,
                                          used);
        uint32_t slots = item->slot_end - item->slot_begin, place = first.slot + slots;
        first.parity ^= place / plan.n_slots & 1;
        first.slot = place % plan.n_slots;
        used += slots;
    }
}

/* ---- the host's side ------------------------------------------------------------------------- */

static bool is_aligned(const struct problem *p) {
    uint64_t all = (uint64_t)(uintptr_t)p->query | (uint64_t)p->query_batch_stride |
                   (uint64_t)(uintptr_t)p->key | (uint64_t)p->key_batch_stride;
    return all % 16 == 0;
}

static struct plan make_plan(const struct slab *s) {
    struct plan plan;
    int heads = s->p.n_heads;
    plan.split = heads > GROUP;
    plan.head_shift = heads > 32 ? 6 : heads > 16 ? 5 : heads > 8 ? 4 : 3;
    plan.line.row_begin = s->row_begin;
    plan.line.row_end = s->row_end;
    plan.line.block_shift = plan.split ? 2 : 9 - plan.head_shift; /* 8 groups of 64 heads */
    plan.line.charge = SWITCH_CHARGE;
    plan.zero = 0;
    int64_t sixteens = s->p.page_size ? s->p.page_size / 16 : 1;
    plan.page_magic = ((uint64_t)1 << PAGE_SHIFT) / sixteens + 1;
    return plan;
}

template <typename T, int D, bool ALIGNED, int N_OCTETS>
static cudaError_t launch(const struct slab *s, cudaStream_t stream) {
    constexpr int SLOT_BYTES = SLOT_KEYS * D * 2;
    static_assert(SLOTS_MIN * SLOT_BYTES + sizeof(struct shared_state) <= LEAST_SHARED,
                  "the smallest ring fits a block of any GPU from compute capability 8.0 on");
    struct plan plan = make_plan(s);
    int device, most;
    cudaError_t status = cudaGetDevice(&device);
    if (!status)
        status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status)
        return status;
    int slots = (most - (int)sizeof(struct shared_state)) / SLOT_BYTES;
    if (slots < SLOTS_MIN)
        return cudaErrorInvalidDevice;
    /* With a multiple of 4 a place of the ring is filled by one warp, or by the two that take
     * turns: where slots are dealt out no other bounds how far they are apart. */
    plan.n_slots = slots < SLOTS_MAX ? slots & ~3 : SLOTS_MAX;
    int bytes = plan.n_slots * SLOT_BYTES + (int)sizeof(struct shared_state);
    static uint64_t allowed; /* see allow_shared */
    status = allow_shared((const void *)score_kernel<T, D, ALIGNED, N_OCTETS>, bytes, &allowed);
    if (status)
        return status;
    score_kernel<T, D, ALIGNED, N_OCTETS><<<s->n_sm, THREADS, bytes, stream>>>(*s, plan);
    return cudaGetLastError();
}

template <typename T, int D>
static cudaError_t launch_for(const struct slab *s, cudaStream_t stream) {
    int heads = s->p.n_heads;
    if (!is_aligned(&s->p))
        return launch<T, D, false, 0>(s, stream);
    if (heads == GROUP || heads == 2 * GROUP)
        return launch<T, D, true, 8>(s, stream);
    if (heads == GROUP / 2)
        return launch<T, D, true, 4>(s, stream);
    return launch<T, D, true, 0>(s, stream);
}

extern "C" int lidx_launch_score_smxx(const struct slab *s, void *stream) {
    if (s->row_begin >= s->row_end || s->p.n_key == 0)
        return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    if (s->p.dtype == DTYPE_BF16)
        return s->p.head_dim == 128 ? launch_for<__nv_bfloat16, 128>(s, on)
                                    : launch_for<__nv_bfloat16, 64>(s, on);
    return s->p.head_dim == 128 ? launch_for<__half, 128>(s, on) : launch_for<__half, 64>(s, on);
}

/* ---- bad input ------------------------------------------------------------------------------- */

static __device__ bool is_bad_length(const int32_t *lengths, int packed, int64_t limit, int64_t b) {
    if (!lengths)
        return false;
    int64_t low = packed && b ? lidx_clamp(lengths[b - 1], 0, limit) : 0;
    return lengths[b] < low || lengths[b] > limit;
}

/* A block counts what was wrong with every gridDim.x-th batch. */
__global__ void __launch_bounds__(THREADS) count_kernel(const __grid_constant__ struct problem p) {
    uint32_t bad = 0;
    for (int64_t b = blockIdx.x; b < p.n_batch; b += gridDim.x) {
        if (threadIdx.x == 0) {
            bad += is_bad_length(p.query_lengths, p.query_packed, p.n_query, b);
            bad += is_bad_length(p.key_lengths, p.key_packed, p.n_key, b);
        }
        struct extent e = lidx_extent(&p, b);
        int64_t pages = p.page_size && e.n_query ? (e.n_key + p.page_size - 1) / p.page_size : 0;
        const int32_t *table =
            (const int32_t *)((const unsigned char *)p.page_table + b * p.page_table_stride);
        for (int64_t i = threadIdx.x; i < pages; i += THREADS)
            bad += table[i] < 0 || table[i] >= p.n_pages;
    }
    for (int d = 16; d > 0; d /= 2)
        bad += __shfl_xor_sync(~0u, bad, d);
    if (threadIdx.x % 32 == 0 && bad)
        atomicAdd(p.error_word, bad);
}

extern "C" int lidx_launch_count(const struct slab *s, void *stream) {
    if (!s->p.error_word || s->p.n_batch == 0)
        return cudaSuccess;
    int64_t most = 4 * s->n_sm;
    int blocks = (int)(s->p.n_batch < most ? s->p.n_batch : most);
    count_kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(s->p);
    return cudaGetLastError();
}
