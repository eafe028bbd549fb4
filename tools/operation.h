/* SPDX-License-Identifier: Apache-2.0
 *
 * One call of the operator from a file to a file: what run, check and demo have in common.
 */
#ifndef LIDX_OPERATION_H
#define LIDX_OPERATION_H

#include <stdint.h>

#include "lightning_indexer.h"
#include "options.h"
#include "safetensors.h"

enum operand_index { QUERY, KEY, WEIGHTS, QUERY_LENGTHS, KEY_LENGTHS, BLOCK_TABLE, N_OPERANDS };

struct operation {
    struct safetensors file;
    struct lidx_tensor tensors[N_OPERANDS]; /* views of the file's; ndim 0 and no shape: absent */
    struct lidx_tensor indices, values;     /* outputs, of int32 and float32 */
    int64_t output_shape[TENSOR_DIMS];
    int64_t n_rows; /* of the outputs */
    struct lidx_args args;
    struct lidx_context *context;
    const char *kernel; /* the one that serves it */
    int n_threads;
    double seconds; /* of the last run */
};

/* --layout-query and so on. What is not given comes from a file's __metadata__, under the same
 * names with underscores, or else from the shapes. */
extern const struct option operation_options[];
/* --kernel and --threads; also for the commands that read no file. */
extern const struct option engine_options[];

extern const char *const layout_names[]; /* by enum lidx_layout */

/* A context as the options ask for it, and how many threads it has. */
int engine_create(struct lidx_context **context, int *n_threads);

/* The name of the CPU kernel that serves this element type when `forced` is asked for; NULL means
 * LIDX_KERNEL's or the best. Valid for the life of the process. */
const char *kernel_in_use(const char *forced, int type_code);

/* Each returns EXIT_FINE or, after a sentence, EXIT_TROUBLE. `result`, which may be NULL, is an
 * earlier output: it says sparse_count and sparse_mode when the command line does not. */
int operation_open(struct operation *operation, const char *path, const struct safetensors *result);
int operation_run(struct operation *operation);
int operation_save(const struct operation *operation, const char *path);
void operation_close(struct operation *operation);

int operation_heads(const struct operation *operation);
int operation_dim(const struct operation *operation);

#endif
