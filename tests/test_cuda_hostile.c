/* SPDX-License-Identifier: Apache-2.0
 *
 * Lengths and page ids out of range on the device: nothing is read or written out of bounds, bad
 * ones act like the nearest good ones and are counted.
 *
 *   lengths    chosen bad lengths against the good ones they stand for
 *   pages      bad page ids against the same keys without their pages
 *   random     any lengths and tables: as with those clamped beforehand
 *
 * The options are cuda_device.h's.
 */
#include "cuda_problem.h"

static uint32_t *error_word;

static uint32_t errors_of_last_run(void) {
    uint32_t n;
    copy_out(&n, error_word, sizeof n);
    MUST(cudaMemset(error_word, 0, sizeof n));
    return n;
}

/* Bad lengths must act like the nearest good ones. Prefix sums that fall make batches overlap:
 * their rows then are anybody's, but stay within bounds. */
static void check_bad_lengths(struct kernel *kernel) {
    static const struct {
        int packed;
        int32_t query[3], key[3], good_query[3], good_key[3];
        uint32_t errors;
        int overlap;
    } cases[] = {
        {0, {9, -1, 4}, {500, 700, -3}, {9, 0, 4}, {500, 500, 0}, 3, 0},
        {0, {INT32_MAX, INT32_MIN, 9}, {INT32_MIN, INT32_MAX, 1}, {9, 0, 9}, {0, 500, 1}, 4, 0},
        {0, {10, 9, 0}, {501, 0, 500}, {9, 9, 0}, {500, 0, 500}, 2, 0},
        {1, {5, 3, 9}, {100, 90, 500}, {5, 5, 9}, {100, 100, 500}, 2, 1},
        {1, {-7, 20, 9}, {INT32_MIN, INT32_MAX, 400}, {0, 9, 9}, {0, 500, 500}, 5, 0},
        {1, {9, 9, 9}, {500, 600, 500}, {9, 9, 9}, {500, 500, 500}, 1, 0},
    };
    struct setup s;
    char text[TEXT] = "";
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        forget();
        setup_make(&s, cases[i].packed, 1, 3, 9, 500, 16, 64, 200, 0, 0, 0);
        s.args.error_word = error_word;
        set_lengths(&s, cases[i].good_query, cases[i].good_key);
        unsigned char *want = answer(&s, kernel);
        CHECK_INT(errors_of_last_run(), 0, "errors counted for good lengths");
        set_lengths(&s, cases[i].query, cases[i].key);
        unsigned char *got = answer(&s, kernel);
        CHECK(got && want && (cases[i].overlap || same_answers(&s, got, want, text)),
              "%s, bad lengths %zu: %s", kernel->name, i, text);
        CHECK_INT(errors_of_last_run(), cases[i].errors, "errors counted for bad lengths");
        free(got);
        free(want);
    }
}

/* The list without the keys of bad pages. */
static void drop_masked(const int32_t *from, const unsigned char *bad, int64_t page_size, int64_t n,
                        int32_t *to, int64_t k) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n && kept < k && from[i] >= 0; i++)
        if (!bad[from[i] / page_size])
            to[kept++] = from[i];
    while (kept < k)
        to[kept++] = -1;
}

static void check_bad_pages(struct kernel *kernel) {
    enum { B = 2, S1 = 6, PAGE = 16, WIDTH = 50, PAGES = 64, ALL = WIDTH * PAGE, K = 300 };
    static int32_t table[B * WIDTH], want_row[K];
    unsigned char bad[B * WIDTH] = {0};
    const int32_t good_lengths[2] = {ALL, ALL - 5}, queries[2] = {S1, S1 - 1};
    struct rng rng = rng_seed(61);
    uint32_t n_bad = 0;
    struct setup s;
    forget();
    setup_make(&s, 0, 0, B, S1, 0, 64, 128, ALL, PAGE, PAGES, WIDTH);
    shuffled_table(table, B * WIDTH, PAGES, &rng);
    copy_in(s.table.data, table, sizeof table);
    set_lengths(&s, queries, good_lengths);
    int32_t *all = (int32_t *)(void *)answer(&s, kernel);
    if (!all)
        return;
    static const int32_t ids[] = {-1, PAGES, INT32_MAX, INT32_MIN, PAGES + 7};
    for (int i = 0; i < B * WIDTH; i++)
        if (rng_below(&rng, 4) == 0) {
            bad[i] = 1;
            n_bad++;
            table[i] = ids[i % 5];
        }
    copy_in(s.table.data, table, sizeof table);
    s.args.sparse_count = K;
    s.out_shape[3] = K;
    s.args.error_word = error_word;
    int32_t *got = (int32_t *)(void *)answer(&s, kernel);
    CHECK_INT(errors_of_last_run(), n_bad, "bad pages counted");
    for (int row = 0; got && row < B * S1; row++) {
        drop_masked(all + row * ALL, bad + row / S1 * WIDTH, PAGE, ALL, want_row, K);
        CHECK(memcmp(got + row * K, want_row, sizeof want_row) == 0,
              "%s: row %d with bad pages is not the good row without their keys", kernel->name,
              row);
    }
    free(got);
    free(all);
}

