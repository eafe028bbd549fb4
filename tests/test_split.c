/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows that several threads share: whatever the scores, their order and the number of threads, the
 * answer is a plain sort's. Queries and keys are made so that each score is known exactly: three
 * elements of a key are the bytes of a number, and a query adds them up or subtracts them.
 *
 *     test_split [CASES]
 */
#include "test.h"

#include "contexts.h"
#include "lightning_indexer.h"
#include "plain_sort.h"

enum {
    HEADS = 2, /* of opposite queries and weights: ReLU(x) - ReLU(-x) = x */
    DIM = 64,
    MOST_BATCHES = 3,
    MOST_QUERIES = 11,
    MOST_KEYS = 20000,
    MOST_K = 8192,
    STRETCH = 96, /* keys that one thread is likely to take at a time */
};

enum stream {
    RANDOM,
    EQUAL,
    TWO_VALUES,
    FEW_LEVELS,
    RISING,
    FALLING,
    NEARLY_EQUAL,
    NEGATIVE,
    BANDS,       /* each stretch of keys in a range of its own */
    ONE_BAND,    /* the best all in one place */
    ALTERNATING, /* stretches of the best and of the worst in turns */
    OUTLIERS,
    ANY_KIND, /* NaN, infinities, zeros of both signs among numbers */
    MOSTLY_NAN,
    ALL_NAN,
    STREAMS
};

static const char *const stream_names[STREAMS] = {
    "random",      "equal",        "two values", "few levels", "rising",
    "falling",     "nearly equal", "negative",   "bands",      "one band",
    "alternating", "outliers",     "any kind",   "mostly NaN", "all NaN",
};

static int number_below(struct rng *rng, int n) {
    return (int)rng_below(rng, (uint64_t)n);
}

/* The score of key i of n: a whole number of less than 24 bits, NaN or infinite. */
static float sample(enum stream stream, struct rng *rng, int i, int n) {
    const int most = (1 << 23) - 1;
    switch (stream) {
    case EQUAL:
        return 4711;
    case TWO_VALUES:
        return (float)(rng_one_in(rng, 2) ? 1 : -1);
    case FEW_LEVELS:
        return (float)(number_below(rng, 5) - 2);
    case RISING:
        return (float)i;
    case FALLING:
        return (float)(n - i);
    case NEARLY_EQUAL:
        return (float)(most - number_below(rng, 3));
    case NEGATIVE:
        return (float)-number_below(rng, most);
    case BANDS:
        return (float)(i / STRETCH * 7919 % 251 * 30000 + number_below(rng, 2000));
    case ONE_BAND:
        return (float)(number_below(rng, 1000) + (i > n / 3 && i < n / 3 + 3000 ? 1000000 : 0));
    case ALTERNATING:
        return (float)(number_below(rng, 100000) * (i / STRETCH % 2 ? 1 : -1));
    case OUTLIERS:
        return (float)(rng_one_in(rng, 200) ? number_below(rng, most) : number_below(rng, 10));
    case ANY_KIND:
        return rng_one_in(rng, 4)   ? NAN
               : rng_one_in(rng, 4) ? (rng_one_in(rng, 2) ? INFINITY : -INFINITY)
               : rng_one_in(rng, 4) ? -0.0f
                                    : (float)(number_below(rng, 2 * most) - most);
    case MOSTLY_NAN:
        return rng_one_in(rng, 50) ? (float)number_below(rng, 100) : NAN;
    case ALL_NAN:
        return NAN;
    default:
        return (float)(number_below(rng, 2 * most) - most);
    }
}

struct batch_data {
    int n_query, n_key;
    float score[MOST_KEYS];      /* of an even row; of an odd one the negative */
    int32_t order[2][MOST_KEYS]; /* best first: of even rows, of odd rows */
};

static struct batch_data batch[MOST_BATCHES];
static uint16_t query[MOST_BATCHES * MOST_QUERIES * HEADS * DIM];
static uint16_t weights[MOST_BATCHES * MOST_QUERIES * HEADS];
static uint16_t key[MOST_BATCHES * MOST_KEYS * DIM];
static int32_t indices[MOST_BATCHES * MOST_QUERIES * MOST_K];
static float values[MOST_BATCHES * MOST_QUERIES * MOST_K];

static void write_key(uint16_t *to, float score) {
    memset(to, 0, sizeof *to * DIM);
    if (!isfinite(score)) {
        to[0] = test_to_bf16(score);
        return;
    }
    int number = abs((int)score), sign = score < 0 ? -1 : 1;
    for (int i = 0; i < 3; i++)
        to[i] = test_to_bf16((float)(sign * (number >> 8 * i & 255)));
}

static void write_query(uint16_t *to, int row) {
    memset(to, 0, sizeof *to * HEADS * DIM);
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < 3; i++)
            to[h * DIM + i] = test_to_bf16(ldexpf((h + row) % 2 ? -1.0f : 1.0f, 8 * i));
}

/* Once for all rows and thread counts: sorting takes longer than all else. */
static void sort_keys(struct batch_data *b) {
    for (int odd = 0; odd < 2; odd++)
        plain_sort(b->order[odd], b->score, b->n_key, odd);
}

/* A row that sees the first `visible` keys has them in the order that they have among all. */
static void check_row(const struct batch_data *b, int row, int visible, int k, const int32_t *index,
                      const float *value, const char *what) {
    const int32_t *order = b->order[row % 2];
    int n = visible < k ? visible : k, bad = -1, at = 0, want = -1;
    for (int i = 0; i < k && bad < 0; i++) {
        float score = -INFINITY;
        want = -1;
        if (i < n) {
            while (order[at] >= visible)
                at++;
            want = order[at++];
            score = (row % 2 ? -1.0f : 1.0f) * b->score[want];
        }
        int same = isnan(score) ? isnan(value[i]) : score == value[i];
        if (index[i] != want || !same)
            bad = i;
    }
    CHECK(bad < 0, "%s, row %d, place %d: key %d with %g, it should be %d", what, row, bad,
          bad < 0 ? 0 : index[bad], bad < 0 ? 0 : (double)value[bad], want);
}

