/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of CPU kernels, best first, and the choice among them.
 */
#ifndef LIDX_KERNELS_H
#define LIDX_KERNELS_H

#include "kernel.h"

extern const struct kernel *const lidx_kernels[]; /* ends with NULL; scalar is the last row */
extern const struct kernel lidx_kernel_scalar;

/* The kernel for this machine, or the one of that name; NULL when `forced` is no kernel of the
 * table. Features and vendor decide, never a timing: two runs on one machine choose alike,
 * since the last bits of a score depend on the kernel. */
const struct kernel *lidx_kernel_choose(const char *forced);

int lidx_kernel_usable(const struct kernel *kernel);

/* A sentence on why a row is or is not usable, and is or is not the choice. Static storage of
 * this thread. */
const char *lidx_kernel_reason(const struct kernel *kernel);

#endif
