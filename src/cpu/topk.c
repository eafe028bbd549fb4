/* SPDX-License-Identifier: Apache-2.0
 *
 * Candidates that beat a threshold are appended to a buffer of 4k entries; when it is full the
 * buffer is cut back to k..1.5k and the threshold rises. Most keys of a long row then cost one
 * comparison. As long as there is no threshold, scores may wait in that buffer until a sample of
 * them gives one.
 *
 * A cut takes its bound from a sorted sample. Where the sample misleads, the range that the entries
 * span is divided into 2^11 equal bins, and the bin in which the k-th largest lies is looked into
 * in the same way, so that a cut ends whatever the input: each round uses up 11 bits of 64.
 *
 * Ordering scatters the entries into as many bins, so that scores crowded around +100 or spread
 * over 1e-8 are resolved alike. A bin then holds a few entries, and what is left is to settle
 * neighbours, which vector units do without a branch; where there are none, a second pass scatters
 * into 2^22 bins. A bin that holds many is ordered again in its own, narrower range.
 */
#include "topk.h"

#include <float.h>

enum {
    BITS = 11, /* of a bin number or a radix digit: 4 KiB of counters, a small part of L1 */
    BINS = 1 << BITS,
    INSERTION_MAX = 32, /* up to here, insertion sort */
    SAMPLE = 256,       /* entries of which a cut takes its bound */
};

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

static int count(const uint64_t *entry, int n, uint64_t bound) {
    int counted = 0;
    for (int i = 0; i < n; i++)
        counted += entry[i] >= bound;
    return counted;
}

const struct topk_loops lidx_topk_portable = {filter, range, keep, count, NULL, NULL, NULL};

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
static void count_bins(uint16_t count[BINS], const uint64_t *entry, int n, struct topk_range r,
                       int shift) {
    uint64_t span = r.high - r.low;
    memset(count, 0, sizeof *count * BINS);
    for (int i = 0; i < n; i++) {
        uint64_t above = entry[i] - r.low; /* huge when below */
        if (above <= span)
            count[above >> shift]++;
    }
}

/* Where cutting and sorting work: room for n entries and, if the loops use bin numbers, n of these.
 * 8 KiB of stack, so a caller has one and passes it down. Counters need 16 bits: a buffer for the
 * largest k has 34816 entries. */
struct bench {
    const struct topk_loops *loops;
    uint64_t *spare;
    uint16_t *bin;
    uint16_t end[BINS];
    uint16_t fine[BINS];
};

/* Drops what is below `bound`, which at least k entries reach. */
static void drop_below(struct topk *t, uint64_t bound) {
    t->n = t->loops->keep(t->entry, t->n, bound);
    if (t->threshold < bound - 1) /* others may have told of a better one */
        t->threshold = bound - 1;
}

/* A round finds the bin in which the k-th largest lies and drops what is below it; the next looks
 * into that bin alone. Entries are distinct, so that `most` = k can be had. */
static void cut_by_bins(struct bench *b, struct topk *t, int most) {
    uint16_t *bin_count = b->end;
    struct topk_range r = t->loops->range(t->entry, t->n);
    int above = 0; /* entries above r.high */
    do {
        int shift = range_shift(r, BITS);
        count_bins(bin_count, t->entry, t->n, r, shift);
        int bin = (int)((r.high - r.low) >> shift);
        while (above + bin_count[bin] < t->k)
            above += bin_count[bin--];
        uint64_t low = r.low + ((uint64_t)bin << shift);
        uint64_t last = low + (((uint64_t)1 << shift) - 1);
        r.high = last < r.high ? last : r.high;
        r.low = low;
        drop_below(t, low);
    } while (t->n > most);
}

static void sort(struct bench *b, uint64_t *entry, int n, int k);

/* How many of a sample of n are to reach a bound that k of n shall reach, and few more: two
 * standard deviations more than would on average. */
static int sample_rank(int k, int n) {
    int rank = (int)((int64_t)k * SAMPLE / n), deviation = 1;
    while (deviation * deviation * SAMPLE < rank * (SAMPLE - rank))
        deviation++;
    rank += 2 * deviation + 1;
    return rank < SAMPLE ? rank : SAMPLE;
}

/* What `rank` or up to `rank` / 32 more entries of a sample reach, by halving. */
static uint64_t bound_of_sample(const struct topk_loops *loops, const uint64_t *sample, int rank) {
    struct topk_range r = loops->range(sample, SAMPLE);
    while (r.high - r.low > 1) { /* enough reach low, too few reach high, if not all are one */
        uint64_t middle = r.low + (r.high - r.low) / 2;
        int reach = loops->count(sample, SAMPLE, middle);
        if (reach < rank)
            r.high = middle;
        else
            r.low = middle;
        if (reach >= rank && reach <= rank + rank / 32)
            break;
    }
    return r.low;
}

/* A bound that a few more than k of n entries reach, if a sample spread evenly over them tells the
 * truth. */
static uint64_t guess_bound(const struct topk *t) {
    uint64_t sample[SAMPLE];
    int stride = t->n / SAMPLE;
    for (int i = 0; i < SAMPLE; i++)
        sample[i] = t->entry[i * stride];
    return bound_of_sample(t->loops, sample, sample_rank(t->k, t->n));
}

/* What a cut may leave: it usually takes one round to get there. */
static int rough(int k) {
    return k + k / 2;
}

