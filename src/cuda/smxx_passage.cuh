/* SPDX-License-Identifier: Apache-2.0
 *
 * How a warp of score_smxx.cu passes through the ring: it fills slots ahead of those that it reads.
 */
#ifndef LIDX_SMXX_PASSAGE_CUH
#define LIDX_SMXX_PASSAGE_CUH

#include "smxx_sums.cuh"

/* A warp's way through the slots of an item, numbered from 0: it fills every WARPS-th and reads
 * every stride-th. What keeps warps from running into each other is said at run_item. */
template <int D, bool ALIGNED> struct passage {
    static constexpr uint32_t SLOT_BYTES = SLOT_KEYS * D * 2;
    const struct slab *s;
    const struct plan *plan;
    const struct item *item;
    uint32_t ring_address, full, empty; /* the ring, and its barriers */
    int32_t n_slots;                    /* of the item */
    int32_t ahead;                      /* how far beyond the one it reads a warp may fill */
    int32_t filled;                     /* the next slot that it fills ... */
    struct ring fill;                   /* ... and where in the ring that is */
    struct ring read;                   /* where in the ring the next slot is that it reads */

    __device__ __forceinline__ passage(const struct slab *s, const struct plan *plan,
                                       const struct item *item, struct shared_state *state,
                                       uint32_t ring_address)
        : s(s), plan(plan), item(item), ring_address(ring_address), full(smem_address(state->full)),
          empty(smem_address(state->empty)), n_slots(item->slot_end - item->slot_begin),
          ahead(plan->n_slots - SLOT_SLACK) {
    }

    __device__ __forceinline__ void fill_next() {
        mbarrier_wait(empty + fill.slot * 8, fill.parity ^ 1);
        fill_slot<D, ALIGNED>(s, plan, item, item->slot_begin + filled,
                              ring_address + fill.slot * SLOT_BYTES, full + fill.slot * 8);
        advance(&fill, WARPS, plan->n_slots);
        filled += WARPS;
    }

    __device__ __forceinline__ void begin_filling(struct ring first, int32_t slot) {
        filled = slot;
        fill = first;
        advance(&fill, filled, plan->n_slots);
        while (filled < ahead && filled < n_slots)
            fill_next();
    }

    /* Returns when the slot is full: what the lane's key in it is. */
    __device__ __forceinline__ struct lane_target begin_slot(int32_t slot) {
        if (filled < n_slots && filled <= slot + ahead)
            fill_next();
        struct lane_target target = {(item->slot_begin + slot) * SLOT_KEYS + lane_key(), false};
        if (s->p.page_size && target.key < item->last_visible) {
            int32_t id = __ldg(item->table + page_of(target.key, plan->page_magic));
            target.masked = id < 0 || id >= s->p.n_pages;
        }
        mbarrier_wait(full + read.slot * 8, read.parity);
        return target;
    }

    __device__ __forceinline__ uint32_t slot_address() const {
        return ring_address + read.slot * SLOT_BYTES;
    }

    __device__ __forceinline__ void end_slot(int stride) {
        int lane = threadIdx.x % 32;
        __syncwarp();
        if (lane < stride)
            mbarrier_arrive(empty + read.slot * 8);
        advance(&read, stride, plan->n_slots);
    }
};

#endif
