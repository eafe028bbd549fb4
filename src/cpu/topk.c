/* SPDX-License-Identifier: Apache-2.0
 *
 * Candidates that beat a threshold are appended to a buffer of 4k entries; when it is full the
 * buffer is cut back to k..1.5k and the threshold rises. Most keys of a long row then cost one
 * comparison.
 *
 * Cutting and ordering both look at the range that the entries really span, so that scores
 * crowded around +100 or spread over 1e-8 are resolved alike: cutting divides the range into 2^11
 * equal bins and counts; ordering is a radix sort on the highest bits, 22 at most, in which the
 * entries differ. A bin or a run that is not resolved by these bits is treated the same way again,
 * with its own, narrower range: each round uses up 11 bits or more of 64, whatever the input.
 */
#include "topk.h"

#include "../dtype.h"

enum {
    BITS = 11, /* of a bin number or a radix digit: 8 KiB of counters, which fits L1 */
    BINS = 1 << BITS,
    INSERTION_MAX = 32, /* up to here, insertion sort */
};

float lidx_topk_score(uint64_t entry) {
    uint32_t key = (uint32_t)(entry >> 32);
    if (key == 0)
        return lidx_float_from_bits(0x7FC00000u);
    return lidx_float_from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

static int filter(uint64_t *entry, const float *score, int n, uint32_t position,
                  uint64_t threshold) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        uint64_t candidate = lidx_topk_entry(score[i], position + (uint32_t)i);
        entry[kept] = candidate;
        kept += candidate > threshold;
    }
    return kept;
}

static struct topk_range range(const uint64_t *entry, int n) {
    struct topk_range r = {entry[0], entry[0]};
    for (int i = 1; i < n; i++) {
        r.low = entry[i] < r.low ? entry[i] : r.low;
        r.high = entry[i] > r.high ? entry[i] : r.high;
    }
    return r;
}

static int keep(uint64_t *entry, int n, uint64_t bound) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        uint64_t e = entry[i];
        entry[kept] = e;
        kept += e >= bound;
    }
    return kept;
}

const struct topk_loops lidx_topk_portable = {filter, range, keep};

void lidx_topk_reset(struct topk *t, int k, uint64_t *entry, const struct topk_loops *loops) {
    *t = (struct topk){
        .entry = entry, .loops = loops, .k = k, .capacity = lidx_topk_capacity(k) - TOPK_SLACK};
}

/* The shift that brings high - low into `bits` bits. */
static int range_shift(struct topk_range r, int bits) {
    uint64_t span = r.high - r.low;
    int width = span ? 64 - __builtin_clzll(span) : 0;
    return width > bits ? width - bits : 0;
}

/* Counts entries by bin; those outside of the range are left out. */
static void count_bins(uint32_t count[BINS], const uint64_t *entry, int n, struct topk_range r,
                       int shift) {
    uint64_t span = r.high - r.low;
    memset(count, 0, sizeof *count * BINS);
    for (int i = 0; i < n; i++) {
        uint64_t above = entry[i] - r.low; /* huge when below */
        if (above <= span)
            count[above >> shift]++;
    }
}

/* Cuts the n > k entries to at least k of the best and at most `most` (>= k). A round finds the
 * bin in which the k-th largest lies and drops what is below it; the next looks into that bin
 * alone. Entries are distinct, so that `most` = k can be had. */
static void cut(struct topk *t, int most) {
    uint32_t count[BINS];
    struct topk_range r = t->loops->range(t->entry, t->n);
    int above = 0; /* entries above r.high */
    do {
        int shift = range_shift(r, BITS);
        count_bins(count, t->entry, t->n, r, shift);
        int bin = (int)((r.high - r.low) >> shift);
        while (above + (int)count[bin] < t->k)
            above += (int)count[bin--];
        uint64_t low = r.low + ((uint64_t)bin << shift);
        uint64_t last = low + (((uint64_t)1 << shift) - 1);
        r.high = last < r.high ? last : r.high;
        r.low = low;
        t->n = t->loops->keep(t->entry, t->n, low);
    } while (t->n > most);
    t->threshold = r.low - 1; /* what beats this is at or above the last bin */
}

void lidx_topk_push(struct topk *t, const float *score, int n, int64_t position) {
    if (t->n + n > t->capacity)
        cut(t, t->k + t->k / 2); /* a rough cut usually takes one round */
    t->n += t->loops->filter(t->entry + t->n, score, n, (uint32_t)position, t->threshold);
}

