/* SPDX-License-Identifier: Apache-2.0
 *
 * The selection against a plain sort of all scores: adversarial streams, every k, the vector forms
 * of its loops against the portable ones, and partial answers brought together.
 */
#include "test.h"

#include "../src/cpu/features.h"
#include "../src/cpu/kernels.h"
#include "../src/cpu/topk.h"

#include "plain_sort.h"

enum stream {
    RANDOM,
    ZEROS,
    FEW_LEVELS,
    CROWDED, /* +100 and a little */
    TINY,    /* 1e-8 */
    DENORMALS,
    RISING,
    FALLING,
    SAWTOOTH,
    EQUAL,
    ANY_BITS, /* inf, NaN, -0 and all */
    NEARLY_EQUAL,
    LAST_WINS, /* all equal but the last few */
    NEGATIVE,
    LONG_TAIL,  /* many octaves, of one sign */
    BOTH_TAILS, /* many octaves, of both signs */
    OUTLIERS,   /* a few far above, a few infinite */
    MOSTLY_ZERO,
    PERIODIC, /* in step with any sample of every 2^n-th */
    STREAMS
};

static float sample(enum stream stream, struct rng *rng, int i, int n) {
    switch (stream) {
    case ZEROS:
        return rng_below(rng, 2) ? -0.0f : 0.0f;
    case FEW_LEVELS:
        return (float)rng_between(rng, -2, 2);
    case CROWDED:
        return 100.0f + rng_normal(rng) * 1e-4f;
    case TINY:
        return rng_normal(rng) * 1e-8f;
    case DENORMALS:
        return test_float_from_bits((uint32_t)rng_below(rng, 3000) | (i % 3 ? 0 : 0x80000000u));
    case RISING:
        return (float)i;
    case FALLING:
        return (float)(n - i);
    case SAWTOOTH:
        return (float)(i % 37) - (float)(i % 5) * 0.25f;
    case EQUAL:
        return 3.25f;
    case ANY_BITS:
        return test_float_from_bits((uint32_t)rng_next(rng));
    case NEARLY_EQUAL:
        return test_float_from_bits(0x42C80000u + (uint32_t)rng_below(rng, 3));
    case LAST_WINS:
        return i >= n - 3 ? 2.0f + (float)i : 1.0f;
    case LONG_TAIL:
        return expf(rng_normal(rng) * 8.0f);
    case BOTH_TAILS:
        return expf(rng_normal(rng) * 8.0f) * (rng_below(rng, 2) ? 1.0f : -1.0f);
    case OUTLIERS:
        return rng_below(rng, 100)  ? rng_normal(rng)
               : rng_below(rng, 10) ? rng_normal(rng) * 1e30f
                                    : copysignf(INFINITY, rng_normal(rng));
    case MOSTLY_ZERO:
        return rng_below(rng, 4) ? 0.0f : rng_normal(rng);
    case PERIODIC:
        return (float)(i % 64) + rng_normal(rng) * 0.01f;
    case NEGATIVE:
        return -fabsf(rng_normal(rng));
    default:
        return rng_normal(rng);
    }
}

/* The first n positions in the contract's order. */
static int32_t *sorted(const float *score, int n, int32_t offset) {
    int32_t *order = malloc(sizeof *order * (size_t)(n + 1));
    plain_sort(order, score, n, 0);
    for (int i = 0; i < n; i++)
        order[i] += offset;
    return order;
}

struct input {
    float *score;
    int32_t *order;
    int n;
    int32_t offset; /* position of the first score */
};

static void push_range(struct topk *t, const struct input *in, int begin, int end,
                       struct rng *rng) {
    while (begin < end) {
        int n = (int)rng_between(rng, 1, rng_below(rng, 4) ? TOPK_STEP : 3 * TOPK_STEP);
        n = rng_below(rng, 2) ? (n + 15) / 16 * 16 : n; /* others can only be the last that wait */
        n = n < end - begin ? n : end - begin;
        float *room = rng_below(rng, 8) ? lidx_topk_reserve(t, n, in->offset + begin) : NULL;
        if (room)
            memcpy(room, in->score + begin, sizeof *room * (size_t)n);
        else
            lidx_topk_push(t, in->score + begin, n, in->offset + begin);
        begin += n;
    }
}

static int same_number(float a, float b) {
    return (isnan(a) && isnan(b)) || a == b;
}

