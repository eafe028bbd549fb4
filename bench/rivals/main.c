/* SPDX-License-Identifier: Apache-2.0
 *
 * lidx_run() beside the operator put together from oneDNN's and from libxsmm's matrix products,
 * turn by turn on the same random data, with the peak of the kernel's multiply instruction measured
 * between the turns on the same threads.
 *
 *     bench_cpu_rivals [--threads 1,2] [--case 1x8192,64x8192] [--seconds 1] [--out FILE.json]
 *
 * Each rival may choose its tile by a trial of all of them, and what it wants packed (keys too) is
 * packed before the clock runs. The libraries select nothing, so their rows of scores go through
 * select.c. A rival is only timed when its selected scores agree with lidx_run()'s within 1e-4 of
 * the row's largest.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../../tools/numbers.h"
#include "../../tools/peak.h"
#include "lightning_indexer.h"
#include "rivals.h"

enum { TURNS = 64, MAX_CASES = 16, MAX_SIDES = 3, FILL = 1 << 23 };

static const struct library *const libraries[] = {
#ifdef HAVE_ONEDNN
    &onednn,
#endif
#ifdef HAVE_LIBXSMM
    &libxsmm,
#endif
    NULL};

/* One side of the race. */
struct side {
    char name[64], detail[96]; /* what multiplies, and how it is cut */
    struct composition *rival; /* NULL: lidx_run() */
    double seconds[TURNS], best, median;
};

struct result {
    int n_query, n_key, n_threads, n_sides;
    double peak, spaced_peak;
    struct side sides[MAX_SIDES];
};

static uint16_t *keys, *queries;
static float *weights, *values, *rival_values;
static int32_t *indices, *rival_indices;
static struct result results[MAX_CASES * 4];
static int n_results;
static const char *kernel = "scalar";

static void fail(const char *sentence) {
    fprintf(stderr, "bench_cpu_rivals: %s\n", sentence);
    exit(2);
}

static void *take(size_t bytes) {
    void *memory = allocate(bytes);
    if (!memory)
        fail("not enough memory");
    return memory;
}

/* ---- data ------------------------------------------------------------------------------------ */

static uint16_t *random_bf16(size_t n, uint64_t seed) {
    struct random random = {seed};
    uint16_t *list = take(n * sizeof *list);
    for (size_t i = 0; i < n && i < FILL; i++)
        list[i] = float_to_bf16(random_normal(&random));
    for (size_t i = FILL; i < n; i++) /* enough of them; again from other places */
        list[i] = list[i - FILL + 192];
    return list;
}

static void make_data(int n_query, int n_key) {
    size_t n_out = (size_t)n_query * TOP_K;
    struct random random = {3};
    keys = random_bf16((size_t)n_key * DIM, 1);
    queries = random_bf16((size_t)n_query * HEADS * DIM, 2);
    weights = take((size_t)n_query * HEADS * sizeof *weights);
    for (int i = 0; i < n_query * HEADS; i++)
        weights[i] = random_normal(&random);
    indices = take(n_out * sizeof *indices);
    rival_indices = take(n_out * sizeof *indices);
    values = take(n_out * sizeof *values);
    rival_values = take(n_out * sizeof *values);
}

/* ---- our side -------------------------------------------------------------------------------- */

static struct lidx_context *context;
static struct lidx_args args = LIDX_ARGS_INIT;

static void describe_arguments(const struct problem *p) {
    static int64_t shapes[5][4];
    static struct lidx_tensor tensors[5];
    static const struct lidx_dtype bf16 = {LIDX_BFLOAT, 16, 1}, f32 = {LIDX_FLOAT, 32, 1},
                                   i32 = {LIDX_INT, 32, 1};
    const struct {
        void *data;
        struct lidx_dtype type;
        int ndim, shape[4];
    } rows[] = {{queries, bf16, 4, {1, p->n_query, HEADS, DIM}},
                {keys, bf16, 4, {1, p->n_key, 1, DIM}},
                {weights, f32, 3, {1, p->n_query, HEADS}},
                {indices, i32, 4, {1, p->n_query, 1, TOP_K}},
                {values, f32, 4, {1, p->n_query, 1, TOP_K}}};
    const struct lidx_tensor **arguments[] = {&args.query, &args.key, &args.weights,
                                              &args.sparse_indices, &args.sparse_values};
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < rows[i].ndim; j++)
            shapes[i][j] = rows[i].shape[j];
        tensors[i] = (struct lidx_tensor){
            rows[i].data, {LIDX_CPU, 0}, rows[i].ndim, rows[i].type, shapes[i], NULL, 0};
        *arguments[i] = &tensors[i];
    }
    args.sparse_mode = LIDX_MODE_FULL;
}

