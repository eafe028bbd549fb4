/* SPDX-License-Identifier: Apache-2.0 */
#include <cjson/cJSON.h>
#include <stdio.h>

#include "commands.h"
#include "message.h"
#include "operation.h"
#include "reference.h"
#include "report.h"

enum { ROWS_SHOWN = 8, SLOTS_SHOWN = 8 };

static const char *output_path;
static int as_json;

static const struct option options[] = {
    {.name = "output",
     .letter = 'o',
     .kind = OPTION_TEXT,
     .target = &output_path,
     .value = "OUT.safetensors",
     .help = "write sparse_indices and sparse_values there, whole or not at all"},
    {.name = "json", .kind = OPTION_FLAG, .target = &as_json, .help = "print JSON"},
    {.name = NULL},
};

static const struct command command = {
    "run",
    "FILE.safetensors",
    "Runs the operator on the tensors query, key and weights of a file, and where the\n"
    "layouts want them actual_seq_lengths_query, actual_seq_lengths_key and block_table.\n"
    "Options that are not given come from the file's __metadata__ (layout_query,\n"
    "layout_key, sparse_count, sparse_mode), layouts else from the shapes. Without -o, the\n"
    "best keys are printed.",
    1,
    1,
    {options, operation_options, engine_options, NULL},
};

static void print_row(const struct operation *operation, int64_t row) {
    int64_t k = operation->args.sparse_count;
    const int32_t *indices = (const int32_t *)operation->indices.data + row * k;
    const float *values = (const float *)operation->values.data + row * k;
    printf("row %lld:", (long long)row);
    if (indices[0] < 0)
        printf(" no key is visible");
    for (int64_t s = 0; s < k && s < SLOTS_SHOWN && indices[s] >= 0; s++)
        printf("  %d (%.4g)", (int)indices[s], (double)values[s]);
    printf("%s\n", k > SLOTS_SHOWN && indices[SLOTS_SHOWN] >= 0 ? "  ..." : "");
}

static void print_text(const struct operation *operation) {
    char seconds[32], rate[32];
    double pairs = reference_pairs(operation);
    format_seconds(seconds, operation->seconds);
    format_count(rate, operation->seconds > 0 ? pairs / operation->seconds : 0);
    if (!output_path) {
        for (int64_t row = 0; row < operation->n_rows && row < ROWS_SHOWN; row++)
            print_row(operation, row);
        if (operation->n_rows > ROWS_SHOWN)
            printf("... and %lld rows more; -o writes them all to a file\n",
                   (long long)operation->n_rows - ROWS_SHOWN);
    }
    printf("%s%s%lld rows of %d slots in %s, %s keys/s, kernel %s, %d thread%s\n",
           output_path ? output_path : "", output_path ? ": " : "", (long long)operation->n_rows,
           (int)operation->args.sparse_count, seconds, rate, operation->kernel,
           operation->n_threads, operation->n_threads == 1 ? "" : "s");
}

static void print_json(const struct operation *operation) {
    const struct lidx_args *args = &operation->args;
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "file", operation->file.path);
    if (output_path)
        cJSON_AddStringToObject(json, "output", output_path);
    cJSON_AddStringToObject(json, "layout_query", layout_names[args->layout_query]);
    cJSON_AddStringToObject(json, "layout_key", layout_names[args->layout_key]);
    cJSON_AddNumberToObject(json, "sparse_count", args->sparse_count);
    cJSON_AddNumberToObject(json, "sparse_mode", args->sparse_mode);
    cJSON_AddNumberToObject(json, "rows", (double)operation->n_rows);
    cJSON_AddNumberToObject(json, "pairs", reference_pairs(operation));
    cJSON_AddNumberToObject(json, "seconds", operation->seconds);
    cJSON_AddStringToObject(json, "kernel", operation->kernel);
    cJSON_AddNumberToObject(json, "threads", operation->n_threads);
    print_and_delete(json);
}

int command_run(int argc, char **argv) {
    const char *files[MAX_POSITIONAL];
    struct operation operation;
    int status = options_parse(&command, argc, argv, files);
    if (status >= 0)
        return status;
    if ((status = operation_open(&operation, files[0], NULL)))
        return status;
    progress("%s: %lld rows ...", files[0], (long long)operation.n_rows);
    status = operation_run(&operation);
    if (!status && output_path)
        status = operation_save(&operation, output_path);
    progress_end();
    if (!status) {
        if (as_json)
            print_json(&operation);
        else
            print_text(&operation);
    }
    operation_close(&operation);
    return status;
}
