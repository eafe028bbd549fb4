/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* mkdtemp */
#endif

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agreement.h"
#include "commands.h"
#include "message.h"
#include "numbers.h"
#include "operation.h"
#include "output.h"
#include "picture.h"
#include "reference.h"
#include "report.h"
#include "scene.h"
#include "speed.h"

enum { ROWS_DRAWN = 16, ROWS_CHECKED = 2, LABEL = 15, ROUNDS = 7 };

static int64_t seed = 1;
static int is_full, as_json, ascii;
static const char *keep;

static const struct option options[] = {
    {.name = "full",
     .kind = OPTION_FLAG,
     .target = &is_full,
     .help = "256 query tokens over a 128K-token context"},
    {.name = "seed",
     .kind = OPTION_INTEGER,
     .target = &seed,
     .low = 0,
     .high = INT64_MAX,
     .value = "N",
     .help = "of the whole scene (default 1)"},
    {.name = "keep",
     .kind = OPTION_TEXT,
     .target = &keep,
     .value = "FILE.safetensors",
     .help = "keep the input, for lidx run and lidx check"},
    {.name = "ascii",
     .kind = OPTION_FLAG,
     .target = &ascii,
     .help = "draw with plain characters, also where UTF-8 works"},
    {.name = "json", .kind = OPTION_FLAG, .target = &as_json, .help = "print JSON"},
    {.name = NULL},
};

static const struct command command = {
    "demo",
    "",
    "Makes a 32K-token context with DeepSeek-V3.2's shapes (64 heads x 128, top 2048) in\n"
    "which four passages are planted, writes it to a safetensors file, runs the operator on\n"
    "that file for the last 16 tokens, which ask for the passages, and shows from the\n"
    "written result how much of each was found, where each token looked, and how fast it\n"
    "was.",
    0,
    0,
    {options, engine_options, NULL},
};

/* What the demo found out. */
struct outcome {
    struct scene scene;
    struct speed speed;
    struct agreement agreement;
    double pairs, recall, chance;
    double recall_of[MAX_PLANTED];
    int32_t *indices; /* as read back from the result's file */
    int64_t k;
};

/* ---- files ----------------------------------------------------------------------------------- */

struct files {
    char directory[OUTPUT_PATH - 32];
    char input[OUTPUT_PATH], result[OUTPUT_PATH];
};

static int make_files(struct files *files) {
    const char *parent = getenv("TMPDIR");
    snprintf(files->directory, sizeof files->directory, "%s/lidx-demo-XXXXXX",
             parent && *parent ? parent : "/tmp");
    if (!mkdtemp(files->directory))
        return refuse("cannot create a directory like %s: %s", files->directory, strerror(errno));
    snprintf(files->input, sizeof files->input, "%s/input.safetensors", files->directory);
    snprintf(files->result, sizeof files->result, "%s/result.safetensors", files->directory);
    output_add_scratch(files->input);
    output_add_scratch(files->result);
    output_add_scratch(files->directory);
    if (keep)
        snprintf(files->input, sizeof files->input, "%s", keep);
    return EXIT_FINE;
}

/* ---- what was found -------------------------------------------------------------------------- */

static int read_result(const char *path, const struct operation *operation, int32_t *indices) {
    struct safetensors file;
    int status = safetensors_open(&file, path);
    if (status)
        return status;
    const struct tensor *t = safetensors_find(&file, "sparse_indices");
    int64_t bytes = operation->n_rows * operation->args.sparse_count * 4;
    if (!t || t->end - t->begin != bytes)
        status = refuse("%s does not hold the sparse_indices that were written", path);
    else
        memcpy(indices, t->data, (size_t)bytes);
    safetensors_close(&file);
    return status;
}

