/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels that this machine can run, and contexts that are forced to one of them.
 */
#ifndef LIDX_CONTEXTS_H
#define LIDX_CONTEXTS_H

#include "lightning_indexer.h"

enum { MAX_KERNELS = 16, KERNEL_NAME = 32 };

/* Names of the backend's usable kernels, best first; `only` that one unless it is NULL. Returns how
 * many there are. */
int find_kernels(const char *backend, const char *only, char name[MAX_KERNELS][KERNEL_NAME]);

/* With the best kernel where `kernel` is NULL. Ends the test when it is refused. */
struct lidx_context *make_context(const char *kernel, int n_threads);

#endif
