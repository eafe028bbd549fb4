/* SPDX-License-Identifier: Apache-2.0
 *
 * A backend runs a checked problem on one kind of device. The list of backends is in indexer.c.
 */
#ifndef LIDX_BACKEND_H
#define LIDX_BACKEND_H

#include <stddef.h>

#include "lightning_indexer.h"
#include "problem.h"

/* What a CUDA run has beyond the problem. */
struct run_resources {
    void *stream;
    void *workspace; /* as large as workspace_size() said, or larger */
    int32_t device_id;
};

struct backend {
    const char *name;
    int device_type; /* enum lidx_device_type that it serves */

    /* Makes and frees the backend's part of a context. `state` may stay NULL. */
    int (*create)(void **state, const struct lidx_options *options);
    void (*destroy)(void *state);

    /* Bytes of workspace for any lengths within the problem's sizes. Reads no tensor data. */
    int (*workspace_size)(void *state, const struct problem *p, int32_t device_id, size_t *bytes);

    /* Enqueues or completes the run. The problem is valid; outputs may be written. */
    int (*run)(void *state, const struct problem *p, const struct run_resources *resources);

    /* Its kernels, best first. `info` has size checked already. */
    int (*kernel_count)(void);
    void (*kernel_info)(int index, struct lidx_kernel_info *info);
};

extern const struct backend lidx_backend_cpu;
extern const struct backend lidx_backend_cuda; /* only in builds with LIDX_WITH_CUDA */

#endif
