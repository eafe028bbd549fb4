/* SPDX-License-Identifier: Apache-2.0
 *
 * One row's k best of what several workers have kept of it.
 *
 * Each worker leaves a slot for each row of the block. When all have, the answer is divided into
 * parts, ranges of ranks of each row: whoever is free gathers the few entries of a part from all
 * slots, orders them and writes them. No entry is like another, so the answer does not depend on
 * who keeps or takes what, nor on where parts begin.
 *
 * Of a worker's candidates only its share is likely to be among the k best: of 2048 candidates of
 * each of 16 workers about 128. So one of them guesses from a sample which entry k of all will
 * reach. Each worker orders those that reach it and leaves the rest as it is, to be looked at only
 * if the guess was too high.
 */
#ifndef LIDX_JOIN_H
#define LIDX_JOIN_H

#include "worker.h"

enum { PART_LANES = 4 };

/* Guesses that are none: smaller than any entry. */
enum { NO_GUESS, TO_GUESS /* somebody looks for one, or has found none */ };

/* What is shared of a cut block's answer; all zero to begin with. */
struct join {
    /* For each row an entry that k entries reach, or 0. What is below it need not be looked at. It
     * only saves work; the answer is the same without. */
    _Alignas(64) _Atomic uint64_t bound[PLAN_ROWS];
    /* An entry that k entries of all workers are likely to reach. It does not change once it is
     * there. */
    _Alignas(64) _Atomic uint64_t guess[PLAN_ROWS];
    _Alignas(64) _Atomic int32_t reaching[PLAN_ROWS]; /* entries in slots that reach the guess */
    _Atomic int32_t members;                          /* workers that have left slots */
    /* Part i is handed out by lane i % PART_LANES, since all want one at the same time. */
    struct {
        _Alignas(64) _Atomic int32_t taken; /* may exceed their number */
    } lane[PART_LANES];
};

/* Bytes of a slot for k entries. */
size_t lidx_slot_bytes(int k);

/* Between pieces: what this worker knows, and what others have found out meanwhile. */
void lidx_join_share_bounds(struct join *join, struct worker *w, const struct plan_block *block);

/* May look for a guess, in what the worker has of n_keys keys. The later the better, but it is best
 * found before the first worker leaves. */
void lidx_join_guess(struct join *join, struct worker *w, const struct plan_block *block,
                     int64_t n_keys);

/* Leaves what the worker has kept of n_keys keys in slots, when it has no more pieces. */
void lidx_join_leave(struct join *join, struct worker *w, const struct plan_block *block,
                     int64_t n_keys);

/* Takes parts as long as there are any, first those of a lane that few others begin with; returns
 * how many. Not before all workers that have pieces have left. */
int lidx_join_take_parts(struct join *join, struct worker *w, const struct plan_block *block);

#endif
