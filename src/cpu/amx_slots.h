/* SPDX-License-Identifier: Apache-2.0
 *
 * The pipeline. A slot is one head tile of one key block: 16 keys x 16 heads of dot products in one
 * accumulator tile.
 *
 * A tile reaches the vector registers only through memory, so four slots are under way at once:
 * slot s is multiplied, slot s-1 is stored to a ring of four tiles before the sums begin anew, and
 * slot s-3 is read back, sent through ReLU, weighted and added to 16 running sums (zmm, one per
 * key). Read two slots later, a tile has left the core's buffers. The rows of a block's last head
 * tile complete the sums of its keys, and a tree that turns 16 sums into 16 scores grows as they
 * come. All this is dealt out between the tile instructions: loads and vector work in bursts leave
 * the tile unit waiting, and back to back its instructions run slower on a core whose tile unit has
 * another user.
 */
#ifndef LIDX_AMX_SLOTS_H
#define LIDX_AMX_SLOTS_H

#include "amx_parts.h"

enum {
    NEAR_BLOCKS = 1, /* how far ahead of the block in work lines are fetched into L1 ... */
    FAR_BLOCKS = 24, /* ... and into L2 */
    LAG = 3,         /* slots from the product to the vector work */
};

/* ---- vector work ----------------------------------------------------------------------------- */

/* One key's 16 heads into its running sum, `begin` where they are its first. max with the dot
 * product second keeps a NaN; the mask keeps out what inf * 0 makes of heads that are not there.
 * The FMA is written out because gcc would move all of them behind the last tile instruction, and
 * spill. */
INLINE void reduce_row(__m512 *sum, const float *tile, int row, __m512 weight, __mmask16 heads,
                       int begin) {
    __m512 dot = _mm512_load_ps(tile + row * LANES);
    __m512 relu = _mm512_maskz_max_ps(heads, _mm512_setzero_ps(), dot);
    if (begin) {
        __asm__ volatile("vfmadd213ps %2, %1, %0"
                         : "+v"(relu)
                         : "v"(weight), "v"(_mm512_setzero_ps()));
        sum[row] = relu;
    } else {
        __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[row]) : "v"(relu), "v"(weight));
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

INLINE __m512 fold_fours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}