/* Cuts the n > k entries to at least k of the best and at most `most` (>= k). */
static void cut(struct bench *b, struct topk *t, int most) {
    if (t->n >= 4 * SAMPLE) {
        uint64_t bound = guess_bound(t);
        int reach = t->loops->count(t->entry, t->n, bound);
        if (reach >= t->k && reach < t->n)
            drop_below(t, bound);
    }
    if (t->n > most)
        cut_by_bins(b, t, most);
}

/* ---- scores that wait ------------------------------------------------------------------------
 *
 * They take half the room of candidates, and most never become any. Who computes them writes them
 * where they wait.
 */

/* How many can wait: as many as there is room for as candidates. */
static int waiting_room(const struct topk *t) {
    return t->capacity - TOPK_SLACK;
}

/* They end where the buffer does, so that candidates of the first i end before the others. */
static float *waiting(const struct topk *t) {
    int end = 2 * lidx_topk_capacity(t->k), aligned = (end - waiting_room(t)) / 16 * 16;
    return (float *)(void *)t->entry + aligned;
}

float *lidx_topk_reserve(struct topk *t, int n, int64_t position) {
    int waits = t->n_waiting;
    if (t->threshold || t->n || waits + n > waiting_room(t) || waits % 16)
        return NULL;
    if (waits == 0)
        t->position = position;
    else if (position != t->position + waits)
        return NULL;
    t->n_waiting += n;
    return waiting(t) + waits;
}

static uint64_t guess_waiting_bound(const struct topk *t) {
    uint64_t sample[SAMPLE + TOPK_SLACK];
    float score[SAMPLE];
    int stride = t->n_waiting / SAMPLE;
    for (int i = 0; i < SAMPLE; i++)
        score[i] = waiting(t)[i * stride];
    t->loops->filter(sample, score, SAMPLE, (uint32_t)t->position, 0);
    for (int i = 0; i < SAMPLE; i++) /* of equal scores, bounds tell the first */
        sample[i] -= (uint64_t)i * (uint64_t)(stride - 1);
    return bound_of_sample(t->loops, sample, sample_rank(t->k, t->n_waiting));
}

/* Makes candidates of the scores that wait, in this buffer or in another. Should the sample have
 * misled, what beats its bound is less than k and has taken no score's place. */
static void end_wait(struct topk *t, uint64_t *entry) {
    const float *score = waiting(t);
    int n = t->n_waiting;
    if (t->threshold == 0 && n >= 4 * SAMPLE && n > rough(t->k)) {
        uint64_t bound = guess_waiting_bound(t);
        t->n = t->loops->filter(entry, score, n, (uint32_t)t->position, bound - 1);
        if (t->n >= t->k)
            t->threshold = bound - 1;
    }
    if (t->n < t->k)
        t->n = t->loops->filter(entry, score, n, (uint32_t)t->position, t->threshold);
    t->entry = entry;
    t->n_waiting = 0;
}

void lidx_topk_move(struct topk *t, uint64_t *entry) {
    if (t->n_waiting)
        end_wait(t, entry);
}

static void make_room(struct topk *t) {
    struct bench b;
    b.loops = t->loops;
    cut(&b, t, rough(t->k));
}

void lidx_topk_push(struct topk *t, const float *score, int n, int64_t position) {
    lidx_topk_move(t, t->entry);
    for (int step; n > 0; n -= step, score += step, position += step) {
        step = n < TOPK_STEP ? n : TOPK_STEP;
        if (t->n + step > t->capacity)
            make_room(t);
        t->n += t->loops->filter(t->entry + t->n, score, step, (uint32_t)position, t->threshold);
    }
}

/* How many of a sorted list beat the threshold. */
static int count_beating(const uint64_t *sorted, int n, uint64_t threshold) {
    int low = 0;
    while (low < n) {
        int middle = low + (n - low) / 2;
        if (sorted[middle] > threshold)
            low = middle + 1;
        else
            n = middle;
    }
    return low;
}

void lidx_topk_add(struct topk *t, const uint64_t *sorted, int n) {
    lidx_topk_move(t, t->entry);
    n = count_beating(sorted, n, t->threshold);
    if (t->n + n > t->capacity) {
        make_room(t);
        n = count_beating(sorted, n, t->threshold);
    }
    memcpy(t->entry + t->n, sorted, sizeof *sorted * (size_t)n);
    t->n += n;
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

/* About one bin an entry: with fewer entries, clearing and summing bins would be most of it. */
static int digit_bits(int n) {
    int bits = 32 - __builtin_clz((unsigned)(n - 1));
    return bits < BITS ? bits : BITS;
}

/* Equal parts of the range of entries. Within a sign these are parts of the scores' binary
 * logarithm, about: they suit scores with a long tail as well as others. */
static struct topk_bins bins_of(struct topk_range r, int bits) {
    return (struct topk_bins){
        .high = r.high, .shift = range_shift(r, bits), .last = (1 << bits) - 1};
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

void lidx_topk_sort(struct topk *t) {
    struct bench b;
    b.loops = t->loops;
    lidx_topk_move(t, t->entry);
    if (t->n > rough(t->k)) /* fewer are binned with the others more quickly than cut away */
        cut(&b, t, rough(t->k));
    b.spare = t->entry + t->n;
    b.bin = (uint16_t *)(void *)(b.spare + t->n);
    sort(&b, t->entry, t->n, t->k);
    t->n = t->n < t->k ? t->n : t->k;
}
