/* SPDX-License-Identifier: Apache-2.0
 *
 * Candidates that beat a threshold are appended to a buffer of 4k entries; when it is full the
 * buffer is cut back and the threshold rises. Most keys of a long row then cost one comparison.
 *
 * Cutting and ordering both use histograms over the range that the entries really span: the
 * range (largest minus smallest) is divided into a power of two of equal bins. Scores crowded
 * around +100 or spread over 1e-8 are thus resolved alike. A bin that holds too many is treated
 * the same way again, its range being smaller by the number of bins each time, so that no input
 * takes more than a few rounds.
 */
#include "topk.h"

#include "../dtype.h"

enum {
    SELECT_BITS = 11,   /* bins of a selection round: 8 KiB of counters, fits L1 */
    SORT_BITS_MAX = 12, /* bins of a sorting round */
    INSERTION_MAX = 24, /* below this, insertion sort */
};

float lidx_topk_score(uint64_t entry) {
    uint32_t key = (uint32_t)(entry >> 32);
    if (key == 0)
        return lidx_float_from_bits(0x7FC00000u);
    return lidx_float_from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

void lidx_topk_reset(struct topk *t, int k, uint64_t *entry) {
    *t = (struct topk){.entry = entry, .k = k, .capacity = lidx_topk_capacity(k)};
}

int lidx_topk_filter(uint64_t *entry, const float *score, int n, uint32_t position,
                     uint64_t threshold) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        uint64_t candidate = lidx_topk_entry(score[i], position + (uint32_t)i);
        entry[kept] = candidate;
        kept += candidate > threshold;
    }
    return kept;
}

struct range {
    uint64_t low, high; /* smallest and largest entry */
};

static struct range entry_range(const uint64_t *entry, int n) {
    struct range r = {entry[0], entry[0]};
    for (int i = 1; i < n; i++) {
        r.low = entry[i] < r.low ? entry[i] : r.low;
        r.high = entry[i] > r.high ? entry[i] : r.high;
    }
    return r;
}

/* The shift that maps high - low into `bits` bits. */
static int bin_shift(struct range r, int bits) {
    uint64_t span = r.high - r.low;
    int width = span ? 64 - __builtin_clzll(span) : 0;
    return width > bits ? width - bits : 0;
}

/* Counts entries of [r.low, r.high] into bins; the others are left out. */
static void count_bins(uint32_t *count, int bits, const uint64_t *entry, int n, struct range r,
                       int shift) {
    memset(count, 0, sizeof *count << bits);
    for (int i = 0; i < n; i++)
        if (entry[i] >= r.low && entry[i] <= r.high)
            count[(entry[i] - r.low) >> shift]++;
}

/* A bound such that at least k of the n > k entries are at or above it, and at most `most`
 * (>= k) are. Entries are distinct, so `most` = k finds the k-th largest. */
static uint64_t select_bound(const uint64_t *entry, int n, int k, int most) {
    uint32_t count[1 << SELECT_BITS];
    struct range r = entry_range(entry, n);
    int above = 0; /* entries above r.high */
    for (;;) {
        int shift = bin_shift(r, SELECT_BITS);
        count_bins(count, SELECT_BITS, entry, n, r, shift);
        int bin = (int)((r.high - r.low) >> shift);
        while (above + (int)count[bin] < k)
            above += (int)count[bin--];
        uint64_t low = r.low + ((uint64_t)bin << shift);
        if (above + (int)count[bin] <= most || shift == 0)
            return low;
        uint64_t last = low + (((uint64_t)1 << shift) - 1);
        r.high = last < r.high ? last : r.high;
        r.low = low;
    }
}

static int keep_from(uint64_t *entry, int n, uint64_t bound) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        uint64_t e = entry[i];
        entry[kept] = e;
        kept += e >= bound;
    }
    return kept;
}

/* Cuts the buffer to between k and 1.5k entries; a rough bound usually needs one round. */
static void compact(struct topk *t) {
    uint64_t bound = select_bound(t->entry, t->n, t->k, t->k + t->k / 2);
    t->n = keep_from(t->entry, t->n, bound);
    t->threshold = bound - 1; /* entries equal to the bound are kept, so beat bound - 1 */
}

void lidx_topk_push(struct topk *t, const float *score, int n, int64_t position,
                    topk_filter filter) {
    if (t->n + n > t->capacity)
        compact(t);
    t->n += filter(t->entry + t->n, score, n, (uint32_t)position, t->threshold);
}

void lidx_topk_merge(struct topk *t, const uint64_t *entry, int n) {
    while (n > 0) {
        int step = n < TOPK_STEP ? n : TOPK_STEP;
        if (t->n + step > t->capacity)
            compact(t);
        for (int i = 0; i < step; i++) {
            t->entry[t->n] = entry[i];
            t->n += entry[i] > t->threshold;
        }
        entry += step;
        n -= step;
    }
}

void lidx_topk_select(struct topk *t) {
    if (t->n <= t->k)
        return;
    uint64_t bound = select_bound(t->entry, t->n, t->k, t->k);
    t->n = keep_from(t->entry, t->n, bound);
    t->threshold = bound - 1;
}

static void insertion_sort(uint64_t *entry, int n) {
    for (int i = 1; i < n; i++) {
        uint64_t e = entry[i];
        int j = i;
        for (; j > 0 && entry[j - 1] < e; j--)
            entry[j] = entry[j - 1];
        entry[j] = e;
    }
}

/* Bits of bin number for n entries: one to two bins an entry. */
static int sort_bits(int n) {
    int bits = 33 - __builtin_clz((unsigned)n);
    return bits < SORT_BITS_MAX ? bits : SORT_BITS_MAX;
}

/* Best first. `spare` has room for n. Recursion narrows the range by the number of bins each
 * time, at least 2^5, so it ends within 64 / 5 rounds. */
static void bin_sort(uint64_t *entry, uint64_t *spare, int n) {
    if (n <= INSERTION_MAX) {
        insertion_sort(entry, n);
        return;
    }
    uint32_t begin[(1 << SORT_BITS_MAX) + 1];
    struct range r = entry_range(entry, n);
    int bits = sort_bits(n), n_bins = 1 << bits, shift = bin_shift(r, bits);
    memset(begin, 0, sizeof *begin * (size_t)(n_bins + 1));
    for (int i = 0; i < n; i++)
        begin[((r.high - entry[i]) >> shift) + 1]++;
    for (int b = 0; b < n_bins; b++)
        begin[b + 1] += begin[b];
    for (int i = 0; i < n; i++)
        spare[begin[(r.high - entry[i]) >> shift]++] = entry[i];
    memcpy(entry, spare, sizeof *entry * (size_t)n);
    /* begin[b] is now the end of bin b. Small bins are sorted together, in one pass at the end of
     * each stretch between large ones: an insertion sort over nearly sorted entries. */
    int stretch = 0;
    for (int b = 0, first = 0; b < n_bins; b++) {
        int last = (int)begin[b];
        if (last - first > INSERTION_MAX) {
            insertion_sort(entry + stretch, first - stretch);
            bin_sort(entry + first, spare, last - first);
            stretch = last;
        }
        first = last;
    }
    insertion_sort(entry + stretch, n - stretch);
}

void lidx_topk_sort(struct topk *t) {
    lidx_topk_select(t);
    bin_sort(t->entry, t->entry + t->n, t->n);
}
