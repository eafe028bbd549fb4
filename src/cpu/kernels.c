/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels.h"

#include <stdio.h>
#include <string.h>

#include "features.h"

#if defined(__x86_64__)
extern const struct kernel lidx_kernel_amx, lidx_kernel_avx512_bf16, lidx_kernel_avx512,
    lidx_kernel_avx2;
#elif defined(__aarch64__)
extern const struct kernel lidx_kernel_neon_bf16, lidx_kernel_neon;
#endif

const struct kernel *const lidx_kernels[] = {
#if defined(__x86_64__)
    &lidx_kernel_amx,    &lidx_kernel_avx512_bf16,
    &lidx_kernel_avx512, &lidx_kernel_avx2,
#elif defined(__aarch64__)
    &lidx_kernel_neon_bf16,
    &lidx_kernel_neon,
#endif
    &lidx_kernel_scalar, NULL,
};

int lidx_kernel_usable(const struct kernel *kernel) {
    return (kernel->needs & ~lidx_features()) == 0;
}

/* Usable, but a row further down is faster on this machine. */
static int is_slow_here(const struct kernel *kernel) {
    return (kernel->needs & FEATURE_AVX512_BF16) && !(kernel->needs & FEATURE_AMX_BF16) &&
           (lidx_features() & FEATURE_SLOW_VDPBF16PS);
}

const struct kernel *lidx_kernel_choose(const char *forced) {
    for (int i = 0; lidx_kernels[i]; i++) {
        const struct kernel *kernel = lidx_kernels[i];
        if (forced ? strcmp(forced, kernel->name) == 0
                   : lidx_kernel_usable(kernel) && !is_slow_here(kernel))
            return kernel;
    }
    return NULL;
}

const char *lidx_kernel_reason(const struct kernel *kernel) {
    static _Thread_local char text[160];
    if (!lidx_kernel_usable(kernel)) {
        snprintf(text, sizeof text, "not usable: this machine lacks %s",
                 lidx_feature_name(kernel->needs & ~lidx_features()));
        return text;
    }
    if (is_slow_here(kernel))
        return "usable, not chosen: on Intel CPUs VDPBF16PS runs at half the rate of fp32 FMA";
    const struct kernel *best = lidx_kernel_choose(NULL);
    if (kernel == best)
        return "chosen: the first of the table that this machine can run";
    snprintf(text, sizeof text, "usable, not chosen: %s comes first", best->name);
    return text;
}
