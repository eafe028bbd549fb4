/* SPDX-License-Identifier: Apache-2.0 */
#include "operation.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"
#include "numbers.h"

const char *const layout_names[] = {"BSND", "TND", "PA_BSND", NULL};
static const char *const query_layout_names[] = {"BSND", "TND", NULL};
static const char *const device_names[] = {"cpu", "cuda", NULL};
static const char *const mode_names[] = {"0", "3", NULL};
static const char *const operand_names[N_OPERANDS] = {
    "query", "key", "weights", "actual_seq_lengths_query", "actual_seq_lengths_key", "block_table"};

/* What the command line asked for; -1 or NULL where it did not. */
static struct {
    int layout_query, layout_key, mode, device;
    int64_t sparse_count, n_threads;
    const char *kernel;
} wanted = {.layout_query = -1, .layout_key = -1, .mode = -1, .sparse_count = -1};

const struct option operation_options[] = {
    {.name = "layout-query",
     .kind = OPTION_CHOICE,
     .target = &wanted.layout_query,
     .choices = query_layout_names,
     .help = "of query, weights and the outputs"},
    {.name = "layout-key",
     .kind = OPTION_CHOICE,
     .target = &wanted.layout_key,
     .choices = layout_names,
     .help = "of key"},
    {.name = "sparse-count",
     .kind = OPTION_INTEGER,
     .target = &wanted.sparse_count,
     .low = 1,
     .high = LIDX_MAX_TOP_K,
     .value = "K",
     .help = "keys to select for each token (default 2048)"},
    {.name = "sparse-mode",
     .kind = OPTION_CHOICE,
     .target = &wanted.mode,
     .choices = mode_names,
     .help = "0: a token sees every key; 3: right-bottom causal (default)"},
    {.name = "device",
     .kind = OPTION_CHOICE,
     .target = &wanted.device,
     .choices = device_names,
     .help = "cpu, where a file's tensors are; the library and torch have cuda"},
    {.name = NULL},
};

const struct option engine_options[] = {
    {.name = "kernel",
     .kind = OPTION_TEXT,
     .target = &wanted.kernel,
     .value = "NAME",
     .help = "force a kernel; `lidx info` lists them (default: the best)"},
    {.name = "threads",
     .kind = OPTION_INTEGER,
     .target = &wanted.n_threads,
     .low = 0,
     .high = LIDX_MAX_THREADS,
     .value = "N",
     .help = "CPU threads; 0, the default, means as many as OpenMP has"},
    {.name = NULL},
};

/* ---- the engine ------------------------------------------------------------------------------ */

const char *kernel_in_use(const char *forced, int type_code) {
    if (!forced)
        forced = getenv("LIDX_KERNEL");
    const char *chosen = "none";
    for (int i = 0; i < lidx_kernel_count(); i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        if (lidx_kernel_info(i, &info) || strcmp(info.backend, "cpu") != 0)
            continue;
        if (forced && *forced && strcmp(forced, info.name) == 0)
            return info.name;
        if (type_code == LIDX_BFLOAT ? info.chosen_bf16 : info.chosen_fp16)
            chosen = info.name;
    }
    return chosen;
}

int engine_create(struct lidx_context **context, int *n_threads) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    options.n_threads = (int32_t)wanted.n_threads;
    options.kernel = wanted.kernel;
    *n_threads = options.n_threads ? options.n_threads : default_threads();
    if (lidx_create(context, &options))
        return refuse("%s", lidx_last_error());
    return EXIT_FINE;
}

static int check_device(void) {
    if (wanted.device == 0)
        return EXIT_FINE;
    for (int i = 0; i < lidx_kernel_count(); i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        if (lidx_kernel_info(i, &info) == LIDX_OK && strcmp(info.backend, "cuda") == 0)
            return refuse("--device is cuda, but this program holds its tensors in host memory; it "
                          "should be cpu, or call the library from C or torch for CUDA");
    }
    return refuse("--device is cuda, but this build has no CUDA support; it should be cpu");
}

/* ---- from a file to arguments ---------------------------------------------------------------- */

