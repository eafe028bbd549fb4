/* SPDX-License-Identifier: Apache-2.0
 *
 * Blocks that are cut: workers share their pieces, then join what each has kept.
 *
 * A worker that takes pieces of a block keeps one selection over all of its and leaves it for the
 * others. When all that belong to the block have been left, the answer is divided into parts, and
 * these are taken like the pieces. Nobody is waited for: whoever waits for parts to come gives up
 * after a while, and who leaves the last selection takes all parts that others do not.
 */
#ifndef LIDX_SPLIT_H
#define LIDX_SPLIT_H

#include "join.h"

/* The parts of a cut block's answer: not before the last piece is in a slot. */
enum { PARTS_TO_COME, PARTS_OPEN, PARTS_TAKEN };

/* What is shared of a cut block. What many write or look at has a cache line of its own. */
struct split {
    struct join join;
    _Alignas(64) _Atomic int32_t taken; /* pieces; may exceed their number */
    _Alignas(64) _Atomic int32_t done;  /* pieces in slots */
    _Alignas(64) _Atomic int32_t state; /* PARTS_... */
};

/* Takes pieces of a cut block as long as there are any; about `sharers` workers are to be expected
 * there. */
void lidx_split_share(struct worker *w, const struct plan_block *block, int sharers);

/* Takes pieces and parts of all cut blocks until there are none and none are to come soon. */
void lidx_split_help(struct worker *w);

#endif