INLINE __m512 fold_eights(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

/* Pins a value to its place among the tile instructions. */
INLINE void pin(__m512 *x) {
    __asm__ volatile("" : "+v"(*x));
}

/* Once the sums of keys 0..row are complete: what of the tree that adds their lanes can be done by
 * now. After row 15, lane j of sum[0] is the sum of the lanes of key j. */
INLINE void fold_row(__m512 *sum, int row) {
    if (row % 2 == 1) {
        sum[row - 1] = fold_lanes(sum[row - 1], sum[row]);
        pin(&sum[row - 1]);
    }
    if (row % 4 == 3) {
        sum[row - 3] = fold_pairs(sum[row - 3], sum[row - 1]);
        pin(&sum[row - 3]);
    }
    if (row % 8 == 7) {
        sum[row - 7] = fold_fours(sum[row - 7], sum[row - 3]);
        pin(&sum[row - 7]);
    }
    if (row == 15)
        sum[0] = fold_eights(sum[0], sum[8]);
}

INLINE void fold_rows(__m512 *sum) {
    fold_row(sum, 1);
    fold_row(sum, 3);
    fold_row(sum, 5);
    fold_row(sum, 7);
    fold_row(sum, 9);
    fold_row(sum, 11);
    fold_row(sum, 13);
    fold_row(sum, 15);
}

INLINE void clear_sums(__m512 *s) {
    s[0] = s[1] = s[2] = s[3] = s[4] = s[5] = s[6] = s[7] = _mm512_setzero_ps();
    s[8] = s[9] = s[10] = s[11] = s[12] = s[13] = s[14] = s[15] = _mm512_setzero_ps();
}

/* The scores of a block, folded. Blocks below 0 are what the pipeline holds as it fills. */
INLINE void finish_block(struct pass *p, __m512 scores, struct place back, int fp16) {
    const int block = back.block;
    if (block >= 0) {
        __mmask16 keys = block == p->n_blocks - 1 ? p->keys : 0xFFFF;
        _mm512_mask_store_ps(p->token[back.token].score + block * KEY_BLOCK, keys, scores);
        if (fp16 && p->flags[block % FLAG_RING])
            score_flagged(p, block, p->flags[block % FLAG_RING]);
    }
}

/* ---- slots ----------------------------------------------------------------------------------- */

/* The lines of a block are dealt out to the slots of the block before, and are there when that
 * block's last slot begins to load its keys. */
struct fetch {
    const unsigned char *near, *far; /* first row of this slot; far may be NULL */
    int64_t stride;
    int rows; /* 0 where all lines have been fetched */
};

/* Rows of a block for each slot: 2, 4, 8 or 16. */
INLINE int rows_of_slot(const struct pass *p) {
    int slots = p->n_tiles * p->n_tokens;
    return slots >= 8 ? 2 : slots >= 4 ? 4 : slots == 1 ? 16 : 8;
}

INLINE struct fetch fetch_plan(const struct pass *p, struct place front, int fp16) {
    const int rows = rows_of_slot(p), slots = p->n_tiles * p->n_tokens;
    int s = front.token * p->n_tiles + front.tile + 1, next = s == slots;
    int row = next ? 0 : s * rows;
    int near = front.block + next + NEAR_BLOCKS + fp16, far = front.block + next + FAR_BLOCKS;
    if (near >= p->n_listed)
        near = 0; /* where the next query token's call begins */
    struct fetch f = {NULL, NULL, p->run.row_stride, row < KEY_BLOCK ? rows : 0};
    if (f.rows == 0)
        return f;
    f.near = (const unsigned char *)p->run.block[near] + row * f.stride;
    if (p->run.n_ahead && far < p->n_listed)
        f.far = (const unsigned char *)p->run.block[far] + row * f.stride;
    return f;
}

INLINE void fetch_lines(const struct fetch *f, int step) {
    if (f->rows == 0)
        return;
    const unsigned char *line = f->near + step * 64;
    for (int i = 0; i < f->rows; i += 2, line += 2 * f->stride) {
        _mm_prefetch((const char *)line, _MM_HINT_T0);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T0);
    }
    if (!f->far)
        return;
    line = f->far + step * 64;
    for (int i = 0; i < f->rows; i += 2, line += 2 * f->stride) {
        _mm_prefetch((const char *)line, _MM_HINT_T1);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T1);
    }
}

/* One step of slot s: 4 or 8 rows of slot s - LAG around one product (fp16: four) of slot s. */
struct step {
    const unsigned char *query; /* tiles of the slot */
    const float *tile;          /* of slot s - LAG */
    float *store;               /* where that of slot s - 1 goes */
    __m512 weight;
    __mmask16 heads;
    int begin, fold; /* these are the first rows of their keys, the last */
    int first, last; /* slot of a block */
    struct keys keys, next;
    struct fetch fetch;
    const unsigned char *parts; /* fp16: of the block's keys */
    int block;
    int split_row;  /* fp16: where this slot's share of the next block begins, */
    int split_rows; /* rows in each step, or 0 */
};

INLINE void reduce_rows(__m512 *sum, const struct step *t, int row, int count) {
    reduce_row(sum, t->tile, row, t->weight, t->heads, t->begin);
    reduce_row(sum, t->tile, row + 1, t->weight, t->heads, t->begin);
    if (t->fold)
        fold_row(sum, row + 1);
    if (count == 4) {
        reduce_row(sum, t->tile, row + 2, t->weight, t->heads, t->begin);
        reduce_row(sum, t->tile, row + 3, t->weight, t->heads, t->begin);
        if (t->fold)
            fold_row(sum, row + 3);
    }
}

/* The keys of a block replace those of the one before as these have been used for the last time:
 * one tile in two steps of the last slot of the one and of the first slot of the other. */