/* The share of each planted passage that the tokens asking for it chose. */
static void measure_recall(struct outcome *o) {
    int64_t found[MAX_PLANTED] = {0}, wanted[MAX_PLANTED] = {0}, all_found = 0, all_wanted = 0;
    for (int64_t i = 0; i < o->scene.n_query; i++) {
        int p = scene_asked(&o->scene, i);
        int64_t begin = o->scene.planted[p];
        wanted[p] += PLANTED_LENGTH;
        for (int64_t s = 0; s < o->k; s++) {
            int64_t j = o->indices[i * o->k + s];
            found[p] += j >= begin && j < begin + PLANTED_LENGTH;
        }
    }
    for (int p = 0; p < o->scene.n_planted; p++) {
        o->recall_of[p] = wanted[p] ? (double)found[p] / (double)wanted[p] : 0;
        all_found += found[p];
        all_wanted += wanted[p];
    }
    o->recall = (double)all_found / (double)all_wanted;
    o->chance = (double)o->k / (double)o->scene.n_key;
}

static int check_rows(struct outcome *o, const struct operation *operation) {
    int status = EXIT_FINE;
    for (int r = 0; r < ROWS_CHECKED && !status; r++) {
        int64_t row = r * (operation->n_rows - 1) / (ROWS_CHECKED - 1);
        progress("checking token %lld in double precision ...", (long long)row);
        status = agreement_row(&o->agreement, operation, row, o->indices + row * o->k, NULL, 0);
    }
    return status;
}

static int explore(struct outcome *o, struct operation *operation, const char *result) {
    progress("choosing keys ...");
    int status = operation_run(operation);
    if (!status)
        status = operation_save(operation, result);
    if (status)
        return status;
    o->k = operation->args.sparse_count;
    o->indices = malloc((size_t)(operation->n_rows * o->k) * sizeof *o->indices);
    if (!o->indices)
        return refuse("no memory for the result");
    if ((status = read_result(result, operation, o->indices)))
        return status;
    measure_recall(o);
    progress("timing ...");
    /* Seven rounds, or as many as about a second has room for. */
    int rounds = (int)(1.0 / (operation->seconds + 0.01));
    const struct speed_effort effort = {rounds < 1        ? 1
                                        : rounds > ROUNDS ? ROUNDS
                                                          : rounds,
                                        0.06, 0.02};
    o->pairs = reference_pairs(operation);
    status =
        speed_measure(operation->context, &operation->args, operation->kernel, operation->n_threads,
                      o->pairs * SCENE_HEADS * SCENE_DIM * 2, &effort, &o->speed);
    return status ? status : check_rows(o, operation);
}

/* ---- what is shown --------------------------------------------------------------------------- */

static void print_table(const struct outcome *o, const struct operation *operation) {
    char seconds[CELL], rate[CELL];
    format_seconds(seconds, o->speed.seconds);
    format_count(rate, o->pairs / o->speed.seconds);
    printf("%lld query tokens x %lld keys, 64 heads x 128, bf16, top %lld, causal, pages of %d\n\n",
           (long long)o->scene.n_query, (long long)o->scene.n_key, (long long)o->k, SCENE_BLOCK);
    printf("  time                %s (median of %d call%s, kernel %s, %d thread%s)\n", seconds,
           o->speed.calls, o->speed.calls == 1 ? "" : "s", operation->kernel, operation->n_threads,
           operation->n_threads == 1 ? "" : "s");
    printf("  speed               %s keys/s, %.1f Gflop/s\n", rate,
           1e-9 * o->pairs * SCENE_HEADS * SCENE_DIM * 2 / o->speed.seconds);
    if (o->speed.fraction > 0)
        printf("  of measured peak    %.2f, %.2f at best (peak %.1f before, %.1f Gflop/s after)\n",
               o->speed.fraction, o->speed.best_fraction, 1e-9 * o->speed.peak_before,
               1e-9 * o->speed.peak_after);
    else
        printf("  of measured peak    - (no peak is defined for kernel %s)\n", operation->kernel);
    printf("  recall              %.3f of the planted passages (%.3f by chance)\n", o->recall,
           o->chance);
    printf("  exact               %lld of %lld tokens checked in double precision agree\n",
           (long long)(o->agreement.rows - o->agreement.rows_wrong), (long long)o->agreement.rows);
}

