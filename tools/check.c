/* SPDX-License-Identifier: Apache-2.0 */
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agreement.h"
#include "commands.h"
#include "message.h"
#include "numbers.h"
#include "operation.h"
#include "report.h"

static int as_json;
static int64_t row_limit;

static const struct option options[] = {
    {.name = "rows",
     .kind = OPTION_INTEGER,
     .target = &row_limit,
     .low = 1,
     .high = INT64_MAX,
     .value = "N",
     .help = "check N rows, evenly spread (default: all)"},
    {.name = "json", .kind = OPTION_FLAG, .target = &as_json, .help = "print JSON"},
    {.name = NULL},
};

static const struct command command = {
    "check",
    "FILE.safetensors [RESULT.safetensors]",
    "Computes every score in double precision with plain loops and compares the\n"
    "sparse_indices (and sparse_values) of RESULT with it; without RESULT, those of a run\n"
    "made now. Indices agree when the true score of each that differs is within 1e-4 of the\n"
    "k-th (or 1e-6 of the row's largest); order, ties, -1 and -inf are exact. Exit status:\n"
    "0 all rows agree, 1 some differ.",
    1,
    2,
    {options, operation_options, engine_options, NULL},
};

/* The result that is checked. */
struct answer {
    const int32_t *indices;
    const void *values;
    char values_type; /* of their dtype, the first letter: 'F' (F32), 'H' (F16) or 'B' (BF16) */
};

static int is_output(const struct operation *operation, const struct tensor *t) {
    return t->ndim == operation->indices.ndim &&
           memcmp(t->shape, operation->output_shape, (size_t)t->ndim * sizeof *t->shape) == 0 &&
           (uintptr_t)t->data % (uintptr_t)(t->element->bits / 8 ? t->element->bits / 8 : 1) == 0;
}

static int find_answer(const struct operation *operation, const struct safetensors *result,
                       struct answer *answer) {
    const struct tensor *indices = safetensors_find(result, "sparse_indices");
    const struct tensor *values = safetensors_find(result, "sparse_values");
    if (!indices || strcmp(indices->element->name, "I32") != 0 || !is_output(operation, indices))
        return refuse("%s has no sparse_indices that fit %s; it should have query's shape with the "
                      "last two sizes 1 and %d, dtype I32 and aligned data",
                      result->path, operation->file.path, (int)operation->args.sparse_count);
    answer->indices = indices->data;
    if (!values)
        return EXIT_FINE;
    const char *type = values->element->name;
    answer->values_type = strcmp(type, "F32") == 0    ? 'F'
                          : strcmp(type, "F16") == 0  ? 'H'
                          : strcmp(type, "BF16") == 0 ? 'B'
                                                      : 0;
    if (!answer->values_type || !is_output(operation, values))
        return refuse("%s has sparse_values of another shape or dtype; they should have the shape "
                      "of sparse_indices and be F32, F16 or BF16, with aligned data",
                      result->path);
    answer->values = values->data;
    return EXIT_FINE;
}

static void widen(const struct answer *answer, int64_t begin, int64_t n, double *values) {
    for (int64_t s = 0; s < n; s++) {
        if (answer->values_type == 'F')
            values[s] = (double)((const float *)answer->values)[begin + s];
        else if (answer->values_type == 'H')
            values[s] = (double)f16_to_float(((const uint16_t *)answer->values)[begin + s]);
        else
            values[s] = (double)bf16_to_float(((const uint16_t *)answer->values)[begin + s]);
    }
}