INLINE void replace_keys(const struct step *t, int step, int steps) {
    const int now = steps / 2 + step / 2, next = step / 2;
    if (step % 2 == 0 && t->first)
        load_keys(now, t->keys.row + now * 64, t->keys.stride);
    if (step % 2 == 0 && t->last)
        load_keys(next, t->next.row + next * 64, t->next.stride);
}

/* fp16: one part of the keys by both parts of the query. */
INLINE void multiply_parts(int keys) {
    multiply(keys, 0);
    multiply(keys, 1);
}

INLINE void run_step(struct pass *p, __m512 *sum, const struct step *t, int step, int steps,
                     int fp16) {
    const int rows = 8 / steps; /* on either side of the product */
    if (fp16) {
        const unsigned char *keys = t->parts + step * 2 * TILE_BYTES;
        load_query(0, t->query + step * 2 * TILE_BYTES);
        load_query(1, t->query + (step * 2 + 1) * TILE_BYTES);
        load_keys(0, keys, 64);
        load_keys(1, keys + TILE_BYTES, 64);
    } else {
        load_query(0, t->query + step * TILE_BYTES);
    }
    reduce_rows(sum, t, step * 2 * rows, rows);
    if (fp16)
        multiply_parts(0);
    else
        multiply(step, 0);
    reduce_rows(sum, t, step * 2 * rows + rows, rows);
    if (!fp16)
        replace_keys(t, step, steps);
    fetch_lines(&t->fetch, step);
    if (fp16) {
        for (int i = 0; i < t->split_rows; i++)
            split_row(p, t->block + 1, t->split_row + step * t->split_rows + i, steps);
        multiply_parts(1);
        publish(p->scratch);
    }
}

/* The rows of the next block are split as its lines are fetched, by the vector units while the tile
 * unit is busy. */
INLINE void plan_split(struct pass *p, struct step *t, struct place front, int steps) {
    const int rows = p->n_tiles >= 4 ? 4 : rows_of_slot(p);
    t->block = front.block;
    t->parts = p->scratch + front.block % 2 * SPLIT_BYTES;
    t->split_row = front.tile * rows;
    t->split_rows = 0;
    if (t->split_row < KEY_BLOCK && front.block + 1 < p->n_blocks)
        t->split_rows = rows / steps;
    if (front.tile == 0)
        p->flags[(front.block + 1) % FLAG_RING] = 0;
}

/* Addresses derived from it are computed where they are used. gcc would find them all before the
 * loop, one for each query tile, and keep them on the stack: a load more for each product. */
INLINE void pin_address(const unsigned char **address) {
    __asm__ volatile("" : "+r"(*address));
}

/* Where slot number s lies in the ring. */
INLINE float *ring_tile(const struct pass *p, int s) {
    return p->ring + (s + RING) % RING * (LANES * LANES);
}

/* Slot number s modulo RING; `back` is slot s - LAG. `known` says that head tiles are known to the
 * compiler. */
INLINE void slot(struct pass *p, __m512 *sum, int s, struct place front, struct place back,
                 int known, int steps, int fp16) {
    const int slot_bytes = steps * (fp16 ? 2 : 1) * TILE_BYTES;
    const int done = back.tile == p->n_tiles - 1;
    const unsigned char *query = p->token[front.token].tiles;
    struct step t;
    pin_address(&query);
    t.query = query + (int64_t)front.tile * slot_bytes;
    t.tile = ring_tile(p, s - LAG);
    t.store = ring_tile(p, s - 1);
    t.weight = _mm512_load_ps(p->token[back.token].weights + back.tile * LANES);
    t.heads = heads_of(p, back.tile);
    t.begin = known && back.tile == 0;
    t.fold = known && done;
    t.first = front.tile == 0 && front.token == 0;
    t.last = front.tile == p->n_tiles - 1 && front.token == p->n_tokens - 1 &&
             front.block + 1 < p->n_blocks;
    t.keys = keys_of(p, front.block);
    t.next = keys_of(p, front.block + t.last);
    t.fetch = fetch_plan(p, front, fp16);
    if (fp16)
        plan_split(p, &t, front, steps);
    store_sums(t.store);
    zero_sums();
    run_step(p, sum, &t, 0, steps, fp16);
    run_step(p, sum, &t, 1, steps, fp16);
    if (steps == 4) {
        run_step(p, sum, &t, 2, steps, fp16);
        run_step(p, sum, &t, 3, steps, fp16);
    }
    if (done) {
        if (!known)
            fold_rows(sum);
        finish_block(p, sum[0], back, fp16);
        if (!known)
            clear_sums(sum);
    }
}

