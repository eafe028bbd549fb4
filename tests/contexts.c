/* SPDX-License-Identifier: Apache-2.0 */
#include "contexts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int find_kernels(const char *backend, const char *only, char name[MAX_KERNELS][KERNEL_NAME]) {
    int n = 0;
    for (int i = 0; i < lidx_kernel_count() && n < MAX_KERNELS; i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        if (lidx_kernel_info(i, &info) || strcmp(info.backend, backend) != 0 || !info.available)
            continue;
        if (!only || strcmp(only, info.name) == 0)
            snprintf(name[n++], KERNEL_NAME, "%s", info.name);
    }
    return n;
}

struct lidx_context *make_context(const char *kernel, int n_threads) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    options.kernel = kernel;
    options.n_threads = n_threads;
    if (lidx_create(&context, &options)) {
        printf("no context for %s with %d threads: %s\n", kernel ? kernel : "the best kernel",
               n_threads, lidx_last_error());
        exit(EXIT_FAILURE);
    }
    return context;
}
