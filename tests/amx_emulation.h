/* SPDX-License-Identifier: Apache-2.0
 *
 * The tile instructions of src/cpu/amx_tiles.h in plain C, so that any x86 machine with AVX-512 can
 * run the AMX kernel. It defines macros with the names of the compiler's intrinsics; include it
 * before the source that uses them.
 *
 * What is emulated, after the Intel 64 and IA-32 Architectures Software Developer's Manual:
 *
 *   TDPBF16PS   For each row m and column n two fp32 sums start at 0, one of the even and one of
 *               the odd numbers of the pairs. For k = 0, 1, ... each takes one product by FMA,
 *               rounded to nearest even. Then even + odd, rounded, and that is added to the
 *               accumulator, rounded. Denormal inputs count as zero, denormal results become zero,
 *               of the input's sign; MXCSR has no say.
 *   TILELOADD, TILESTORED, TILEZERO   rows of 64 bytes at a stride.
 *   LDTILECFG, TILERELEASE            only whether tiles are configured: using one that is not
 *               would fault, and here aborts.
 *
 * Not emulated: shapes other than 16 rows of 64 bytes, the payload of NaNs, results that are
 * denormal before rounding and normal after it.
 */
#ifndef LIDX_AMX_EMULATION_H
#define LIDX_AMX_EMULATION_H

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { EMULATED_ROWS = 16, EMULATED_COLUMNS = 16 };

/* A row: 16 fp32 numbers, or 16 pairs of bf16 numbers, the first of a pair in the low half. */
struct emulated_tile {
    uint32_t row[EMULATED_ROWS][EMULATED_COLUMNS];
};

static _Thread_local struct emulated_tile emulated_tiles[8];
static _Thread_local int emulated_configured;

static inline struct emulated_tile *emulated_tile(int number) {
    if (!emulated_configured)
        abort();
    return &emulated_tiles[number];
}

static inline float emulated_flush(uint32_t bits) {
    float x;
    if ((bits & 0x7F800000u) == 0)
        bits &= 0x80000000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float emulated_flush_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return emulated_flush(bits);
}

static inline void emulated_tile_zero(int number) {
    memset(emulated_tile(number), 0, sizeof(struct emulated_tile));
}

static inline void emulated_tile_load(int number, const void *base, int64_t stride) {
    for (int m = 0; m < EMULATED_ROWS; m++)
        memcpy(emulated_tile(number)->row[m], (const unsigned char *)base + m * stride, 64);
}

static inline void emulated_tile_store(int number, void *base, int64_t stride) {
    for (int m = 0; m < EMULATED_ROWS; m++)
        memcpy((unsigned char *)base + m * stride, emulated_tile(number)->row[m], 64);
}

__attribute__((target("avx2,fma"))) static void emulated_dpbf16ps(int c, int a, int b) {
    struct emulated_tile *sums = emulated_tile(c);
    const struct emulated_tile *left = emulated_tile(a), *right = emulated_tile(b);
    for (int m = 0; m < EMULATED_ROWS; m++) {
        float even[EMULATED_COLUMNS] = {0}, odd[EMULATED_COLUMNS] = {0};
        for (int k = 0; k < EMULATED_COLUMNS; k++) {
            float x = emulated_flush(left->row[m][k] << 16);
            float y = emulated_flush(left->row[m][k] & 0xFFFF0000u);
            for (int n = 0; n < EMULATED_COLUMNS; n++) {
                uint32_t pair = right->row[k][n];
                even[n] = emulated_flush_float(fmaf(x, emulated_flush(pair << 16), even[n]));
                odd[n] = emulated_flush_float(fmaf(y, emulated_flush(pair & 0xFFFF0000u), odd[n]));
            }
        }
        for (int n = 0; n < EMULATED_COLUMNS; n++) {
            float old = emulated_flush(sums->row[m][n]);
            float both = emulated_flush_float(even[n] + odd[n]);
            float sum = emulated_flush_float(old + both);
            memcpy(&sums->row[m][n], &sum, sizeof sum);
        }
    }
}

static inline void emulated_configure(int on) {
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    emulated_configured = on;
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config)         ((void)(config), emulated_configure(1))
#define _tile_release()                  emulated_configure(0)
#define _tile_zero(tile)                 emulated_tile_zero(tile)
#define _tile_loadd(tile, base, stride)  emulated_tile_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_tile_store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b)          emulated_dpbf16ps(c, a, b)

#endif
#endif
