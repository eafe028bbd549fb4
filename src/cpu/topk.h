/* SPDX-License-Identifier: Apache-2.0
 *
 * Exact top-k of a stream of scores, in O(k) memory, and the tie rule in one place.
 *
 * A candidate is one number of 63 bits: the score as an order-preserving integer above, the
 * complement of the position's 31 bits below. Larger is better, no two are equal, so "score
 * descending, equal scores by ascending position, -0 as +0, NaN last" is plain integer order, and
 * the k largest do not depend on the order in which they came.
 *
 * Read as a double, a candidate is a positive normal number, so that floating-point minima and
 * maxima order candidates too: on Intel's CPUs they are four times as fast as those of integers.
 */
#ifndef LIDX_TOPK_H
#define LIDX_TOPK_H

#include <stdint.h>
#include <string.h>

enum {
    TOPK_STEP = 1024, /* scores that a selection has room for once it is cut back */
    TOPK_SLACK = 16,  /* entries that a filter may write past its n */
    TOPK_NEAR = 16,
    TOPK_SAMPLE = 256, /* entries of which a bound is taken */
    TOPK_BITS = 11,    /* of a bin number or a radix digit: 4 KiB of counters, a small part of L1 */
    TOPK_BINS = 1 << TOPK_BITS,
};

struct topk_range {
    uint64_t low, high; /* smallest and largest entry */
};

/* The shift that brings high - low into `bits` bits. */
static inline int lidx_topk_shift(struct topk_range r, int bits) {
    uint64_t span = r.high - r.low;
    int width = span ? 64 - __builtin_clzll(span) : 0;
    return width > bits ? width - bits : 0;
}

/* Equal parts of a range of entries, numbered from the best down: of the entries themselves when
 * scale is 0, or else of their scores. */
struct topk_bins {
    uint64_t high;
    int shift;
    float best, scale;
    int last; /* largest bin number */
};

/* The loops that see every score or every candidate. A CPU kernel may bring vector forms; the
 * answers are the same to the bit. */
struct topk_loops {
    /* Appends to `entry` the candidates of score[0..n) at position, position + 1, ... that beat
     * `threshold`; returns how many. May write n + TOPK_SLACK entries, whatever their number, but
     * none further on than TOPK_SLACK behind the number of scores that it has read: they may lie
     * at the end of the same memory. */
    int (*filter)(uint64_t *entry, const float *score, int n, uint32_t position,
                  uint64_t threshold);
    /* n >= 1 */
    struct topk_range (*range)(const uint64_t *entry, int n);
    /* Moves the entries at or above `bound` to the front, in order; returns how many. */
    int (*keep)(uint64_t *entry, int n, uint64_t bound);
    /* Copies the entries below `bound`, in order; returns how many. May write TOPK_SLACK more. */
    int (*below)(uint64_t *out, const uint64_t *entry, int n, uint64_t bound);
    /* How many entries are at or above `bound`. */
    int (*count)(const uint64_t *entry, int n, uint64_t bound);
    /* The next three all or none: with them entries are binned once and settled, without them
     * binned twice as finely, in two passes. */
    /* bin[i] = number of the bin of entry[i]. May write n + TOPK_SLACK numbers. */
    void (*place)(uint16_t *bin, const uint64_t *entry, int n, const struct topk_bins *bins);
    /* Turns the counts of bins, a multiple of 32, into the places where bins begin; returns the
     * largest count. */
    uint32_t (*begin)(uint16_t *count, int bins);
    /* Copies to `out`, best first where groups of at most TOPK_NEAR neighbours are all that is out
     * of order. Longer groups come out as some permutation of themselves. */
    void (*settle)(uint64_t *out, const uint64_t *in, int n);
};

extern const struct topk_loops lidx_topk_portable;

struct topk {
    uint64_t *entry; /* caller's, lidx_topk_capacity(k) of them */
    const struct topk_loops *loops;
    uint64_t threshold; /* whatever does not beat it cannot be among the k best */
    int n;
    int n_waiting;    /* scores in the buffer that are no candidates yet ... */
    int64_t position; /* ... and the position of the first of them */
    int k;
    int capacity;
};