static void run_side(const struct side *side) {
    if (side->rival)
        composition_run(side->rival, rival_indices, rival_values);
    else if (lidx_run(context, &args))
        fail(lidx_last_error());
}

/* The one that LIDX_KERNEL names, or else the best. */
static const char *kernel_name(void) {
    static struct lidx_kernel_info info;
    const char *forced = getenv("LIDX_KERNEL");
    for (int i = 0; i < lidx_kernel_count(); i++) {
        info.size = sizeof info;
        if (lidx_kernel_info(i, &info) || strcmp(info.backend, "cpu") != 0)
            continue;
        if (forced && *forced ? strcmp(forced, info.name) == 0 : info.chosen_bf16)
            return info.name;
    }
    return "scalar";
}

/* ---- rivals ---------------------------------------------------------------------------------- */

/* Every rank's score, theirs beside ours, and no key twice. */
static int agrees(const struct problem *p) {
    static unsigned char *seen;
    if (!seen)
        seen = take((size_t)1 << 24);
    for (int t = 0; t < p->n_query; t++) {
        const float *ours = values + (size_t)t * TOP_K, *theirs = rival_values + (size_t)t * TOP_K;
        const int32_t *chosen = rival_indices + (size_t)t * TOP_K;
        float tolerance = 1e-4F * fabsf(ours[0]);
        memset(seen, 0, (size_t)p->n_key);
        for (int i = 0; i < TOP_K; i++) {
            if (!(fabsf(ours[i] - theirs[i]) <= tolerance) || chosen[i] < 0 ||
                chosen[i] >= p->n_key || seen[chosen[i]]++)
                return 0;
        }
    }
    return 1;
}

/* Seconds of a call: the best of three, or of fewer when calls are long. */
static double trial(struct composition *rival) {
    double best = 1e30, begin = now();
    composition_run(rival, rival_indices, rival_values);
    for (int i = 0; i < 3; i++) {
        double start = now();
        composition_run(rival, rival_indices, rival_values);
        double took = now() - start;
        best = took < best ? took : best;
        if (now() - begin > 0.3)
            break;
    }
    return best;
}

/* Tries all tiles on at most 64 of the queries. */
static int choose_tile(const struct library *library, const struct problem *problem,
                       struct tile *chosen) {
    static const int token_counts[] = {1, 4}, key_counts[] = {64, 256, 1024};
    struct problem part = *problem;
    double best = 1e30;
    if (part.n_query > 64)
        part.n_query = part.n_threads > 64 ? part.n_threads : 64;
    if (part.n_key > 65536)
        part.n_key = 65536;
    for (int i = 0; i < 12; i++) {
        struct tile tile = {token_counts[i % 2], key_counts[i / 2 % 3],
                            i < 6 ? HEADS_FASTEST : KEYS_FASTEST};
        if (part.n_query % tile.tokens)
            continue;
        struct composition *rival = composition_create(library, &part, &tile);
        if (!rival)
            continue;
        double took = trial(rival);
        if (took < best) {
            best = took;
            *chosen = tile;
        }
        composition_destroy(rival);
    }
    return best < 1e30;
}

static void add_rival(struct result *r, const struct problem *problem,
                      const struct library *library) {
    struct tile tile;
    struct side *side = &r->sides[r->n_sides];
    if (!choose_tile(library, problem, &tile)) {
        fprintf(stderr, "%s %s has no kernel here\n", library->name, library->version());
        return;
    }
    side->rival = composition_create(library, problem, &tile);
    if (!side->rival)
        fail("not enough memory");
    composition_run(side->rival, rival_indices, rival_values);
    if (!agrees(problem)) {
        fprintf(stderr, "%s %s is not timed: its selection differs from ours\n", library->name,
                library->version());
        composition_destroy(side->rival);
        return;
    }
    snprintf(side->name, sizeof side->name, "%s %s", library->name, library->version());
    snprintf(side->detail, sizeof side->detail, "%s, %d token%s x %d keys, %s",
             composition_implementation(side->rival), tile.tokens, tile.tokens > 1 ? "s" : "",
             tile.keys, tile.order == HEADS_FASTEST ? "keys in place" : "keys packed before");
    r->n_sides++;
}

