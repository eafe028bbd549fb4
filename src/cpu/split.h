/* SPDX-License-Identifier: Apache-2.0
 *
 * Blocks that are cut: workers share their pieces, then bring together what each has kept.
 *
 * A worker that takes pieces of a block keeps one selection over all of its, sorts it and leaves it
 * in slots, one for each row. When the last piece is in a slot the answer is divided into parts,
 * ranges of ranks of each row, and these are taken like the pieces: whoever is free gathers the few
 * entries of a part from all slots, orders them and writes them. No entry is like another, so the
 * answer does not depend on who takes what, nor on where parts begin. Nobody is waited for: whoever
 * waits for parts to come gives up after a while, and who brings the last selection takes all parts
 * that others do not.
 */
#ifndef LIDX_SPLIT_H
#define LIDX_SPLIT_H

#include "worker.h"

/* The parts of a cut block's answer: not before the last piece is in a slot. */
enum { PARTS_TO_COME, PARTS_OPEN, PARTS_TAKEN };

enum { PART_LANES = 4 };

/* What is shared of a cut block. What many write or look at has a cache line of its own. */
struct split {
    /* For each row an entry that k entries reach, or 0. What is below it need not be looked at. It
     * only saves work; the answer is the same without. */
    _Alignas(64) _Atomic uint64_t bound[PLAN_ROWS];
    _Alignas(64) _Atomic int32_t taken; /* pieces; may exceed their number */
    _Alignas(64) _Atomic int32_t done;  /* pieces in slots */
    _Atomic int32_t joined;             /* workers that have left their selections in slots */
    _Alignas(64) _Atomic int32_t state; /* PARTS_... */
    /* Part i is handed out by lane i % PART_LANES, since all want one at the same time. */
    struct {
        _Alignas(64) _Atomic int32_t taken; /* may exceed their number */
    } lane[PART_LANES];
};

/* Bytes of a slot for k entries. */
size_t lidx_slot_bytes(int k);

/* Takes pieces of a cut block as long as there are any; about `sharers` workers are to be expected
 * there. */
void lidx_split_share(struct worker *w, const struct plan_block *block, int sharers);

/* Takes pieces and parts of all cut blocks until there are none and none are to come soon. */
void lidx_split_help(struct worker *w);

#endif
