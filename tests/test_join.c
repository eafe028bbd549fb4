/* SPDX-License-Identifier: Apache-2.0
 *
 * What workers have kept of a row, joined, against a plain sort: without threads, so that whoever
 * has which keys, and in what order they come, is the test's choice. Two blocks are under way at
 * the same time, and their slots are all there is of memory.
 *
 *     test_join [CASES]
 */
#include "test.h"

#include "../src/cpu/features.h"
#include "../src/cpu/join.h"
#include "../src/cpu/kernels.h"

#include "plain_sort.h"

enum {
    BLOCKS = 2,
    MOST_MEMBERS = 40,
    MOST_RUNS = 64, /* of keys, of a block */
    MOST_KEYS = 24000,
    MOST_K = 8192,
};

static const char *const stream_names[] = {
    "random", "equal", "rising", "falling", "few levels", "steps", "one band", "nan",
};

enum stream { RANDOM, EQUAL, RISING, FALLING, FEW_LEVELS, STEPS, ONE_BAND, MOSTLY_NAN, STREAMS };

/* The score of key i of n, which lies in run `run`. */
static float sample(enum stream stream, struct rng *rng, int i, int n, int run) {
    switch (stream) {
    case EQUAL:
        return 2.5f;
    case RISING:
        return (float)i;
    case FALLING:
        return (float)(n - i);
    case FEW_LEVELS:
        return (float)rng_between(rng, -2, 2);
    case STEPS: /* each run in a range of its own */
        return (float)(run * 7 % 11) * 100.0f + rng_normal(rng);
    case ONE_BAND:
        return rng_normal(rng) + (i > n / 4 && i < n / 2 ? 1000.0f : 0.0f);
    case MOSTLY_NAN:
        return rng_one_in(rng, 10) ? rng_normal(rng) : NAN;
    default:
        return rng_normal(rng);
    }
}

/* A block: its runs of keys, whose each is, and what is known of its rows. */
struct block {
    struct plan_block plan;
    struct join join;
    int n_members, n_runs;
    int begin[MOST_RUNS + 1], owner[MOST_RUNS];
    float score[PLAN_ROWS][MOST_KEYS];
    int32_t order[PLAN_ROWS][MOST_KEYS]; /* best first */
};

/* A member of a block: a worker with memory of its own. */
struct member {
    struct worker worker;
    struct guard entries[PLAN_ROWS];
    int64_t n_keys;
    int next; /* run to look at */
    int has_left;
};

static struct block block[BLOCKS];
static struct member member[BLOCKS][MOST_MEMBERS];
static struct run run;
static struct problem problem;
static int32_t indices[BLOCKS][PLAN_ROWS][MOST_K];
static float values[BLOCKS][PLAN_ROWS][MOST_K];

/* Cuts the keys into runs, each for some member: by turns, by lot, or the first half for the first
 * members, as threads take them. */
static void deal(struct block *b, struct rng *rng, int n_keys) {
    int way = (int)rng_below(rng, 3);
    b->n_runs = (int)rng_between(rng, b->n_members, MOST_RUNS);
    b->n_runs = b->n_runs < n_keys ? b->n_runs : n_keys;
    b->n_members = b->n_members < b->n_runs ? b->n_members : b->n_runs;
    for (int i = 0; i <= b->n_runs; i++)
        b->begin[i] = (int)((int64_t)n_keys * i / b->n_runs);
    if (way == 2) /* few keys in many runs, the others in the first */
        for (int i = 1; i < b->n_runs; i++)
            b->begin[i] = n_keys - (b->n_runs - i);
    for (int i = 0; i < b->n_runs; i++)
        b->owner[i] = i < b->n_members ? i
                      : way            ? (int)rng_below(rng, (uint64_t)b->n_members)
                                       : i % b->n_members;
}

static void sort_rows(struct block *b) {
    for (int r = 0; r < b->plan.n_rows; r++)
        plain_sort(b->order[r], b->score[r], (int)b->plan.n_keys, 0);
}

static void make_block(int index, enum stream stream, struct rng *rng) {
    struct block *b = &block[index];
    int n_keys = (int)rng_between(rng, 2, rng_one_in(rng, 2) ? MOST_KEYS : 5000);
    memset(&b->join, 0, sizeof b->join);
    b->n_members = (int)rng_between(rng, 2, rng_one_in(rng, 2) ? MOST_MEMBERS : 4);
    deal(b, rng, n_keys);
    b->plan = (struct plan_block){.batch = index,
                                  .n_keys = n_keys,
                                  .n_rows = rng_one_in(rng, 2) ? 1 : (int)rng_between(rng, 1, 3),
                                  .slot = index ? block[0].n_members * block[0].plan.n_rows : 0};
    for (int r = 0; r < b->plan.n_rows; r++)
        for (int i = 0; i < b->n_runs; i++)
            for (int key = b->begin[i]; key < b->begin[i + 1]; key++)
                b->score[r][key] = sample(stream, rng, key, n_keys, i);
    sort_rows(b);
}

