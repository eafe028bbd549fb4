/* SPDX-License-Identifier: Apache-2.0
 *
 * What every C test shares: counted checks with a plain closing line, reproducible random data,
 * 16-bit conversions that owe nothing to src/, and buffers with an unmapped page at one end.
 *
 *     #include "test.h"                       first, since it asks for MAP_ANONYMOUS
 *     int main(void) {
 *         struct rng rng = rng_seed(1);
 *         CHECK(2 + 2 == 4, "sum of %d and %d", 2, 2);
 *         return test_end();                  prints "1 passed, 0 failed"
 *     }
 */
#ifndef LIDX_TEST_H
#define LIDX_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_ANONYMOUS
#error "include test.h before any system header"
#endif

/* ---- counted checks -------------------------------------------------------------------------- */

/* One pair for all files of a program: a failure that a helper's file counts must not get lost. */
__attribute__((weak)) long test_passed, test_failed;

enum { TEST_SHOWN = 20 }; /* failures printed in full; the rest are only counted */

/* Counts one check and says whether it held. Not for use inside a parallel region. */
__attribute__((format(printf, 5, 6))) static inline int
test_check(int holds, const char *file, int line, const char *condition, const char *format, ...) {
    if (holds) {
        test_passed++;
        return 1;
    }
    if (test_failed++ < TEST_SHOWN) {
        va_list arguments;
        printf("%s:%d: failed: %s: ", file, line, condition);
        va_start(arguments, format);
        vprintf(format, arguments);
        va_end(arguments);
        printf("\n");
        fflush(stdout);
    }
    return 0;
}

static inline const char *test_text(const char *text) {
    return text ? text : "(null)";
}

/* CHECK(condition, "format", ...): the sentence says which case it was. */
#define CHECK(condition, ...) test_check(!!(condition), __FILE__, __LINE__, #condition, __VA_ARGS__)

#define CHECK_INT(got, want, what)                                                                 \
    do {                                                                                           \
        long long check_got = (long long)(got), check_want = (long long)(want);                    \
        test_check(check_got == check_want, __FILE__, __LINE__, #got " == " #want,                 \
                   "%s: got %lld, want %lld", (what), check_got, check_want);                      \
    } while (0)

#define CHECK_STRING(got, want, what)                                                              \
    do {                                                                                           \
        const char *check_got = test_text(got), *check_want = (want);                              \
        test_check(strcmp(check_got, check_want) == 0, __FILE__, __LINE__, #got " is " #want,      \
                   "%s: got \"%s\", want \"%s\"", (what), check_got, check_want);                  \
    } while (0)

/* Prints the closing line; the exit status of main. A test that checked nothing has failed. */
static inline int test_end(void) {
    printf("%ld passed, %ld failed\n", test_passed, test_failed);
    fflush(stdout);
    return test_failed == 0 && test_passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* ---- random data: xoshiro256**, seeded by splitmix64 ----------------------------------------- */

struct rng {
    uint64_t s[4];
};

static inline struct rng rng_seed(uint64_t seed) {
    struct rng rng;
    for (int i = 0; i < 4; i++) {
        uint64_t z = seed += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        rng.s[i] = z ^ z >> 31;
    }
    return rng;
}

static inline uint64_t rng_rotate(uint64_t x, int by) {
    return x << by | x >> (64 - by);
}

static inline uint64_t rng_next(struct rng *rng) {
    uint64_t *s = rng->s;
    uint64_t result = rng_rotate(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rng_rotate(s[3], 45);
    return result;
}

/* 0 .. n - 1, n >= 1; the bias is below n / 2^64. */
static inline uint64_t rng_below(struct rng *rng, uint64_t n) {
    return rng_next(rng) % n;
}

/* True once in n times. */
static inline int rng_one_in(struct rng *rng, uint64_t n) {
    return rng_below(rng, n) == 0;
}

/* low .. high, both included. */
static inline int64_t rng_between(struct rng *rng, int64_t low, int64_t high) {
    return low + (int64_t)rng_below(rng, (uint64_t)(high - low) + 1);
}

/* Nearly normal: mean 0, variance 1, from four 16-bit uniforms; never beyond 3.5. */
static inline float rng_normal(struct rng *rng) {
    uint64_t x = rng_next(rng);
    int32_t sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (int32_t)(x >> 16 * i & 0xFFFFu);
    return (float)(sum - 2 * 0xFFFF) * (1.7320508f / 65536.0f);
}

/* ---- 16-bit floats, the slow and obvious way ------------------------------------------------- */

static inline float test_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t test_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float test_from_bf16(uint16_t h) {
    return test_float_from_bits((uint32_t)h << 16);
}

static inline float test_from_fp16(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float magnitude;
    if (exponent == 31)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = ldexpf((float)fraction, -24);
    else
        magnitude = ldexpf((float)(1024 + fraction), exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

/* Nearest, ties to even: of the two neighbours take the closer one, or the even one. */
static inline uint16_t test_to_bf16(float x) {
    uint32_t bits = test_float_bits(x);
    if (isnan(x))
        return (uint16_t)((bits >> 31) << 15 | 0x7FC0u);
    uint32_t low = bits & 0xFFFFu, high = bits >> 16;
    if (low > 0x8000u || (low == 0x8000u && (high & 1u)))
        high++;
    return (uint16_t)high;
}

static inline uint16_t test_to_fp16(float x) {
    uint16_t sign = signbit(x) ? 0x8000u : 0;
    double magnitude = fabs((double)x);
    if (isnan(x))
        return sign | 0x7E00u;
    if (magnitude >= 65520.0)
        return sign | 0x7C00u;
    int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    double unit = ldexp(1.0, exponent - 10);
    double steps = nearbyint(magnitude / unit); /* default rounding mode: ties to even */
    /* 1024 steps are the next exponent's first value, so the sum carries by itself. */
    return sign | (uint16_t)((exponent + 14) * 1024 + (int)steps);
}

static inline uint16_t test_to_half(float x, int is_bf16) {
    return is_bf16 ? test_to_bf16(x) : test_to_fp16(x);
}

static inline float test_from_half(uint16_t h, int is_bf16) {
    return is_bf16 ? test_from_bf16(h) : test_from_fp16(h);
}

/* ---- buffers beside an unmapped page --------------------------------------------------------- */

/* `data` has exactly `size` bytes. In one made by guard_after() the next byte is unmapped, in one
 * made by guard_before() the byte in front of it is. The bytes start as 0xA5. */
struct guard {
    unsigned char *data;
    size_t size;
    void *map;
    size_t map_size;
};

static inline struct guard guard_make(size_t size, int after) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t body = (size + page - 1) / page * page;
    struct guard guard = {NULL, size, NULL, body + 2 * page};
    guard.map =
        mmap(NULL, guard.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (guard.map == MAP_FAILED) {
        perror("mmap");
        exit(EXIT_FAILURE);
    }
    unsigned char *first = (unsigned char *)guard.map + page;
    guard.data = after ? first + body - size : first;
    memset(first, 0xA5, body);
    if (mprotect(guard.map, page, PROT_NONE) || mprotect(first + body, page, PROT_NONE)) {
        perror("mprotect");
        exit(EXIT_FAILURE);
    }
    return guard;
}

static inline struct guard guard_after(size_t size) {
    return guard_make(size, 1);
}

static inline struct guard guard_before(size_t size) {
    return guard_make(size, 0);
}

static inline void guard_free(struct guard *guard) {
    if (guard->map)
        munmap(guard->map, guard->map_size);
    memset(guard, 0, sizeof *guard);
}

#endif