/* How many of the n best of two sorted lists are a's. */
static int count_from_a(int n, const uint64_t *a, int n_a, const uint64_t *b, int n_b) {
    int low = n > n_b ? n - n_b : 0, high = n < n_a ? n : n_a;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (a[middle] > b[n - middle - 1])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Merges from both ends at once: two chains of loads and comparisons that do not wait for each
 * other take half the time of one. */
int lidx_topk_merge(uint64_t *out, int k, const uint64_t *a, int n_a, const uint64_t *b, int n_b) {
    int n = n_a + n_b < k ? n_a + n_b : k;
    int last_a = count_from_a(n, a, n_a, b, n_b) - 1, last_b = n - last_a - 2;
    const uint64_t *first_a = a, *first_b = b;
    for (int front = 0, back = n - 1; front <= back; front++, back--) {
        uint64_t worst_a = last_a >= 0 ? a[last_a] : UINT64_MAX;
        uint64_t worst_b = last_b >= 0 ? b[last_b] : UINT64_MAX;
        int front_is_a = *first_a > *first_b, back_is_a = worst_a < worst_b;
        out[front] = front_is_a ? *first_a : *first_b;
        first_a += front_is_a;
        first_b += !front_is_a;
        out[back] = back_is_a ? worst_a : worst_b;
        last_a -= back_is_a;
        last_b -= !back_is_a;
    }
    out[n] = 0;
    return n;
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

static void begin_from_count(uint32_t *count, int bins) {
    uint32_t begin = 0;
    for (int b = 0; b < bins; b++) {
        uint32_t n = count[b];
        count[b] = begin;
        begin += n;
    }
}

/* About one bin an entry: with fewer entries, clearing and summing bins would be most of it. */
static int digit_bits(int n) {
    int bits = 32 - __builtin_clz((unsigned)(n - 1));
    return bits < BITS ? bits : BITS;
}

/* Sorts by the two digits of (high - entry) >> shift, ascending: best first. */
static void radix_sort(uint64_t *entry, uint64_t *spare, int n, uint64_t high, int shift,
                       int bits) {
    uint32_t lower[BINS], upper[BINS];
    uint64_t mask = ((uint64_t)1 << bits) - 1;
    memset(lower, 0, sizeof *lower << bits);
    memset(upper, 0, sizeof *upper << bits);
    for (int i = 0; i < n; i++) {
        uint64_t digits = (high - entry[i]) >> shift;
        lower[digits & mask]++;
        upper[digits >> bits]++;
    }
    begin_from_count(lower, 1 << bits);
    begin_from_count(upper, 1 << bits);
    for (int i = 0; i < n; i++)
        spare[lower[(high - entry[i]) >> shift & mask]++] = entry[i];
    for (int i = 0; i < n; i++)
        entry[upper[(high - spare[i]) >> shift >> bits]++] = spare[i];
}

/* Best first; `spare` has room for n. */
static void sort(const struct topk_loops *loops, uint64_t *entry, uint64_t *spare, int n) {
    if (n <= INSERTION_MAX) {
        insertion_sort(entry, n);
        return;
    }
    struct topk_range r = loops->range(entry, n);
    int bits = digit_bits(n), shift = range_shift(r, 2 * bits);
    radix_sort(entry, spare, n, r.high, shift, bits);
    /* What may be out of order are runs that agree in all these bits: rare and short on ordinary
     * scores. Runs of equal scores are long, but in order: they came by ascending position, and
     * the radix sort is stable. */
    for (int i = 1; i < n; i++) {
        if (entry[i - 1] >= entry[i])
            continue;
        uint64_t digits = (r.high - entry[i]) >> shift;
        int first = i - 1, last = i + 1;
        while (first > 0 && (r.high - entry[first - 1]) >> shift == digits)
            first--;
        while (last < n && (r.high - entry[last]) >> shift == digits)
            last++;
        sort(loops, entry + first, spare, last - first);
        i = last;
    }
}

void lidx_topk_sort(struct topk *t) {
    /* A few too many are sorted more quickly than cut away. */
    if (t->n > t->k + t->k / 8)
        cut(t, t->k + t->k / 8);
    sort(t->loops, t->entry, t->entry + t->n, t->n);
    t->n = t->n < t->k ? t->n : t->k;
}
