/* SPDX-License-Identifier: Apache-2.0 */
#include "split.h"

#include <stddef.h>

#include "answer.h"

enum {
    PARTS = 16,        /* most parts of a row */
    PART_ENTRIES = 64, /* fewer are not worth a part */
    NEAR = 32,         /* how far from its place an entry usually lies, in ranks */
    PATIENCE = 8000,   /* blocks looked at while work is to come: up to some hundred microseconds */
};

/* One row of one worker's pieces: up to k entries, best first, and a 0. */
struct slot {
    int32_t n;
    int32_t share;    /* of k: as the worker's keys are to all */
    uint64_t reached; /* the entry of that rank, or 0 */
    _Alignas(64) uint64_t entry[];
};

size_t lidx_slot_bytes(int k) {
    return offsetof(struct slot, entry) + (sizeof(uint64_t) * (size_t)(k + 1) + 63) / 64 * 64;
}

static struct split *split_of(const struct worker *w, const struct plan_block *block) {
    return &w->run->splits[block->split];
}

static struct slot *slot_at(const struct run *run, const struct plan_block *block, int member,
                            int r) {
    int64_t index = block->slot + (int64_t)member * block->n_rows + r;
    return (struct slot *)(void *)(run->slots + (size_t)index * run->slot_bytes);
}

/* ---- pieces ---------------------------------------------------------------------------------- */

static uint64_t known_bound(const struct worker *w, const struct plan_block *block, int r) {
    return atomic_load_explicit(&split_of(w, block)->bound[r], memory_order_relaxed);
}

static void publish_bound(const struct worker *w, const struct plan_block *block, int r,
                          uint64_t bound) {
    _Atomic uint64_t *shared = &split_of(w, block)->bound[r];
    uint64_t known = atomic_load_explicit(shared, memory_order_relaxed);
    while (known < bound && !atomic_compare_exchange_weak_explicit(
                                shared, &known, bound, memory_order_relaxed, memory_order_relaxed))
        continue;
}

/* Between pieces: what this worker knows, and what others have found out meanwhile. */
static void share_bounds(struct worker *w, const struct plan_block *block) {
    for (int r = 0; r < block->n_rows; r++) {
        struct topk *t = &w->row[r].topk;
        uint64_t known = known_bound(w, block, r);
        if (known > t->threshold)
            t->threshold = known - 1;
        else if (t->threshold)
            publish_bound(w, block, r, t->threshold + 1);
    }
}

