/* SPDX-License-Identifier: Apache-2.0
 *
 * Ordering of candidates, and of two ordered lists.
 *
 * Ordering scatters the entries into as many bins as there are entries, 2^11 at most, so that
 * scores crowded around +100 or spread over 1e-8 are resolved alike. A bin then holds a few
 * entries, and what is left is to settle neighbours, which vector units do without a branch; where
 * there are none, a second pass scatters into 2^22 bins. A bin that holds many is ordered again in
 * its own, narrower range.
 */
#include "topk.h"

#include <float.h>

enum {
    INSERTION_MAX = 32, /* up to here, insertion sort */
};

/* Where sorting works: room for n entries and, if the loops use bin numbers, n of these. 8 KiB of
 * stack, so a caller has one and passes it down. Counters need 16 bits: a buffer for the largest k
 * has 34816 entries. */
struct bench {
    const struct topk_loops *loops;
    uint64_t *spare;
    uint16_t *bin;
    uint16_t end[TOPK_BINS];
    uint16_t fine[TOPK_BINS];
};

static void sort(struct bench *b, uint64_t *entry, int n, int k);

static void insertion_sort(uint64_t *entry, int n) {
    for (int i = 1; i < n; i++) {
        uint64_t e = entry[i];
        int j = i;
        for (; j > 0 && entry[j - 1] < e; j--)
            entry[j] = entry[j - 1];
        entry[j] = e;
    }
}

/* About one bin an entry: with fewer entries, clearing and summing bins would be most of it. */
static int digit_bits(int n) {
    int bits = 32 - __builtin_clz((unsigned)(n - 1));
    return bits < TOPK_BITS ? bits : TOPK_BITS;
}

/* Equal parts of the range of entries. Within a sign these are parts of the scores' binary
 * logarithm, about: they suit scores with a long tail as well as others. */
static struct topk_bins bins_of(struct topk_range r, int bits) {
    return (struct topk_bins){
        .high = r.high, .shift = lidx_topk_shift(r, bits), .last = (1 << bits) - 1};
}

/* Across zero half of them would lie between the least denormals: there equal parts of the scores
 * are taken, if these are finite. */
static struct topk_bins coarse_bins_of(struct topk_range r, int bits) {
    struct topk_bins bins = bins_of(r, bits);
    if ((r.high ^ r.low) >> 62) {
        bins.best = lidx_topk_score(r.high);
        float span = bins.best - lidx_topk_score(r.low);
        float scale = (float)(1 << bits) / span;
        if (span <= FLT_MAX && scale <= FLT_MAX)
            bins.scale = scale;
    }
    return bins;
}

static int number_of(uint64_t entry, const struct topk_bins *bins) {
    if (bins->scale == 0)
        return (int)((bins->high - entry) >> bins->shift);
    int number = (int)((bins->best - lidx_topk_score(entry)) * bins->scale);
    return number < bins->last ? number : bins->last;
}

/* Scatters to b->spare by bin, each bin's in the order they came. Leaves in b->end where bins end;
 * returns the largest number of entries in a bin. */
static uint32_t scatter(struct bench *b, const uint64_t *entry, int n,
                        const struct topk_bins *bins) {
    b->loops->place(b->bin, entry, n, bins);
    memset(b->end, 0, sizeof *b->end * (size_t)(bins->last + 1));
    for (int i = 0; i < n; i++)
        b->end[b->bin[i]]++;
    uint32_t most = b->loops->begin(b->end, bins->last + 1);
    for (int i = 0; i < n; i++)
        b->spare[b->end[b->bin[i]]++] = entry[i];
    return most;
}

static void begin_from_count(uint16_t *bin, int n_bins) {
    unsigned next = 0;
    for (int i = 0; i < n_bins; i++) {
        unsigned n = bin[i];
        bin[i] = (uint16_t)next;
        next += n;
    }
}

/* Sorts by bin number, in two digits of `bits`. */
static void radix_sort(struct bench *b, uint64_t *entry, int n, const struct topk_bins *bins,
                       int bits) {
    const uint64_t mask = ((uint64_t)1 << bits) - 1, high = bins->high;
    const int shift = bins->shift;
    memset(b->fine, 0, sizeof *b->fine << bits);
    memset(b->end, 0, sizeof *b->end << bits);
    for (int i = 0; i < n; i++) {
        uint64_t number = (high - entry[i]) >> shift;
        b->fine[number & mask]++;
        b->end[number >> bits]++;
    }
    begin_from_count(b->fine, 1 << bits);
    begin_from_count(b->end, 1 << bits);
    for (int i = 0; i < n; i++)
        b->spare[b->fine[(high - entry[i]) >> shift & mask]++] = entry[i];
    for (int i = 0; i < n; i++)
        entry[b->end[(high - b->spare[i]) >> shift >> bits]++] = b->spare[i];
}

/* Orders bins that hold several entries. Equal scores fill long ones, but in order: they came by
 * ascending position, and that was kept. */
static void sort_long_bins(struct bench *b, uint64_t *entry, int n, const struct topk_bins *bins) {
    for (int i = 1; i < n; i++) {
        if (entry[i - 1] >= entry[i])
            continue;
        int number = number_of(entry[i], bins), first = i - 1, last = i + 1;
        while (first > 0 && number_of(entry[first - 1], bins) == number)
            first--;
        while (last < n && number_of(entry[last], bins) == number)
            last++;
        sort(b, entry + first, last - first, last - first);
        i = last;
    }
}

/* The k best first, in order; the others are lost. */
static void sort(struct bench *b, uint64_t *entry, int n, int k) {
    if (n <= INSERTION_MAX) {
        insertion_sort(entry, n);
        return;
    }
    const struct topk_range r = b->loops->range(entry, n);
    const int bits = digit_bits(n);
    struct topk_bins bins;
    if (b->loops->settle) {
        bins = coarse_bins_of(r, bits);
        uint32_t most = scatter(b, entry, n, &bins);
        if (k < n) /* the bin of the k-th, all of it, is the last of interest */
            n = b->end[number_of(b->spare[k - 1], &bins)];
        b->loops->settle(entry, b->spare, n);
        if (most <= TOPK_NEAR)
            return;
    } else {
        bins = bins_of(r, 2 * bits);
        radix_sort(b, entry, n, &bins, bits);
    }
    sort_long_bins(b, entry, n, &bins);
}

void lidx_topk_order(const struct topk_loops *loops, uint64_t *entry, int n, int k) {
    struct bench b;
    b.loops = loops;
    b.spare = entry + n;
    b.bin = (uint16_t *)(void *)(b.spare + n);
    sort(&b, entry, n, k);
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
