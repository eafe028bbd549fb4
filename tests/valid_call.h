/* SPDX-License-Identifier: Apache-2.0
 *
 * A valid call of each pair of layouts, to be broken in one place, and what a refusal must be: its
 * status, a sentence that names the argument, outputs as they were.
 */
#ifndef LIDX_VALID_CALL_H
#define LIDX_VALID_CALL_H

#include "test.h"

#include "lightning_indexer.h"

enum { Q, K, W, QL, KL, TABLE, INDICES, VALUES, N_TENSORS };
enum { B = 2, S1 = 3, N1 = 4, D = 64, S2 = 40, TOP = 5, BLOCK = 16, PAGES = 8, COLUMNS = 4 };
enum { BSND_BSND, TND_TND, BSND_PA, TND_PA, N_PAIRS };

extern const char *const tensor_name[N_TENSORS], *const pair_name[N_PAIRS];

/* A valid call of the given pair of layouts, to be broken in one place. */
struct call {
    struct lidx_args args;
    struct lidx_tensor t[N_TENSORS];
    int64_t shape[N_TENSORS][6];
    int64_t stride[N_TENSORS][6];
    uint16_t query[B * S1 * N1 * D];
    uint16_t key[PAGES * BLOCK * D + 1];
    uint16_t weights[B * S1 * N1];
    int32_t query_list[B + 1], key_list[B + 1], table[B * COLUMNS];
    int32_t indices[B * S1 * TOP];
    float values[B * S1 * TOP];
};

int is_packed(int pair);
int is_paged(int pair);
int is_used(int pair, int which); /* whether the pair takes the tensor */

/* Valid, with outputs of 0xA5. */
void valid_call(struct call *c, int pair);
int outputs_untouched(const struct call *c);

int is_sentence(const char *text);
void check_sentence(int got, int status, const char *mention, const char *what);

/* The broken call is refused as it should be. */
void refuse(struct lidx_context *context, const struct call *c, int status, const char *mention,
            const char *what);

/* The same, where what is wrong with tensor `which` has this status and the sentence names it. */
void refuse_tensor(struct lidx_context *context, const struct call *c, int pair, int which,
                   int status, const char *fault);

/* The call runs, and its indices are those of keys. */
void accept(struct lidx_context *context, const struct call *c, const char *what);

/* "what, tensor of pair", until the next call. */
const char *say(const char *what, int pair, int which);

#endif