static inline int lidx_topk_capacity(int k) {
    return 4 * k + 2 * TOPK_STEP;
}

/* What a cut leaves at most: it usually takes one round to get there. */
static inline int lidx_topk_rough(int k) {
    return k + k / 2;
}

/* Order-preserving integer of a score, -0 as +0. That of NaN lies below -inf's; a smaller one would
 * make a denormal double. */
enum { TOPK_NAN = 1 << 22 };

static inline uint32_t lidx_topk_key(float score) {
    float positive_zero = score + 0.0f;
    uint32_t bits;
    memcpy(&bits, &positive_zero, sizeof bits);
    uint32_t key = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    return score != score ? TOPK_NAN : key;
}

static inline uint64_t lidx_topk_entry(float score, uint32_t position) {
    return (uint64_t)lidx_topk_key(score) << 31 | (~position & INT32_MAX);
}

static inline int32_t lidx_topk_position(uint64_t entry) {
    return (int32_t)(~(uint32_t)entry & INT32_MAX);
}

/* The score back from an entry; NaN is the canonical quiet NaN. */
static inline float lidx_topk_score(uint64_t entry) {
    uint32_t key = (uint32_t)(entry >> 31);
    uint32_t bits = key ^ (key & 0x80000000u ? 0x80000000u : 0xFFFFFFFFu);
    bits = key != TOPK_NAN ? bits : 0x7FC00000u;
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

void lidx_topk_reset(struct topk *t, int k, uint64_t *entry, const struct topk_loops *loops);

/* Where the next n scores, of positions position, position + 1, ..., can be written instead of
 * being pushed: a multiple of 64 bytes from `entry`. NULL when they must be pushed. */
float *lidx_topk_reserve(struct topk *t, int n, int64_t position);

/* n scores of positions position, position + 1, ... */
void lidx_topk_push(struct topk *t, const float *score, int n, int64_t position);

/* The candidates of a list of n <= k, best first, such as another selection's answer. */
void lidx_topk_add(struct topk *t, const uint64_t *sorted, int n);

/* Goes on in another buffer as large if all there is are scores that wait. Where selections end one
 * after the other, one buffer for all of them stays in cache. */
void lidx_topk_move(struct topk *t, uint64_t *entry);

/* The next functions are for selections of which others have a part, and want no scores to wait. */

/* An entry that a few more than n of at least TOPK_SAMPLE candidates reach if a sample of them
 * tells the truth; 0 where it is seen not to. n < t->n. */
uint64_t lidx_topk_guess(const struct topk *t, int n);

/* Drops candidates that cannot be among the k best until at most lidx_topk_rough(k) are left. */
void lidx_topk_cut(struct topk *t);

/* Drops the candidates below a bound, not 0, that k entries reach, here or elsewhere. */
void lidx_topk_raise(struct topk *t, uint64_t bound);

/* How many candidates reach a bound. */
int lidx_topk_count(const struct topk *t, uint64_t bound);

/* Moves the candidates below a bound to `rest`, and returns how many these are. Writes up to
 * TOPK_SLACK entries behind them. */
int lidx_topk_divide(struct topk *t, uint64_t bound, uint64_t *rest);

/* Takes those of n <= lidx_topk_rough(k) entries, in any order, that reach `bound` but not `above`;
 * returns how many reach `above`. */
int lidx_topk_take(struct topk *t, const uint64_t *entry, int n, uint64_t bound, uint64_t above);

/* Reduces to the k best, best first; entry[0..n) is the answer. */
void lidx_topk_sort(struct topk *t);

/* Orders n entries, best first: the k best, the others are lost. Behind them there is room for n
 * more and for n + TOPK_SLACK numbers of bins. */
void lidx_topk_order(const struct topk_loops *loops, uint64_t *entry, int n, int k);

/* The best of two sorted lists, behind each of which there is a 0, which no entry is, or an entry
 * worse than all of both: up to k of them to `out`, best first, and a 0 behind them. Returns how
 * many. */
int lidx_topk_merge(uint64_t *out, int k, const uint64_t *a, int n_a, const uint64_t *b, int n_b);

#endif
