/* SPDX-License-Identifier: Apache-2.0
 *
 * oneDNN's matmul, bfloat16 to float. Its second operand, the weights, is in whatever format it
 * asks for; the caller's threads each have a primitive, made where oneDNN sees one thread.
 */
#include <dnnl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rivals.h"

#if DNNL_VERSION_MAJOR < 3
typedef const dnnl_memory_desc_t *const_dnnl_memory_desc_t;
#endif

struct op {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_desc_t description;
    dnnl_primitive_t product;
    dnnl_memory_desc_t plain_description, left_description, out_description, any_description;
    dnnl_memory_t left, right, out, scratchpad;
    void *scratch;
    enum order order;
};

static const char *version(void) {
    static char text[32];
    const dnnl_version_t *v = dnnl_version();
    snprintf(text, sizeof text, "%d.%d.%d", v->major, v->minor, v->patch);
    return text;
}

/* ---- where versions 2 and 3 differ ----------------------------------------------------------- */

#if DNNL_VERSION_MAJOR < 3

static const_dnnl_memory_desc_t view(const dnnl_memory_desc_t *description) {
    return description;
}

static int describe(dnnl_memory_desc_t *description, int rows, int columns, dnnl_data_type_t type,
                    dnnl_format_tag_t tag) {
    dnnl_dims_t dims = {rows, columns};
    return dnnl_memory_desc_init_by_tag(description, 2, dims, type, tag);
}

static int describe_product(struct op *op, dnnl_primitive_attr_t attributes) {
    dnnl_matmul_desc_t matmul;
    return dnnl_matmul_desc_init(&matmul, &op->left_description, &op->any_description, NULL,
                                 &op->out_description) ||
           dnnl_primitive_desc_create(&op->description, &matmul, attributes, op->engine, NULL);
}

static void forget(dnnl_memory_desc_t *description) {
    (void)description;
}

#else

static const_dnnl_memory_desc_t view(const dnnl_memory_desc_t *description) {
    return *description;
}

static int describe(dnnl_memory_desc_t *description, int rows, int columns, dnnl_data_type_t type,
                    dnnl_format_tag_t tag) {
    dnnl_dims_t dims = {rows, columns};
    return dnnl_memory_desc_create_with_tag(description, 2, dims, type, tag);
}

static int describe_product(struct op *op, dnnl_primitive_attr_t attributes) {
    return dnnl_matmul_primitive_desc_create(&op->description, op->engine, op->left_description,
                                             op->any_description, NULL, op->out_description,
                                             attributes);
}

static void forget(dnnl_memory_desc_t *description) {
    if (*description)
        dnnl_memory_desc_destroy(*description);
}

#endif

/* ---- the rest -------------------------------------------------------------------------------- */

static const_dnnl_memory_desc_t asked(const struct op *op, dnnl_query_t what) {
    return dnnl_primitive_desc_query_md(op->description, what, 0);
}

static void close_op(void *address) {
    struct op *op = address;
    dnnl_memory_t memories[] = {op->left, op->right, op->out, op->scratchpad};
    for (int i = 0; i < 4; i++) {
        if (memories[i])
            dnnl_memory_destroy(memories[i]);
    }
    forget(&op->plain_description);
    forget(&op->left_description);
    forget(&op->out_description);
    forget(&op->any_description);
    if (op->product)
        dnnl_primitive_destroy(op->product);
    if (op->description)
        dnnl_primitive_desc_destroy(op->description);
    if (op->stream)
        dnnl_stream_destroy(op->stream);
    if (op->engine)
        dnnl_engine_destroy(op->engine);
    free(op->scratch);
    free(op);
}

static int make_product(struct op *op) {
    dnnl_primitive_attr_t attributes;
    if (dnnl_primitive_attr_create(&attributes))
        return 1;
    int failed = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user) ||
                 describe_product(op, attributes) ||
                 dnnl_primitive_create(&op->product, op->description);
    dnnl_primitive_attr_destroy(attributes);
    return failed;
}

