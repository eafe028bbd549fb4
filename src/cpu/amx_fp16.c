/* SPDX-License-Identifier: Apache-2.0
 *
 * AMX, fp16: through the bf16 parts of amx_parts.h. Denormals are not lost, since they are normal
 * numbers in bf16.
 */
#if defined(__x86_64__)

#include "amx_slots.h"

size_t lidx_amx_packed_size_fp16(int n_heads, int head_dim) {
    return tiles_bytes(n_heads, head_dim, DTYPE_FP16) +
           (size_t)head_tiles(n_heads) * LANES * sizeof(float) + sizeof(uint32_t);
}

/* Not 0: the query holds an inf or NaN. */
static uint32_t query_special(const float *behind_weights) {
    uint32_t special;
    memcpy(&special, behind_weights, sizeof special);
    return special;
}

TARGET void lidx_amx_pack_fp16(void *packed, const struct query_row *row) {
    unsigned char *tile = packed;
    size_t head_bytes = (size_t)row->head_dim * 2;
    uint32_t special = 0;
    for (int first = 0; first < row->n_heads; first += LANES) {
        for (int dim = 0; dim < row->head_dim; dim += STEP_DIMS) {
            pairs high[LANES], low[LANES];
            const unsigned char *source = row->query;
            source += (size_t)first * head_bytes + (size_t)dim * 2;
            for (int h = 0; h < LANES; h++) {
                high[h] = low[h] = _mm512_setzero_si512();
                if (first + h < row->n_heads) {
                    split(&high[h], &low[h], source + (size_t)h * head_bytes);
                    special |= not_finite(source + (size_t)h * head_bytes);
                }
            }
            lidx_avx512_transpose(tile, 64, high, 64, LANES);
            lidx_avx512_transpose(tile + TILE_BYTES, 64, low, 64, LANES);
            tile += 2 * TILE_BYTES;
        }
    }
    float *weights = (float *)(void *)tile;
    pack_weights(weights, row);
    memcpy(weights + head_tiles(row->n_heads) * LANES, &special, sizeof special);
}

TARGET void lidx_amx_score_fp16(float *score, const void *packed, int n_heads, int head_dim,
                                const struct key_run *run) {
    _Alignas(64) float ring[RING * LANES * LANES];
    _Alignas(64) unsigned char scratch[2 * SPLIT_BYTES];
    struct pass p = pass_of(score, packed, n_heads, head_dim, DTYPE_FP16, run);
    p.ring = ring;
    p.scratch = scratch;
    if (query_special(p.token[0].weights + p.n_tiles * LANES)) {
        for (int j = 0; j < run->n_keys; j++)
            score[j] = score_special(&p, key_at(run, j));
        return;
    }
    memset(ring, 0, sizeof ring);
    for (int r = 0; r < KEY_BLOCK; r++)
        split_row(&p, 0, r, head_dim / STEP_DIMS);
    publish(scratch);
    if (head_dim == 64)
        run_slots(&p, 2, 1);
    else if (p.n_tiles == 4)
        run_slots_of_4(&p, 1, 4, 1);
    else
        run_slots(&p, 4, 1);
}

#endif
