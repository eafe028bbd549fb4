/* SPDX-License-Identifier: Apache-2.0 */
#include "split.h"

enum {
    PATIENCE = 8000, /* blocks looked at while work is to come: up to some hundred microseconds */
};

static struct split *split_of(const struct worker *w, const struct plan_block *block) {
    return &w->run->splits[block->split];
}

static int pieces_left(const struct worker *w, const struct plan_block *block) {
    int taken = atomic_load_explicit(&split_of(w, block)->taken, memory_order_relaxed);
    return block->n_pieces - taken;
}

/* Takes pieces of a cut block in a row: half of an equal share of those that are left, so that
 * runs are long at first and short in the end; among several rows or blocks never so many that
 * others could end long before this worker. Returns how many. */
static int take_run(const struct worker *w, const struct plan_block *block, int sharers,
                    int32_t *first) {
    const struct plan *plan = &w->run->plan;
    int64_t most = plan->n_pieces;
    if (plan->n_splits > 1 || block->n_rows > 1)
        most /= 8 * (int64_t)w->run->n_workers;
    int left = pieces_left(w, block);
    if (left <= 0)
        return 0;
    int n = left / (2 * sharers);
    n = n > most ? (int)most : n;
    n = n > 1 ? n : 1;
    *first = atomic_fetch_add_explicit(&split_of(w, block)->taken, n, memory_order_relaxed);
    left = block->n_pieces - *first;
    return n < left ? n : left > 0 ? left : 0;
}

static void set_parts(const struct worker *w, const struct plan_block *block, int state) {
    atomic_store_explicit(&split_of(w, block)->state, state, memory_order_release);
}

/* Takes parts as long as there are any; returns how many. */
static int take_parts(struct worker *w, const struct plan_block *block) {
    struct split *split = split_of(w, block);
    int n = lidx_join_take_parts(&split->join, w, block);
    if (atomic_load_explicit(&split->state, memory_order_relaxed) != PARTS_TAKEN)
        set_parts(w, block, PARTS_TAKEN);
    return n;
}

/* Whether these pieces are the last of the block to be done. */
static int are_last(struct worker *w, const struct plan_block *block, int n_pieces) {
    _Atomic int32_t *done = &split_of(w, block)->done;
    return atomic_fetch_add_explicit(done, n_pieces, memory_order_acq_rel) + n_pieces ==
           block->n_pieces;
}

void lidx_split_share(struct worker *w, const struct plan_block *block, int sharers) {
    struct join *join = &split_of(w, block)->join;
    int64_t n_keys = 0;
    int n_pieces = 0, n;
    int32_t first;
    while ((n = take_run(w, block, sharers, &first)) > 0) {
        int64_t begin = lidx_plan_key(block, first), end = lidx_plan_key(block, first + n);
        if (n_pieces == 0)
            lidx_worker_load(w, block);
        lidx_join_share_bounds(join, w, block);
        if (pieces_left(w, block) < sharers)
            lidx_join_guess(join, w, block, n_keys);
        lidx_worker_score(w, block, begin, end);
        n_keys += end - begin;
        n_pieces += n;
    }
    if (n_pieces == 0)
        return;
    if (n_pieces == block->n_pieces) {
        set_parts(w, block, PARTS_TAKEN);
        lidx_worker_finish(w, block);
        return;
    }
    lidx_join_leave(join, w, block, n_keys);
    if (are_last(w, block, n_pieces)) {
        set_parts(w, block, PARTS_OPEN);
        take_parts(w, block);
    }
}

/* The next thing to do for a worker that has no block. */
enum chance { NOTHING, TO_COME, A_PART, A_PIECE };

static enum chance chance_at(const struct worker *w, const struct plan_block *block, int *pieces) {
    *pieces = pieces_left(w, block);
    if (*pieces > 0)
        return A_PIECE;
    int state = atomic_load_explicit(&split_of(w, block)->state, memory_order_acquire);
    return state == PARTS_TO_COME ? TO_COME : state == PARTS_OPEN ? A_PART : NOTHING;
}

/* Looks at the cut blocks from *open on, and moves *open past those where nothing is left. Of
 * several with pieces that with most is found. */
static enum chance look_around(const struct worker *w, int64_t *open,
                               const struct plan_block **found) {
    const struct plan *plan = &w->run->plan;
    enum chance best = NOTHING;
    int pieces, most = 0;
    for (int64_t i = *open; i < plan->n_splits; i++) {
        enum chance chance = chance_at(w, &plan->cut[i], &pieces);
        if (chance == NOTHING && i == *open)
            ++*open;
        if (chance > best || (chance == A_PIECE && pieces > most)) {
            best = chance;
            most = pieces;
            *found = &plan->cut[i];
        }
    }
    return best;
}

/* Tells the core that this thread waits for another. */
static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void lidx_split_help(struct worker *w) {
    const struct plan_block *block = NULL;
    int64_t open = 0;
    int64_t patience = PATIENCE;
    while (patience > 0) {
        enum chance chance = look_around(w, &open, &block);
        if (chance == NOTHING)
            return;
        if (chance == A_PIECE)
            lidx_split_share(w, block, w->run->n_workers);
        else if (chance != A_PART || take_parts(w, block) == 0) {
            relax();
            patience -= 1 + w->run->plan.n_splits - open;
            continue;
        }
        patience = PATIENCE;
    }
}
