/* SPDX-License-Identifier: Apache-2.0 */
#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

#include "commands.h"
#include "lightning_indexer.h"
#include "message.h"
#include "numbers.h"
#include "operation.h"
#include "report.h"
#include "speed.h"
#include "workload.h"

enum { CASES = 128 };

static const char *const dtype_names[] = {"bf16", "fp16", NULL};

static const char *shapes, *threads, *kernels;
static int64_t n_heads = 64, head_dim = 128, sparse_count = LIDX_DEFAULT_TOP_K, block_size = 64,
               seed = 1, n_rounds = 7, round_ms = 60;
static int dtype, layout = -1, as_json, as_markdown;

static const struct option options[] = {
    {.name = "shape",
     .kind = OPTION_TEXT,
     .target = &shapes,
     .value = "LIST",
     .help = "query tokens x keys, such as 1x4096,64x8192; causal where tokens > 1"},
    {.name = "layout",
     .kind = OPTION_CHOICE,
     .target = &layout,
     .choices = layout_names,
     .help = "of the keys (default: BSND and, for one token, PA_BSND)"},
    {.name = "block-size",
     .kind = OPTION_INTEGER,
     .target = &block_size,
     .low = 16,
     .high = 1024,
     .value = "N",
     .help = "keys of a page (default 64); pages are shuffled"},
    {.name = "heads",
     .kind = OPTION_INTEGER,
     .target = &n_heads,
     .low = 1,
     .high = LIDX_MAX_HEADS,
     .value = "N",
     .help = "default 64"},
    {.name = "dim",
     .kind = OPTION_INTEGER,
     .target = &head_dim,
     .low = 64,
     .high = 128,
     .value = "N",
     .help = "64 or 128, the default"},
    {.name = "dtype",
     .kind = OPTION_CHOICE,
     .target = &dtype,
     .choices = dtype_names,
     .help = "default bf16"},
    {.name = "sparse-count",
     .kind = OPTION_INTEGER,
     .target = &sparse_count,
     .low = 1,
     .high = LIDX_MAX_TOP_K,
     .value = "K",
     .help = "default 2048"},
    {.name = "kernel",
     .kind = OPTION_TEXT,
     .target = &kernels,
     .value = "LIST",
     .help = "such as avx2,scalar (default: the best)"},
    {.name = "threads",
     .kind = OPTION_TEXT,
     .target = &threads,
     .value = "LIST",
     .help = "such as 1,2; 0 means all (default: 1 and all)"},
    {.name = "rounds",
     .kind = OPTION_INTEGER,
     .target = &n_rounds,
     .low = 1,
     .high = 64,
     .value = "N",
     .help = "default 7"},
    {.name = "round-ms",
     .kind = OPTION_INTEGER,
     .target = &round_ms,
     .low = 0,
     .high = 60000,
     .value = "N",
     .help = "milliseconds of calls in a round (default 60)"},
    {.name = "seed",
     .kind = OPTION_INTEGER,
     .target = &seed,
     .low = 0,
     .high = INT64_MAX,
     .value = "N",
     .help = "of the random tensors (default 1)"},
    {.name = "json", .kind = OPTION_FLAG, .target = &as_json, .help = "print JSON"},
    {.name = "markdown", .kind = OPTION_FLAG, .target = &as_markdown, .help = "print markdown"},
    {.name = NULL},
};

static const struct command command = {
    "bench",
    "",
    "Times score and top-k over shapes, and between the rounds of calls the peak of the\n"
    "instruction that the kernel multiplies with, on the same threads (Gflop/s before the\n"
    "first round and after the last). \"of peak\" is the median call against the highest peak\n"
    "of the rounds, \"at best\" the fastest call: where the two are far apart, other work had\n"
    "the cores. \"of n x 1\" divides by n times the peak of one core alone. \"memory\" is what\n"
    "the process grew by from before the context was made to after its first run, without\n"
    "inputs and outputs: heap or resident memory, whichever grew more.",
    0,
    0,
    {options, NULL},
};

/* One line of the result. */
struct bench_case {
    int64_t n_query, n_key;
    int layout, n_threads;
    char kernel[CELL];
    struct speed speed;
    double memory; /* bytes */
    double pairs, flop;
};

static struct bench_case cases[CASES];
static int n_cases;

/* ---- which cases ----------------------------------------------------------------------------- */

static int add_case(int64_t n_query, int64_t n_key, int key_layout) {
    char kernel[CELL] = "", item[16];
    const char *kernel_list = kernels ? kernels : "";
    const char *default_list = default_threads() > 1 ? "1,0" : "1";
    do {
        if (kernels)
            kernel_list = next_item(kernel_list, kernel, sizeof kernel);
        const char *thread_list = threads ? threads : default_list;
        while ((thread_list = next_item(thread_list, item, sizeof item))) {
            int64_t n;
            if (!parse_integer(item, 0, LIDX_MAX_THREADS, &n))
                return refuse(
                    "--threads has \"%.20s\"; it should be a list of numbers from 0 to %d", item,
                    LIDX_MAX_THREADS);
            if (n_cases == CASES)
                return refuse(
                    "there are more than %d cases; --shape, --kernel and --threads should "
                    "ask for fewer",
                    CASES);
            struct bench_case *c = &cases[n_cases++];
            *c = (struct bench_case){.n_query = n_query, .n_key = n_key, .layout = key_layout};
            c->n_threads = n ? (int)n : default_threads();
            memcpy(c->kernel, kernel, sizeof kernel);
        }
    } while (kernels && *kernel_list);
    return EXIT_FINE;
}

