/* SPDX-License-Identifier: Apache-2.0
 *
 * Which CTA scores what. Compiled for the device and, by its test, for the host.
 *
 * An item is one block of up to 2^block_shift query rows of one batch; its work is the tiles of
 * TILE_KEYS keys that its last row sees, none beyond. All items of a slab laid end to end, batch
 * after batch, make one line of tiles, on which each item also takes `charge` places before its
 * first tile for the cost of switching to it. A CTA gets one of `n_cta` equal contiguous runs of
 * that line. Lengths are on the device, so every CTA finds its run by itself: a sum over batches,
 * a closed form within a batch, no metadata and no atomics.
 */
#ifndef LIDX_SCHEDULE_H
#define LIDX_SCHEDULE_H

#include "../visible.h"

enum { TILE_KEYS = 64, TILE_SHIFT = 6 };

/* The part of a slab that lies in one batch. Lengths fit 32 bits, and sums of them here do while
 * they keep 2 * TILE_KEYS from the limit: the Hopper kernel takes no others, and for the portable
 * one they take a row of 8 GiB of scores. */
struct batch_part {
    int32_t query_begin; /* row of the batch's query 0 in the query tensor's batch */
    int32_t key_begin;
    int32_t n_query; /* real lengths */
    int32_t n_key;
    int32_t first; /* queries [first, last) are in the slab */
    int32_t last;
    int32_t n_items;
};

/* What a slab and a kernel instance fix. An item has at most TILE_KEYS rows. */
struct line {
    int64_t row_begin; /* output rows of the slab */
    int64_t row_end;
    int32_t block_shift; /* log2 of the query rows of an item */
    int32_t charge;
};

/* A place on the line, and the next item there. `at` is where that item begins, counted from
 * the beginning of the run (negative for an item that an earlier run has begun). */
struct cursor {
    int32_t batch;
    int32_t item;
    int32_t at;
    int32_t span; /* places of the run */
};

LIDX_INLINE int32_t clamp32(int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
}

/* The 32-bit twin of lidx_segment. */
LIDX_INLINE void segment32(const int32_t *lengths, int packed, int32_t limit, int64_t b,
                           int32_t *begin, int32_t *length) {
    int32_t first = packed && b ? clamp32(lengths[b - 1], 0, limit) : 0;
    int32_t last = lengths ? clamp32(lengths[b], first, limit) : limit;
    *begin = first;
    *length = last - first;
}

/* Batches [*begin, *end): no other has rows in the slab. */
LIDX_INLINE void batches_of_line(const struct problem *p, const struct line *line, int32_t *begin,
                                 int32_t *end) {
    *begin = p->query_packed ? 0 : (int32_t)(line->row_begin / p->n_query);
    *end = (int32_t)(p->query_packed ? p->n_batch : (line->row_end - 1) / p->n_query + 1);
}

LIDX_INLINE struct batch_part part_of_batch(const struct problem *p, const struct line *line,
                                            int64_t b) {
    struct batch_part part;
    segment32(p->query_lengths, p->query_packed, (int32_t)p->n_query, b, &part.query_begin,
              &part.n_query);
    segment32(p->key_lengths, p->key_packed, (int32_t)p->n_key, b, &part.key_begin, &part.n_key);
    int64_t row = p->query_packed ? part.query_begin : b * p->n_query;
    part.first = (int32_t)lidx_clamp(line->row_begin - row, 0, part.n_query);
    part.last = (int32_t)lidx_clamp(line->row_end - row, 0, part.n_query);
    uint32_t rows = (uint32_t)(part.last - part.first), block = 1u << line->block_shift;
    part.n_items = part.n_key > 0 ? (int32_t)((rows + block - 1) >> line->block_shift) : 0;
    return part;
}

/* Keys that query i sees, i < n_query. The 32-bit twin of lidx_visible. */
LIDX_INLINE int32_t part_visible(const struct problem *p, const struct batch_part *part,
                                 int32_t i) {
    if (p->sparse_mode == 0)
        return part->n_key;
    int32_t seen = part->n_key - part->n_query + i + 1;
    return seen > 0 ? seen : 0;
}

