/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend gives one answer, bit for bit, whatever happens around it:
 *
 *   slabs      the same rows through a workspace that holds few of them
 *   repeat     50 launches
 *   load       200 launches while another stream keeps the GPU busy
 *   graph      captured once, replayed with other lengths, pages and queries in the same buffers
 *
 * The options are cuda_device.h's.
 */
#include "cuda_problem.h"

enum { REPEATS = 50, LOADED = 200 };

/* A page table far wider than the lengths leaves room for a few rows of scores at a time. */
static void check_slabs(struct kernel *kernel) {
    enum { B = 3, S1 = 30, PAGE = 64, WIDTH = 50, WIDE = 40000, PAGES = 90 };
    static int32_t table[B * WIDTH], wide[B * WIDE];
    struct rng rng = rng_seed(21);
    struct setup s;
    char text[TEXT] = "";
    for (int heads = 8; heads <= (options.sanitizer ? 8 : 64); heads *= 8) {
        forget();
        setup_make(&s, 0, 1, B, S1, 0, heads, 128, 700, PAGE, PAGES, WIDTH);
        set_lengths(&s, (int32_t[]){S1, 7, S1}, (int32_t[]){WIDTH * PAGE, 3000, 41});
        shuffled_table(table, B * WIDTH, PAGES, &rng);
        copy_in(s.table.data, table, sizeof table);
        unsigned char *want = answer(&s, kernel);
        if (!want)
            return;
        memset(wide, 0x7F, sizeof wide);
        for (int b = 0; b < B; b++)
            memcpy(wide + b * WIDE, table + b * WIDTH, 4 * WIDTH);
        s.table.data = give(sizeof wide, 0);
        s.table_shape[1] = WIDE;
        copy_in(s.table.data, wide, sizeof wide);
        unsigned char *got = answer(&s, kernel);
        CHECK(got && same_answers(&s, got, want, text), "%s, slabs of few rows: %s", kernel->name,
              text);
        free(got);
        free(want);
    }
}

/* ---- repeated launches, graphs --------------------------------------------------------------- */

static void check_repeat(struct kernel *kernel) {
    struct setup s;
    char text[TEXT] = "";
    for (int form = 0; form < 4; form++) {
        int packed = form % 2;
        int32_t ends[2] = {300, 700}, each[2] = {300, 400}, table[2 * 60];
        struct rng rng = rng_seed(31);
        forget();
        setup_make(&s, packed, form < 2, 2, packed ? 700 : 400, packed ? 6000 : 3500, 64, 128, 2048,
                   form < 2 ? 0 : 64, 100, 60);
        if (form < 2)
            set_lengths(&s, packed ? ends : each,
                        packed ? (int32_t[]){2500, 6000} : (int32_t[]){2500, 3500});
        else
            set_lengths(&s, packed ? ends : each, (int32_t[]){2500, 3840});
        shuffled_table(table, 2 * 60, 100, &rng);
        copy_in(s.table.data, table, sizeof table);
        unsigned char *want = answer(&s, kernel);
        for (int i = 1; want && i < (options.quick ? 5 : REPEATS); i++) {
            unsigned char *got = answer(&s, kernel);
            if (!CHECK(got && same_answers(&s, got, want, text), "%s, launch %d of form %d: %s",
                       kernel->name, i, form, text))
                i = REPEATS;
            free(got);
        }
        free(want);
    }
}

/* What check_load runs, and what keeps the GPU busy meanwhile. */
struct load {
    struct setup s;
    struct setup other;
    void *other_workspace;
    cudaStream_t stream; /* of the one */
    cudaStream_t busy;   /* of the other */
};

static void load_make(struct load *l, struct kernel *kernel, int paged) {
    enum { B = 8, WIDTH = 60, PAGES = 300 };
    int32_t table[B * WIDTH], query[B], key[B];
    struct rng rng = rng_seed(37);
    size_t size;
    forget();
    setup_make(&l->s, 0, 1, paged ? B : 1, paged ? 2 : 300, 4000, 64, 128, 512, paged ? 64 : 0,
               PAGES, WIDTH);
    for (int b = 0; b < B; b++) {
        query[b] = paged ? 2 : 300;
        key[b] = (paged ? WIDTH * 64 : 4000) - 301 * b;
    }
    set_lengths(&l->s, query, key);
    shuffled_table(table, B * WIDTH, PAGES, &rng);
    copy_in(l->s.table.data, table, 4 * (size_t)(l->s.n_batch * WIDTH));
    setup_make(&l->other, 0, 0, 1, 512, 6000, 32, 128, 100, 0, 0, 0);
    l->other.args.actual_seq_lengths_query = l->other.args.actual_seq_lengths_key = NULL;
    CHECK_INT(lidx_workspace_size(kernel->context, &l->other.args, &size), LIDX_OK, kernel->name);
    MUST(cudaMalloc(&l->other_workspace, size));
    MUST(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking));
    MUST(cudaStreamCreateWithFlags(&l->busy, cudaStreamNonBlocking));
}

static void load_free(struct load *l) {
    MUST(cudaDeviceSynchronize());
    MUST(cudaStreamDestroy(l->stream));
    MUST(cudaStreamDestroy(l->busy));
    MUST(cudaFree(l->other_workspace));
}