static int parse_shape(const char *text, int64_t *n_query, int64_t *n_key) {
    char left[24];
    size_t length = strcspn(text, "x");
    snprintf(left, sizeof left, "%.*s", (int)length, text);
    if (text[length] == 'x' && parse_integer(left, 1, 1 << 20, n_query) &&
        parse_integer(text + length + 1, 1, (int64_t)1 << 28, n_key))
        return EXIT_FINE;
    return refuse("--shape has \"%.40s\"; it should be tokens x keys, such as 64x8192", text);
}

static int add_shape(int64_t n_query, int64_t n_key) {
    int status = EXIT_FINE;
    if (layout >= 0)
        return add_case(n_query, n_key, layout);
    status = add_case(n_query, n_key, LIDX_BSND);
    if (!status && n_query == 1)
        status = add_case(n_query, n_key, LIDX_PA_BSND);
    return status;
}

static int list_cases(void) {
    const char *list = shapes ? shapes : "1x4096,1x65536,1x1048576,64x8192";
    char item[48];
    int status;
    while ((list = next_item(list, item, sizeof item))) {
        int64_t n_query, n_key;
        if ((status = parse_shape(item, &n_query, &n_key)) || (status = add_shape(n_query, n_key)))
            return status;
    }
    if (n_cases == 0)
        return refuse("--threads or --shape is an empty list; it should name at least one case");
    return EXIT_FINE;
}

/* ---- one case -------------------------------------------------------------------------------- */

/* The visible pairs of n causal queries at the end of their context. */
static double count_pairs(const struct bench_case *c) {
    double pairs = 0;
    for (int64_t i = 0; i < c->n_query; i++) {
        int64_t visible = c->n_key - c->n_query + i + 1;
        pairs += visible > 0 ? (double)visible : 0;
    }
    return pairs;
}

static int make_workload(struct workload *workload) {
    *workload = (struct workload){.n_heads = n_heads,
                                  .head_dim = head_dim,
                                  .sparse_count = sparse_count,
                                  .block_size = block_size,
                                  .is_fp16 = dtype,
                                  .seed = (uint64_t)seed};
    for (int i = 0; i < n_cases; i++) {
        if (cases[i].n_query > workload->max_query)
            workload->max_query = cases[i].n_query;
        if (cases[i].n_key > workload->max_key)
            workload->max_key = cases[i].n_key;
    }
    return workload_create(workload);
}

static int time_case(struct bench_case *c, const struct lidx_args *args) {
    struct lidx_options engine = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    engine.n_threads = c->n_threads;
    engine.kernel = c->kernel[0] ? c->kernel : NULL;
    struct memory mark = memory_mark();
    if (lidx_create(&context, &engine))
        return refuse("%s", lidx_last_error());
    if (lidx_run(context, args)) {
        lidx_destroy(context);
        return refuse("%s", lidx_last_error());
    }
    c->memory = memory_growth(mark);
    snprintf(c->kernel, sizeof c->kernel, "%s",
             kernel_in_use(engine.kernel, args->query->dtype.code));
    c->pairs = count_pairs(c);
    c->flop = c->pairs * (double)(n_heads * head_dim * 2);
    struct speed_effort effort = {(int)n_rounds, 1e-3 * (double)round_ms, 0.02};
    int status = speed_measure(context, args, c->kernel, c->n_threads, c->flop, &effort, &c->speed);
    lidx_destroy(context);
    return status;
}

static int run_case(struct bench_case *c, struct workload *workload) {
    workload_view(workload, c->n_query, c->n_key, c->layout);
    return time_case(c, &workload->args);
}

/* ---- results --------------------------------------------------------------------------------- */

static void case_name(char text[CELL], const struct bench_case *c) {
    if (c->n_query == 1)
        snprintf(text, CELL, "decode 1 x %lld", (long long)c->n_key);
    else
        snprintf(text, CELL, "prefill %lld x %lld", (long long)c->n_query, (long long)c->n_key);
}

