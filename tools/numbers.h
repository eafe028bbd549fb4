/* SPDX-License-Identifier: Apache-2.0
 *
 * Small arithmetic that several commands share: 16-bit floats, random numbers, medians, a clock.
 */
#ifndef LIDX_NUMBERS_H
#define LIDX_NUMBERS_H

#include <stdint.h>

float bf16_to_float(uint16_t bits);
float f16_to_float(uint16_t bits);
uint16_t float_to_bf16(float x); /* to nearest, ties to even; NaN stays NaN */
uint16_t float_to_f16(float x);  /* likewise; too large becomes infinity */

/* splitmix64: any seed is a good one, and streams of different seeds do not meet in practice. */
struct random {
    uint64_t state;
};

uint64_t random_bits(struct random *random);
int64_t random_below(struct random *random, int64_t n);
float random_normal(struct random *random); /* nearly normal: mean 0, variance 1, within 3.5 */
void random_shuffle(struct random *random, int32_t *list, int64_t n);

double now(void);                     /* seconds, monotonic */
double median(double *values, int n); /* sorts them */
int default_threads(void);            /* what a context gets that asks for 0 threads */

#endif