static int describe(struct operation *operation, enum operand_index index, const struct tensor *t) {
    static const struct {
        const char *name;
        struct lidx_dtype dtype;
    } types[] = {{"BF16", {LIDX_BFLOAT, 16, 1}},
                 {"F16", {LIDX_FLOAT, 16, 1}},
                 {"F32", {LIDX_FLOAT, 32, 1}},
                 {"I32", {LIDX_INT, 32, 1}}};
    static const char *const allowed[N_OPERANDS] = {
        "BF16 or F16", "BF16 or F16", "BF16, F16 or F32", "I32", "I32", "I32"};
    struct lidx_tensor *view = &operation->tensors[index];
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, t->element->name) == 0 &&
            strstr(allowed[index], t->element->name))
            view->dtype = types[i].dtype;
    if (!view->dtype.lanes)
        return refuse("%s: %s has dtype %s; it should be %s", operation->file.path, t->name,
                      t->element->name, allowed[index]);
    size_t bytes = (size_t)t->element->bits / 8;
    if (t->begin < t->end && (uintptr_t)t->data % bytes)
        return refuse("%s: %s begins at a byte that is no multiple of its %zu-byte elements; the "
                      "file should be written with its data aligned",
                      operation->file.path, t->name, bytes);
    view->data = (void *)(uintptr_t)t->data; /* inputs are only read */
    view->device.device_type = LIDX_CPU;
    view->ndim = t->ndim;
    view->shape = (int64_t *)(uintptr_t)t->shape;
    return EXIT_FINE;
}

static int find_operands(struct operation *operation) {
    struct lidx_args *args = &operation->args;
    const struct lidx_tensor **const slots[N_OPERANDS] = {&args->query,
                                                          &args->key,
                                                          &args->weights,
                                                          &args->actual_seq_lengths_query,
                                                          &args->actual_seq_lengths_key,
                                                          &args->block_table};
    for (int i = 0; i < N_OPERANDS; i++) {
        const struct tensor *t = safetensors_find(&operation->file, operand_names[i]);
        if (!t && i <= WEIGHTS)
            return refuse("%s has no tensor \"%s\"; it should have query, key and weights",
                          operation->file.path, operand_names[i]);
        if (!t)
            continue;
        int status = describe(operation, (enum operand_index)i, t);
        if (status)
            return status;
        *slots[i] = &operation->tensors[i];
    }
    return EXIT_FINE;
}

/* A choice by the command line, else by metadata, else `otherwise`. */
static int choose(const struct operation *operation, const struct safetensors *result,
                  const char *name, int given, const char *const *choices, int otherwise,
                  int *choice) {
    *choice = given >= 0 ? given : otherwise;
    if (given >= 0)
        return EXIT_FINE;
    const char *text = result ? safetensors_metadata(result, name) : NULL;
    if (!text)
        text = safetensors_metadata(&operation->file, name);
    if (!text)
        return EXIT_FINE;
    *choice = parse_choice(text, choices);
    if (*choice >= 0)
        return EXIT_FINE;
    char allowed[64];
    join_choices(allowed, sizeof allowed, choices);
    return refuse("%s: __metadata__ has %s \"%.40s\"; it should be %s", operation->file.path, name,
                  text, allowed);
}

static int choose_count(struct operation *operation, const struct safetensors *result) {
    operation->args.sparse_count = LIDX_DEFAULT_TOP_K;
    const struct tensor *indices = result ? safetensors_find(result, "sparse_indices") : NULL;
    const char *text = safetensors_metadata(&operation->file, "sparse_count");
    int64_t count = LIDX_DEFAULT_TOP_K;
    if (wanted.sparse_count >= 0)
        count = wanted.sparse_count;
    else if (indices && indices->ndim > 0)
        count = indices->shape[indices->ndim - 1];
    else if (text && !parse_integer(text, 1, LIDX_MAX_TOP_K, &count))
        return refuse("%s: __metadata__ has sparse_count \"%.40s\"; it should be 1 to %d",
                      operation->file.path, text, LIDX_MAX_TOP_K);
    if (count < 1 || count > LIDX_MAX_TOP_K)
        return refuse("%s: sparse_indices has %lld slots a row; it should have 1 to %d",
                      result->path, (long long)count, LIDX_MAX_TOP_K);
    operation->args.sparse_count = (int32_t)count;
    return EXIT_FINE;
}

static int resolve_choices(struct operation *operation, const struct safetensors *result) {
    struct lidx_args *args = &operation->args;
    int by_query = args->query->ndim == 3 ? LIDX_TND : LIDX_BSND;
    int by_key = args->block_table ? LIDX_PA_BSND : args->key->ndim == 3 ? LIDX_TND : LIDX_BSND;
    int status, mode;
    if ((status = choose(operation, NULL, "layout_query", wanted.layout_query, query_layout_names,
                         by_query, &args->layout_query)) ||
        (status = choose(operation, NULL, "layout_key", wanted.layout_key, layout_names, by_key,
                         &args->layout_key)) ||
        (status = choose(operation, result, "sparse_mode", wanted.mode, mode_names, 1, &mode)))
        return status;
    args->sparse_mode = mode ? LIDX_MODE_CAUSAL : LIDX_MODE_FULL;
    return choose_count(operation, result);
}

