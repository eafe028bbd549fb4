/* SPDX-License-Identifier: Apache-2.0
 *
 * One call for each way in which one argument alone can be wrong: options, layouts, lists, tables,
 * sizes that only some tensors have. What test_tensors.c asks of a refusal holds here too.
 */
#include "valid_call.h"

static struct lidx_context *context;

static void check_heads_and_dim(int pair) {
    static const int64_t bad_heads[] = {0, 129, 1 << 20},
                         bad_dims[] = {0, 1, 32, 96, 127, 129, 256};
    struct call c;
    int heads = is_packed(pair) ? 1 : 2;
    for (int i = 0; i < 3; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads] = c.shape[W][heads] = bad_heads[i];
        refuse_tensor(context, &c, pair, Q, LIDX_ERR_SHAPE, "heads");
        CHECK(strstr(lidx_last_error(), "128"), "\"%s\" names the limit", lidx_last_error());
    }
    for (int i = 0; i < 7; i++) {
        valid_call(&c, pair);
        for (int which = 0; which < N_TENSORS; which++)
            c.t[which].strides = NULL;
        c.shape[Q][heads + 1] = c.shape[K][pair == TND_TND ? 2 : 3] = bad_dims[i];
        refuse_tensor(context, &c, pair, Q, LIDX_ERR_SHAPE, "head dimension");
        CHECK(strstr(lidx_last_error(), "64") && strstr(lidx_last_error(), "128"),
              "\"%s\" names what is allowed", lidx_last_error());
    }
    valid_call(&c, pair);
    c.t[K].strides = NULL;
    c.shape[K][pair == TND_TND ? 1 : 2] = 2;
    refuse_tensor(context, &c, pair, K, LIDX_ERR_SHAPE, "2 key heads");
}

static void check_options(int pair) {
    static const int32_t bad_counts[] = {0, -1, 8193, INT32_MAX, INT32_MIN};
    static const int32_t bad_modes[] = {1, 2, 4, -1, INT32_MAX};
    struct call c;
    for (int i = 0; i < 5; i++) {
        valid_call(&c, pair);
        c.args.sparse_count = bad_counts[i];
        refuse(context, &c, LIDX_ERR_OPTION, "sparse_count", say("sparse_count", pair, INDICES));
        valid_call(&c, pair);
        c.args.sparse_mode = bad_modes[i];
        refuse(context, &c, LIDX_ERR_OPTION, "sparse_mode", say("sparse_mode", pair, Q));
    }
}

static void check_layouts(void) {
    struct call c;
    static const int bad_query[] = {LIDX_PA_BSND, 3, -1, INT32_MAX, INT32_MIN};
    for (int i = 0; i < 5; i++) {
        valid_call(&c, BSND_BSND);
        c.args.layout_query = bad_query[i];
        refuse(context, &c, LIDX_ERR_LAYOUT,
               i ? "layout_query" : "layout_query is PA_BSND; it should be BSND", "layout_query");
        if (i == 0)
            continue;
        valid_call(&c, BSND_BSND);
        c.args.layout_key = bad_query[i];
        refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "layout_key");
    }
    valid_call(&c, BSND_BSND);
    c.args.layout_key = LIDX_TND;
    refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "BSND with TND");
    valid_call(&c, TND_TND);
    c.args.layout_key = LIDX_BSND;
    refuse(context, &c, LIDX_ERR_LAYOUT, "layout_key", "TND with BSND");
    /* Who forgets the layout should hear of that, not of a shape. */
    valid_call(&c, BSND_PA);
    c.args.layout_key = LIDX_BSND;
    refuse(context, &c, LIDX_ERR_ARGUMENT, "block_table is given with layout_key BSND",
           "pages and their table without PA_BSND");
}

