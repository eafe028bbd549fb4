/* SPDX-License-Identifier: Apache-2.0
 *
 * Element types: one row each, and the scalar conversions that define them.
 */
#ifndef LIDX_DTYPE_H
#define LIDX_DTYPE_H

#include <stdint.h>
#include <string.h>

#include "problem.h"

struct dtype_row {
    const char *name; /* as an error sentence says it */
    uint8_t code;     /* DLPack's type code */
    uint8_t bits;
};

extern const struct dtype_row lidx_dtypes[DTYPE_COUNT];

static inline float lidx_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t lidx_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float lidx_bf16_to_float(uint16_t h) {
    return lidx_float_from_bits((uint32_t)h << 16);
}

float lidx_fp16_to_float(uint16_t h);
uint16_t lidx_float_to_bf16(float x); /* round to nearest even; NaN stays NaN */
uint16_t lidx_float_to_fp16(float x); /* likewise; too large becomes inf */

static inline int lidx_dtype_bytes(int dtype) {
    return lidx_dtypes[dtype].bits / 8;
}

/* Element i of an array of any of the types, at any alignment. */
static inline float lidx_load(const void *array, int64_t i, int dtype) {
    if (dtype == DTYPE_F32) {
        float x;
        memcpy(&x, (const unsigned char *)array + i * (int64_t)sizeof x, sizeof x);
        return x;
    }
    uint16_t h;
    memcpy(&h, (const unsigned char *)array + i * (int64_t)sizeof h, sizeof h);
    return dtype == DTYPE_BF16 ? lidx_bf16_to_float(h) : lidx_fp16_to_float(h);
}

static inline void lidx_store(void *array, int64_t i, int dtype, float x) {
    switch (dtype) {
    case DTYPE_BF16:
        ((uint16_t *)array)[i] = lidx_float_to_bf16(x);
        break;
    case DTYPE_FP16:
        ((uint16_t *)array)[i] = lidx_float_to_fp16(x);
        break;
    default:
        ((float *)array)[i] = x;
    }
}

#endif
