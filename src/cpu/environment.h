/* SPDX-License-Identifier: Apache-2.0
 *
 * The floating-point environment of a thread: rounding mode, flush-to-zero and exception masks.
 * On x86-64 all of it that the kernels feel is one register, MXCSR; fegetenv() and fesetenv() also
 * move the x87 state, which nothing here uses, and take a third of a call on a few keys.
 */
#ifndef LIDX_ENVIRONMENT_H
#define LIDX_ENVIRONMENT_H

#if defined(__x86_64__)
#include <immintrin.h>

struct float_environment {
    unsigned mxcsr;
};

/* Round to nearest, denormals kept, all exceptions masked. Returns what was set before. */
static inline struct float_environment lidx_enter_default_environment(void) {
    const struct float_environment callers = {_mm_getcsr()};
    _mm_setcsr(0x1F80);
    return callers;
}

/* Also takes back the exception flags raised since. */
static inline void lidx_leave_default_environment(const struct float_environment *callers) {
    _mm_setcsr(callers->mxcsr);
}

#else
#include <fenv.h>

struct float_environment {
    fenv_t environment;
};

static inline struct float_environment lidx_enter_default_environment(void) {
    struct float_environment callers;
    fegetenv(&callers.environment);
    fesetenv(FE_DFL_ENV);
    return callers;
}

static inline void lidx_leave_default_environment(const struct float_environment *callers) {
    fesetenv(&callers->environment);
}

#endif
#endif
