/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA score kernels' schedule, compiled for the host: over random lengths (hostile ones
 * too), layouts and slabs, every visible (query row, key tile) of the slab lies in exactly one
 * run, runs are equal, and the closed form agrees with the sum it stands for.
 */
#include "test.h"

#include "../src/cuda/schedule.h"

enum { MAX_BATCH = 64, MAX_QUERY = 160, MAX_KEY = 3000, MAX_TILES = MAX_KEY / TILE_KEYS + 1 };

struct setting {
    struct problem p;
    struct line line;
    int32_t batch_begin;
    int32_t batch_end;
    int64_t n_rows;
    int32_t query_lengths[MAX_BATCH];
    int32_t key_lengths[MAX_BATCH];
};

static int64_t visible[MAX_BATCH * MAX_QUERY];
static uint8_t covered[MAX_BATCH * MAX_QUERY][MAX_TILES];

static int32_t some_length(struct rng *rng, int32_t most) {
    int32_t kind = (int32_t)rng_below(rng, 8);
    return kind == 0 ? 0 : kind == 1 ? most : (int32_t)rng_below(rng, (uint32_t)most + 1);
}

/* Lengths as given, or their prefix sums; returns the sum. Only lengths that are not prefix sums
 * may be hostile here: hostile prefix sums may give one row to two batches. */
static int64_t fill_lengths(struct rng *rng, int32_t *lengths, int64_t n, int32_t most,
                            int packed) {
    int64_t sum = 0;
    for (int64_t b = 0; b < n; b++) {
        int32_t length = some_length(rng, most);
        sum += length;
        lengths[b] = packed ? (int32_t)sum : length;
        if (!packed && rng_below(rng, 20) == 0)
            lengths[b] = rng_below(rng, 2) ? INT32_MIN + length : INT32_MAX - length;
    }
    return sum;
}

static void make_setting(struct rng *rng, struct setting *s) {
    memset(s, 0, sizeof *s);
    struct problem *p = &s->p;
    int32_t most_query = 1 + (int32_t)rng_below(rng, rng_below(rng, 2) ? MAX_QUERY : 4);
    int32_t most_key = 1 + (int32_t)rng_below(rng, rng_below(rng, 2) ? MAX_KEY : 100);
    p->n_batch = 1 + rng_below(rng, rng_below(rng, 4) ? 5 : MAX_BATCH);
    p->query_packed = (int32_t)rng_below(rng, 2);
    p->key_packed = p->query_packed && rng_below(rng, 2);
    p->sparse_mode = rng_below(rng, 3) ? 3 : 0;
    int64_t queries = fill_lengths(rng, s->query_lengths, p->n_batch, most_query, p->query_packed);
    int64_t keys = fill_lengths(rng, s->key_lengths, p->n_batch, most_key, p->key_packed);
    p->n_query = p->query_packed ? queries : most_query;
    p->n_key = p->key_packed ? keys : most_key;
    p->query_lengths = p->query_packed || rng_below(rng, 4) ? s->query_lengths : NULL;
    p->key_lengths = p->key_packed || rng_below(rng, 4) ? s->key_lengths : NULL;
    s->n_rows = p->query_packed ? p->n_query : p->n_batch * p->n_query;
    if (!s->n_rows)
        return;
    struct line *line = &s->line;
    line->block_shift = (int32_t)rng_below(rng, 7);
    line->charge = (int32_t)rng_below(rng, 4);
    line->row_begin = rng_below(rng, 2) ? rng_below(rng, (uint32_t)s->n_rows) : 0;
    line->row_end = s->n_rows;
    if (rng_below(rng, 2))
        line->row_end =
            line->row_begin + 1 + rng_below(rng, (uint32_t)(s->n_rows - line->row_begin));
    batches_of_line(p, line, &s->batch_begin, &s->batch_end);
}

static void find_visible(const struct setting *s) {
    memset(visible, 0, sizeof visible);
    memset(covered, 0, sizeof covered);
    for (int64_t b = 0; b < s->p.n_batch; b++) {
        struct extent e = lidx_extent(&s->p, b);
        int64_t row = s->p.query_packed ? e.query_begin : b * s->p.n_query;
        for (int64_t i = 0; i < e.n_slots; i++)
            visible[row + i] = lidx_visible(&s->p, &e, i);
    }
}

