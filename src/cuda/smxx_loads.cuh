/* SPDX-License-Identifier: Apache-2.0
 *
 * What score_smxx.cu reads: keys into the ring, heads and weights into registers.
 */
#ifndef LIDX_SMXX_LOADS_CUH
#define LIDX_SMXX_LOADS_CUH

#include "smxx_items.cuh"

/* ---- keys: global memory to the ring --------------------------------------------------------- */

static __device__ __forceinline__ int32_t page_of(int32_t key, uint64_t magic) {
    return (int32_t)(((uint64_t)((uint32_t)key / 16) * magic) >> PAGE_SHIFT);
}

/* 16 bytes from an address that is aligned to 2. */
static __device__ __forceinline__ uint4 load_global_halves(const unsigned char *source) {
    const uint16_t *h = (const uint16_t *)source;
    uint4 x;
    x.x = h[0] | (uint32_t)h[1] << 16;
    x.y = h[2] | (uint32_t)h[3] << 16;
    x.z = h[4] | (uint32_t)h[5] << 16;
    x.w = h[6] | (uint32_t)h[7] << 16;
    return x;
}

/* Row r of a slot is at r * row bytes; its 16-byte chunk c is at c ^ 4 in odd rows, so that the 8
 * lanes that a 16-byte read serves at once (2 rows x 4 chunks) meet all 32 banks. Each half of a
 * slot lies on one page, pages being multiples of 16 keys. */
template <int D, bool ALIGNED>
static __device__ __forceinline__ void fill_slot(const struct slab *s, const struct plan *plan,
                                                 const struct item *item, int32_t slot_number,
                                                 uint32_t slot_address, uint32_t full) {
    constexpr int CHUNKS = D / 8, ROWS_AT_ONCE = 32 / CHUNKS, HALF = SLOT_KEYS / 2;
    const struct problem *p = &s->p;
    int lane = threadIdx.x % 32, in = lane / CHUNKS, chunk = lane % CHUNKS;
    int32_t key = slot_number * SLOT_KEYS, last_visible = item->last_visible;
    int32_t page[2] = {0, 0}, id[2] = {0, 0};
    if (p->page_size) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            page[half] = page_of(key + half * HALF, plan->page_magic);
            id[half] = key + half * HALF < last_visible ? __ldg(item->table + page[half]) : -1;
        }
    }
    uint32_t to = slot_address + in * (D * 2) + (chunk ^ (in & 1) * 4) * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool there = !p->page_size || (id[half] >= 0 && id[half] < p->n_pages);
        int32_t left = last_visible - (key + half * HALF) - in;
        const unsigned char *source =
            item->keys + id[half] * p->key_batch_stride +
            (int64_t)(key + half * HALF + in - page[half] * p->page_size) * (D * 2) + chunk * 16;
#pragma unroll(ALIGNED ? HALF : 2) /* more at a time would spill registers */
        for (int r = 0; r < HALF; r += ROWS_AT_ONCE)
            if (there && r < left) {
                if (ALIGNED)
                    copy_async_16(to + (half * HALF + r) * D * 2, source + r * D * 2);
                else
                    store_shared_16(to + (half * HALF + r) * D * 2,
                                    load_global_halves(source + r * D * 2));
            }
    }
    if (ALIGNED)
        mbarrier_arrive_after_copies(full);
    else
        mbarrier_arrive(full);
}

/* ---- queries and weights: global memory to registers ----------------------------------------- */

/* Head c of group g, counting all queries' heads: query and head within the item. */
static __device__ __forceinline__ void head_place(const struct plan *plan, int group, int c,
                                                  int *query, int *head) {
    if (plan->split) {
        *query = group / 2;
        *head = group % 2 * GROUP + c;
    } else {
        c += group * GROUP;
        *query = c >> plan->head_shift;
        *head = c & ((1 << plan->head_shift) - 1);
    }
}

/* Octet o of a group is its heads 8o .. 8o + 7; thread lane / 4 has the one of that number.
 * The instruction wants words of two heads in four adjacent registers, a 16-byte load leaves words
 * of one head there. Left to itself the compiler keeps the latter and moves words for every
 * product (487 moves beside 128 products); an operation on each that it cannot see through makes
 * it settle them once. */
template <int D, bool ALIGNED>
static __device__ __forceinline__ void load_heads(const struct slab *s, const struct plan *plan,
                                                  const struct item *item, int group,
                                                  uint32_t (&a)[HEAD_TILES][D / 16][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        int query, head;
        head_place(plan, group, 8 * o + lane / 4, &query, &head);
        bool there = query < item->rows && head < s->p.n_heads;
        const unsigned char *source =
            item->query + (query * s->p.n_heads + head) * (D * 2) + lane % 4 * 16;
#pragma unroll
        for (int t = 0; t < D / 32; t++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (there)
                x = ALIGNED ? __ldg((const uint4 *)(source + t * 64))
                            : load_global_halves(source + t * 64);
            a[o / 2][2 * t][o % 2] = x.x ^ plan->zero;
            a[o / 2][2 * t][2 + o % 2] = x.y ^ plan->zero;
            a[o / 2][2 * t + 1][o % 2] = x.z ^ plan->zero;
            a[o / 2][2 * t + 1][2 + o % 2] = x.w ^ plan->zero;
        }
    }
}

static __device__ __forceinline__ float load_weight(const unsigned char *weights, int i,
                                                    int dtype) {
    if (dtype == DTYPE_F32)
        return ((const float *)weights)[i];
    if (dtype == DTYPE_FP16)
        return __half2float(((const __half *)weights)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)weights)[i]);
}

/* The weights of a thread's heads, and which of them exist: bit o for octet o. */
static __device__ __forceinline__ uint32_t load_weights(const struct slab *s,
                                                        const struct plan *plan,
                                                        const struct item *item, int group,
                                                        float (&w)[OCTETS]) {
    uint32_t heads = 0;
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        int query, head;
        head_place(plan, group, 8 * o + threadIdx.x % 32 / 4, &query, &head);
        w[o] = 0;
        if (head < s->p.n_heads) {
            heads |= 1u << o;
            if (query < item->rows)
                w[o] = load_weight(item->weights, query * s->p.n_heads + head, s->p.weights_dtype);
        }
    }
    return heads;
}

#endif
