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
     .help = "tokens x keys, such as 1x4096,64x8192; see above"},
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
     .help = "keys of a page (default 64)"},
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
    "inputs and outputs: heap or resident memory, whichever grew more.\n"
    "\n"
    "A shape is T x K, T causal tokens at the end of K keys; 1xK is timed dense and paged, with\n"
    "shuffled pages, unless --layout, 1xK/dense or 1xK/16 (keys of a page) says which. BxTxK is\n"
    "a batch of B in layout TND; in BxTx~K the lengths are lognormal, with mean K.",
    0,
    0,
    {options, NULL},
};

/* One line of the result. */
struct bench_case {
    struct workload_shape shape;
    int n_threads;
    char kernel[CELL];
    struct speed speed;
    double memory; /* bytes */
    double pairs, flop;
};

static struct bench_case cases[CASES];
static int n_cases;

/* ---- which cases ----------------------------------------------------------------------------- */

static int add_case(const struct workload_shape *shape) {
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
            *c = (struct bench_case){.shape = *shape};
            c->n_threads = n ? (int)n : default_threads();
            memcpy(c->kernel, kernel, sizeof kernel);
        }
    } while (kernels && *kernel_list);
    return EXIT_FINE;
}

/* The whole of an item such as 32x1x~8192 or 1x65536/16, without what follows a slash. */
static int parse_numbers(const char *text, struct workload_shape *shape) {
    int64_t numbers[3];
    int n = 0;
    char part[24];
    while (n < 3 && *text) {
        size_t length = strcspn(text, "x");
        if (n > 0 && *text == '~' && !strchr(text, 'x'))
            shape->is_lognormal = 1;
        snprintf(part, sizeof part, "%.*s", (int)length - shape->is_lognormal,
                 text + shape->is_lognormal);
        if (!parse_integer(part, 1, (int64_t)1 << 28, &numbers[n++]))
            return 0;
        text += length;
        text += *text == 'x' && text[1];
    }
    if (n < 2 || *text)
        return 0;
    shape->n_batch = n == 3 ? numbers[0] : 1;
    shape->n_query = numbers[n - 2];
    shape->n_key = numbers[n - 1];
    return shape->n_query * shape->n_batch <= 1 << 20 && shape->n_batch <= MAX_BATCHES &&
           shape->n_key * shape->n_batch <= 1 << 28 && (n == 3 || !shape->is_lognormal);
}

/* What follows the slash; without one, the layout is -1: still open. */
static int parse_pages(const char *text, struct workload_shape *shape) {
    shape->layout_key = shape->n_batch > 1 ? LIDX_TND : layout;
    shape->block_size = block_size;
    if (!text)
        return 1;
    if (shape->n_batch > 1)
        return 0;
    shape->layout_key = strcmp(text, "dense") == 0 ? LIDX_BSND : LIDX_PA_BSND;
    return shape->layout_key == LIDX_BSND ||
           (parse_integer(text, 16, 1024, &shape->block_size) && shape->block_size % 16 == 0);
}

static int parse_shape(const char *text, struct workload_shape *shape) {
    char numbers[48];
    const char *slash = strchr(text, '/');
    size_t length = slash ? (size_t)(slash - text) : strlen(text);
    snprintf(numbers, sizeof numbers, "%.*s", (int)length, text);
    *shape = (struct workload_shape){0};
    if (parse_numbers(numbers, shape) && parse_pages(slash ? slash + 1 : NULL, shape))
        return EXIT_FINE;
    return refuse("--shape has \"%.40s\"; it should be tokens x keys, such as 64x8192, 1x65536/16 "
                  "for pages of 16 keys, or batches x tokens x keys, such as 32x1x~8192",
                  text);
}

