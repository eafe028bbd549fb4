/* SPDX-License-Identifier: Apache-2.0
 *
 * CPUID, XGETBV and the kernel's word on AMX tiles; auxv on ARM.
 */
#define _DEFAULT_SOURCE /* syscall */
#include "features.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
    XCR0_YMM = 0x6,      /* xmm and ymm state */
    XCR0_ZMM = 0xE6,     /* and opmask, upper zmm, zmm16-31 */
    XCR0_TILE = 0x60000, /* tile configuration and tile data */
};

static uint64_t read_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int bit(uint32_t word, int index) {
    return word >> index & 1;
}

/* Linux gives tile state only to a process that asked; asking again is harmless. */
static int request_tiles(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int is_intel(void) {
    uint32_t a, b, c, d;
    __cpuid(0, a, b, c, d);
    return b == 0x756E6547 && d == 0x49656E69 && c == 0x6C65746E; /* GenuineIntel */
}

static uint64_t detect(void) {
    uint32_t a, b, c, d, b7, c7, d7, sub_leaves, a71 = 0, ignore;
    uint64_t features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) /* OSXSAVE */
        return 0;
    uint64_t xcr0 = read_xcr0();
    if ((xcr0 & XCR0_YMM) != XCR0_YMM || !bit(c, 28))
        return 0;
    features |= bit(c, 12) ? FEATURE_FMA : 0;
    features |= bit(c, 29) ? FEATURE_F16C : 0;
    if (!__get_cpuid_count(7, 0, &sub_leaves, &b7, &c7, &d7))
        return features;
    features |= bit(b7, 5) && bit(c, 23) ? FEATURE_AVX2 : 0; /* and POPCNT, as in all such CPUs */
    if (sub_leaves >= 1)
        __cpuid_count(7, 1, a71, ignore, c, d);
    int f_dq_bw_vl = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);
    if ((xcr0 & XCR0_ZMM) == XCR0_ZMM && f_dq_bw_vl) {
        features |= FEATURE_AVX512;
        features |= bit(a71, 5) ? FEATURE_AVX512_BF16 : 0;
        if (bit(a71, 5) && is_intel())
            features |= FEATURE_SLOW_VDPBF16PS;
    }
    if ((xcr0 & XCR0_TILE) == XCR0_TILE && bit(d7, 24) && bit(d7, 22) && request_tiles())
        features |= FEATURE_AMX_BF16;
    return features;
}

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

static uint64_t detect(void) {
    enum { FPHP = 1 << 9, ASIMDHP = 1 << 10, BF16 = 1 << 14 }; /* HWCAP, HWCAP2 */
    uint64_t features = FEATURE_NEON;
    unsigned long cap = getauxval(AT_HWCAP), cap2 = getauxval(AT_HWCAP2);
    features |= (cap & FPHP) && (cap & ASIMDHP) ? FEATURE_NEON_FP16 : 0;
    features |= cap2 & BF16 ? FEATURE_NEON_BF16 : 0;
    return features;
}

#elif defined(__aarch64__)

static uint64_t detect(void) {
    return FEATURE_NEON;
}

#else

static uint64_t detect(void) {
    return 0;
}

#endif

uint64_t lidx_features(void) {
    enum { ASKED = 1 };
    static _Atomic uint64_t cached; /* features << 1 | ASKED; asking twice at once does no harm */
    uint64_t value = atomic_load_explicit(&cached, memory_order_relaxed);
    if (!value) {
        value = detect() << 1 | ASKED;
        atomic_store_explicit(&cached, value, memory_order_relaxed);
    }
    return value >> 1;
}

static const char *const names[] = {"avx2",     "fma",  "f16c",      "avx512",    "avx512_bf16",
                                    "amx_bf16", "neon", "neon_fp16", "neon_bf16", "slow_vdpbf16ps"};

const char *lidx_feature_name(uint64_t bits) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (bits >> i & 1)
            return names[i];
    return "none";
}

const char *lidx_features_names(void) {
    static _Thread_local char text[160];
    uint64_t features = lidx_features();
    text[0] = 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (features >> i & 1) {
            strcat(text, text[0] ? " " : "");
            strcat(text, names[i]);
        }
    return text;
}