/* ---- any lengths and tables ------------------------------------------------------------------ */

enum { MOST_BATCH = 300, MOST_WIDTH = 12 }; /* 300: more than a warp of the Hopper kernel sums up */

/* What a case is like, and its lists as a kernel should take them. */
struct hostile {
    int packed, paged, n_batch, page_size, n_pages, width;
    int64_t n_query, n_key; /* limits of the lengths */
    int sorted;             /* no batches overlap */
    int32_t query[MOST_BATCH], key[MOST_BATCH], table[MOST_BATCH * MOST_WIDTH];
    int32_t good_query[MOST_BATCH], good_key[MOST_BATCH];
};

static int32_t any_length(struct rng *rng, int64_t limit) {
    static const int32_t ends[] = {INT32_MIN, INT32_MIN + 1, -1, 0, 1, INT32_MAX - 63, INT32_MAX};
    switch (rng_below(rng, 4)) {
    case 0:
        return ends[rng_below(rng, 7)];
    case 1:
        return (int32_t)rng_next(rng);
    case 2:
        return (int32_t)(limit + rng_between(rng, -2, 70));
    default:
        return (int32_t)rng_between(rng, 0, limit);
    }
}

static int32_t clamped(int32_t x, int64_t low, int64_t high) {
    return (int32_t)(x < low ? low : x > high ? high : x);
}

