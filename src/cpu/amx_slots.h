/* SPDX-License-Identifier: Apache-2.0
 *
 * The pipeline. A slot is one head tile of one key block: 16 keys x 16 heads of dot products in one
 * accumulator tile.
 *
 * A tile reaches the vector registers only through memory, so three slots are under way at once:
 * slot s is multiplied, slot s-1 is stored to a ring of two tiles, and slot s-2 is read back, sent
 * through ReLU, weighted and added to 16 running sums (zmm, one per key). Stored a slot late, a
 * tile never waits for its product. The vector work is dealt out between the tile instructions:
 * back to back these run slower on a core whose tile unit has another user. After the last head
 * tile of a block a transposing tree turns the 16 sums into 16 scores.
 */
#ifndef LIDX_AMX_SLOTS_H
#define LIDX_AMX_SLOTS_H

#include "amx_parts.h"

enum {
    NEAR_BLOCKS = 1, /* how far ahead of the block in work lines are fetched into L1 ... */
    FAR_BLOCKS = 24, /* ... and into L2 */
};

/* ---- vector work ----------------------------------------------------------------------------- */

/* One key's 16 heads into its running sum. max with the dot product second keeps a NaN; the mask
 * keeps out what inf * 0 makes of heads that are not there. The FMA is written out because gcc
 * would move all of them behind the last tile instruction, and spill. */
INLINE void reduce_row(__m512 *sum, const float *tile, int row, __m512 weight, __mmask16 heads) {
    __m512 dot = _mm512_load_ps(tile + row * LANES);
    __m512 relu = _mm512_maskz_max_ps(heads, _mm512_setzero_ps(), dot);
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[row]) : "v"(relu), "v"(weight));
}

INLINE void reduce_rows(__m512 *sum, const float *tile, int row, int count, __m512 weight,
                        __mmask16 heads) {
    reduce_row(sum, tile, row, weight, heads);
    reduce_row(sum, tile, row + 1, weight, heads);
    if (count == 4) {
        reduce_row(sum, tile, row + 2, weight, heads);
        reduce_row(sum, tile, row + 3, weight, heads);
    }
}

/* Adds pairs of lanes of two vectors and leaves them in one; the same for every key, so that a
 * score does not depend on its place in the block. */
INLINE __m512 fold_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

INLINE __m512 fold_pairs(__m512 a, __m512 b) {
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

INLINE __m512 fold_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    return fold_pairs(fold_lanes(a, b), fold_lanes(c, d));
}

/* Lane j of the result is the sum of the lanes of s[j]. */
INLINE __m512 sum_lanes(const __m512 *s) {
    __m512 a = fold_four(s[0], s[1], s[2], s[3]);
    __m512 b = fold_four(s[4], s[5], s[6], s[7]);
    __m512 c = fold_four(s[8], s[9], s[10], s[11]);
    __m512 d = fold_four(s[12], s[13], s[14], s[15]);
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

INLINE void clear_sums(__m512 *s) {
    s[0] = s[1] = s[2] = s[3] = s[4] = s[5] = s[6] = s[7] = _mm512_setzero_ps();
    s[8] = s[9] = s[10] = s[11] = s[12] = s[13] = s[14] = s[15] = _mm512_setzero_ps();
}

/* After the last head tile of a block. Blocks below 0 are what the pipeline holds as it fills. */
INLINE void finish_block(struct pass *p, __m512 *sum, struct place back, int fp16) {
    const int block = back.block;
    if (block >= 0) {
        __mmask16 keys = block == p->n_blocks - 1 ? p->keys : 0xFFFF;
        _mm512_mask_store_ps(p->token[back.token].score + block * KEY_BLOCK, keys, sum_lanes(sum));
        if (fp16 && p->flags[block % FLAG_RING])
            score_flagged(p, block, p->flags[block % FLAG_RING]);
    }
    clear_sums(sum);
}

/* ---- slots ----------------------------------------------------------------------------------- */

/* The lines of a block are fetched four rows at a time, dealt out to the slots of the block. */
struct fetch {
    const unsigned char *near, *far; /* first row of this slot; far may be NULL */
    int64_t stride;
    int groups;
};

INLINE int groups_of(int n_tiles) {
    return n_tiles >= 4 ? 1 : n_tiles == 1 ? 4 : 2;
}

INLINE struct fetch fetch_plan(const struct pass *p, struct place front, int fp16) {
    int per_slot = groups_of(p->n_tiles);
    int first = front.tile * per_slot;
    int near = front.block + NEAR_BLOCKS + fp16, far = front.block + FAR_BLOCKS;
    if (near >= p->n_listed)
        near = 0; /* where the next query token's call begins */
    struct fetch f = {NULL, NULL, p->run->row_stride, per_slot};
    if (first >= 4 || front.token > 0)
        return f;
    f.near = (const unsigned char *)p->run->block[near] + first * 4 * f.stride;
    if (p->run->n_ahead && far < p->n_listed)
        f.far = (const unsigned char *)p->run->block[far] + first * 4 * f.stride;
    return f;
}

INLINE void fetch_lines(const struct fetch *f, int step) {
    if (!f->near)
        return;
    for (int i = 0; i < f->groups * 4; i += 4) {
        const unsigned char *line = f->near + i * f->stride + step * 64;
        _mm_prefetch((const char *)line, _MM_HINT_T0);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T0);
        _mm_prefetch((const char *)(line + 2 * f->stride), _MM_HINT_T0);
        _mm_prefetch((const char *)(line + 3 * f->stride), _MM_HINT_T0);
    }
    if (!f->far)
        return;
    for (int i = 0; i < f->groups * 4; i += 4) {
        const unsigned char *line = f->far + i * f->stride + step * 64;
        _mm_prefetch((const char *)line, _MM_HINT_T1);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T1);
        _mm_prefetch((const char *)(line + 2 * f->stride), _MM_HINT_T1);
        _mm_prefetch((const char *)(line + 3 * f->stride), _MM_HINT_T1);
    }
}