static void check_pages(int pair) {
    static const int64_t bad_sizes[] = {0, 1, 8, 15, 17, 24, 1032, 1040, 2048, 1 << 30};
    static const int32_t bad_ids[] = {-1, PAGES, INT32_MAX, INT32_MIN};
    struct call c;
    for (int i = 0; i < 10; i++) {
        valid_call(&c, pair);
        c.t[K].strides = NULL;
        c.shape[K][1] = bad_sizes[i];
        refuse(context, &c, LIDX_ERR_SHAPE, "block_size", say("block size", pair, K));
    }
    for (int i = 0; i < 4; i++)
        for (int at = 0; at < B * COLUMNS; at++) {
            valid_call(&c, pair);
            c.table[at] = bad_ids[i];
            if (at % COLUMNS == COLUMNS - 1)
                accept(context, &c, say("entry past the last needed one", pair, TABLE));
            else
                refuse_tensor(context, &c, pair, TABLE, LIDX_ERR_VALUE, "page id");
        }
    valid_call(&c, pair);
    c.query_list[0] = 0;
    for (int at = 0; at < COLUMNS; at++)
        c.table[at] = bad_ids[at];
    accept(context, &c, say("entries of a batch without tokens", pair, TABLE));
    valid_call(&c, pair);
    c.key_list[1] = BLOCK * COLUMNS + 1;
    refuse_tensor(context, &c, pair, KL, LIDX_ERR_VALUE, "longer than the table");
    CHECK(strstr(lidx_last_error(), "block_table"), "\"%s\" names what is too short",
          lidx_last_error());
    valid_call(&c, pair);
    c.shape[K][0] = 0;
    refuse(context, &c, LIDX_ERR_VALUE,
           "block_table[0][0] is 0; it should be one of key's 0 blocks", say("no pages", pair, K));
}

/* Of a batch's row of the table as many entries are read as its keys need, and no more. */
static void check_pages_needed(int pair) {
    for (int n = 0; n <= (COLUMNS - 1) * BLOCK; n++) {
        struct call c;
        valid_call(&c, pair);
        int needed = (n + BLOCK - 1) / BLOCK;
        int32_t *row = c.table + COLUMNS;
        c.key_list[1] = n;
        for (int i = needed; i < COLUMNS; i++)
            row[i] = PAGES;
        for (int i = 0; i < needed; i++) {
            int32_t right = row[i];
            row[i] = PAGES;
            refuse_tensor(context, &c, pair, TABLE, LIDX_ERR_VALUE, "a page that is needed");
            row[i] = right;
        }
        accept(context, &c, say("pages that are not needed", pair, TABLE));
    }
}

static void check_unpaged_table(int pair) {
    struct call c;
    valid_call(&c, pair);
    c.args.block_table = &c.t[TABLE];
    refuse_tensor(context, &c, pair, TABLE, LIDX_ERR_ARGUMENT, "given without pages");
}

static void refuse_value(struct call *c, int pair, int which, int32_t *at, int32_t value) {
    int32_t right = *at;
    *at = value;
    refuse_tensor(context, c, pair, which, LIDX_ERR_VALUE, "list value");
    *at = right;
}

static void check_lists(int pair) {
    struct call c;
    int32_t rows = is_packed(pair) ? B * S1 : S1, keys = pair == TND_TND ? B * S2 : S2;
    if (is_paged(pair))
        keys = BLOCK * COLUMNS;
    valid_call(&c, pair);
    for (int b = 0; b < B; b++) {
        refuse_value(&c, pair, QL, &c.query_list[b], -1);
        refuse_value(&c, pair, QL, &c.query_list[b], INT32_MIN);
        refuse_value(&c, pair, QL, &c.query_list[b], rows + 1);
        refuse_value(&c, pair, QL, &c.query_list[b], INT32_MAX);
        refuse_value(&c, pair, KL, &c.key_list[b], -1);
        refuse_value(&c, pair, KL, &c.key_list[b], INT32_MIN);
        refuse_value(&c, pair, KL, &c.key_list[b], keys + 1);
        refuse_value(&c, pair, KL, &c.key_list[b], INT32_MAX);
    }
    if (is_packed(pair))
        refuse_value(&c, pair, QL, &c.query_list[1], S1 - 1);
    if (pair == TND_TND)
        refuse_value(&c, pair, KL, &c.key_list[1], S2 - 1);
    accept(context, &c, say("restored", pair, QL));
    for (int which = QL; which <= KL; which++)
        for (int change = -1; change <= 1; change += 2) {
            valid_call(&c, pair);
            c.shape[which][0] += change;
            int got = lidx_run(context, &c.args);
            CHECK(got == LIDX_ERR_SHAPE && outputs_untouched(&c), "%s: %s",
                  say("length of a list", pair, which), lidx_status_name(got));
        }
}

