/* SPDX-License-Identifier: Apache-2.0
 *
 * The torch that is loaded: its functions by name, and the numbers it gives to types.
 */
#ifndef LIDX_TORCH_LOOKUP_H
#define LIDX_TORCH_LOOKUP_H

#include "lightning_indexer.h"
#include "torch_shim.h"

/* Filled by lidx_torch_load(). */
extern struct torch_shim torch;

/* What torch calls the element and device types, asked once. */
struct torch_numbers {
    int32_t dtype[N_TORCH_DTYPES];
    int32_t cpu, cuda;
};

extern struct torch_numbers numbers;

/* Called by Python, before anything else is: looks all functions up in these libraries, which must
 * be loaded already; libtorch_cuda is NULL where torch has no CUDA. Returns NULL, or a sentence
 * that says what failed. */
LIDX_API const char *lidx_torch_load(const char *libtorch_cpu, const char *libtorch_cuda);

/* Called by Python, for its tests: the name of function `index` and the library that it is looked
 * up in, with a question mark where that need not have it; NULL past the last. */
LIDX_API const char *lidx_torch_symbol(int index, const char **library);

#endif