static void check_answer(const struct topk *t, const struct input *in, int k, const char *what) {
    int n = in->n < k ? in->n : k;
    if (!CHECK(t->n == n, "%s: %d of %d entries", what, t->n, n))
        return;
    for (int i = 0; i < n; i++) {
        int32_t position = lidx_topk_position(t->entry[i]);
        float score = in->score[in->order[i] - in->offset];
        if (!CHECK(position == in->order[i], "%s: entry %d is %d, it should be %d", what, i,
                   position, in->order[i]) ||
            !CHECK(same_number(lidx_topk_score(t->entry[i]), score), "%s: score %g became %g", what,
                   (double)score, (double)lidx_topk_score(t->entry[i])))
            return;
    }
}

static struct guard entries(int k) {
    return guard_after(sizeof(uint64_t) * (size_t)lidx_topk_capacity(k));
}

/* One stream in one go. */
static void check_stream(const struct input *in, int k, const struct topk_loops *loops,
                         struct rng *rng, const char *what) {
    struct guard memory = entries(k);
    struct topk t;
    lidx_topk_reset(&t, k, (uint64_t *)(void *)memory.data, loops);
    push_range(&t, in, 0, in->n, rng);
    lidx_topk_sort(&t);
    check_answer(&t, in, k, what);
    guard_free(&memory);
}

/* As many scores wait as there is room for, and of the few best a sample of 256 sees each: it tells
 * of more than there are, and then all are taken, which lie close behind what is made of them. */
static void check_misled(const struct topk_loops *loops, const char *loops_name) {
    static const int ks[] = {100, 340, 846, 2048};
    for (int c = 0; c < 4; c++) {
        int k = ks[c], n = lidx_topk_capacity(k) - 2 * TOPK_SLACK;
        struct input in = {.score = malloc(sizeof *in.score * (size_t)n), .n = n};
        struct guard memory = entries(k);
        struct topk t;
        char what[96];
        snprintf(what, sizeof what, "misled, %s loops, k %d", loops_name, k);
        for (int i = 0; i < n; i++)
            in.score[i] = i % (n / 256) == 0 ? 1.0f : 0.0f;
        in.order = sorted(in.score, n, 0);
        lidx_topk_reset(&t, k, (uint64_t *)(void *)memory.data, loops);
        float *room = lidx_topk_reserve(&t, n, 0);
        if (CHECK(room, "%s: no room for %d scores", what, n)) {
            memcpy(room, in.score, sizeof *room * (size_t)n);
            lidx_topk_sort(&t);
            check_answer(&t, &in, k, what);
        }
        guard_free(&memory);
        free(in.score);
        free(in.order);
    }
}

/* The stream in pieces, each sorted alone, merged in any order. */
static void check_merge(const struct input *in, int k, const struct topk_loops *loops,
                        struct rng *rng, const char *what) {
    enum { PIECES = 5 };
    struct guard piece[PIECES], list[2];
    struct topk part[PIECES], t = {.k = k};
    int begin = 0;
    for (int i = 0; i < PIECES; i++) {
        int end = i == PIECES - 1 ? in->n : (int)rng_between(rng, begin, in->n);
        piece[i] = entries(k);
        lidx_topk_reset(&part[i], k, (uint64_t *)(void *)piece[i].data, loops);
        push_range(&part[i], in, begin, end, rng);
        lidx_topk_sort(&part[i]);
        part[i].entry[part[i].n] = 0;
        CHECK(part[i].n == (end - begin < k ? end - begin : k), "%s: piece keeps %d", what,
              part[i].n);
        begin = end;
    }
    for (int i = 0; i < 2; i++) {
        list[i] = guard_after(sizeof(uint64_t) * ((size_t)k + 1));
        *(uint64_t *)(void *)list[i].data = 0;
    }
    int first = (int)rng_below(rng, PIECES);
    for (int i = 0; i < PIECES; i++) {
        const struct topk *p = &part[(first + i * 2) % PIECES];
        t.entry = (uint64_t *)(void *)list[i % 2].data;
        t.n = lidx_topk_merge(t.entry, k, (uint64_t *)(void *)list[(i + 1) % 2].data, t.n, p->entry,
                              p->n);
        CHECK(t.entry[t.n] == 0, "%s: a merged list of %d has no end", what, t.n);
    }
    check_answer(&t, in, k, what);
    for (int i = 0; i < PIECES; i++)
        guard_free(&piece[i]);
    for (int i = 0; i < 2; i++)
        guard_free(&list[i]);
}

/* How many of a sorted list reach the bound. */
static int reaching(const struct topk *t, uint64_t bound) {
    int n = 0;
    while (n < t->n && t->entry[n] >= bound)
        n++;
    return n;
}

/* The stream in two halves, each sorted alone; what reaches a bound merged, and then the rest: the
 * first lists end where worse entries follow. */