static void print_table(void) {
    static const char *const heading[] = {"case",    "keys",    "kernel",   "threads",
                                          "median",  "keys/s",  "Gflop/s",  "peak: before, after",
                                          "of peak", "at best", "of n x 1", "memory/thread"};
    static struct table table = {.n_columns = 12};
    table_add(&table, heading);
    for (int i = 0; i < n_cases; i++) {
        const struct bench_case *c = &cases[i];
        char cells[12][CELL];
        const char *row[12];
        for (int j = 0; j < 12; j++)
            row[j] = cells[j];
        case_name(cells[0], c);
        if (c->layout == LIDX_PA_BSND)
            snprintf(cells[1], CELL, "paged %lld", (long long)block_size);
        else
            snprintf(cells[1], CELL, "%s", c->layout == LIDX_TND ? "ragged" : "dense");
        snprintf(cells[2], CELL, "%s", c->kernel);
        snprintf(cells[3], CELL, "%d", c->n_threads);
        format_seconds(cells[4], c->speed.seconds);
        format_count(cells[5], c->pairs / c->speed.seconds);
        snprintf(cells[6], CELL, "%.1f", 1e-9 * c->flop / c->speed.seconds);
        snprintf(cells[7], CELL, "-");
        if (c->speed.peak_before > 0)
            snprintf(cells[7], CELL, "%.1f, %.1f", 1e-9 * c->speed.peak_before,
                     1e-9 * c->speed.peak_after);
        format_ratio(cells[8], c->speed.fraction);
        format_ratio(cells[9], c->speed.best_fraction);
        format_ratio(cells[10], c->speed.fraction_one);
        snprintf(cells[11], CELL, "-");
        if (c->memory >= 0)
            snprintf(cells[11], CELL, "%.2f MiB", c->memory / (1 << 20) / c->n_threads);
        table_add(&table, row);
    }
    table_print(&table, as_markdown);
    if (!as_markdown)
        printf("\n%lld heads x %lld, %s, top %lld; keys/s counts each key once for each query "
               "token that sees it\n",
               (long long)n_heads, (long long)head_dim, dtype_names[dtype],
               (long long)sparse_count);
}

static void print_json(void) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "version", lidx_version());
    cJSON_AddStringToObject(json, "cpu_features", lidx_cpu_features());
    cJSON_AddNumberToObject(json, "heads", (double)n_heads);
    cJSON_AddNumberToObject(json, "dim", (double)head_dim);
    cJSON_AddStringToObject(json, "dtype", dtype_names[dtype]);
    cJSON_AddNumberToObject(json, "sparse_count", (double)sparse_count);
    cJSON *list = cJSON_AddArrayToObject(json, "cases");
    for (int i = 0; i < n_cases; i++) {
        const struct bench_case *c = &cases[i];
        cJSON *one = cJSON_CreateObject();
        cJSON_AddNumberToObject(one, "query_tokens", (double)c->n_query);
        cJSON_AddNumberToObject(one, "keys", (double)c->n_key);
        cJSON_AddStringToObject(one, "layout_key", layout_names[c->layout]);
        if (c->layout == LIDX_PA_BSND)
            cJSON_AddNumberToObject(one, "block_size", (double)block_size);
        cJSON_AddStringToObject(one, "kernel", c->kernel);
        cJSON_AddNumberToObject(one, "threads", c->n_threads);
        cJSON_AddNumberToObject(one, "calls", c->speed.calls);
        cJSON_AddNumberToObject(one, "median_s", c->speed.seconds);
        cJSON_AddNumberToObject(one, "best_s", c->speed.best);
        cJSON_AddNumberToObject(one, "keys_per_s", c->pairs / c->speed.seconds);
        cJSON_AddNumberToObject(one, "flop_per_s", c->flop / c->speed.seconds);
        cJSON_AddNumberToObject(one, "peak_before_flop_per_s", c->speed.peak_before);
        cJSON_AddNumberToObject(one, "peak_after_flop_per_s", c->speed.peak_after);
        cJSON_AddNumberToObject(one, "fraction_of_peak", c->speed.fraction);
        cJSON_AddNumberToObject(one, "best_fraction_of_peak", c->speed.best_fraction);
        cJSON_AddNumberToObject(one, "fraction_of_n_single_peaks", c->speed.fraction_one);
        cJSON_AddNumberToObject(one, "memory_bytes", c->memory);
        cJSON_AddItemToArray(list, one);
    }
    print_and_delete(json);
}

int command_bench(int argc, char **argv) {
    const char *files[MAX_POSITIONAL];
    struct workload workload;
    char name[CELL];
    int status = options_parse(&command, argc, argv, files);
    if (status >= 0)
        return status;
    if (head_dim != 64 && head_dim != 128)
        return refuse("--dim is %lld; it should be 64 or 128", (long long)head_dim);
    if (block_size % 16)
        return refuse("--block-size is %lld; it should be a multiple of 16", (long long)block_size);
    if ((status = list_cases()))
        return status;
    progress("filling tensors ...");
    status = make_workload(&workload);
    for (int i = 0; i < n_cases && !status; i++) {
        case_name(name, &cases[i]);
        progress("case %d of %d: %s ...", i + 1, n_cases, name);
        status = run_case(&cases[i], &workload);
    }
    progress_end();
    if (!status) {
        if (as_json)
            print_json();
        else
            print_table();
    }
    workload_destroy(&workload);
    return status;
}