static int add_shape(struct workload_shape *shape) {
    int is_open = shape->layout_key < 0, status;
    if (is_open)
        shape->layout_key = LIDX_BSND;
    status = add_case(shape);
    if (!status && is_open && shape->n_query == 1) {
        shape->layout_key = LIDX_PA_BSND;
        status = add_case(shape);
    }
    return status;
}

/* Decode from short to long, pages, a few speculative tokens, prefill, and a batch of unequal
 * lengths beside equal ones. */
static const char default_shapes[] =
    "1x512/dense,1x1024/dense,1x2048/dense,1x4096,2x4096,4x4096,8x4096,1x65536,1x65536/16,"
    "1x1048576,64x8192,64x65536,32x1x8192,32x1x~8192";

static int list_cases(void) {
    const char *list = shapes ? shapes : default_shapes;
    char item[48];
    int status;
    while ((list = next_item(list, item, sizeof item))) {
        struct workload_shape shape;
        if ((status = parse_shape(item, &shape)) || (status = add_shape(&shape)))
            return status;
    }
    if (n_cases == 0)
        return refuse("--threads or --shape is an empty list; it should name at least one case");
    return EXIT_FINE;
}

/* ---- one case -------------------------------------------------------------------------------- */

static int make_workload(struct workload *workload) {
    *workload = (struct workload){.n_heads = n_heads,
                                  .head_dim = head_dim,
                                  .sparse_count = sparse_count,
                                  .is_fp16 = dtype,
                                  .seed = (uint64_t)seed};
    for (int i = 0; i < n_cases; i++) {
        const struct workload_shape *shape = &cases[i].shape;
        if (shape->n_batch * shape->n_query > workload->max_query)
            workload->max_query = shape->n_batch * shape->n_query;
        if (shape->n_batch * shape->n_key > workload->max_key)
            workload->max_key = shape->n_batch * shape->n_key;
    }
    return workload_create(workload);
}

static int time_case(struct bench_case *c, const struct workload *workload) {
    const struct lidx_args *args = &workload->args;
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
    c->pairs = workload->pairs;
    c->flop = c->pairs * (double)(n_heads * head_dim * 2);
    struct speed_effort effort = {(int)n_rounds, 1e-3 * (double)round_ms, 0.02};
    int status = speed_measure(context, args, c->kernel, c->n_threads, c->flop, &effort, &c->speed);
    lidx_destroy(context);
    return status;
}

static int run_case(struct bench_case *c, struct workload *workload) {
    workload_view(workload, &c->shape);
    return time_case(c, workload);
}

/* ---- results --------------------------------------------------------------------------------- */

static void case_name(char text[CELL], const struct bench_case *c) {
    const struct workload_shape *s = &c->shape;
    char batches[24] = "";
    if (s->n_batch > 1)
        snprintf(batches, sizeof batches, "%lld x ", (long long)s->n_batch);
    snprintf(text, CELL, "%s %s%lld x %s%lld", s->n_query <= 8 ? "decode" : "prefill", batches,
             (long long)s->n_query, s->is_lognormal ? "~" : "", (long long)s->n_key);
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
        if (c->shape.layout_key == LIDX_PA_BSND)
            snprintf(cells[1], CELL, "paged %lld", (long long)c->shape.block_size);
        else
            snprintf(cells[1], CELL, "%s", c->shape.layout_key == LIDX_TND ? "ragged" : "dense");
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
        cJSON_AddNumberToObject(one, "batches", (double)c->shape.n_batch);
        cJSON_AddNumberToObject(one, "query_tokens", (double)c->shape.n_query);
        cJSON_AddNumberToObject(one, "keys", (double)c->shape.n_key);
        cJSON_AddStringToObject(one, "lengths", c->shape.is_lognormal ? "lognormal" : "equal");
        cJSON_AddStringToObject(one, "layout_key", layout_names[c->shape.layout_key]);
        if (c->shape.layout_key == LIDX_PA_BSND)
            cJSON_AddNumberToObject(one, "block_size", (double)c->shape.block_size);
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
