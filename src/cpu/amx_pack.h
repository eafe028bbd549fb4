/* SPDX-License-Identifier: Apache-2.0
 *
 * Packing for AMX: 16 rows of a query, of one step each, become a tile.
 */
#ifndef LIDX_AMX_PACK_H
#define LIDX_AMX_PACK_H

#include "amx.h"

/* 16 x 16 words of 32 bits: four rounds, each doubling the rows that a register holds. */
INLINE void transpose(pairs out[LANES], const pairs in[LANES]) {
    pairs a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        pairs even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        pairs odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xDD);
        pairs even2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        pairs odd2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xDD);
        out[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xDD);
        out[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xDD);
    }
}

INLINE void store_tile(void *tile, const pairs rows[LANES]) {
    pairs columns[LANES];
    transpose(columns, rows);
    for (int p = 0; p < LANES; p++)
        _mm512_store_si512((pairs *)tile + p, columns[p]);
}

static inline void pack_weights(float *weights, const struct query_row *row) {
    int padded = head_tiles(row->n_heads) * LANES;
    for (int h = 0; h < padded; h++)
        weights[h] = h < row->n_heads ? row->weights[h] : 0;
}

#endif
