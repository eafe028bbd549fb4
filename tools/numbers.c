/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* clock_gettime */
#endif

#include "numbers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif

float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

uint16_t float_to_bf16(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    if (x != x)
        return (uint16_t)(wide >> 16 | 0x40); /* quiet: rounding might carry it to infinity */
    return (uint16_t)((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

float f16_to_float(uint16_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x;
    if (exponent == 31)
        x = mantissa ? NAN : INFINITY;
    else if (exponent)
        x = ldexpf((float)(mantissa + 1024), exponent - 25);
    else
        x = ldexpf((float)mantissa, -24);
    return bits >> 15 ? -x : x;
}

uint16_t float_to_f16(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    float a = fabsf(x);
    if (a != a)
        return sign | 0x7E00;
    if (a >= 65520.0f) /* halfway from the largest number to the next */
        return sign | 0x7C00;
    if (a < 0x1p-14f) /* subnormal: a whole number of 2^-24, and 1024 of them are normal again */
        return (uint16_t)(sign | (uint16_t)lrintf(a * 0x1p24f));
    int exponent;
    float mantissa = frexpf(a, &exponent);     /* in [0.5, 1) */
    long rounded = lrintf(mantissa * 2048.0f); /* 1024..2048: its top bit adds 1 to the exponent */
    return (uint16_t)(sign | (uint16_t)(((exponent + 13) << 10) + rounded));
}

uint64_t random_bits(struct random *random) {
    uint64_t z = random->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

int64_t random_below(struct random *random, int64_t n) {
    return (int64_t)(random_bits(random) % (uint64_t)n);
}

/* The sum of four uniform 16-bit numbers: mean 2 * 65535, variance 4 * 65536^2 / 12. */
float random_normal(struct random *random) {
    uint64_t x = random_bits(random);
    int32_t sum = (int32_t)(x & 0xFFFF) + (int32_t)(x >> 16 & 0xFFFF) +
                  (int32_t)(x >> 32 & 0xFFFF) + (int32_t)(x >> 48);
    return (float)(sum - 131070) * (1.7320508f / 65536.0f);
}

void random_shuffle(struct random *random, int32_t *list, int64_t n) {
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = random_below(random, i + 1);
        int32_t t = list[i];
        list[i] = list[j];
        list[j] = t;
    }
}

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, int n) {
    if (n < 1)
        return 0;
    qsort(values, (size_t)n, sizeof *values, compare);
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

int default_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
