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

INLINE void multiply(int c, int step) {
    switch (c * 4 + step) {
    case 0:
        _tile_dpbf16ps(0, 2, 6);
        break;
    case 1:
        _tile_dpbf16ps(0, 3, 7);
        break;
    case 2:
        _tile_dpbf16ps(0, 4, 6);
        break;
    case 3:
        _tile_dpbf16ps(0, 5, 7);
        break;
    case 4:
        _tile_dpbf16ps(1, 2, 6);
        break;
    case 5:
        _tile_dpbf16ps(1, 3, 7);
        break;
    case 6:
        _tile_dpbf16ps(1, 4, 6);
        break;
    default:
        _tile_dpbf16ps(1, 5, 7);
    }
}

/* The products of the high parts of keys with both parts of the query, or of the low ones. */
INLINE void multiply_parts(int c, int step, int low) {
    switch (c * 4 + step % 2 * 2 + low) {
    case 0:
        _tile_dpbf16ps(0, 2, 6);
        _tile_dpbf16ps(0, 2, 7);
        break;
    case 1:
        _tile_dpbf16ps(0, 3, 6);
        _tile_dpbf16ps(0, 3, 7);
        break;
    case 2:
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 4, 7);
        break;
    case 3:
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(0, 5, 7);
        break;
    case 4:
        _tile_dpbf16ps(1, 2, 6);
        _tile_dpbf16ps(1, 2, 7);
        break;
    case 5:
        _tile_dpbf16ps(1, 3, 6);
        _tile_dpbf16ps(1, 3, 7);
        break;
    case 6:
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        break;
    default:
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
    }
}

/* Memory that C code wrote and a tile load reads next: the load says nothing of it to gcc. */
INLINE void publish(const void *memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

#endif