static void store_selections(struct worker *w, const struct plan_block *block, int64_t n_keys) {
    int member = atomic_fetch_add_explicit(&split_of(w, block)->joined, 1, memory_order_relaxed);
    for (int r = 0; r < block->n_rows; r++) {
        struct slot *slot = slot_at(w->run, block, member, r);
        const struct topk t = lidx_worker_select(w, r);
        if (t.n == t.k)
            publish_bound(w, block, r, t.entry[t.k - 1]);
        slot->n = t.n;
        slot->share = (int32_t)((n_keys * t.k + block->n_keys - 1) / block->n_keys);
        slot->reached = slot->share <= t.n ? t.entry[slot->share - 1] : 0;
        memcpy(slot->entry, t.entry, sizeof *t.entry * (size_t)t.n);
        slot->entry[t.n] = 0;
    }
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

/* ---- parts ----------------------------------------------------------------------------------- */

/* A range of ranks of one row. */
struct part {
    const struct plan_block *block;
    int members; /* how many have left a slot for the row */
    int row;
    int index;
    int parts; /* of the row */
};

/* Into how many parts a row of the block is divided. */
static int parts_of_row(const struct run *run, const struct plan_block *block) {
    int parts = run->n_workers / block->n_rows, most = run->p->top_k / PART_ENTRIES;
    parts = parts < PARTS ? parts : PARTS;
    parts = parts < most ? parts : most;
    return parts > 1 ? parts : 1;
}

static const struct slot *member_slot(const struct run *run, const struct part *part, int member) {
    return slot_at(run, part->block, member, part->row);
}

/* How many entries of a slot would lie in the first `index` parts, were all slots alike. */
static int rank_in_slot(const struct slot *slot, const struct part *part, int index) {
    return (int)(((int64_t)slot->share * index + part->parts - 1) / part->parts);
}

/* The entry at a place counted from 1, or 0. */
static uint64_t entry_at(const struct slot *slot, int rank) {
    return rank <= slot->n ? slot->entry[rank - 1] : 0;
}

/* An entry that k entries of all slots together reach, or 0: each vouches for its share of k. Where
 * scores do not depend on the place, few more than k reach it. */
static uint64_t common_bound(const struct worker *w, const struct part *part) {
    uint64_t common = UINT64_MAX, known = known_bound(w, part->block, part->row);
    for (int m = 0; m < part->members; m++) {
        uint64_t reached = member_slot(w->run, part, m)->reached;
        common = reached < common ? reached : common;
    }
    return known > common ? known : common;
}

/* What the slots would say where the first `index` parts end, in the mean. Any falling sequence
 * would do; with this one parts are about alike where scores do not depend on the place. */
static uint64_t mean_bound(const struct run *run, const struct part *part, int index) {
    uint64_t sum = 0;
    for (int m = 0; m < part->members; m++) {
        const struct slot *slot = member_slot(run, part, m);
        sum += entry_at(slot, rank_in_slot(slot, part, index)) / (uint64_t)part->members;
    }
    return sum;
}

/* What entries of the first `index` parts reach and others do not; nothing below `least` counts. */
static uint64_t end_of_parts(const struct run *run, const struct part *part, int index,
                             uint64_t least) {
    if (index == 0)
        return UINT64_MAX;
    uint64_t bound = index < part->parts ? mean_bound(run, part, index) : least;
    return bound > least ? bound : least;
}

/* How many entries of a slot reach the bound; usually about `guess`. */
static int count_reaching(const struct slot *slot, uint64_t bound, int guess) {
    int low = guess > NEAR ? guess - NEAR : 0;
    int high = guess + NEAR < slot->n ? guess + NEAR : slot->n;
    if (low >= high || (low > 0 && slot->entry[low - 1] < bound) || slot->entry[high] >= bound)
        low = 0, high = slot->n;
    for (int n = high - low, half; n > 0; n -= half) { /* a step of it is no branch */
        half = (n + 1) / 2;
        low = slot->entry[low + half - 1] >= bound ? low + half : low;
    }
    return low;
}

/* A slot's entries of a part. */
struct stretch {
    const uint64_t *entry;
    int before; /* entries of parts before */
    int n;
};

static struct stretch stretch_of(const struct slot *slot, const struct part *part, uint64_t above,
                                 uint64_t bound) {
    int begin = count_reaching(slot, above, rank_in_slot(slot, part, part->index));
    int end = count_reaching(slot, bound, rank_in_slot(slot, part, part->index + 1));
    return (struct stretch){slot->entry + begin, begin, end - begin};
}

/* The part's entries, in order, to t; returns how many are in parts before. Two stretches are
 * merged, more are sorted. */
static int gather_part(struct worker *w, const struct part *part, struct topk *t) {
    const struct run *run = w->run;
    uint64_t least = common_bound(w, part);
    uint64_t above = end_of_parts(run, part, part->index, least);
    uint64_t bound = end_of_parts(run, part, part->index + 1, least);
    int before = 0;
    if (part->members == 2) {
        struct stretch a = stretch_of(member_slot(run, part, 0), part, above, bound);
        struct stretch b = stretch_of(member_slot(run, part, 1), part, above, bound);
        before = a.before + b.before;
        t->n = lidx_topk_merge(t->entry, run->p->top_k, a.entry, a.n, b.entry, b.n);
        return before;
    }
    lidx_topk_reset(t, run->p->top_k, t->entry, run->loops);
    for (int m = 0; m < part->members; m++) {
        struct stretch s = stretch_of(member_slot(run, part, m), part, above, bound);
        lidx_topk_add(t, s.entry, s.n);
        before += s.before;
    }
    if (before < t->k)
        t->k -= before;
    lidx_topk_sort(t);
    return before;
}

/* Writes what of a part belongs to the k best; the last one also writes what is missing. */
static void write_part(struct worker *w, const struct part *part) {
    const struct problem *p = w->run->p;
    const struct plan_block *block = part->block;
    struct topk *t = &w->row[0].topk; /* what it held is in a slot or has been written */
    int before = gather_part(w, part, t), end = before + t->n;
    int64_t row = block->extent.query_begin + block->row + part->row;
    end = end < p->top_k ? end : p->top_k;
    if (before < end)
        lidx_write_entries(p, block->batch, row, before, t->entry, end - before);
    if (part->index + 1 == part->parts && end < p->top_k)
        lidx_write_missing(p, block->batch, row, end);
}

static void set_parts(const struct worker *w, const struct plan_block *block, int state) {
    atomic_store_explicit(&split_of(w, block)->state, state, memory_order_release);
}

/* Takes parts as long as there are any, first those of a lane that few others begin with. Returns
 * how many. */
static int take_parts(struct worker *w, const struct plan_block *block) {
    struct split *split = split_of(w, block);
    int members = atomic_load_explicit(&split->joined, memory_order_relaxed);
    int parts = parts_of_row(w->run, block), n = block->n_rows * parts, n_taken = 0;
    for (int l = 0; l < PART_LANES; l++) {
        int lane = (w->index + l) % PART_LANES, i;
        _Atomic int32_t *taken = &split->lane[lane].taken;
        if (l > 0 && atomic_load_explicit(taken, memory_order_relaxed) * PART_LANES + lane >= n)
            continue;
        while ((i = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed) * PART_LANES + lane) <
               n) {
            const struct part part = {block, members, i / parts, i % parts, parts};
            write_part(w, &part);
            n_taken++;
        }
    }
    if (atomic_load_explicit(&split->state, memory_order_relaxed) != PARTS_TAKEN)
        set_parts(w, block, PARTS_TAKEN);
    return n_taken;
}

/* ---- who does what --------------------------------------------------------------------------- */

/* Whether these pieces are the last of the block to be done. */
static int are_last(struct worker *w, const struct plan_block *block, int n_pieces) {
    _Atomic int32_t *done = &split_of(w, block)->done;
    return atomic_fetch_add_explicit(done, n_pieces, memory_order_acq_rel) + n_pieces ==
           block->n_pieces;
}

void lidx_split_share(struct worker *w, const struct plan_block *block, int sharers) {
    int64_t n_keys = 0;
    int n_pieces = 0, n;
    int32_t first;
    while ((n = take_run(w, block, sharers, &first)) > 0) {
        int64_t begin = lidx_plan_key(block, first), end = lidx_plan_key(block, first + n);
        if (n_pieces == 0)
            lidx_worker_load(w, block);
        share_bounds(w, block);
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
    store_selections(w, block, n_keys);
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