/* A guess that somebody else has made, or is making: whatever it is, the answer is the same. */
static uint64_t make_guess(const struct block *b, int r, int k, struct rng *rng) {
    int n = (int)b->plan.n_keys, rank = (int)rng_below(rng, (uint64_t)n);
    switch (rng_below(rng, 8)) {
    case 0:
        return TO_GUESS;
    case 1:
        return lidx_topk_entry(INFINITY, 0);
    case 2:
        return lidx_topk_entry(NAN, INT32_MAX);
    case 3: /* k or one more or less reach it */
        rank = k - 2 + (int)rng_below(rng, 3);
        if (rank < 0 || rank >= n)
            return NO_GUESS;
        /* fall through */
    case 4:
        return lidx_topk_entry(b->score[r][b->order[r][rank]], (uint32_t)b->order[r][rank]);
    default:
        return NO_GUESS;
    }
}

static void start_member(struct member *m, const struct block *b, int index) {
    m->worker.run = &run;
    m->worker.index = index;
    m->n_keys = m->next = m->has_left = 0;
    for (int r = 0; r < b->plan.n_rows; r++) {
        m->entries[r] = guard_after(sizeof(uint64_t) * (size_t)lidx_topk_capacity(problem.top_k));
        lidx_topk_reset(&m->worker.row[r].topk, problem.top_k,
                        (uint64_t *)(void *)m->entries[r].data, run.loops);
    }
}

static void push(struct topk *t, const float *score, int n, int position) {
    float *room = lidx_topk_reserve(t, n, position);
    if (room)
        memcpy(room, score, sizeof *room * (size_t)n);
    else
        lidx_topk_push(t, score, n, position);
}

/* The member's next run of keys; when there is none, it leaves. */
static void step(struct member *m, struct block *b, int index, struct rng *rng) {
    while (m->next < b->n_runs && b->owner[m->next] != index)
        m->next++;
    if (m->next == b->n_runs) {
        lidx_join_leave(&b->join, &m->worker, &b->plan, m->n_keys);
        m->has_left = 1;
        return;
    }
    lidx_join_share_bounds(&b->join, &m->worker, &b->plan);
    if (rng_one_in(rng, 4))
        lidx_join_guess(&b->join, &m->worker, &b->plan, m->n_keys);
    int begin = b->begin[m->next], n = b->begin[m->next + 1] - begin;
    for (int r = 0; r < b->plan.n_rows; r++)
        push(&m->worker.row[r].topk, b->score[r] + begin, n, begin);
    m->n_keys += n;
    m->next++;
}

/* Members take their runs and leave in any order, or one after the other. */
static void work(struct rng *rng) {
    int left = 0, one_by_one = rng_one_in(rng, 4);
    for (int i = 0; i < BLOCKS; i++)
        left += block[i].n_members;
    while (left > 0) {
        int i = (int)rng_below(rng, BLOCKS);
        int index = (int)rng_below(rng, (uint64_t)block[i].n_members);
        struct member *m = &member[i][index];
        while (!m->has_left) {
            step(m, &block[i], index, rng);
            left -= m->has_left;
            if (!one_by_one)
                break;
        }
    }
}

static void check_row(int index, int r, const char *what) {
    const struct block *b = &block[index];
    const int32_t *order = b->order[r];
    int n_keys = (int)b->plan.n_keys, n = n_keys < problem.top_k ? n_keys : problem.top_k, bad = -1;
    const int32_t *got = &indices[0][0][0] + (index * PLAN_ROWS + r) * problem.top_k;
    const float *value = &values[0][0][0] + (index * PLAN_ROWS + r) * problem.top_k;
    for (int i = 0; i < problem.top_k && bad < 0; i++) {
        float score = i < n ? b->score[r][order[i]] : -INFINITY;
        int same = isnan(score) ? isnan(value[i]) : score == value[i];
        if (got[i] != (i < n ? order[i] : -1) || !same)
            bad = i;
    }
    CHECK(bad < 0,
          "%s, block %d of %d keys and %d members, row %d, place %d: key %d, it should be %d", what,
          index, n_keys, b->n_members, r, bad, bad < 0 ? 0 : got[bad],
          bad < 0 || bad >= n ? -1 : order[bad]);
}

static void take_parts(struct rng *rng) {
    for (int i = 0; i < BLOCKS; i++) {
        int taker = (int)rng_below(rng, (uint64_t)block[i].n_members);
        CHECK(lidx_join_take_parts(&block[i].join, &member[i][taker].worker, &block[i].plan) > 0,
              "block %d has no parts", i);
    }
}