/* ---- the race -------------------------------------------------------------------------------- */

static double larger(double a, double b) {
    return a > b ? a : b;
}

/* The median of a few calls in a row, after one that is not counted. */
static double turn(const struct side *side, int calls, double *best) {
    double seconds[TURNS];
    run_side(side);
    for (int i = 0; i < calls; i++) {
        double start = now();
        run_side(side);
        seconds[i] = now() - start;
        if (*best == 0 || seconds[i] < *best)
            *best = seconds[i];
    }
    return median(seconds, calls);
}

static void measure_peak(struct result *r) {
    int type = LIDX_BFLOAT, n = r->n_threads;
    r->peak = larger(r->peak, peak_flops_threads(kernel, type, 0.01, n));
    if (!strcmp(kernel, "amx"))
        r->spaced_peak = larger(r->spaced_peak, peak_flops_of("TDPBF16PS spaced", 0.01, n));
}

static void race(struct result *r, double patience) {
    int calls[MAX_SIDES], n = 0;
    double begin = now();
    for (int i = 0; i < r->n_sides; i++) {
        double took = 0;
        turn(&r->sides[i], 1, &took);
        calls[i] = took > 0.02 ? 1 : took < 0.02 / 50 ? 50 : (int)(0.02 / took);
    }
    do {
        measure_peak(r);
        for (int i = 0; i < r->n_sides; i++) {
            struct side *side = &r->sides[i];
            side->seconds[n] = turn(side, calls[i], &side->best);
        }
        n++;
    } while (n < TURNS && (n < 3 || now() - begin < patience));
    measure_peak(r);
    for (int i = 0; i < r->n_sides; i++)
        r->sides[i].median = median(r->sides[i].seconds, n);
}

static double flop(const struct result *r) {
    return 2.0 * HEADS * DIM * r->n_query * r->n_key;
}

static void print_result(const struct result *r) {
    char name[32];
    snprintf(name, sizeof name, "%d x %d", r->n_query, r->n_key);
    printf("%-12s %d thread%s peak %.2f Tflop/s", name, r->n_threads,
           r->n_threads > 1 ? "s," : ", ", 1e-12 * r->peak);
    if (r->spaced_peak > 0)
        printf(", spaced %.2f", 1e-12 * r->spaced_peak);
    printf("\n");
    for (int i = 0; i < r->n_sides; i++) {
        const struct side *s = &r->sides[i];
        printf("    %-20s %10.1f us (best %10.1f)  of peak %5.3f", s->name, 1e6 * s->median,
               1e6 * s->best, r->peak > 0 ? flop(r) / s->median / r->peak : 0);
        if (i)
            printf("  %5.2f times our time", s->median / r->sides[0].median);
        printf("  (%s)\n", s->detail);
    }
    fflush(stdout);
}

static void run_case(int n_query, int n_key, int n_threads, double patience) {
    struct problem problem = {n_query, n_key, n_threads, queries, keys, weights};
    struct result *r = &results[n_results++];
    struct lidx_options options = LIDX_OPTIONS_INIT;
    *r = (struct result){n_query, n_key, n_threads, 1, 0, 0, {{{0}, {0}, NULL, {0}, 0, 0}}};
    options.n_threads = n_threads;
    if (lidx_create(&context, &options))
        fail(lidx_last_error());
    snprintf(r->sides[0].name, sizeof r->sides[0].name, "lightning_indexer");
    snprintf(r->sides[0].detail, sizeof r->sides[0].detail, "%s, keys in place", kernel);
    describe_arguments(&problem);
    run_side(&r->sides[0]);
    for (int i = 0; libraries[i]; i++)
        add_rival(r, &problem, libraries[i]);
    race(r, patience);
    print_result(r);
    for (int i = 1; i < r->n_sides; i++)
        composition_destroy(r->sides[i].rival);
    lidx_destroy(context);
}

/* ---- report and options ---------------------------------------------------------------------- */

