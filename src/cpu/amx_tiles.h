/* SPDX-License-Identifier: Apache-2.0
 *
 * The tile instructions, whose register numbers are part of their names:
 *
 *     tmm0, tmm1   accumulators of even and odd slots; row = key, lane = head
 *     tmm2..tmm5   bf16: the block's keys, 32 dimensions each, resident for all its slots
 *                  fp16: high and low parts of the keys, for even and odd steps
 *     tmm6, tmm7   packed query; bf16: even and odd steps, fp16: high and low parts
 */
#ifndef LIDX_AMX_TILES_H
#define LIDX_AMX_TILES_H

#include "amx.h"

INLINE void zero_sums(int c) {
    if (c == 0)
        _tile_zero(0);
    else
        _tile_zero(1);
}

INLINE void store_sums(int c, float *tile) {
    if (c == 0)
        _tile_stored(0, tile, 64);
    else
        _tile_stored(1, tile, 64);
}

INLINE void load_keys(int step, const void *keys, int64_t stride) {
    switch (step) {
    case 0:
        _tile_loadd(2, keys, stride);
        break;
    case 1:
        _tile_loadd(3, keys, stride);
        break;
    case 2:
        _tile_loadd(4, keys, stride);
        break;
    default:
        _tile_loadd(5, keys, stride);
    }
}

INLINE void load_query(int which, const void *tile) {
    if (which == 0)
        _tile_loadd(6, tile, 64);
    else
        _tile_loadd(7, tile, 64);
}

/* Adds to accumulator c the products of tile 2 + keys with tile 6 + query. */
INLINE void multiply(int c, int keys, int query) {
#define PRODUCT(c, keys, query)                                                                    \
    case c * 64 + keys * 8 + query:                                                                \
        _tile_dpbf16ps(c, keys, query);                                                            \
        break
    switch (c * 64 + (2 + keys) * 8 + 6 + query) {
        PRODUCT(0, 2, 6);
        PRODUCT(0, 2, 7);
        PRODUCT(0, 3, 6);
        PRODUCT(0, 3, 7);
        PRODUCT(0, 4, 6);
        PRODUCT(0, 4, 7);
        PRODUCT(0, 5, 6);
        PRODUCT(0, 5, 7);
        PRODUCT(1, 2, 6);
        PRODUCT(1, 2, 7);
        PRODUCT(1, 3, 6);
        PRODUCT(1, 3, 7);
        PRODUCT(1, 4, 6);
        PRODUCT(1, 4, 7);
        PRODUCT(1, 5, 6);
        PRODUCT(1, 5, 7);
    }
#undef PRODUCT
}

/* Memory that C code wrote and a tile load reads next: the load says nothing of it to gcc. */
INLINE void publish(const void *memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

#endif