/* One step of slot s: 4 or 8 rows of slot s-2 around one product (fp16: four) of slot s. */
struct step {
    const unsigned char *query; /* tiles of the slot */
    const float *tile;          /* of slot s-2 */
    __m512 weight;
    __mmask16 heads;
    int reload; /* take the next block's keys once this block is done with the register */
    struct keys next;
    struct fetch fetch;
    const unsigned char *parts; /* fp16: of the block's keys */
    int block;
    int split_row;  /* fp16: where this slot's share of the next block begins, */
    int split_rows; /* rows in each step, or 0 */
};

INLINE void run_step(struct pass *p, __m512 *sum, const struct step *t, int c, int step, int steps,
                     int fp16) {
    const int rows = 8 / steps; /* on either side of the product */
    if (fp16) {
        const unsigned char *keys = t->parts + step * 2 * TILE_BYTES;
        load_query(0, t->query + step * 2 * TILE_BYTES);
        load_query(1, t->query + (step * 2 + 1) * TILE_BYTES);
        load_keys(step % 2 * 2, keys, 64);
        load_keys(step % 2 * 2 + 1, keys + TILE_BYTES, 64);
    } else {
        load_query(step % 2, t->query + step * TILE_BYTES);
    }
    reduce_rows(sum, t->tile, step * 2 * rows, rows, t->weight, t->heads);
    if (fp16)
        multiply_parts(c, step, 0);
    else
        multiply(c, step);
    if (step == 0)
        store_sums(!c, p->ring + !c * LANES * LANES);
    reduce_rows(sum, t->tile, step * 2 * rows + rows, rows, t->weight, t->heads);
    if (t->reload)
        load_keys(step, t->next.row + step * 64, t->next.stride);
    fetch_lines(&t->fetch, step);
    if (fp16) {
        for (int i = 0; i < t->split_rows; i++)
            split_row(p, t->block + 1, t->split_row + step * t->split_rows + i, steps);
        multiply_parts(c, step, 1);
        publish(p->scratch);
    }
}

/* The head tile and block of slots s and s-2. */
struct places {
    struct place front, back;
};

/* The rows of the next block are split four at a time like its lines are fetched, by the vector
 * units while the tile unit is busy. */
INLINE void plan_split(struct pass *p, struct step *t, struct place front, int steps) {
    int groups = groups_of(p->n_tiles);
    t->block = front.block;
    t->parts = p->scratch + front.block % 2 * SPLIT_BYTES;
    t->split_row = front.tile * groups * 4;
    t->split_rows = 0;
    if (t->split_row < KEY_BLOCK && front.block + 1 < p->n_blocks)
        t->split_rows = groups * 4 / steps;
    if (front.tile == 0)
        p->flags[(front.block + 1) % FLAG_RING] = 0;
}

/* Slot s with accumulator c = s % 2; slot s-2 used the same one and the same place in the ring. */
INLINE void slot(struct pass *p, __m512 *sum, int c, struct places at, int steps, int fp16) {
    const int slot_bytes = steps * (fp16 ? 2 : 1) * TILE_BYTES;
    struct step t;
    t.query = p->token[at.front.token].tiles + (int64_t)at.front.tile * slot_bytes;
    t.tile = p->ring + c * LANES * LANES;
    t.weight = _mm512_load_ps(p->token[at.back.token].weights + at.back.tile * LANES);
    t.heads = heads_of(p, at.back.tile);
    t.reload = !fp16 && at.front.tile == p->n_tiles - 1 && at.front.token == p->n_tokens - 1 &&
               at.front.block + 1 < p->n_blocks;
    t.next = keys_of(p, at.front.block + t.reload);
    t.fetch = fetch_plan(p, at.front, fp16);
    if (fp16)
        plan_split(p, &t, at.front, steps);
    zero_sums(c);
    run_step(p, sum, &t, c, 0, steps, fp16);
    run_step(p, sum, &t, c, 1, steps, fp16);
    if (steps == 4) {
        run_step(p, sum, &t, c, 2, steps, fp16);
        run_step(p, sum, &t, c, 3, steps, fp16);
    }
    if (at.back.tile == p->n_tiles - 1)
        finish_block(p, sum, at.back, fp16);
}