static void check_merged_parts(const struct input *in, int k, const struct topk_loops *loops,
                               struct rng *rng, const char *what) {
    struct guard memory[2] = {entries(k), entries(k)};
    struct guard list = guard_after(sizeof(uint64_t) * ((size_t)k + 1));
    struct topk half[2], whole = {.k = k, .entry = (uint64_t *)(void *)list.data};
    int middle = in->n / 2, n[2];
    for (int i = 0; i < 2; i++) {
        lidx_topk_reset(&half[i], k, (uint64_t *)(void *)memory[i].data, loops);
        push_range(&half[i], in, i ? middle : 0, i ? in->n : middle, rng);
        lidx_topk_sort(&half[i]);
        half[i].entry[half[i].n] = 0;
    }
    const struct topk *from = &half[rng_below(rng, 2)];
    uint64_t bound = from->n ? from->entry[rng_below(rng, (uint64_t)from->n)] : 1;
    for (int i = 0; i < 2; i++)
        n[i] = reaching(&half[i], bound);
    whole.n = lidx_topk_merge(whole.entry, k, half[0].entry, n[0], half[1].entry, n[1]);
    if (whole.n < k)
        whole.n += lidx_topk_merge(whole.entry + whole.n, k - whole.n, half[0].entry + n[0],
                                   half[0].n - n[0], half[1].entry + n[1], half[1].n - n[1]);
    check_answer(&whole, in, k, what);
    for (int i = 0; i < 2; i++)
        guard_free(&memory[i]);
    guard_free(&list);
}

/* The stream in pieces, each sorted alone and added to one selection, in any order. */
static void check_add(const struct input *in, int k, const struct topk_loops *loops,
                      struct rng *rng, const char *what) {
    enum { PIECES = 9 };
    struct guard memory[2] = {entries(k), entries(k)};
    struct topk whole, part;
    int cut[PIECES + 1] = {0}, first = (int)rng_below(rng, PIECES);
    for (int i = 1; i <= PIECES; i++)
        cut[i] = i == PIECES ? in->n : (int)rng_between(rng, cut[i - 1], in->n);
    lidx_topk_reset(&whole, k, (uint64_t *)(void *)memory[0].data, loops);
    for (int i = 0; i < PIECES; i++) {
        int piece = (first + i * 2) % PIECES;
        lidx_topk_reset(&part, k, (uint64_t *)(void *)memory[1].data, loops);
        push_range(&part, in, cut[piece], cut[piece + 1], rng);
        lidx_topk_sort(&part);
        lidx_topk_add(&whole, part.entry, part.n);
    }
    lidx_topk_sort(&whole);
    check_answer(&whole, in, k, what);
    guard_free(&memory[0]);
    guard_free(&memory[1]);
}

/* A bound that may be anything: often an entry, seldom one that all reach or none. */
static uint64_t any_bound(const struct input *in, struct rng *rng) {
    int i = in->n ? (int)rng_below(rng, (uint64_t)in->n) : 0;
    if (in->n == 0 || rng_one_in(rng, 6))
        return rng_one_in(rng, 2) ? 1 : INT64_MAX;
    return lidx_topk_entry(in->score[i], (uint32_t)(in->offset + i));
}

/* Divides the candidates at a bound and checks that none is lost; returns how many are the rest. */
static int check_divide(struct topk *t, uint64_t bound, struct guard *rest, const char *what) {
    int n = t->n, reach = lidx_topk_count(t, bound), wrong = 0;
    uint64_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += t->entry[i];
    *rest = guard_after(sizeof(uint64_t) * (size_t)(n - reach + TOPK_SLACK));
    uint64_t *entry = (uint64_t *)(void *)rest->data;
    int n_rest = lidx_topk_divide(t, bound, entry);
    for (int i = 0; i < t->n; i++) {
        sum -= t->entry[i];
        wrong += t->entry[i] < bound;
    }
    for (int i = 0; i < n_rest; i++) {
        sum -= entry[i];
        wrong += entry[i] >= bound;
    }
    CHECK(t->n == reach && n_rest == n - reach && sum == 0 && wrong == 0,
          "%s: %d and %d of %d candidates, of which %d reach the bound", what, t->n, n_rest, n,
          reach);
    return n_rest;
}

/* Takes all of the rest, and before some of it, to count what is above that. */
static void check_take(struct topk *whole, struct topk *some, const uint64_t *rest, int n,
                       uint64_t above, const char *what) {
    int n_above = 0, kept = some->n;
    for (int i = 0; i < n; i++)
        n_above += rest[i] >= above;
    int counted = lidx_topk_take(some, rest, n, above - above / 8, above);
    CHECK(counted == n_above, "%s: %d entries above, not %d", what, n_above, counted);
    for (int i = kept; i < some->n; i++)
        if (!CHECK(some->entry[i] >= above - above / 8 && some->entry[i] < above,
                   "%s: took an entry out of range", what))
            break;
    CHECK_INT(lidx_topk_take(whole, rest, n, 1, INT64_MAX), 0, what);
}