static int make_memories(struct op *op) {
    const_dnnl_memory_desc_t right = asked(op, dnnl_query_weights_md);
    const_dnnl_memory_desc_t scratchpad = asked(op, dnnl_query_scratchpad_md);
    op->scratch = allocate(dnnl_memory_desc_get_size(scratchpad) + 64);
    return !op->scratch ||
           dnnl_memory_create(&op->left, view(&op->left_description), op->engine,
                              DNNL_MEMORY_NONE) ||
           dnnl_memory_create(&op->right, right, op->engine, DNNL_MEMORY_NONE) ||
           dnnl_memory_create(&op->out, view(&op->out_description), op->engine, DNNL_MEMORY_NONE) ||
           dnnl_memory_create(&op->scratchpad, scratchpad, op->engine, op->scratch);
}

static void *open_op(const struct tile *tile) {
    int heads = tile->tokens * HEADS, is_heads = tile->order == HEADS_FASTEST;
    int rows = is_heads ? tile->keys : heads, columns = is_heads ? heads : tile->keys;
    struct op *op = calloc(1, sizeof *op);
    if (!op)
        return NULL;
    op->order = tile->order;
    if (dnnl_engine_create(&op->engine, dnnl_cpu, 0) ||
        dnnl_stream_create(&op->stream, op->engine, dnnl_stream_default_flags) ||
        describe(&op->left_description, rows, DIM, dnnl_bf16, dnnl_ab) ||
        describe(&op->plain_description, DIM, columns, dnnl_bf16, dnnl_ba) ||
        describe(&op->any_description, DIM, columns, dnnl_bf16, dnnl_format_tag_any) ||
        describe(&op->out_description, rows, columns, dnnl_f32, dnnl_ab) || make_product(op) ||
        make_memories(op)) {
        close_op(op);
        return NULL;
    }
    return op;
}

static size_t packed_bytes(void *op) {
    return dnnl_memory_desc_get_size(asked(op, dnnl_query_weights_md));
}

static void pack(void *address, const uint16_t *rows, void *packed) {
    struct op *op = address;
    dnnl_primitive_desc_t description = NULL;
    dnnl_primitive_t reorder = NULL;
    dnnl_memory_t from = NULL;
    int failed =
        dnnl_memory_create(&from, view(&op->plain_description), op->engine,
                           (void *)(uintptr_t)rows) ||
        dnnl_memory_set_data_handle(op->right, packed) ||
        dnnl_reorder_primitive_desc_create(&description, view(&op->plain_description), op->engine,
                                           asked(op, dnnl_query_weights_md), op->engine, NULL) ||
        dnnl_primitive_create(&reorder, description);
    if (!failed) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, op->right}};
        failed =
            dnnl_primitive_execute(reorder, op->stream, 2, args) || dnnl_stream_wait(op->stream);
    }
    if (failed)
        memset(packed, 0, packed_bytes(op)); /* the check of the results will tell */
    if (reorder)
        dnnl_primitive_destroy(reorder);
    if (description)
        dnnl_primitive_desc_destroy(description);
    if (from)
        dnnl_memory_destroy(from);
}

static void multiply(void *address, const void *query, const void *key, float *dots) {
    struct op *op = address;
    const void *left = op->order == HEADS_FASTEST ? key : query;
    const void *right = op->order == HEADS_FASTEST ? query : key;
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, op->left},
                              {DNNL_ARG_WEIGHTS, op->right},
                              {DNNL_ARG_DST, op->out},
                              {DNNL_ARG_SCRATCHPAD, op->scratchpad}};
    dnnl_memory_set_data_handle(op->left, (void *)(uintptr_t)left);
    dnnl_memory_set_data_handle(op->right, (void *)(uintptr_t)right);
    dnnl_memory_set_data_handle(op->out, dots);
    dnnl_primitive_execute(op->product, op->stream, 4, args);
}

static const char *implementation(void *op) {
    const char *text = "";
    dnnl_primitive_desc_query(((struct op *)op)->description, dnnl_query_impl_info_str, 0,
                              (void *)&text);
    return text;
}

const struct library onednn = {"oneDNN",     version, open_op,  close_op,
                               packed_bytes, pack,    multiply, implementation};
