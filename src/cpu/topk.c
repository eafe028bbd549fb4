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
 */
#include "topk.h"

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

static int below(uint64_t *out, const uint64_t *entry, int n, uint64_t bound) {
    int copied = 0;
    for (int i = 0; i < n; i++) {
        out[copied] = entry[i];
        copied += entry[i] < bound;
    }
    return copied;
}

static int count(const uint64_t *entry, int n, uint64_t bound) {
    int counted = 0;
    for (int i = 0; i < n; i++)
        counted += entry[i] >= bound;
    return counted;
}

const struct topk_loops lidx_topk_portable = {filter, range, keep, below, count, NULL, NULL, NULL};

void lidx_topk_reset(struct topk *t, int k, uint64_t *entry, const struct topk_loops *loops) {
    *t = (struct topk){
        .entry = entry, .loops = loops, .k = k, .capacity = lidx_topk_capacity(k) - TOPK_SLACK};
}

/* Counts entries by bin; those outside of the range are left out. */
static void count_bins(uint16_t count[TOPK_BINS], const uint64_t *entry, int n, struct topk_range r,
                       int shift) {
    uint64_t span = r.high - r.low;
    memset(count, 0, sizeof *count * TOPK_BINS);
    for (int i = 0; i < n; i++) {
        uint64_t above = entry[i] - r.low; /* huge when below */
        if (above <= span)
            count[above >> shift]++;
    }
}

void lidx_topk_raise(struct topk *t, uint64_t bound) {
    t->n = t->loops->keep(t->entry, t->n, bound);
    if (t->threshold < bound - 1) /* others may have told of a better one */
        t->threshold = bound - 1;
}

/* A round finds the bin in which the k-th largest lies and drops what is below it; the next looks
 * into that bin alone. Entries are distinct, so that `most` = k can be had. */
static void cut_by_bins(struct topk *t, int most) {
    uint16_t bin_count[TOPK_BINS];
    struct topk_range r = t->loops->range(t->entry, t->n);
    int above = 0; /* entries above r.high */
    do {
        int shift = lidx_topk_shift(r, TOPK_BITS);
        count_bins(bin_count, t->entry, t->n, r, shift);
        int bin = (int)((r.high - r.low) >> shift);
        while (above + bin_count[bin] < t->k)
            above += bin_count[bin--];
        uint64_t low = r.low + ((uint64_t)bin << shift);
        uint64_t last = low + (((uint64_t)1 << shift) - 1);
        r.high = last < r.high ? last : r.high;
        r.low = low;
        lidx_topk_raise(t, low);
    } while (t->n > most);
}

/* Of the number of a sample that reach what `rank` of it do on average, rounded up. */
static int deviation_of(int rank) {
    int deviation = 1;
    while (deviation * deviation * TOPK_SAMPLE < rank * (TOPK_SAMPLE - rank))
        deviation++;
    return deviation;
}

/* How many of a sample of n are to reach a bound that k of n shall reach, and few more: two
 * standard deviations more than would on average. */
static int sample_rank(int k, int n) {
    int rank = (int)((int64_t)k * TOPK_SAMPLE / n);
    rank += 2 * deviation_of(rank) + 1;
    return rank < TOPK_SAMPLE ? rank : TOPK_SAMPLE;
}

/* What `rank` or up to `rank` / 32 more entries of a sample reach, by halving. */
static uint64_t bound_of_sample(const struct topk_loops *loops, const uint64_t *sample, int rank) {
    struct topk_range r = loops->range(sample, TOPK_SAMPLE);
    while (r.high - r.low > 1) { /* enough reach low, too few reach high, if not all are one */
        uint64_t middle = r.low + (r.high - r.low) / 2;
        int reach = loops->count(sample, TOPK_SAMPLE, middle);
        if (reach < rank)
            r.high = middle;
        else
            r.low = middle;
        if (reach >= rank && reach <= rank + rank / 32)
            break;
    }
    return r.low;
}

