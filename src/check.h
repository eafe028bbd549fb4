/* SPDX-License-Identifier: Apache-2.0
 *
 * Public arguments -> struct problem, or a status and a sentence.
 */
#ifndef LIDX_CHECK_H
#define LIDX_CHECK_H

#include "lightning_indexer.h"
#include "problem.h"

enum check_depth {
    CHECK_SIZES, /* shapes, types and strides; data pointers may be NULL */
    CHECK_DATA   /* pointers too, and on the CPU the values of lists and tables */
};

/* `args` is of this version's size. `device` is the one that all tensors are on. */
int lidx_check(const struct lidx_args *args, enum check_depth depth, struct problem *p,
               struct lidx_device *device);

#endif
