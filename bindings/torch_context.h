/* SPDX-License-Identifier: Apache-2.0
 *
 * Contexts: each thread that calls has its own, made at its first call and freed when the thread
 * ends. It has as many threads as torch.get_num_threads() says; when that number changes, the
 * context is made anew. A forked child runs on one thread, since OpenMP's threads do not survive
 * a fork.
 */
#ifndef LIDX_TORCH_CONTEXT_H
#define LIDX_TORCH_CONTEXT_H

#include "lightning_indexer.h"

/* This thread's context, or NULL, and then lidx_last_error() says why. */
struct lidx_context *torch_context(void);

#endif
