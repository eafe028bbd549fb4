/* SPDX-License-Identifier: Apache-2.0 */
#include "join.h"

#include <stddef.h>

#include "answer.h"

enum {
    PARTS = 16,        /* most parts of a row */
    PART_ENTRIES = 64, /* fewer are not worth a part */
    NEAR = 32,         /* how far from its place an entry usually lies, in ranks */
};

/* What one worker leaves of one row: up to k entries, best first, and a 0; behind it the rest, in
 * any order, which are worse. Nothing else of its pieces can be among the k best. */
struct slot {
    int32_t n;
    int32_t n_rest;
    int32_t share;    /* of k: as the worker's keys are to all */
    uint64_t reached; /* the entry of that rank, or 0 */
    uint64_t least;   /* no entry of the rest reaches it, all others do */
    _Alignas(64) uint64_t entry[];
};

size_t lidx_slot_bytes(int k) {
    size_t n = (size_t)lidx_topk_rough(k) + 1 + TOPK_SLACK;
    return offsetof(struct slot, entry) + (sizeof(uint64_t) * n + 63) / 64 * 64;
}

static struct slot *slot_at(const struct run *run, const struct plan_block *block, int member,
                            int r) {
    int64_t index = block->slot + (int64_t)member * block->n_rows + r;
    return (struct slot *)(void *)(run->slots + (size_t)index * run->slot_bytes);
}

/* Behind the entries of a slot that are in order. */
static const uint64_t *rest_of(const struct slot *slot) {
    return slot->entry + slot->n + 1;
}

/* ---- bounds ---------------------------------------------------------------------------------- */

static uint64_t known_bound(const struct join *join, int r) {
    return atomic_load_explicit(&join->bound[r], memory_order_relaxed);
}

static void publish_bound(struct join *join, int r, uint64_t bound) {
    _Atomic uint64_t *shared = &join->bound[r];
    uint64_t known = atomic_load_explicit(shared, memory_order_relaxed);
    while (known < bound && !atomic_compare_exchange_weak_explicit(
                                shared, &known, bound, memory_order_relaxed, memory_order_relaxed))
        continue;
}

/* How many of the k best are a worker's, where scores do not depend on the place. */
static int share_of(const struct plan_block *block, int k, int64_t n_keys) {
    return (int)((n_keys * k + block->n_keys - 1) / block->n_keys);
}

/* Looks for what k entries of all workers will reach, in what one has of n_keys, if that is so much
 * that ordering a share of it alone saves time. One looks for all, and only once; nobody waits. */
static void find_guess(struct join *join, const struct plan_block *block, int r,
                       const struct topk *t, int64_t n_keys) {
    _Atomic uint64_t *guess = &join->guess[r];
    uint64_t none = NO_GUESS;
    int share = share_of(block, t->k, n_keys);
    if (t->n < share + TOPK_SAMPLE ||
        atomic_load_explicit(guess, memory_order_relaxed) != NO_GUESS ||
        !atomic_compare_exchange_strong_explicit(guess, &none, TO_GUESS, memory_order_relaxed,
                                                 memory_order_relaxed))
        return;
    uint64_t found = lidx_topk_guess(t, share);
    if (found)
        atomic_store_explicit(guess, found, memory_order_relaxed);
}

/* The guess, or 0. */
static uint64_t guess_of(const struct join *join, int r) {
    uint64_t guess = atomic_load_explicit(&join->guess[r], memory_order_relaxed);
    return guess != TO_GUESS ? guess : 0;
}

void lidx_join_share_bounds(struct join *join, struct worker *w, const struct plan_block *block) {
    for (int r = 0; r < block->n_rows; r++) {
        struct topk *t = &w->row[r].topk;
        uint64_t known = known_bound(join, r);
        if (known > t->threshold)
            t->threshold = known - 1;
        else if (t->threshold)
            publish_bound(join, r, t->threshold + 1);
    }
}

void lidx_join_guess(struct join *join, struct worker *w, const struct plan_block *block,
                     int64_t n_keys) {
    for (int r = 0; r < block->n_rows; r++)
        find_guess(join, block, r, &w->row[r].topk, n_keys);
}

/* ---- slots ----------------------------------------------------------------------------------- */

/* Moves to the slot, in any order, what does not reach the guess: it is looked at only if fewer
 * than k entries of all workers do. Once k do the guess is a bound. */
static void leave_rest(struct join *join, struct slot *slot, int r, struct topk *t) {
    uint64_t known = known_bound(join, r), guess = guess_of(join, r);
    if (known)
        lidx_topk_raise(t, known);
    if (guess <= known)
        return;
    lidx_topk_cut(t);
    if (t->threshold)
        publish_bound(join, r, t->threshold + 1);
    int n = lidx_topk_count(t, guess);
    slot->n_rest = lidx_topk_divide(t, guess, slot->entry + (n < t->k ? n : t->k) + 1);
    slot->least = guess;
    if (atomic_fetch_add_explicit(&join->reaching[r], n, memory_order_relaxed) + n >= t->k)
        publish_bound(join, r, guess);
}