/* Into `got`, in pinned memory, indices and values of a run beside three of the other problem. */
static int run_loaded(struct load *l, struct kernel *kernel, unsigned char *got) {
    size_t n = output_bytes(&l->s);
    int status = LIDX_OK;
    for (int j = 0; j < 3 && !status; j++)
        status = enqueue(kernel, &l->other.args, l->other_workspace, l->busy);
    MUST(cudaMemsetAsync(l->s.indices.data, 0xA5, n, l->stream));
    MUST(cudaMemsetAsync(l->s.values.data, 0xA5, n, l->stream));
    if (!status)
        status = enqueue(kernel, &l->s.args, NULL, l->stream);
    if (!CHECK(status == LIDX_OK, "%s: %s", kernel->name, lidx_last_error()))
        return 0;
    MUST(cudaMemcpyAsync(got, l->s.indices.data, n, cudaMemcpyDeviceToHost, l->stream));
    MUST(cudaMemcpyAsync(got + n, l->s.values.data, n, cudaMemcpyDeviceToHost, l->stream));
    MUST(cudaStreamSynchronize(l->stream));
    return 1;
}

/* Launches on one stream while runs of another problem keep the GPU busy on a second one. */
static void check_load(struct kernel *kernel) {
    for (int paged = 0; paged < 2; paged++) {
        struct load l;
        unsigned char *got;
        int differing = 0;
        load_make(&l, kernel, paged);
        size_t n = output_bytes(&l.s);
        unsigned char *want = answer(&l.s, kernel);
        MUST(cudaMallocHost((void **)&got, 2 * n));
        for (int i = 0; want && i < LOADED && run_loaded(&l, kernel, got); i++)
            differing += memcmp(got, want, 2 * n) != 0;
        CHECK(differing == 0, "%s, paged %d: %d of %d launches under load differ", kernel->name,
              paged, differing, LOADED);
        load_free(&l);
        MUST(cudaFreeHost(got));
        free(want);
    }
}

/* Lengths, table and queries number `turn`, in the same buffers. */
static void change(struct setup *s, int turn) {
    enum { MOST_BATCH = 5, MOST_WIDTH = 40 };
    struct rng rng = rng_seed((uint64_t)turn + 41);
    int32_t query[MOST_BATCH], key[MOST_BATCH], table[MOST_BATCH * MOST_WIDTH];
    int64_t width = s->table_shape[1];
    int packed = s->args.layout_query == LIDX_TND, sum = 0;
    for (int b = 0; b < s->n_batch; b++) {
        int64_t left = packed ? s->rows - sum : s->query_shape[1];
        query[b] = (int32_t)rng_between(&rng, 0, left);
        sum += query[b];
        query[b] = packed ? sum : query[b];
        key[b] = (int32_t)rng_between(&rng, 0, width * s->key_shape[1]);
    }
    set_lengths(s, query, key);
    shuffled_table(table, s->n_batch * width, s->key_shape[0], &rng);
    copy_in(s->table.data, table, 4 * (size_t)(s->n_batch * width));
    uint16_t first[64];
    fill_halves(first, 64, 1, (uint64_t)turn + 51);
    copy_in(s->query.data, first, sizeof first);
}

static void check_graph(struct kernel *kernel) {
    for (int packed = 0; packed < 2; packed++) {
        struct setup s;
        char text[TEXT] = "";
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t replay;
        forget();
        setup_make(&s, packed, 1, 5, packed ? 60 : 9, 0, 32, 128, 333, 48, 70, 40);
        change(&s, 0);
        size_t n = output_bytes(&s);
        unsigned char *got = malloc(2 * n);
        MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        int status = enqueue(kernel, &s.args, NULL, stream);
        MUST(cudaStreamEndCapture(stream, &graph));
        if (!CHECK(status == LIDX_OK, "%s under capture: %s", kernel->name, lidx_last_error()))
            return;
        MUST(cudaGraphInstantiate(&replay, graph, 0));
        for (int turn = 1; turn < 8; turn++) {
            change(&s, turn);
            unsigned char *want = answer(&s, kernel);
            MUST(cudaMemset(s.indices.data, 0x5A, n));
            MUST(cudaMemset(s.values.data, 0x5A, n));
            MUST(cudaDeviceSynchronize());
            MUST(cudaGraphLaunch(replay, stream));
            MUST(cudaStreamSynchronize(stream));
            copy_out(got, s.indices.data, n);
            copy_out(got + n, s.values.data, n);
            CHECK(want && same_answers(&s, got, want, text), "%s, replay %d, packed %d: %s",
                  kernel->name, turn, packed, text);
            free(want);
        }
        free(got);
        MUST(cudaGraphExecDestroy(replay));
        MUST(cudaGraphDestroy(graph));
        MUST(cudaStreamDestroy(stream));
    }
}

int main(int argc, char **argv) {
    static void (*const checks[])(struct kernel *) = {check_slabs, check_graph, check_repeat,
                                                      check_load};
    static const char *const names[] = {"slabs", "graph", "repeat", "load"};
    if (!device_open(argc, argv))
        return 77;
    for (int i = 0; i < (options.sanitizer ? 2 : 4); i++) {
        for (int j = 0; j < n_kernels; j++)
            checks[i](&kernels[j]);
        SAY(names[i]);
    }
    CHECK(device_close(), "a kernel took nothing");
    return test_end();
}