static void write_json(const char *path) {
    FILE *file = fopen(path, "w");
    const char *instruction = peak_instruction(kernel, LIDX_BFLOAT);
    if (!file)
        fail("the output file cannot be written");
    fprintf(file,
            "{\n \"version\": \"%s\", \"cpu_features\": \"%s\", \"kernel\": \"%s\",\n"
            " \"peak_instruction\": \"%s\", \"heads\": %d, \"dim\": %d, \"sparse_count\": %d,\n"
            " \"rivals\": [\n",
            lidx_version(), lidx_cpu_features(), kernel, instruction ? instruction : "none", HEADS,
            DIM, TOP_K);
    for (int i = 0; i < n_results; i++) {
        const struct result *r = &results[i];
        fprintf(file,
                "  {\"query_tokens\": %d, \"keys\": %d, \"threads\": %d,\n"
                "   \"peak_flop_per_s\": %.4g, \"spaced_peak_flop_per_s\": %.4g, \"sides\": [",
                r->n_query, r->n_key, r->n_threads, r->peak, r->spaced_peak);
        for (int j = 0; j < r->n_sides; j++) {
            const struct side *s = &r->sides[j];
            fprintf(file,
                    "%s\n    {\"name\": \"%s\", \"median_s\": %.5g, \"best_s\": %.5g, "
                    "\"fraction_of_peak\": %.4f, \"of_our_time\": %.3f,\n     \"how\": \"%s\"}",
                    j ? "," : "", s->name, s->median, s->best,
                    r->peak > 0 ? flop(r) / s->median / r->peak : 0, s->median / r->sides[0].median,
                    s->detail);
        }
        fprintf(file, "]}%s\n", i + 1 < n_results ? "," : "");
    }
    fprintf(file, " ]\n}\n");
    if (fclose(file))
        fail("the output file cannot be written");
}

/* The next number of a list such as 1,2; 0 at its end. */
static int next_number(const char **list) {
    char *end;
    long n = strtol(*list, &end, 10);
    if (end == *list)
        return 0;
    *list = *end == ',' ? end + 1 : end;
    return (int)n;
}

static int next_case(const char **list, int *n_query, int *n_key) {
    int used = 0;
    if (sscanf(*list, "%dx%d%n", n_query, n_key, &used) < 2)
        return 0;
    *list += used;
    *list += **list == ',';
    if (*n_query < 1 || *n_query > 4096 || *n_key < TOP_K || *n_key > 1 << 22 || *n_key % 1024)
        fail("--case takes up to 4096 tokens x 2048 to 4194304 keys, a multiple of 1024");
    return 1;
}

int main(int argc, char **argv) {
    const char *threads = NULL, *out = NULL,
               *cases = "1x4096,1x8192,1x65536,1x1048576,64x8192,512x8192";
    char all[32] = "1";
    double patience = 1;
    int most_queries = 1, most_keys = TOP_K, n_query, n_key, n_threads;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--threads"))
            threads = argv[i + 1];
        else if (!strcmp(argv[i], "--case"))
            cases = argv[i + 1];
        else if (!strcmp(argv[i], "--seconds"))
            patience = atof(argv[i + 1]);
        else if (!strcmp(argv[i], "--out"))
            out = argv[i + 1];
        else
            fail("options are --threads, --case, --seconds and --out");
    }
    if (argc % 2 == 0)
        fail("options are --threads, --case, --seconds and --out, each with a value");
#ifdef _OPENMP
    if (omp_get_num_procs() > 1)
        snprintf(all, sizeof all, "1,%d", omp_get_num_procs());
#endif
    for (const char *list = cases; next_case(&list, &n_query, &n_key);) {
        most_queries = n_query > most_queries ? n_query : most_queries;
        most_keys = n_key > most_keys ? n_key : most_keys;
    }
    make_data(most_queries, most_keys);
    kernel = kernel_name();
    printf("kernel %s, %d heads x %d, bf16, top %d in order\n", kernel, HEADS, DIM, TOP_K);
    if (!libraries[0])
        printf("built without oneDNN and libxsmm: nothing to compare with\n");
    for (const char *list = threads ? threads : all; (n_threads = next_number(&list)) > 0;) {
        for (const char *rest = cases; next_case(&rest, &n_query, &n_key);) {
            if (n_results < MAX_CASES * 4)
                run_case(n_query, n_key, n_threads, patience);
        }
    }
    if (out)
        write_json(out);
    return 0;
}