static void print_picture(const struct outcome *o) {
    struct picture picture;
    char marks[PICTURE_WIDTH + 1] = "";
    picture_init(&picture, o->scene.n_key, LABEL + 1, ascii);
    for (int p = 0; p < o->scene.n_planted; p++)
        picture_mark(&picture, marks, o->scene.planted[p] + PLANTED_LENGTH / 2, (char)('A' + p));
    printf(
        "\nWhich positions each token chose: height is the share of a stretch of the context, a\n"
        "blank less than 1 in 16; the letters mark the planted passages\n\n");
    printf("%*s%s\n", LABEL, "", marks);
    int64_t rows = o->scene.n_query < ROWS_DRAWN ? o->scene.n_query : ROWS_DRAWN;
    for (int64_t r = 0; r < rows; r++) {
        int64_t i = r * o->scene.n_query / rows;
        int p = scene_asked(&o->scene, i);
        printf("%6lld asks %c |", (long long)(o->scene.n_key - o->scene.n_query + i), 'A' + p);
        picture_print(&picture, o->indices + i * o->k, o->k);
        printf("|\n");
    }
    printf("%*s0%*lld\n", LABEL, "", picture.width - 1, (long long)o->scene.n_key);
}

static void print_json(const struct outcome *o, const struct operation *operation) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddNumberToObject(json, "query_tokens", (double)o->scene.n_query);
    cJSON_AddNumberToObject(json, "keys", (double)o->scene.n_key);
    cJSON_AddNumberToObject(json, "seed", (double)seed);
    cJSON_AddStringToObject(json, "kernel", operation->kernel);
    cJSON_AddNumberToObject(json, "threads", operation->n_threads);
    cJSON_AddNumberToObject(json, "median_s", o->speed.seconds);
    cJSON_AddNumberToObject(json, "keys_per_s", o->pairs / o->speed.seconds);
    cJSON_AddNumberToObject(json, "peak_before_flop_per_s", o->speed.peak_before);
    cJSON_AddNumberToObject(json, "peak_after_flop_per_s", o->speed.peak_after);
    cJSON_AddNumberToObject(json, "fraction_of_peak", o->speed.fraction);
    cJSON_AddNumberToObject(json, "best_fraction_of_peak", o->speed.best_fraction);
    cJSON_AddNumberToObject(json, "recall", o->recall);
    cJSON_AddNumberToObject(json, "recall_by_chance", o->chance);
    cJSON_AddNumberToObject(json, "rows_checked", (double)o->agreement.rows);
    cJSON_AddNumberToObject(json, "rows_differ", (double)o->agreement.rows_wrong);
    cJSON *passages = cJSON_AddArrayToObject(json, "passages");
    for (int p = 0; p < o->scene.n_planted; p++) {
        cJSON *passage = cJSON_CreateObject();
        cJSON_AddNumberToObject(passage, "begin", (double)o->scene.planted[p]);
        cJSON_AddNumberToObject(passage, "length", PLANTED_LENGTH);
        cJSON_AddNumberToObject(passage, "recall", o->recall_of[p]);
        cJSON_AddItemToArray(passages, passage);
    }
    print_and_delete(json);
}

static int show(const struct outcome *o, const struct operation *operation) {
    progress_end();
    if (as_json) {
        print_json(o, operation);
    } else {
        print_table(o, operation);
        print_picture(o);
        if (keep)
            printf("\nThe input is in %s; try `lidx check %s`\n", keep, keep);
    }
    return o->agreement.rows_wrong ? EXIT_DIFFERS : EXIT_FINE;
}

int command_demo(int argc, char **argv) {
    const char *no_files[MAX_POSITIONAL];
    static struct outcome outcome;
    static struct files files;
    struct operation operation;
    int status = options_parse(&command, argc, argv, no_files);
    if (status >= 0)
        return status;
    if ((status = make_files(&files)))
        return status;
    progress("making the scene ...");
    scene_plan(&outcome.scene, is_full ? 131072 : 32768, is_full ? 256 : 16, (uint64_t)seed);
    status = scene_write(&outcome.scene, files.input);
    if (!status && !(status = operation_open(&operation, files.input, NULL))) {
        status = explore(&outcome, &operation, files.result);
        if (!status)
            status = show(&outcome, &operation);
        operation_close(&operation);
    }
    free(outcome.indices);
    output_remove_scratch();
    return status;
}
