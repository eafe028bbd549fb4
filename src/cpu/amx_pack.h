/* SPDX-License-Identifier: Apache-2.0
 *
 * Packing for AMX: 16 rows of a query, of one step each, become a tile by lidx_avx512_transpose.
 */
#ifndef LIDX_AMX_PACK_H
#define LIDX_AMX_PACK_H

#include "amx.h"

static inline void pack_weights(float *weights, const struct query_row *row) {
    int padded = head_tiles(row->n_heads) * LANES;
    for (int h = 0; h < padded; h++)
        weights[h] = h < row->n_heads ? row->weights[h] : 0;
}

#endif