static struct lidx_tensor tensor(void *data, int code, int bits, int64_t *shape, int ndim) {
    struct lidx_tensor t = {data,  {LIDX_CPU, 0}, ndim, {(uint8_t)code, (uint8_t)bits, 1},
                            shape, NULL,          0};
    return t;
}

struct shape {
    int batches, k, mode;
    int32_t query_ends[MOST_BATCHES], key_ends[MOST_BATCHES];
};

static int run(struct lidx_context *context, struct shape *s) {
    int64_t tokens = s->query_ends[s->batches - 1], keys = s->key_ends[s->batches - 1];
    int64_t q[] = {tokens, HEADS, DIM}, k[] = {keys, 1, DIM}, out[] = {tokens, 1, s->k},
            list[] = {s->batches};
    struct lidx_tensor t[] = {
        tensor(query, LIDX_BFLOAT, 16, q, 3),       tensor(key, LIDX_BFLOAT, 16, k, 3),
        tensor(weights, LIDX_BFLOAT, 16, q, 2),     tensor(s->query_ends, LIDX_INT, 32, list, 1),
        tensor(s->key_ends, LIDX_INT, 32, list, 1), tensor(indices, LIDX_INT, 32, out, 3),
        tensor(values, LIDX_FLOAT, 32, out, 3)};
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &t[0], args.key = &t[1], args.weights = &t[2];
    args.actual_seq_lengths_query = &t[3], args.actual_seq_lengths_key = &t[4];
    args.sparse_indices = &t[5], args.sparse_values = &t[6];
    args.layout_query = args.layout_key = LIDX_TND;
    args.sparse_count = s->k, args.sparse_mode = s->mode;
    memset(indices, 0xA5, sizeof *indices * (size_t)(tokens * s->k));
    return lidx_run(context, &args);
}

static void check_answer(const struct shape *s, const char *what) {
    int64_t row = 0;
    for (int b = 0; b < s->batches; b++)
        for (int i = 0; i < batch[b].n_query; i++, row++) {
            int visible = batch[b].n_key;
            if (s->mode == LIDX_MODE_CAUSAL)
                visible += i + 1 - batch[b].n_query;
            check_row(&batch[b], i, visible > 0 ? visible : 0, s->k, indices + row * s->k,
                      values + row * s->k, what);
        }
}

static int pick_k(struct rng *rng, int n) {
    switch (rng_below(rng, 6)) {
    case 0:
        return (int)rng_between(rng, 1, 300);
    case 1:
        return n > 1 ? n - 1 : 1;
    case 2:
        return n;
    case 3:
        return n + 1;
    case 4:
        return (int)rng_between(rng, 1, MOST_K);
    default:
        return 2048;
    }
}

static void make_case(struct shape *s, struct rng *rng, enum stream stream) {
    int32_t tokens = 0, keys = 0;
    s->batches = rng_one_in(rng, 3) ? (int)rng_between(rng, 2, MOST_BATCHES) : 1;
    s->mode = rng_one_in(rng, 3) ? LIDX_MODE_CAUSAL : LIDX_MODE_FULL;
    for (int b = 0; b < s->batches; b++) {
        batch[b].n_query = rng_one_in(rng, 2) ? 1 : (int)rng_between(rng, 1, MOST_QUERIES);
        batch[b].n_key = (int)rng_between(rng, 1, rng_one_in(rng, 3) ? MOST_KEYS : 5000);
        for (int i = 0; i < batch[b].n_key; i++) {
            batch[b].score[i] = sample(stream, rng, i, batch[b].n_key);
            write_key(key + (size_t)(keys + i) * DIM, batch[b].score[i]);
        }
        sort_keys(&batch[b]);
        for (int i = 0; i < batch[b].n_query; i++) {
            write_query(query + (size_t)(tokens + i) * HEADS * DIM, i);
            for (int h = 0; h < HEADS; h++)
                weights[(tokens + i) * HEADS + h] = test_to_bf16(h ? -1.0f : 1.0f);
        }
        s->query_ends[b] = tokens += batch[b].n_query;
        s->key_ends[b] = keys += batch[b].n_key;
    }
    int k = pick_k(rng, batch[0].n_key);
    s->k = k > MOST_K ? MOST_K : k;
}

int main(int argc, char **argv) {
    static const int threads[] = {1, 2, 3, 7, 16, 40};
    enum { CONTEXTS = sizeof threads / sizeof *threads };
    struct lidx_context *context[CONTEXTS];
    const char *text = argc > 1 ? argv[1] : getenv("LIDX_TEST_CASES");
    long cases = text ? atol(text) : 300;
    for (int i = 0; i < CONTEXTS; i++)
        context[i] = make_context(NULL, threads[i]);
    for (long c = 0; c < cases; c++) {
        struct rng rng = rng_seed((uint64_t)c + 1);
        enum stream stream = (enum stream)(c % STREAMS);
        struct shape s;
        make_case(&s, &rng, stream);
        for (int i = 0; i < CONTEXTS; i++) {
            char what[96];
            snprintf(what, sizeof what, "case %ld, %s, k %d, %d threads", c, stream_names[stream],
                     s.k, threads[i]);
            CHECK_INT(run(context[i], &s), LIDX_OK, what);
            check_answer(&s, what);
        }
    }
    for (int i = 0; i < CONTEXTS; i++)
        lidx_destroy(context[i]);
    return test_end();
}