static void check_counts(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.args.actual_seq_lengths_key = NULL;
    for (int which = 0; which < N_TENSORS; which++)
        c.t[which].strides = NULL;
    c.shape[K][1] = (int64_t)INT32_MAX + 1;
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "2^31 keys of one batch");
    /* A size of 0 does not make the other sizes harmless. */
    valid_call(&c, BSND_BSND);
    for (int which = 0; which < N_TENSORS; which++) {
        c.t[which].strides = NULL;
        c.shape[which][0] = 0;
    }
    CHECK_INT(lidx_run(context, &c.args), LIDX_OK, "no batches");
    c.shape[K][1] = -1;
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "no batches of -1 keys");
    c.shape[K][1] = S2;
    c.shape[Q][1] = c.shape[W][1] = c.shape[INDICES][1] = c.shape[VALUES][1] = (int64_t)1 << 60;
    refuse(context, &c, LIDX_ERR_SHAPE, "query has more elements", "no batches of 2^60 tokens");
    for (int which = 0; which < N_TENSORS; which++)
        for (int dim = 1; dim < c.t[which].ndim; dim++) {
            valid_call(&c, BSND_PA);
            for (int i = 0; i < N_TENSORS; i++)
                c.t[i].strides = NULL;
            c.shape[which][0] = 0;
            c.shape[which][dim] = INT64_MAX;
            int got = lidx_run(context, &c.args);
            CHECK(got != LIDX_OK && outputs_untouched(&c), "%s",
                  say("0 times the largest size", BSND_PA, which));
        }
}

/* A table without columns is enough for batches without keys. */
static void check_empty_table(void) {
    for (int pair = BSND_PA; pair <= TND_PA; pair++) {
        struct call c;
        valid_call(&c, pair);
        c.t[TABLE].strides = NULL;
        c.t[TABLE].data = NULL;
        c.shape[TABLE][1] = 0;
        c.key_list[0] = c.key_list[1] = 0;
        accept(context, &c, say("no columns", pair, TABLE));
        for (int i = 0; i < B * S1 * TOP; i++)
            CHECK_INT(c.indices[i], -1, "a batch without keys");
        memset(c.indices, 0xA5, sizeof c.indices);
        memset(c.values, 0xA5, sizeof c.values);
        c.key_list[1] = 1;
        refuse_tensor(context, &c, pair, KL, LIDX_ERR_VALUE, "longer than a table without columns");
    }
}

/* Packed tokens that belong to no batch see no keys. */
static void check_tokens_without_batches(void) {
    struct call c;
    valid_call(&c, TND_TND);
    c.shape[QL][0] = c.shape[KL][0] = 0;
    accept(context, &c, say("no batches", TND_TND, QL));
    for (int i = 0; i < B * S1 * TOP; i++)
        CHECK(c.indices[i] == -1 && c.values[i] == -INFINITY, "no batches: slot %d is %d, %g", i,
              c.indices[i], (double)c.values[i]);
}

/* B = 2^40 without tokens is legal, and no work. */
static void check_many_empty_batches(void) {
    struct call c;
    valid_call(&c, BSND_BSND);
    c.args.actual_seq_lengths_query = c.args.actual_seq_lengths_key = NULL;
    for (int which = 0; which < N_TENSORS; which++) {
        c.t[which].strides = NULL;
        c.shape[which][0] = (int64_t)1 << 40;
        c.shape[which][1] = 0;
    }
    int got = lidx_run(context, &c.args);
    CHECK(got == LIDX_OK && outputs_untouched(&c), "2^40 batches without tokens: %s",
          lidx_status_name(got));
    /* Their keys, were there any to speak of, would be 2^77 elements. */
    c.shape[K][1] = INT32_MAX;
    refuse(context, &c, LIDX_ERR_SHAPE, "key", "more elements than 64 bits address");
}

int main(void) {
    if (!CHECK(lidx_create(&context, NULL) == LIDX_OK, "%s", lidx_last_error()))
        return test_end();
    for (int pair = 0; pair < N_PAIRS; pair++) {
        check_heads_and_dim(pair);
        check_options(pair);
        check_lists(pair);
        if (is_paged(pair)) {
            check_pages(pair);
            check_pages_needed(pair);
        } else {
            check_unpaged_table(pair);
        }
    }
    check_layouts();
    check_counts();
    check_empty_table();
    check_tokens_without_batches();
    check_many_empty_batches();
    lidx_destroy(context);
    return test_end();
}
