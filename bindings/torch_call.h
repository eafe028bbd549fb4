/* SPDX-License-Identifier: Apache-2.0
 *
 * One call of an operator: torch's arguments to struct lidx_args, the run, and what goes back.
 *
 * Who owns what: torch hands over each argument (a tensor's handle, a string, an optional's cell),
 * so every one is released before the call ends, also when it is refused. A refusal is thrown by
 * torch's own check function through the frames of these files, which is why they are compiled with
 * -fexceptions and why the throw is the last thing a call does.
 */
#ifndef LIDX_TORCH_CALL_H
#define LIDX_TORCH_CALL_H

#include "lightning_indexer.h"
#include "torch_shim.h"

enum {
    QUERY,
    KEY,
    WEIGHTS,
    QUERY_LENGTHS,
    KEY_LENGTHS,
    BLOCK_TABLE,
    ERROR_WORD, /* this and what follows is written */
    INDICES,
    VALUES,
    N_TENSORS
};

extern const char *const call_tensor_names[N_TENSORS];

struct call {
    struct lidx_args args;
    struct torch_tensor *handle[N_TENSORS]; /* owned */
    int64_t sparse_count, sparse_mode, pre_tokens, next_tokens;
    int return_values;
    int fills_outputs;                 /* the outputs are the caller's tensors */
    int32_t device_type, device_index; /* query's, as torch numbers them */
    const char *error;                 /* NULL while all is well */

    /* What follows is written before it is read, so a call does not begin by clearing it. */
    struct lidx_tensor tensor[N_TENSORS];
    int64_t output_shape[4], output_strides[4];
    char sentence[256]; /* where the operator's own refusals are written */
};

/* --- torch_arguments.c: from torch's stack --------------------------------------------------- */

/* Defaults, and the three tensors that every operator begins with. */
void call_begin(struct call *c, const torch_value *stack);

void call_take_tensor(struct call *c, int which, torch_value argument);
void call_take_optional_tensor(struct call *c, int which, torch_value argument);

/* The two lists of lengths and the table, which follow each other in the operators that have any.
 */
void call_take_lists(struct call *c, const torch_value *stack);

/* A layout by its name; consumes the string. */
void call_take_layout(struct call *c, const char *name, torch_value argument, int32_t *layout);

/* The value of an optional argument; 0 and *value untouched when it is None. */
int torch_take_optional(torch_value argument, torch_value *value);

/* Fills tensor[which] from its handle; shape and strides stay torch's. */
void call_describe(struct call *c, int which);

/* An element type of torch's as the library says it. */
struct lidx_dtype torch_dtype(int32_t dtype);

/* --- torch_call.c: the run ------------------------------------------------------------------- */

/* Makes the outputs, unless they are the caller's, and runs. What has gone wrong before or goes
 * wrong here is in c->error. */
void call_run(struct call *c);

/* An empty tensor in place of values that were not asked for. */
void call_empty_values(struct call *c);

/* Releases all that is owned; on failure throws, else leaves new outputs to the caller. */
void call_finish(struct call *c);

#endif