/* Sums item by item what places_before gives at once. */
static int64_t check_places(const struct setting *s, long number) {
    int64_t total = 0;
    for (int32_t b = s->batch_begin; b < s->batch_end; b++) {
        struct batch_part part = part_of_batch(&s->p, &s->line, b);
        int64_t sum = 0;
        for (int32_t item = 0; item < part.n_items; item++) {
            CHECK(places_before(&s->p, &s->line, &part, item) == sum,
                  "setting %ld, batch %d, item %d", number, b, item);
            int32_t places = item_places(&s->p, &s->line, &part, item);
            int32_t tiles = item_tiles(&s->p, &s->line, &part, item);
            CHECK(!tiles || places >= tiles + s->line.charge,
                  "setting %ld, batch %d, item %d: %d tiles in %d places", number, b, item, tiles,
                  places);
            CHECK((item < first_item(&s->p, &s->line, &part)) == (places == 0),
                  "setting %ld, batch %d, item %d is blind", number, b, item);
            sum += places;
        }
        if (part.n_items)
            CHECK(places_before(&s->p, &s->line, &part, part.n_items) == sum,
                  "setting %ld, batch %d, all items", number, b);
        total += sum;
    }
    return total;
}

/* The cursor of the run's first place, as a CTA finds it. */
static struct cursor find_start(const struct setting *s, int64_t first, int64_t behind) {
    int64_t before = 0;
    for (int32_t b = s->batch_begin; b < s->batch_end; b++) {
        struct batch_part part = part_of_batch(&s->p, &s->line, b);
        int64_t places = part.n_items ? places_before(&s->p, &s->line, &part, part.n_items) : 0;
        if (first < before + places) {
            int32_t item = item_at(&s->p, &s->line, &part, first - before);
            before += places_before(&s->p, &s->line, &part, item);
            return (struct cursor){b, item, (int32_t)(before - first), (int32_t)(behind - first)};
        }
        before += places;
    }
    CHECK(0, "no batch has place %lld", (long long)first);
    return (struct cursor){0, 0, 0, 0};
}

static void cover_item(const struct setting *s, const struct cursor *c,
                       const struct batch_part *part, int32_t item, long number) {
    int32_t begin, end, tiles = item_tiles(&s->p, &s->line, part, item);
    tiles_of_cursor(&s->line, c, tiles, &begin, &end);
    int64_t row = s->p.query_packed ? part->query_begin : (int64_t)c->batch * s->p.n_query;
    int32_t query = part->first + (item << s->line.block_shift);
    for (int32_t i = query; i < query + (1 << s->line.block_shift) && i < part->last; i++) {
        CHECK(row + i >= s->line.row_begin && row + i < s->line.row_end, "setting %ld: row %lld",
              number, (long long)(row + i));
        CHECK(part_visible(&s->p, part, i) == visible[row + i], "setting %ld: row %lld", number,
              (long long)(row + i));
        for (int32_t tile = begin; tile < end; tile++)
            covered[row + i][tile]++;
    }
}

static void walk_run(const struct setting *s, struct cursor c, long number) {
    struct batch_part part = part_of_batch(&s->p, &s->line, c.batch);
    while (c.at < c.span) {
        if (c.item >= part.n_items) {
            if (++c.batch >= s->batch_end)
                break;
            part = part_of_batch(&s->p, &s->line, c.batch);
            c.item = part.n_items ? first_item(&s->p, &s->line, &part) : 0;
            continue;
        }
        cover_item(s, &c, &part, c.item, number);
        c.at += item_places(&s->p, &s->line, &part, c.item);
        c.item++;
    }
}

static void check_covered(const struct setting *s, long number) {
    long wrong = 0;
    for (int64_t row = 0; row < s->n_rows; row++) {
        int inside = row >= s->line.row_begin && row < s->line.row_end;
        for (int64_t tile = 0; tile * TILE_KEYS < visible[row]; tile++)
            wrong += covered[row][tile] != inside;
    }
    CHECK(!wrong, "setting %ld: %ld (row, tile) not covered once", number, wrong);
}

static void check_setting(struct rng *rng, long number) {
    static struct setting s;
    make_setting(rng, &s);
    if (!s.n_rows || !s.p.n_key)
        return;
    find_visible(&s);
    int64_t total = check_places(&s, number), behind = 0;
    int32_t n_cta = 1 + (int32_t)rng_below(rng, 150);
    for (int32_t cta = 0; cta < n_cta; cta++) {
        int64_t first = run_begin(total, cta, n_cta);
        CHECK(first == behind, "setting %ld: run %d begins at its neighbour's end", number, cta);
        behind = run_begin(total, cta + 1, n_cta);
        CHECK(behind - first <= total / n_cta + 1, "setting %ld: run %d is too long", number, cta);
        if (first < behind)
            walk_run(&s, find_start(&s, first, behind), number);
    }
    CHECK(behind == total, "setting %ld: runs end at %lld of %lld", number, (long long)behind,
          (long long)total);
    check_covered(&s, number);
}

int main(void) {
    struct rng rng = rng_seed(1);
    for (long number = 0; number < 2000; number++)
        check_setting(&rng, number);
    return test_end();
}