static void run_case(long number, const struct topk_loops *loops, const char *loops_name) {
    struct rng rng = rng_seed((uint64_t)number + 1);
    enum stream stream = (enum stream)(number % STREAMS);
    char what[96];
    make_block(0, stream, &rng);
    make_block(1, stream, &rng);
    int k = (int)(rng_one_in(&rng, 3)   ? rng_between(&rng, 1, MOST_K)
                  : rng_one_in(&rng, 3) ? rng_between(&rng, 1, 300)
                  : rng_one_in(&rng, 3) ? block[0].plan.n_keys + rng_between(&rng, -1, 1)
                                        : 2048);
    k = k < MOST_K ? k : MOST_K;
    int64_t stride = (int64_t)PLAN_ROWS * k * 4;
    problem = (struct problem){.top_k = k,
                               .values_dtype = DTYPE_F32,
                               .n_batch = BLOCKS,
                               .n_query = PLAN_ROWS,
                               .indices = &indices[0][0][0],
                               .values = values,
                               .indices_batch_stride = stride,
                               .values_batch_stride = stride};
    int n_slots = 0;
    for (int i = 0; i < BLOCKS; i++)
        n_slots += block[i].n_members * block[i].plan.n_rows;
    size_t slot_bytes = lidx_slot_bytes(k), bytes = slot_bytes * (size_t)n_slots;
    struct guard slots = rng_one_in(&rng, 2) ? guard_after(bytes) : guard_before(bytes);
    memset(slots.data, 0x5A, bytes);
    run = (struct run){.p = &problem,
                       .loops = loops,
                       .n_workers = (int)rng_between(&rng, 1, MOST_MEMBERS),
                       .slots = slots.data,
                       .slot_bytes = slot_bytes};
    for (int i = 0; i < BLOCKS; i++) {
        for (int r = 0; r < block[i].plan.n_rows; r++)
            block[i].join.guess[r] = make_guess(&block[i], r, k, &rng);
        for (int m = 0; m < block[i].n_members; m++)
            start_member(&member[i][m], &block[i], m);
    }
    memset(indices, 0xA5, sizeof indices);
    work(&rng);
    take_parts(&rng);
    snprintf(what, sizeof what, "case %ld, %s loops, %s, k %d", number, loops_name,
             stream_names[stream], k);
    for (int i = 0; i < BLOCKS; i++)
        for (int r = 0; r < block[i].plan.n_rows; r++)
            check_row(i, r, what);
    for (int i = 0; i < BLOCKS; i++)
        for (int m = 0; m < block[i].n_members; m++)
            for (int r = 0; r < block[i].plan.n_rows; r++)
                guard_free(&member[i][m].entries[r]);
    guard_free(&slots);
}

static uint64_t guess_of(enum stream stream, int n, int share, const struct topk_loops *loops,
                         struct topk *t, uint64_t *entry) {
    struct rng rng = rng_seed((uint64_t)n + (uint64_t)share);
    lidx_topk_reset(t, n, entry, loops);
    for (int i = 0; i < n; i++) {
        float score = sample(stream, &rng, i, n, 0);
        lidx_topk_push(t, &score, 1, i);
    }
    return lidx_topk_guess(t, share);
}

/* A guess is reached by as many as shall reach it and few more, but there is none where the best
 * come first. */
static void check_guess(const struct topk_loops *loops, const char *loops_name) {
    static const int ns[] = {TOPK_SAMPLE, TOPK_SAMPLE + 1, 511, 700, 2048, 4096, 8000};
    struct guard memory = guard_after(sizeof(uint64_t) * (size_t)lidx_topk_capacity(MOST_K));
    uint64_t *entry = (uint64_t *)(void *)memory.data;
    struct topk t;
    for (int i = 0; i < 7; i++)
        for (int n = ns[i], share = 1; share <= n / 2; share = 2 * share + 1) {
            int wide = share + 64 * n / TOPK_SAMPLE;
            int reach = lidx_topk_count(&t, guess_of(RANDOM, n, share, loops, &t, entry));
            CHECK(reach >= share && reach <= wide, "%s loops: %d of %d reach a guess for %d",
                  loops_name, reach, n, share);
            reach = lidx_topk_count(&t, guess_of(RISING, n, share, loops, &t, entry));
            CHECK(reach >= share && reach <= wide,
                  "%s loops: rising, %d of %d reach a guess for %d", loops_name, reach, n, share);
            if (share > n / 16) {
                CHECK(guess_of(FALLING, n, share, loops, &t, entry) == 0,
                      "%s loops: a guess for %d of %d, falling", loops_name, share, n);
                CHECK(guess_of(EQUAL, n, share, loops, &t, entry) == 0,
                      "%s loops: a guess for %d of %d, equal", loops_name, share, n);
            }
        }
    guard_free(&memory);
}

int main(int argc, char **argv) {
    const char *text = argc > 1 ? argv[1] : getenv("LIDX_TEST_CASES");
    long cases = text ? atol(text) : 400;
    for (long number = 0; number < cases; number++) {
        const struct kernel *best = lidx_kernel_choose(NULL);
        run_case(number, &lidx_topk_portable, "portable");
        if (best->topk)
            run_case(number, best->topk, best->name);
    }
    check_guess(&lidx_topk_portable, "portable");
    return test_end();
}
