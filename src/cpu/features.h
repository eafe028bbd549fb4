/* SPDX-License-Identifier: Apache-2.0
 *
 * What this CPU and its operating system allow, asked once.
 */
#ifndef LIDX_FEATURES_H
#define LIDX_FEATURES_H

#include <stdint.h>

enum feature {
    FEATURE_AVX2 = 1 << 0, /* AVX2 and the OS saves ymm */
    FEATURE_FMA = 1 << 1,
    FEATURE_F16C = 1 << 2,
    FEATURE_AVX512 = 1 << 3, /* F, BW, DQ, VL and the OS saves zmm */
    FEATURE_AVX512_BF16 = 1 << 4,
    FEATURE_AMX_BF16 = 1 << 5, /* AMX-TILE, AMX-BF16 and the OS granted tile state */
    FEATURE_NEON = 1 << 6,
    FEATURE_NEON_FP16 = 1 << 7, /* FEAT_FP16 */
    FEATURE_NEON_BF16 = 1 << 8, /* FEAT_BF16: BFDOT, BFMMLA */
    /* Policy, not capability: VDPBF16PS here is slower than fp32 FMA on widened keys. */
    FEATURE_SLOW_VDPBF16PS = 1 << 9,
};

uint64_t lidx_features(void);

/* "avx2 fma f16c ..."; static storage. */
const char *lidx_features_names(void);

/* The name of the lowest bit in `bits`. */
const char *lidx_feature_name(uint64_t bits);

#endif
