/* SPDX-License-Identifier: Apache-2.0
 *
 * The tile instructions, whose register numbers are part of their names:
 *
 *     tmm0         accumulator; row = key, lane = head
 *     tmm2..tmm5   bf16: the block's keys, 32 dimensions each, resident for all its slots
 *                  fp16: tmm2, tmm3, high and low parts of the keys, anew in each step
 *     tmm6, tmm7   packed query; fp16: high and low parts, bf16: tmm6 alone
 *
 * No register is in use that could be spared: where another thread is on the core, tile loads take
 * the longer the more registers have been written since LDTILECFG, up to twice as long in all. Most
 * likely the core renames them, and its threads share the names.
 */
#ifndef LIDX_AMX_TILES_H
#define LIDX_AMX_TILES_H

#include "amx.h"

INLINE void zero_sums(void) {
    _tile_zero(0);
}

INLINE void store_sums(float *tile) {
    _tile_stored(0, tile, 64);
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

INLINE void load_query(int part, const void *tile) {
    if (part == 0)
        _tile_loadd(6, tile, 64);
    else
        _tile_loadd(7, tile, 64);
}

/* Adds the products of tile 2 + keys with tile 6 + query to the sums. */
INLINE void multiply(int keys, int query) {
#define PRODUCT(keys, query)                                                                       \
    case keys * 8 + query:                                                                         \
        _tile_dpbf16ps(0, keys, query);                                                            \
        break
    switch ((2 + keys) * 8 + 6 + query) {
        PRODUCT(2, 6);
        PRODUCT(2, 7);
        PRODUCT(3, 6);
        PRODUCT(3, 7);
        PRODUCT(4, 6);
        PRODUCT(5, 6);
    }
#undef PRODUCT
}

/* Memory that C code wrote and a tile load reads next: the load says nothing of it to gcc. */
INLINE void publish(const void *memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

#endif
