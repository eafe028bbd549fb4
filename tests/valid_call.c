/* SPDX-License-Identifier: Apache-2.0 */
#include "valid_call.h"

const char *const tensor_name[N_TENSORS] = {"query",
                                            "key",
                                            "weights",
                                            "actual_seq_lengths_query",
                                            "actual_seq_lengths_key",
                                            "block_table",
                                            "sparse_indices",
                                            "sparse_values"};
const char *const pair_name[N_PAIRS] = {"BSND/BSND", "TND/TND", "BSND/PA_BSND", "TND/PA_BSND"};

static void describe(struct call *c, int which, void *data, struct lidx_dtype dtype, int ndim,
                     const int64_t *shape) {
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        c->shape[which][i] = shape[i];
        c->stride[which][i] = stride;
        stride *= shape[i];
    }
    c->t[which] = (struct lidx_tensor){
        data, {LIDX_CPU, 0}, ndim, dtype, c->shape[which], c->stride[which], 0};
}

int is_packed(int pair) {
    return pair == TND_TND || pair == TND_PA;
}

int is_paged(int pair) {
    return pair == BSND_PA || pair == TND_PA;
}

int is_used(int pair, int which) {
    return which != TABLE || is_paged(pair);
}

static void set_lists(struct call *c, int pair) {
    for (int b = 0; b < B; b++) {
        c->query_list[b] = is_packed(pair) ? S1 * (b + 1) : S1;
        c->key_list[b] = pair == TND_TND ? S2 * (b + 1) : S2;
        for (int i = 0; i < COLUMNS; i++)
            c->table[b * COLUMNS + i] = i == COLUMNS - 1 ? -77 : (b * 3 + i) % PAGES;
    }
}

void valid_call(struct call *c, int pair) {
    const struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, int32 = {LIDX_INT, 32, 1},
                            f32 = {LIDX_FLOAT, 32, 1};
    int packed = is_packed(pair);
    memset(c, 0, sizeof *c);
    const int64_t query[] = {B, S1, N1, D}, packed_query[] = {B * S1, N1, D};
    const int64_t key[] = {B, S2, 1, D}, packed_key[] = {B * S2, 1, D};
    const int64_t pages[] = {PAGES, BLOCK, 1, D}, list[] = {B}, table[] = {B, COLUMNS};
    const int64_t out[] = {B, S1, 1, TOP}, packed_out[] = {B * S1, 1, TOP};
    describe(c, Q, c->query, bf16, packed ? 3 : 4, packed ? packed_query : query);
    describe(c, K, c->key, bf16, pair == TND_TND ? 3 : 4,
             is_paged(pair)    ? pages
             : pair == TND_TND ? packed_key
                               : key);
    describe(c, W, c->weights, bf16, packed ? 2 : 3, packed ? packed_query : query);
    describe(c, QL, c->query_list, int32, 1, list);
    describe(c, KL, c->key_list, int32, 1, list);
    describe(c, TABLE, c->table, int32, 2, table);
    describe(c, INDICES, c->indices, int32, packed ? 3 : 4, packed ? packed_out : out);
    describe(c, VALUES, c->values, f32, packed ? 3 : 4, packed ? packed_out : out);
    set_lists(c, pair);
    for (int i = 0; i < B * S1 * N1 * D; i++)
        c->query[i] = test_to_bf16((float)(i % 7) - 3);
    for (int i = 0; i < PAGES * BLOCK * D; i++)
        c->key[i] = test_to_bf16((float)(i % 5) - 2);
    c->args = (struct lidx_args)LIDX_ARGS_INIT;
    c->args.query = &c->t[Q];
    c->args.key = &c->t[K];
    c->args.weights = &c->t[W];
    c->args.actual_seq_lengths_query = &c->t[QL];
    c->args.actual_seq_lengths_key = &c->t[KL];
    c->args.block_table = is_paged(pair) ? &c->t[TABLE] : NULL;
    c->args.layout_query = packed ? LIDX_TND : LIDX_BSND;
    c->args.layout_key = is_paged(pair) ? LIDX_PA_BSND : packed ? LIDX_TND : LIDX_BSND;
    c->args.sparse_count = TOP;
    c->args.sparse_indices = &c->t[INDICES];
    c->args.sparse_values = &c->t[VALUES];
    memset(c->indices, 0xA5, sizeof c->indices);
    memset(c->values, 0xA5, sizeof c->values);
}

int outputs_untouched(const struct call *c) {
    const unsigned char *indices = (const unsigned char *)c->indices;
    const unsigned char *values = (const unsigned char *)c->values;
    for (size_t i = 0; i < sizeof c->indices; i++)
        if (indices[i] != 0xA5)
            return 0;
    for (size_t i = 0; i < sizeof c->values; i++)
        if (values[i] != 0xA5)
            return 0;
    return 1;
}

/* A sentence of ours says what was found and what it should be. */
int is_sentence(const char *text) {
    return strlen(text) > 20 && strchr(text, ' ') != NULL;
}

void check_sentence(int got, int status, const char *mention, const char *what) {
    const char *sentence = lidx_last_error();
    CHECK(got == status, "%s: %s (\"%s\"), it should be %s", what, lidx_status_name(got),
          got ? sentence : "", lidx_status_name(status));
    if (got != LIDX_OK)
        CHECK(strstr(sentence, mention) && is_sentence(sentence), "%s: \"%s\" does not name %s",
              what, sentence, mention);
}

void refuse(struct lidx_context *context, const struct call *c, int status, const char *mention,
            const char *what) {
    check_sentence(lidx_run(context, &c->args), status, mention, what);
    CHECK(outputs_untouched(c), "%s: an output was touched", what);
}

static char what_text[160];

const char *say(const char *what, int pair, int which) {
    snprintf(what_text, sizeof what_text, "%s, %s of %s", what, tensor_name[which],
             pair_name[pair]);
    return what_text;
}

void accept(struct lidx_context *context, const struct call *c, const char *what) {
    int status = lidx_run(context, &c->args);
    CHECK(status == LIDX_OK, "%s: %s, \"%s\"", what, lidx_status_name(status), lidx_last_error());
    for (int i = 0; status == LIDX_OK && i < B * S1 * TOP; i++)
        CHECK(c->indices[i] >= -1 && c->indices[i] < S2, "%s: slot %d is %d", what, i,
              c->indices[i]);
}

void refuse_tensor(struct lidx_context *context, const struct call *c, int pair, int which,
                   int status, const char *fault) {
    refuse(context, c, status, tensor_name[which], say(fault, pair, which));
}
