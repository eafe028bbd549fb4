/* SPDX-License-Identifier: Apache-2.0
 *
 * The operators for PyTorch: their schemas, their kernels and their registration. torch_call.h has
 * what a call does, torch_lookup.h where torch's functions come from.
 */
#include <stddef.h>
#include <string.h>

#include "lightning_indexer.h"
#include "torch_call.h"
#include "torch_lookup.h"

/* What Python calls (through ctypes), beside lidx_torch_load(). */
LIDX_API const char *lidx_torch_schema(const char *op);

/* Each returns NULL, or a sentence that says what failed. */
LIDX_API const char *lidx_torch_define(const char *ns, const char *op, int owns_namespace);
LIDX_API const char *lidx_torch_implement(const char *ns, const char *op);

static const char schema_op[] =
    "lightning_indexer(Tensor query, Tensor key, Tensor weights, "
    "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, "
    "Tensor? block_table=None, str? layout_query=None, str? layout_key=None, "
    "int? sparse_count=None, int? sparse_mode=None) -> Tensor";

static void kernel_op(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    torch_value value;
    (void)n_arguments;
    (void)n_results;
    call_begin(&c, stack);
    call_take_lists(&c, stack);
    if (torch_take_optional(stack[6], &value))
        call_take_layout(&c, "layout_query", value, &c.args.layout_query);
    if (torch_take_optional(stack[7], &value))
        call_take_layout(&c, "layout_key", value, &c.args.layout_key);
    if (torch_take_optional(stack[8], &value))
        c.sparse_count = (int64_t)value;
    if (torch_take_optional(stack[9], &value))
        c.sparse_mode = (int64_t)value;
    call_run(&c);
    call_finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
}

static const char schema_npu[] =
    "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, "
    "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, "
    "Tensor? block_table=None, str layout_query='BSND', str layout_key='BSND', "
    "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, "
    "int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)";

static void kernel_npu(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    (void)n_arguments;
    (void)n_results;
    call_begin(&c, stack);
    call_take_lists(&c, stack);
    call_take_layout(&c, "layout_query", stack[6], &c.args.layout_query);
    call_take_layout(&c, "layout_key", stack[7], &c.args.layout_key);
    c.sparse_count = (int64_t)stack[8];
    c.sparse_mode = (int64_t)stack[9];
    c.pre_tokens = (int64_t)stack[10];
    c.next_tokens = (int64_t)stack[11];
    c.return_values = (stack[12] & 0xff) != 0; /* a bool fills one byte of its 64 bits */
    call_run(&c);
    if (!c.return_values)
        call_empty_values(&c);
    call_finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
    stack[1] = (torch_value)(uintptr_t)c.handle[VALUES];
}

/* Into the caller's tensors: no allocation of outputs, float32 values, and the count of what a CUDA
 * run had to clamp or hide. It returns nothing, which is the form that torch.compile can follow. */
static const char schema_out[] =
    "lightning_indexer_out(Tensor query, Tensor key, Tensor weights, Tensor(a!) sparse_indices, "
    "Tensor(b!)? sparse_values=None, *, Tensor? actual_seq_lengths_query=None, "
    "Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query='BSND', "
    "str layout_key='BSND', int sparse_mode=3, Tensor(c!)? error_word=None) -> ()";

static void kernel_out(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    (void)n_arguments;
    (void)n_results;
    call_begin(&c, stack);
    c.fills_outputs = 1;
    call_take_tensor(&c, INDICES, stack[3]);
    call_take_optional_tensor(&c, VALUES, stack[4]);
    call_take_lists(&c, stack + 2); /* two arguments later than in the others */
    call_take_layout(&c, "layout_query", stack[8], &c.args.layout_query);
    call_take_layout(&c, "layout_key", stack[9], &c.args.layout_key);
    c.sparse_mode = (int64_t)stack[10];
    call_take_optional_tensor(&c, ERROR_WORD, stack[11]);
    call_run(&c);
    call_finish(&c);
}

/* The first operator without what most calls leave out, for the Python function: torch takes 0.1 us
 * over each argument that is not given. */
static const char schema_dense[] =
    "_dense(Tensor query, Tensor key, Tensor weights, int sparse_count=2048) -> Tensor";

static void kernel_dense(torch_value *stack, uint64_t n_arguments, uint64_t n_results) {
    struct call c;
    (void)n_arguments;
    (void)n_results;
    call_begin(&c, stack);
    c.sparse_count = (int64_t)stack[3];
    call_run(&c);
    call_finish(&c);
    stack[0] = (torch_value)(uintptr_t)c.handle[INDICES];
}

static const struct op {
    const char *name;
    const char *schema;
    torch_kernel kernel;
} ops[] = {
    {"lightning_indexer", schema_op, kernel_op},
    {"npu_lightning_indexer", schema_npu, kernel_npu},
    {"lightning_indexer_out", schema_out, kernel_out},
    {"_dense", schema_dense, kernel_dense},
};

static const struct op *find_op(const char *name) {
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (strcmp(name, ops[i].name) == 0)
            return &ops[i];
    return NULL;
}

const char *lidx_torch_schema(const char *name) {
    const struct op *op = find_op(name);
    return op ? op->schema : NULL;
}

const char *lidx_torch_implement(const char *ns, const char *name) {
    static const char *const keys[] = {"CPU", "CUDA"};
    const struct op *op = find_op(name);
    if (!op)
        return "there is no such operator";
    for (int i = 0; i < 2; i++) {
        struct torch_library *library;
        if (torch.library_init_impl(ns, keys[i], __FILE__, __LINE__, &library) ||
            torch.library_impl(library, op->name, op->kernel))
            return "torch refused to register the operator's implementation";
    }
    return NULL;
}

const char *lidx_torch_define(const char *ns, const char *name, int owns_namespace) {
    const struct op *op = find_op(name);
    struct torch_library *library;
    torch_error error;
    if (!op)
        return "there is no such operator";
    error = owns_namespace ? torch.library_init_def(ns, __FILE__, __LINE__, &library)
                           : torch.library_init_fragment(ns, __FILE__, __LINE__, &library);
    if (error || torch.library_def(library, op->schema))
        return "torch refused to define the operator";
    return lidx_torch_implement(ns, name);
}