LIDX_INLINE int32_t item_tiles(const struct problem *p, const struct line *line,
                               const struct batch_part *part, int32_t item) {
    int32_t last = part->first + ((item + 1) << line->block_shift);
    int32_t seen = part_visible(p, part, (last < part->last ? last : part->last) - 1);
    return (int32_t)(((uint32_t)seen + TILE_KEYS - 1) >> TILE_SHIFT);
}

/* Sum of x >> shift over x in [0, n). */
LIDX_INLINE int64_t sum_of_shifted(int64_t n, int32_t shift) {
    int64_t whole = n >> shift;
    int64_t rest = n & ((1 << shift) - 1);
    return ((whole * (whole - 1) / 2) << shift) + whole * rest;
}

/* The batch's first item that sees a key. */
LIDX_INLINE int32_t first_item(const struct problem *p, const struct line *line,
                               const struct batch_part *part) {
    int64_t blind = (int64_t)part->n_query - part->n_key - part->first;
    if (p->sparse_mode == 0 || blind <= 0)
        return 0;
    blind >>= line->block_shift;
    return blind < part->n_items ? (int32_t)blind : part->n_items;
}

/* Places that the batch's first `items` items take. Causal: with block = 2^block_shift rows, item m
 * sees x = a + block * (m + 1) keys (a last, shorter item is charged as if it were whole, which
 * costs at most a place), so its tiles are (x + 63) >> 6 = ((a + 63) / block + m + 1) >>
 * (6 - block_shift), a sum with a closed form. Items with x <= 0 see nothing and take no place. */
LIDX_INLINE int64_t places_before(const struct problem *p, const struct line *line,
                                  const struct batch_part *part, int32_t items) {
    if (p->sparse_mode == 0) {
        int64_t tiles = ((uint32_t)part->n_key + TILE_KEYS - 1) >> TILE_SHIFT;
        return items * (tiles + line->charge);
    }
    int64_t a = (int64_t)part->n_key - part->n_query + part->first;
    int64_t blind = first_item(p, line, part);
    if (items <= blind)
        return 0;
    int64_t base = ((a + TILE_KEYS - 1) >> line->block_shift) + 1;
    int32_t shift = TILE_SHIFT - line->block_shift;
    return sum_of_shifted(base + items, shift) - sum_of_shifted(base + blind, shift) +
           (items - blind) * line->charge;
}

/* The last item of the batch that begins at or before `place`, which lies in the batch. */
LIDX_INLINE int32_t item_at(const struct problem *p, const struct line *line,
                            const struct batch_part *part, int64_t place) {
    int32_t low = 0, high = part->n_items;
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (places_before(p, line, part, middle) <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Run number `cta` of `n_cta` begins here; the next one begins where it ends. The first ones are
 * a place longer where the line does not divide evenly. */
LIDX_INLINE int64_t run_begin(int64_t total, int32_t cta, int32_t n_cta) {
    int64_t each = total >> 32 ? total / n_cta : (uint32_t)total / (uint32_t)n_cta;
    int32_t longer = (int32_t)(total - each * n_cta);
    return each * cta + (cta < longer ? cta : longer);
}

/* Tiles [*begin, *end) of the cursor's item are in the run. */
LIDX_INLINE void tiles_of_cursor(const struct line *line, const struct cursor *c, int32_t tiles,
                                 int32_t *begin, int32_t *end) {
    int32_t at = c->at + line->charge;
    *begin = at < 0 ? -at : 0;
    *end = tiles < c->span - at ? tiles : c->span - at;
}

/* Places from the cursor's item to the one behind it. */
LIDX_INLINE int32_t item_places(const struct problem *p, const struct line *line,
                                const struct batch_part *part, int32_t item) {
    int32_t seen = part->n_key;
    if (p->sparse_mode != 0)
        seen += part->first - part->n_query + ((item + 1) << line->block_shift);
    return seen > 0 ? ((seen + TILE_KEYS - 1) >> TILE_SHIFT) + line->charge : 0;
}

#endif