/* What remains of slot number s, whose tile is in the ring. */
INLINE void drain(struct pass *p, __m512 *sum, int s, struct place back, int known, int fp16) {
    struct step t;
    t.tile = ring_tile(p, s);
    t.weight = _mm512_load_ps(p->token[back.token].weights + back.tile * LANES);
    t.heads = heads_of(p, back.tile);
    t.begin = known && back.tile == 0;
    t.fold = 0;
    reduce_rows(sum, &t, 0, 4);
    reduce_rows(sum, &t, 4, 4);
    reduce_rows(sum, &t, 8, 4);
    reduce_rows(sum, &t, 12, 4);
    if (back.tile == p->n_tiles - 1) {
        fold_rows(sum);
        finish_block(p, sum[0], back, fp16);
        clear_sums(sum);
    }
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
    struct place front = {0, 0, 0}, back = {0, -((LAG + n_tiles - 1) / n_tiles), 0};
    back.tile = -LAG - back.block * n_tiles;
    clear_sums(sum);
    for (int64_t s = 0; s < n_slots; s++) {
        slot(p, sum, (int)(s % RING), front, back, 0, steps, fp16);
        advance(&front, n_tiles);
        advance(&back, n_tiles);
    }
    store_sums(ring_tile(p, (int)((n_slots - 1) % RING)));
    for (int64_t s = n_slots - LAG; s < n_slots; s++) {
        drain(p, sum, (int)((s + RING) % RING), back, 0, fp16);
        advance(&back, n_tiles);
    }
}

/* The place LAG slots before slot s of a block with four head tiles. */
INLINE struct place place_behind(int s, int block, int n_tokens) {
    int behind = s - LAG < 0 ? s - LAG + 4 * n_tokens : s - LAG;
    return (struct place){behind % 4, s - LAG < 0 ? block - 1 : block, behind / 4};
}

INLINE void run_slots_of_token(struct pass *p, __m512 *sum, int block, int token, int n_tokens,
                               int steps, int fp16) {
    const int s = token * 4;
    slot(p, sum, 0, (struct place){0, block, token}, place_behind(s, block, n_tokens), 1, steps,
         fp16);
    slot(p, sum, 1, (struct place){1, block, token}, place_behind(s + 1, block, n_tokens), 1, steps,
         fp16);
    slot(p, sum, 2, (struct place){2, block, token}, place_behind(s + 2, block, n_tokens), 1, steps,
         fp16);
    slot(p, sum, 3, (struct place){3, block, token}, place_behind(s + 3, block, n_tokens), 1, steps,
         fp16);
}

/* The same for four head tiles, 49 to 64 heads, with all that depends on the head tile known to
 * the compiler, and for one query token or two, whose slots take turns over the keys that
 * tmm2..tmm5 hold. */
INLINE void run_slots_of_4(struct pass *p, int n_tokens, int steps, int fp16) {
    __m512 sum[KEY_BLOCK];
    const int last = n_tokens - 1;
    int block = 0;
    p->n_tiles = 4;
    p->n_tokens = n_tokens;
    clear_sums(sum);
    for (; block < p->n_blocks; block++) {
        run_slots_of_token(p, sum, block, 0, n_tokens, steps, fp16);
        if (n_tokens == 2)
            run_slots_of_token(p, sum, block, 1, n_tokens, steps, fp16);
    }
    store_sums(ring_tile(p, 3));
    drain(p, sum, 1, (struct place){1, block - 1, last}, 1, fp16);
    drain(p, sum, 2, (struct place){2, block - 1, last}, 1, fp16);
    drain(p, sum, 3, (struct place){3, block - 1, last}, 1, fp16);
}

#endif