static void describe_output(struct operation *operation, struct lidx_tensor *output, int code) {
    output->device.device_type = LIDX_CPU;
    output->ndim = operation->args.query->ndim;
    output->dtype = (struct lidx_dtype){(uint8_t)code, 32, 1};
    output->shape = operation->output_shape;
}

/* The outputs get memory only after the library has accepted the shapes: until then a file may
 * claim any number of rows for no bytes at all. */
static int make_outputs(struct operation *operation) {
    const struct lidx_tensor *query = operation->args.query;
    size_t bytes;
    operation->n_rows = 1;
    for (int i = 0; i < query->ndim; i++)
        operation->output_shape[i] = query->shape[i];
    if (query->ndim >= 2) {
        operation->output_shape[query->ndim - 2] = 1;
        operation->output_shape[query->ndim - 1] = operation->args.sparse_count;
    }
    describe_output(operation, &operation->indices, LIDX_INT);
    describe_output(operation, &operation->values, LIDX_FLOAT);
    operation->args.sparse_indices = &operation->indices;
    operation->args.sparse_values = &operation->values;
    if (lidx_workspace_size(operation->context, &operation->args, &bytes))
        return refuse("%s: %s", operation->file.path, lidx_last_error());
    for (int i = 0; i < query->ndim - 2; i++)
        operation->n_rows *= query->shape[i];
    bytes = (size_t)operation->n_rows * (size_t)operation->args.sparse_count * 4;
    operation->indices.data = malloc(bytes ? bytes : 1);
    operation->values.data = malloc(bytes ? bytes : 1);
    if (!operation->indices.data || !operation->values.data)
        return refuse("no memory for outputs of 2 x %zu bytes", bytes);
    return EXIT_FINE;
}

int operation_open(struct operation *operation, const char *path,
                   const struct safetensors *result) {
    memset(operation, 0, sizeof *operation);
    operation->args = (struct lidx_args)LIDX_ARGS_INIT;
    int status;
    if (!(status = check_device()) && !(status = safetensors_open(&operation->file, path)) &&
        !(status = engine_create(&operation->context, &operation->n_threads)) &&
        !(status = find_operands(operation)) && !(status = resolve_choices(operation, result)))
        status = make_outputs(operation);
    if (status) {
        operation_close(operation);
        return status;
    }
    operation->kernel = kernel_in_use(wanted.kernel, operation->args.query->dtype.code);
    return EXIT_FINE;
}

int operation_run(struct operation *operation) {
    double begin = now();
    if (lidx_run(operation->context, &operation->args))
        return refuse("%s: %s", operation->file.path, lidx_last_error());
    operation->seconds = now() - begin;
    return EXIT_FINE;
}

void operation_close(struct operation *operation) {
    lidx_destroy(operation->context);
    free(operation->indices.data);
    free(operation->values.data);
    safetensors_close(&operation->file);
    memset(operation, 0, sizeof *operation);
}

/* ---- to a file ------------------------------------------------------------------------------- */

int operation_save(const struct operation *operation, const char *path) {
    const struct lidx_args *args = &operation->args;
    struct tensor tensors[2] = {{.name = "sparse_indices",
                                 .element = element_named("I32"),
                                 .ndim = operation->indices.ndim,
                                 .data = operation->indices.data},
                                {.name = "sparse_values",
                                 .element = element_named("F32"),
                                 .ndim = operation->values.ndim,
                                 .data = operation->values.data}};
    for (int i = 0; i < 2; i++)
        memcpy(tensors[i].shape, operation->output_shape, sizeof tensors[i].shape);
    char count[16];
    snprintf(count, sizeof count, "%d", (int)args->sparse_count);
    cJSON *metadata = cJSON_CreateObject();
    cJSON_AddStringToObject(metadata, "layout_query", layout_names[args->layout_query]);
    cJSON_AddStringToObject(metadata, "layout_key", layout_names[args->layout_key]);
    cJSON_AddStringToObject(metadata, "sparse_count", count);
    cJSON_AddStringToObject(metadata, "sparse_mode",
                            args->sparse_mode == LIDX_MODE_FULL ? "0" : "3");
    cJSON_AddStringToObject(metadata, "kernel", operation->kernel);
    int status = safetensors_write(path, tensors, 2, metadata);
    cJSON_Delete(metadata);
    return status;
}

int operation_heads(const struct operation *operation) {
    const struct lidx_tensor *query = operation->args.query;
    return (int)query->shape[query->ndim - 2];
}

int operation_dim(const struct operation *operation) {
    const struct lidx_tensor *query = operation->args.query;
    return (int)query->shape[query->ndim - 1];
}
