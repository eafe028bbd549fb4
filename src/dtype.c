/* SPDX-License-Identifier: Apache-2.0 */
#include "dtype.h"

#include "lightning_indexer.h"

const struct dtype_row lidx_dtypes[DTYPE_COUNT] = {
    [DTYPE_BF16] = {"bfloat16", LIDX_BFLOAT, 16},
    [DTYPE_FP16] = {"float16", LIDX_FLOAT, 16},
    [DTYPE_F32] = {"float32", LIDX_FLOAT, 32},
};

float lidx_fp16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 31u;
    uint32_t fraction = h & 0x3FFu;
    if (exponent == 31)
        return lidx_float_from_bits(sign | 0x7F800000u | fraction << 13);
    if (exponent != 0)
        return lidx_float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    /* Zero or denormal: fraction * 2^-24, exact in fp32. */
    float magnitude = (float)fraction * 0x1p-24f;
    return lidx_float_from_bits(sign | lidx_float_bits(magnitude));
}

uint16_t lidx_float_to_bf16(float x) {
    uint32_t bits = lidx_float_bits(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

uint16_t lidx_float_to_fp16(float x) {
    uint32_t bits = lidx_float_bits(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u)
        return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) /* 65520 and above round to inf */
        return sign | 0x7C00u;
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: adding 0.5 leaves the fraction in units of 2^-24, rounded to even. */
        float shifted = lidx_float_from_bits(magnitude) + 0.5f;
        return sign | (uint16_t)(lidx_float_bits(shifted) - 0x3F000000u);
    }
    uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return sign | (uint16_t)((rounded - 0x38000000u) >> 13);
}