static int ascending(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static void hostile_lengths(struct rng *rng, int n, int64_t limit, int sorted, int32_t *any,
                            int32_t *good) {
    for (int b = 0; b < n; b++)
        any[b] = any_length(rng, limit);
    if (sorted)
        qsort(any, (size_t)n, sizeof *any, ascending);
    for (int b = 0; b < n; b++)
        good[b] = clamped(any[b], 0, limit);
}

static void hostile_make(struct hostile *h, struct rng *rng) {
    static const int batches[] = {1, 2, 5, 31, 33, 70, MOST_BATCH};
    h->packed = (int)rng_below(rng, 2);
    h->paged = (int)rng_below(rng, 2);
    h->n_batch = batches[rng_below(rng, 7)];
    h->page_size = 16 * (int)rng_between(rng, 1, 5);
    h->n_pages = (int)rng_between(rng, rng_below(rng, 8) ? 1 : 0, 40);
    h->width = (int)rng_between(rng, 1, MOST_WIDTH);
    h->n_query = rng_between(rng, 0, h->packed ? 150 : 9);
    h->n_key = h->paged ? h->width * h->page_size : rng_between(rng, 0, 700);
    h->sorted = !h->packed || rng_below(rng, 4) != 0;
    hostile_lengths(rng, h->n_batch, h->n_query, h->packed && h->sorted, h->query, h->good_query);
    hostile_lengths(rng, h->n_batch, h->n_key, h->packed && !h->paged && h->sorted, h->key,
                    h->good_key);
    for (int i = 0; i < h->n_batch * h->width; i++)
        h->table[i] = rng_below(rng, 5) ? (int32_t)rng_below(rng, (uint64_t)h->n_pages + 1)
                                        : any_length(rng, h->n_pages);
}

/* Beginning and length of batch b; counts a bad length. */
static void extent(const int32_t *list, int packed, int64_t limit, int b, int32_t *begin,
                   int32_t *length, uint32_t *bad) {
    int32_t first = packed && b ? clamped(list[b - 1], 0, limit) : 0;
    *bad += list[b] < first || list[b] > limit;
    *begin = first;
    *length = clamped(list[b], first, limit) - first;
}

static uint32_t errors_of(const struct hostile *h) {
    uint32_t bad = 0;
    for (int b = 0; b < h->n_batch; b++) {
        int32_t begin, n_query, n_key;
        extent(h->query, h->packed, h->n_query, b, &begin, &n_query, &bad);
        extent(h->key, h->packed && !h->paged, h->n_key, b, &begin, &n_key, &bad);
        for (int i = 0; h->paged && n_query && i * h->page_size < n_key; i++) {
            int32_t id = h->table[b * h->width + i];
            bad += id < 0 || id >= h->n_pages;
        }
    }
    return bad;
}

/* Indices within the keys there are, -1 together at the end. */
static int rows_sound(const struct setup *s, const unsigned char *out, int64_t n_key) {
    const int32_t *index = (const int32_t *)(const void *)out;
    int64_t k = s->args.sparse_count;
    for (int64_t i = 0; i < s->rows * k; i++)
        if (index[i] < -1 || index[i] >= n_key || (i % k && index[i - 1] < 0 && index[i] >= 0))
            return 0;
    return 1;
}

static void check_hostile(long number, struct kernel *kernel) {
    static const int heads[] = {8, 16, 32, 64, 128, 3};
    static struct hostile h;
    struct rng rng = rng_seed((uint64_t)number * 7001 + 5);
    struct setup s;
    char text[TEXT] = "";
    hostile_make(&h, &rng);
    forget();
    setup_make(&s, h.packed, (int)rng_below(&rng, 2), h.n_batch, h.n_query, h.n_key,
               heads[rng_below(&rng, 6)], rng_below(&rng, 2) ? 128 : 64,
               (int)rng_between(&rng, 1, 300), h.paged ? h.page_size : 0, h.n_pages, h.width);
    s.args.sparse_mode = rng_below(&rng, 4) ? LIDX_MODE_CAUSAL : LIDX_MODE_FULL;
    s.args.error_word = error_word;
    copy_in(s.table.data, h.table, 4 * (size_t)(h.n_batch * h.width));
    set_lengths(&s, h.query, h.key);
    unsigned char *got = answer(&s, kernel), *want;
    if (!got)
        return;
    CHECK_INT(errors_of_last_run(), s.rows ? errors_of(&h) : 0, "errors counted");
    CHECK(rows_sound(&s, got, h.n_key), "case %ld, %s: an index out of place", number,
          kernel->name);
    if (h.sorted) {
        set_lengths(&s, h.good_query, h.good_key);
        want = answer(&s, kernel);
        CHECK(same_answers(&s, got, want, text), "case %ld, %s: clamped beforehand: %s", number,
              kernel->name, text);
        errors_of_last_run();
        free(want);
    }
    free(got);
}

/* Every second batch has all rows and keys: scored, they would take minutes, and the 32 bits that
 * the Hopper kernel counts its work in do not hold them. */
static void check_overlap(struct kernel *kernel) {
    enum { B = 32768, T = 512, KEYS = 65536 };
    static int32_t query[B], key[B];
    struct setup s;
    forget();
    setup_make(&s, 1, 1, B, T, KEYS, 128, 64, 100, 0, 0, 0);
    for (int b = 0; b < B; b++) {
        query[b] = b % 2 ? T : 0;
        key[b] = b % 2 ? KEYS : 0;
    }
    s.args.error_word = error_word;
    set_lengths(&s, query, key);
    unsigned char *got = answer(&s, kernel);
    CHECK(got && rows_sound(&s, got, KEYS), "%s: batches that overlap", kernel->name);
    CHECK_INT(errors_of_last_run(), B - 2, "falling lengths counted");
    free(got);
}

/* ---- main ------------------------------------------------------------------------------------ */

int main(int argc, char **argv) {
    if (!device_open(argc, argv))
        return 77;
    MUST(cudaMalloc((void **)&error_word, sizeof *error_word));
    MUST(cudaMemset(error_word, 0, sizeof *error_word));
    long cases = options.sanitizer ? 24 : options.quick ? 100 : 600;
    if (options.cases >= 0)
        cases = options.cases;
    for (int i = 0; i < n_kernels; i++) {
        if (options.first == 0) {
            check_bad_lengths(&kernels[i]);
            check_bad_pages(&kernels[i]);
            if (!options.sanitizer)
                check_overlap(&kernels[i]);
        }
        for (long number = options.first; number < options.first + cases; number++)
            check_hostile(number, &kernels[i]);
    }
    CHECK(device_close(), "a kernel took nothing");
    return test_end();
}
