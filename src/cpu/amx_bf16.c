/* SPDX-License-Identifier: Apache-2.0
 *
 * AMX, bf16: natively. TDPBF16PS reads bf16 denormals (below 1.2e-38) as zero and flushes results
 * as small.
 */
#if defined(__x86_64__)

#include "amx_slots.h"

size_t lidx_amx_packed_size_bf16(int n_heads, int head_dim) {
    return tiles_bytes(n_heads, head_dim, DTYPE_BF16) +
           (size_t)head_tiles(n_heads) * LANES * sizeof(float);
}

TARGET void lidx_amx_pack_bf16(void *packed, const struct query_row *row) {
    unsigned char *tile = packed;
    size_t head_bytes = (size_t)row->head_dim * 2;
    for (int first = 0; first < row->n_heads; first += LANES) {
        int left = row->n_heads - first;
        for (int dim = 0; dim < row->head_dim; dim += STEP_DIMS) {
            const unsigned char *source = row->query;
            source += (size_t)first * head_bytes + (size_t)dim * 2;
            lidx_avx512_transpose(tile, 64, source, (int64_t)head_bytes,
                                  left < LANES ? left : LANES);
            tile += TILE_BYTES;
        }
    }
    pack_weights((float *)(void *)tile, row);
}

/* Four head tiles of 128 dimensions. Where no line is fetched far ahead the compiler is told so:
 * that loop has a quarter less instructions. */
INLINE void run_four_tiles(struct pass *p, int n_tokens) {
    if (p->run.n_ahead == 0) {
        p->run.n_ahead = 0;
        run_slots_of_4(p, n_tokens, 4, 0);
    } else {
        run_slots_of_4(p, n_tokens, 4, 0);
    }
}

TARGET void lidx_amx_score_bf16(float *score, const void *packed, int n_heads, int head_dim,
                                const struct key_run *run) {
    _Alignas(64) float ring[RING * LANES * LANES];
    _Alignas(64) unsigned char scratch[KEY_BLOCK * MAX_HEAD_DIM * 2];
    struct pass p = pass_of(score, packed, n_heads, head_dim, DTYPE_BF16, run);
    p.ring = ring;
    p.scratch = scratch;
    memset(ring, 0, sizeof ring);
    copy_tail(scratch, run, (size_t)head_dim * 2);
    load_first_keys(&p, head_dim / STEP_DIMS);
    if (head_dim == 64 && p.n_tiles == 4)
        run_slots_of_4(&p, 1, 2, 0);
    else if (head_dim == 64)
        run_slots(&p, 2, 0);
    else if (p.n_tiles == 4)
        run_four_tiles(&p, 1);
    else
        run_slots(&p, 4, 0);
}

TARGET void lidx_amx_score_two_bf16(float *const score[2], const void *const packed[2], int n_heads,
                                    int head_dim, const struct key_run *run) {
    _Alignas(64) float ring[RING * LANES * LANES];
    _Alignas(64) unsigned char scratch[KEY_BLOCK * MAX_HEAD_DIM * 2];
    if (head_tiles(n_heads) != 4 || head_dim != 128) {
        lidx_amx_score_bf16(score[0], packed[0], n_heads, head_dim, run);
        lidx_amx_score_bf16(score[1], packed[1], n_heads, head_dim, run);
        return;
    }
    struct pass p = pass_of(score[0], packed[0], n_heads, head_dim, DTYPE_BF16, run);
    p.token[1] = token_of(score[1], packed[1], n_heads, head_dim, DTYPE_BF16);
    p.ring = ring;
    p.scratch = scratch;
    memset(ring, 0, sizeof ring);
    copy_tail(scratch, run, (size_t)head_dim * 2);
    load_first_keys(&p, 4);
    run_four_tiles(&p, 2);
}

#endif