static int compare_rows(const struct operation *operation, const struct answer *answer,
                        struct agreement *agreement) {
    int64_t k = operation->args.sparse_count, n = operation->n_rows;
    double epsilon = answer->values_type == 'H' ? 0x1p-11 : answer->values_type == 'B' ? 0x1p-8 : 0;
    double *values = malloc((size_t)k * sizeof *values), shown = 0;
    int status = values ? EXIT_FINE : refuse("no memory for a row of %lld slots", (long long)k);
    int64_t rows = row_limit && row_limit < n ? row_limit : n;
    for (int64_t r = 0; r < rows && !status; r++) {
        int64_t row = (int64_t)((double)r * (double)n / (double)rows);
        if (now() - shown > 0.1) {
            progress("row %lld of %lld ...", (long long)r, (long long)rows);
            shown = now();
        }
        if (answer->values)
            widen(answer, row * k, k, values);
        status = agreement_row(agreement, operation, row, answer->indices + row * k,
                               answer->values ? values : NULL, epsilon);
    }
    progress_end();
    free(values);
    return status;
}

static void print_text(const struct agreement *agreement) {
    for (int64_t i = 0; i < agreement->n_findings && i < FINDINGS; i++) {
        const struct finding *finding = &agreement->findings[i];
        printf("row %lld, slot %lld: %s\n", (long long)finding->row, (long long)finding->slot,
               finding->text);
    }
    if (agreement->n_findings > FINDINGS)
        printf("... and %lld findings more\n", (long long)agreement->n_findings - FINDINGS);
    printf("%lld rows checked, %lld agree, %lld differ; of %lld indices %lld differ within the "
           "rule; largest error of a value %.2g of its row's largest\n",
           (long long)agreement->rows, (long long)(agreement->rows - agreement->rows_wrong),
           (long long)agreement->rows_wrong, (long long)agreement->slots,
           (long long)agreement->within, agreement->worst_value);
}

static void print_json(const struct operation *operation, const struct agreement *agreement) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "file", operation->file.path);
    cJSON_AddBoolToObject(json, "agree", agreement->rows_wrong == 0);
    cJSON_AddNumberToObject(json, "rows", (double)agreement->rows);
    cJSON_AddNumberToObject(json, "rows_differ", (double)agreement->rows_wrong);
    cJSON_AddNumberToObject(json, "indices", (double)agreement->slots);
    cJSON_AddNumberToObject(json, "indices_within_rule", (double)agreement->within);
    cJSON_AddNumberToObject(json, "worst_value_error", agreement->worst_value);
    cJSON_AddNumberToObject(json, "findings_count", (double)agreement->n_findings);
    cJSON *findings = cJSON_AddArrayToObject(json, "findings");
    for (int64_t i = 0; i < agreement->n_findings && i < FINDINGS; i++) {
        cJSON *finding = cJSON_CreateObject();
        cJSON_AddNumberToObject(finding, "row", (double)agreement->findings[i].row);
        cJSON_AddNumberToObject(finding, "slot", (double)agreement->findings[i].slot);
        cJSON_AddStringToObject(finding, "text", agreement->findings[i].text);
        cJSON_AddItemToArray(findings, finding);
    }
    print_and_delete(json);
}

static int check(struct operation *operation, const struct safetensors *result) {
    struct answer answer = {operation->indices.data, operation->values.data, 'F'};
    struct agreement agreement = {0};
    if (result)
        answer = (struct answer){NULL, NULL, 0};
    int status = result ? find_answer(operation, result, &answer) : EXIT_FINE;
    if (!status)
        status = operation_run(operation); /* with a result, for its checks of the input only */
    if (!status)
        status = compare_rows(operation, &answer, &agreement);
    if (status)
        return status;
    if (as_json)
        print_json(operation, &agreement);
    else
        print_text(&agreement);
    return agreement.rows_wrong ? EXIT_DIFFERS : EXIT_FINE;
}

int command_check(int argc, char **argv) {
    const char *files[MAX_POSITIONAL];
    struct operation operation;
    struct safetensors result = {0};
    int status = options_parse(&command, argc, argv, files);
    if (status >= 0)
        return status;
    if (files[1] && (status = safetensors_open(&result, files[1])))
        return status;
    status = operation_open(&operation, files[0], files[1] ? &result : NULL);
    if (!status) {
        status = check(&operation, files[1] ? &result : NULL);
        operation_close(&operation);
    }
    safetensors_close(&result);
    return status;
}
