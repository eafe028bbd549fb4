/* SPDX-License-Identifier: Apache-2.0
 *
 * AMX: 16 keys in place against 16 heads at a time, in bf16 tiles. amx.h says what lies where.
 */
#if defined(__x86_64__)

#include "amx.h"

#include "amx_tiles.h"
#include "features.h"

/* Eight tiles of 16 rows of 64 bytes, as LDTILECFG reads them. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

TARGET static void enter(void) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    publish(&config);
    _tile_loadconfig(&config);
}

TARGET static void leave(void) {
    _tile_release();
}

const struct kernel lidx_kernel_amx = {
    .name = "amx",
    .needs = FEATURE_AMX_BF16 | FEATURE_AVX512,
    .enter = enter,
    .leave = leave,
    .topk = &lidx_topk_avx512,
    .path = {[DTYPE_BF16] = {lidx_amx_packed_size_bf16, lidx_amx_pack_bf16, lidx_amx_score_bf16},
             [DTYPE_FP16] = {lidx_amx_packed_size_fp16, lidx_amx_pack_fp16, lidx_amx_score_fp16}},
    .score_two = {[DTYPE_BF16] = lidx_amx_score_two_bf16},
    .shares_keys = {[DTYPE_BF16] = 1},
    /* A call finds its queries gone from L1 and the tile unit asleep; L2 has 2 MiB. */
    .tile_keys = 2880,
    .products_per_ns = 800,
};

#endif