void lidx_join_leave(struct join *join, struct worker *w, const struct plan_block *block,
                     int64_t n_keys) {
    int member = atomic_fetch_add_explicit(&join->members, 1, memory_order_relaxed);
    for (int r = 0; r < block->n_rows; r++) {
        struct slot *slot = slot_at(w->run, block, member, r);
        struct topk t = lidx_worker_candidates(w, r);
        slot->share = share_of(block, t.k, n_keys);
        slot->n_rest = 0;
        find_guess(join, block, r, &t, n_keys);
        leave_rest(join, slot, r, &t);
        lidx_topk_sort(&t);
        if (t.n == t.k)
            publish_bound(join, r, t.entry[t.k - 1]);
        slot->n = t.n;
        slot->reached = slot->share <= t.n ? t.entry[slot->share - 1] : 0;
        memcpy(slot->entry, t.entry, sizeof *t.entry * (size_t)t.n);
        slot->entry[t.n] = 0;
    }
}

/* ---- parts ----------------------------------------------------------------------------------- */

/* A range of ranks of one row. */
struct part {
    const struct plan_block *block;
    uint64_t known; /* a bound that k entries reach, or 0 */
    int members;    /* how many have left a slot for the row */
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
static uint64_t common_bound(const struct run *run, const struct part *part) {
    uint64_t common = UINT64_MAX;
    for (int m = 0; m < part->members; m++) {
        uint64_t reached = member_slot(run, part, m)->reached;
        common = reached < common ? reached : common;
    }
    return part->known > common ? part->known : common;
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

/* How many of a slot's best reach the bound; usually about `guess`. */
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

/* Of a slot's best, those that reach `bound` but not `above`. */
struct stretch {
    const uint64_t *entry;
    int before; /* entries that reach `above` */
    int n;
};

static struct stretch stretch_of(const struct run *run, const struct part *part, int member,
                                 uint64_t above, uint64_t bound) {
    const struct slot *slot = member_slot(run, part, member);
    int begin = count_reaching(slot, above, rank_in_slot(slot, part, part->index));
    int end = count_reaching(slot, bound, rank_in_slot(slot, part, part->index + 1));
    return (struct stretch){slot->entry + begin, begin, end - begin};
}

/* Whether entries of a slot's rest reach the bound. */
static int wants_rest(const struct slot *slot, uint64_t bound) {
    return slot->n_rest > 0 && bound < slot->least;
}

static int is_merge(const struct run *run, const struct part *part, uint64_t bound) {
    return part->members == 2 && !wants_rest(member_slot(run, part, 0), bound) &&
           !wants_rest(member_slot(run, part, 1), bound);
}

static int merge_part(const struct run *run, const struct part *part, uint64_t above,
                      uint64_t bound, struct topk *t) {
    struct stretch a = stretch_of(run, part, 0, above, bound);
    struct stretch b = stretch_of(run, part, 1, above, bound);
    t->n = lidx_topk_merge(t->entry, run->p->top_k, a.entry, a.n, b.entry, b.n);
    return a.before + b.before;
}

static int sort_part(const struct run *run, const struct part *part, uint64_t above, uint64_t bound,
                     struct topk *t) {
    int before = 0;
    lidx_topk_reset(t, run->p->top_k, t->entry, run->loops);
    for (int m = 0; m < part->members; m++) {
        const struct slot *slot = member_slot(run, part, m);
        struct stretch s = stretch_of(run, part, m, above, bound);
        lidx_topk_add(t, s.entry, s.n);
        before += s.before;
        if (wants_rest(slot, bound))
            before += lidx_topk_take(t, rest_of(slot), slot->n_rest, bound, above);
    }
    if (before < t->k)
        t->k -= before;
    lidx_topk_sort(t);
    return before;
}

/* The part's entries, in order, to t; returns how many are in parts before. Two stretches are
 * merged, more are sorted. */
static int gather_part(const struct run *run, const struct part *part, struct topk *t) {
    uint64_t least = common_bound(run, part);
    uint64_t above = end_of_parts(run, part, part->index, least);
    uint64_t bound = end_of_parts(run, part, part->index + 1, least);
    return is_merge(run, part, bound) ? merge_part(run, part, above, bound, t)
                                      : sort_part(run, part, above, bound, t);
}

/* Writes what of a part belongs to the k best; the last one also writes what is missing. */
static void write_part(struct worker *w, const struct part *part) {
    const struct problem *p = w->run->p;
    const struct plan_block *block = part->block;
    struct topk *t = &w->row[0].topk; /* what it held is in a slot or has been written */
    int before = gather_part(w->run, part, t), end = before + t->n;
    int64_t row = block->extent.query_begin + block->row + part->row;
    end = end < p->top_k ? end : p->top_k;
    if (before < end)
        lidx_write_entries(p, block->batch, row, before, t->entry, end - before);
    if (part->index + 1 == part->parts && end < p->top_k)
        lidx_write_missing(p, block->batch, row, end);
}

int lidx_join_take_parts(struct join *join, struct worker *w, const struct plan_block *block) {
    int members = atomic_load_explicit(&join->members, memory_order_relaxed);
    int parts = parts_of_row(w->run, block), n = block->n_rows * parts, n_taken = 0;
    for (int l = 0; l < PART_LANES; l++) {
        int lane = (w->index + l) % PART_LANES, i;
        _Atomic int32_t *taken = &join->lane[lane].taken;
        if (l > 0 && atomic_load_explicit(taken, memory_order_relaxed) * PART_LANES + lane >= n)
            continue;
        while ((i = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed) * PART_LANES + lane) <
               n) {
            int r = i / parts;
            const struct part part = {block, known_bound(join, r), members, r, i % parts, parts};
            write_part(w, &part);
            n_taken++;
        }
    }
    return n_taken;
}