/* An entry that a few more than n of the candidates reach, if the sample, spread evenly over them,
 * tells the truth. */
static uint64_t guess_bound(const struct topk *t, int n, uint64_t sample[TOPK_SAMPLE]) {
    for (int i = 0; i < TOPK_SAMPLE; i++)
        sample[i] = t->entry[i * t->n / TOPK_SAMPLE];
    return bound_of_sample(t->loops, sample, sample_rank(n, t->n));
}

/* Cuts the n > k entries to at least k of the best and at most `most` (>= k). */
static void cut(struct topk *t, int most) {
    if (t->n >= 4 * TOPK_SAMPLE) {
        uint64_t sample[TOPK_SAMPLE], bound = guess_bound(t, t->k, sample);
        int reach = t->loops->count(t->entry, t->n, bound);
        if (reach >= t->k && reach < t->n)
            lidx_topk_raise(t, bound);
    }
    if (t->n > most)
        cut_by_bins(t, most);
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
    uint64_t sample[TOPK_SAMPLE + TOPK_SLACK];
    float score[TOPK_SAMPLE];
    int stride = t->n_waiting / TOPK_SAMPLE;
    for (int i = 0; i < TOPK_SAMPLE; i++)
        score[i] = waiting(t)[i * stride];
    t->loops->filter(sample, score, TOPK_SAMPLE, (uint32_t)t->position, 0);
    for (int i = 0; i < TOPK_SAMPLE; i++) /* of equal scores, bounds tell the first */
        sample[i] -= (uint64_t)i * (uint64_t)(stride - 1);
    return bound_of_sample(t->loops, sample, sample_rank(t->k, t->n_waiting));
}

/* Makes candidates of the scores that wait, in this buffer or in another. Should the sample have
 * misled, what beats its bound is less than k and has taken no score's place. */
static void end_wait(struct topk *t, uint64_t *entry) {
    const float *score = waiting(t);
    int n = t->n_waiting;
    if (t->threshold == 0 && n >= 4 * TOPK_SAMPLE && n > lidx_topk_rough(t->k)) {
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
    cut(t, lidx_topk_rough(t->k));
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

/* Where the first candidates are better than the last by more than chance the sample tells of them
 * alone, and others' are likely to be worse. */
uint64_t lidx_topk_guess(const struct topk *t, int n) {
    enum { HALF = TOPK_SAMPLE / 2 };
    uint64_t sample[TOPK_SAMPLE], bound = guess_bound(t, n, sample);
    int first = t->loops->count(sample, HALF, bound);
    int last = t->loops->count(sample + HALF, HALF, bound);
    return first - last > 4 * deviation_of(first + last) ? 0 : bound;
}

void lidx_topk_cut(struct topk *t) {
    if (t->n > lidx_topk_rough(t->k))
        make_room(t);
}

int lidx_topk_count(const struct topk *t, uint64_t bound) {
    return t->loops->count(t->entry, t->n, bound);
}

int lidx_topk_divide(struct topk *t, uint64_t bound, uint64_t *rest) {
    int n_rest = t->loops->below(rest, t->entry, t->n, bound);
    t->n = t->loops->keep(t->entry, t->n, bound);
    return n_rest;
}

int lidx_topk_take(struct topk *t, const uint64_t *entry, int n, uint64_t bound, uint64_t above) {
    int n_above = 0;
    if (t->n + n > t->capacity)
        make_room(t);
    for (int i = 0; i < n; i++) {
        t->entry[t->n] = entry[i];
        t->n += entry[i] >= bound && entry[i] < above;
        n_above += entry[i] >= above;
    }
    return n_above;
}

void lidx_topk_sort(struct topk *t) {
    lidx_topk_move(t, t->entry);
    lidx_topk_cut(t); /* fewer are binned with the others more quickly than cut away */
    lidx_topk_order(t->loops, t->entry, t->n, t->k);
    t->n = t->n < t->k ? t->n : t->k;
}