/* What remains of a slot whose tile is in the ring. */
INLINE void drain(struct pass *p, __m512 *sum, int c, struct place back, int fp16) {
    const float *tile = p->ring + c * LANES * LANES;
    const __m512 weight = _mm512_load_ps(p->token[back.token].weights + back.tile * LANES);
    const __mmask16 heads = heads_of(p, back.tile);
    reduce_rows(sum, tile, 0, 4, weight, heads);
    reduce_rows(sum, tile, 4, 4, weight, heads);
    reduce_rows(sum, tile, 8, 4, weight, heads);
    reduce_rows(sum, tile, 12, 4, weight, heads);
    if (back.tile == p->n_tiles - 1)
        finish_block(p, sum, back, fp16);
}

INLINE void advance(struct place *place, int n_tiles) {
    if (++place->tile == n_tiles) {
        place->tile = 0;
        place->block++;
    }
}

/* All slots, for any number of head tiles. */
INLINE void run_slots(struct pass *p, int steps, int fp16) {
    __m512 sum[KEY_BLOCK];
    const int n_tiles = p->n_tiles;
    int64_t n_slots = (int64_t)p->n_blocks * n_tiles;
    struct places at = {{0, 0, 0}, {n_tiles == 1 ? 0 : n_tiles - 2, n_tiles == 1 ? -2 : -1, 0}};
    clear_sums(sum);
    for (int64_t s = 0; s < n_slots; s++) {
        if (s % 2 == 0)
            slot(p, sum, 0, at, steps, fp16);
        else
            slot(p, sum, 1, at, steps, fp16);
        advance(&at.front, n_tiles);
        advance(&at.back, n_tiles);
    }
    if (n_slots % 2) {
        store_sums(0, p->ring);
        drain(p, sum, 1, at.back, fp16);
        advance(&at.back, n_tiles);
        drain(p, sum, 0, at.back, fp16);
    } else {
        store_sums(1, p->ring + LANES * LANES);
        drain(p, sum, 0, at.back, fp16);
        advance(&at.back, n_tiles);
        drain(p, sum, 1, at.back, fp16);
    }
}

/* The same for four head tiles, 49 to 64 heads, with all that depends on the head tile known to
 * the compiler. */
INLINE void run_slots_of_4(struct pass *p, int steps, int fp16) {
    __m512 sum[KEY_BLOCK];
    int block = 0;
    p->n_tiles = 4;
    p->n_tokens = 1;
    clear_sums(sum);
    for (; block < p->n_blocks; block++) {
        slot(p, sum, 0, (struct places){{0, block, 0}, {2, block - 1, 0}}, steps, fp16);
        slot(p, sum, 1, (struct places){{1, block, 0}, {3, block - 1, 0}}, steps, fp16);
        slot(p, sum, 0, (struct places){{2, block, 0}, {0, block, 0}}, steps, fp16);
        slot(p, sum, 1, (struct places){{3, block, 0}, {1, block, 0}}, steps, fp16);
    }
    store_sums(1, p->ring + LANES * LANES);
    drain(p, sum, 0, (struct place){2, block - 1, 0}, fp16);
    drain(p, sum, 1, (struct place){3, block - 1, 0}, fp16);
}

/* The same for two query tokens, whose slots take turns over the keys that tmm2..tmm5 hold. */
INLINE void run_slots_of_4_twice(struct pass *p, int steps) {
    __m512 sum[KEY_BLOCK];
    int block = 0;
    p->n_tiles = 4;
    p->n_tokens = 2;
    clear_sums(sum);
    for (; block < p->n_blocks; block++) {
        slot(p, sum, 0, (struct places){{0, block, 0}, {2, block - 1, 1}}, steps, 0);
        slot(p, sum, 1, (struct places){{1, block, 0}, {3, block - 1, 1}}, steps, 0);
        slot(p, sum, 0, (struct places){{2, block, 0}, {0, block, 0}}, steps, 0);
        slot(p, sum, 1, (struct places){{3, block, 0}, {1, block, 0}}, steps, 0);
        slot(p, sum, 0, (struct places){{0, block, 1}, {2, block, 0}}, steps, 0);
        slot(p, sum, 1, (struct places){{1, block, 1}, {3, block, 0}}, steps, 0);
        slot(p, sum, 0, (struct places){{2, block, 1}, {0, block, 1}}, steps, 0);
        slot(p, sum, 1, (struct places){{3, block, 1}, {1, block, 1}}, steps, 0);
    }
    store_sums(1, p->ring + LANES * LANES);
    drain(p, sum, 0, (struct place){2, block - 1, 1}, 0);
    drain(p, sum, 1, (struct place){3, block - 1, 1}, 0);
}

#endif
