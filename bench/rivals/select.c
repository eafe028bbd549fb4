/* SPDX-License-Identifier: Apache-2.0
 *
 * The best k of a row of scores in two passes over it: count the scores by their leading 11 bits,
 * which gives the bin of the k-th; keep what lies above that bin, and of the bin itself as many as
 * are still wanted, by quickselect; order the k by a radix sort. No pass depends on the data's
 * order, and the passes can be shared by threads.
 */
#include <string.h>

#include "rivals.h"

static uint32_t ordered_bits(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

static float score_of(uint64_t entry) {
    uint32_t bits = (uint32_t)(entry >> 32);
    float score;
    bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
    memcpy(&score, &bits, sizeof score);
    return score;
}

void share_count(struct share *share, const float *scores, int begin, int end) {
    uint32_t counts[4][BINS]; /* four, so that equal bins in a row do not wait for each other */
    int i = begin;
    memset(counts, 0, sizeof counts);
    for (; i + 4 <= end; i += 4) {
        for (int j = 0; j < 4; j++)
            counts[j][ordered_bits(scores[i + j]) >> 21]++;
    }
    for (; i < end; i++)
        counts[0][ordered_bits(scores[i]) >> 21]++;
    for (int bin = 0; bin < BINS; bin++)
        share->counts[bin] = counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
}

int selection_cut(const struct share *shares, int n_shares, int k) {
    int64_t sum = 0;
    for (int bin = BINS - 1; bin > 0; bin--) {
        for (int s = 0; s < n_shares; s++)
            sum += shares[s].counts[bin];
        if (sum >= k)
            return bin;
    }
    return 0;
}

void share_collect(struct share *share, const float *scores, int begin, int end, int cut) {
    int n_above = 0, n_within = 0;
    for (int i = begin; i < end; i++) { /* no branch: both places are written, one is kept */
        uint32_t bits = ordered_bits(scores[i]);
        uint64_t entry = (uint64_t)bits << 32 | ~(uint32_t)i;
        int bin = (int)(bits >> 21);
        share->above[n_above] = share->within[n_within] = entry;
        n_above += bin > cut;
        n_within += bin == cut;
    }
    share->n_above = n_above;
    share->n_within = n_within;
}

/* Moves the k largest of n to the front. */
static void largest_first(uint64_t *list, int n, int k) {
    int low = 0, high = n - 1;
    while (low < high) {
        uint64_t a = list[low], b = list[low + (high - low) / 2], c = list[high];
        uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int i = low, j = high;
        while (i <= j) {
            while (list[i] > pivot)
                i++;
            while (list[j] < pivot)
                j--;
            if (i <= j) {
                uint64_t swap = list[i];
                list[i++] = list[j];
                list[j--] = swap;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Largest first: three stable passes over the score's bits, then equal scores by position. */
static void sort(uint64_t *list, uint64_t *other, int n) {
    static const int shifts[] = {32, 43, 54};
    for (int pass = 0; pass < 3; pass++) {
        uint32_t places[BINS] = {0}, sum = 0;
        for (int i = 0; i < n; i++)
            places[~(list[i] >> shifts[pass]) & (BINS - 1)]++;
        for (int bin = 0; bin < BINS; bin++) {
            uint32_t count = places[bin];
            places[bin] = sum;
            sum += count;
        }
        for (int i = 0; i < n; i++)
            other[places[~(list[i] >> shifts[pass]) & (BINS - 1)]++] = list[i];
        uint64_t *swap = list;
        list = other;
        other = swap;
    }
    memcpy(other, list, (size_t)n * sizeof *list); /* an odd number of passes */
    list = other;
    for (int i = 1; i < n; i++) {
        uint64_t entry = list[i];
        int j = i;
        for (; j > 0 && list[j - 1] < entry; j--)
            list[j] = list[j - 1];
        list[j] = entry;
    }
}

void selection_finish(const struct share *shares, int n_shares, int k, uint64_t *scratch,
                      int32_t *indices, float *values) {
    int n = 0, n_above;
    for (int s = 0; s < n_shares; s++) {
        memcpy(scratch + n, shares[s].above, (size_t)shares[s].n_above * sizeof *scratch);
        n += shares[s].n_above;
    }
    n_above = n;
    for (int s = 0; s < n_shares; s++) {
        memcpy(scratch + n, shares[s].within, (size_t)shares[s].n_within * sizeof *scratch);
        n += shares[s].n_within;
    }
    largest_first(scratch + n_above, n - n_above, k - n_above);
    sort(scratch, scratch + n, k);
    for (int i = 0; i < k; i++) {
        indices[i] = (int32_t) ~(uint32_t)scratch[i];
        values[i] = score_of(scratch[i]);
    }
}