/* The stream in pieces, of each the better ones sorted and the rest as it is, brought together. */
static void check_rest(const struct input *in, int k, const struct topk_loops *loops,
                       struct rng *rng, const char *what) {
    enum { PIECES = 9 };
    struct guard memory[3] = {entries(k), entries(k), entries(k)}, rest;
    struct topk whole, some, part;
    uint64_t bound = any_bound(in, rng), least = 0;
    if (in->n >= k) /* what k entries reach */
        least =
            lidx_topk_entry(in->score[in->order[k - 1] - in->offset], (uint32_t)in->order[k - 1]);
    lidx_topk_reset(&whole, k, (uint64_t *)(void *)memory[0].data, loops);
    for (int i = 0, begin = 0, end; i < PIECES; i++, begin = end) {
        end = i + 1 == PIECES ? in->n : (int)rng_between(rng, begin, in->n);
        lidx_topk_reset(&part, k, (uint64_t *)(void *)memory[1].data, loops);
        lidx_topk_reset(&some, k, (uint64_t *)(void *)memory[2].data, loops);
        push_range(&part, in, begin, end, rng);
        lidx_topk_move(&part, part.entry);
        if (least && rng_one_in(rng, 2))
            lidx_topk_raise(&part, least);
        lidx_topk_cut(&part);
        CHECK(part.n <= lidx_topk_rough(k), "%s: a cut leaves %d", what, part.n);
        int n_rest = check_divide(&part, bound, &rest, what);
        check_take(&whole, &some, (uint64_t *)(void *)rest.data, n_rest, any_bound(in, rng), what);
        lidx_topk_sort(&part);
        lidx_topk_add(&whole, part.entry, part.n);
        guard_free(&rest);
    }
    lidx_topk_sort(&whole);
    check_answer(&whole, in, k, what);
    for (int i = 0; i < 3; i++)
        guard_free(&memory[i]);
}

static int pick_k(struct rng *rng, int n) {
    switch (rng_below(rng, 8)) {
    case 0:
        return n ? n : 1;
    case 1:
        return n + 1;
    case 2:
        return n > 1 ? n - 1 : 1;
    case 3:
        return (int)rng_between(rng, 1, 8192);
    case 4:
        return 1;
    case 5: /* around whole blocks of the vector forms */
        return (int)(rng_between(rng, 1, 16) * 128 + rng_between(rng, -17, 17));
    default:
        return (int)rng_between(rng, 1, 300);
    }
}

static void run_case(long number, const struct topk_loops *loops, const char *loops_name) {
    struct rng rng = rng_seed((uint64_t)number + 1);
    enum stream stream = (enum stream)rng_below(&rng, STREAMS);
    struct input in;
    char what[96];
    in.n = (int)rng_between(&rng, 0, rng_below(&rng, 4) ? 2500 : 30000);
    if (rng_below(&rng, 3) == 0)
        in.n = (int)(rng_between(&rng, 1, 20) * 128 + rng_between(&rng, -17, 17));
    in.offset = rng_below(&rng, 8) ? 0 : INT32_MAX - in.n;
    in.score = calloc((size_t)in.n + 1, sizeof *in.score);
    for (int i = 0; i < in.n; i++)
        in.score[i] = sample(stream, &rng, i, in.n);
    in.order = sorted(in.score, in.n, in.offset);
    int k = pick_k(&rng, in.n);
    k = k > 8192 ? 8192 : k;
    snprintf(what, sizeof what, "case %ld, %s loops, stream %d, n %d, k %d", number, loops_name,
             (int)stream, in.n, k);
    check_stream(&in, k, loops, &rng, what);
    check_merge(&in, k, loops, &rng, what);
    check_merged_parts(&in, k, loops, &rng, what);
    check_add(&in, k, loops, &rng, what);
    check_rest(&in, k, loops, &rng, what);
    free(in.score);
    free(in.order);
    if (number == 0)
        check_misled(loops, loops_name);
}

int main(void) {
    const char *text = getenv("LIDX_TEST_CASES");
    long cases = text ? atol(text) : 2000;
    for (long number = 0; number < cases; number++) {
        run_case(number, &lidx_topk_portable, "portable");
        for (int i = 0; lidx_kernels[i]; i++)
            if (lidx_kernels[i]->topk && lidx_kernel_usable(lidx_kernels[i]) &&
                (i == 0 || lidx_kernels[i]->topk != lidx_kernels[i - 1]->topk ||
                 !lidx_kernel_usable(lidx_kernels[i - 1])))
                run_case(number, lidx_kernels[i]->topk, lidx_kernels[i]->name);
    }
    return test_end();
}
