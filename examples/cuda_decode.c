/* SPDX-License-Identifier: Apache-2.0
 *
 * A decode step on a GPU as a CUDA graph: captured once, then replayed for each new token, with
 * other lengths, page tables and data in the same buffers. Each query here is the newest key of its
 * sequence, which must therefore come out first.
 *
 *     cc examples/cuda_decode.c -o cuda_decode $(pkg-config --cflags --libs lightning_indexer) \
 *        -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lcudart
 */
#include <cuda_runtime_api.h>
#include <lightning_indexer.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SEQUENCES = 4,
    HEADS = 64,
    DIM = 128,
    BLOCK = 64,
    MAX_PAGES = 32, /* of a sequence */
    POOL = SEQUENCES * MAX_PAGES,
    TOP_K = 256,
    STEPS = 100
};

/* What the host knows of the cache. */
static int32_t table[SEQUENCES][MAX_PAGES], length[SEQUENCES];
static int n_pages;

/* One step's queries: all heads of a sequence alike. */
static uint16_t query[SEQUENCES][HEADS][DIM];

/* The same on the device, and what a run needs there besides. */
static struct {
    void *query, *pool, *weights, *length, *table, *best, *error_word, *workspace;
} device;

static void need(cudaError_t code, const char *what) {
    if (code == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
    exit(1);
}

static void need_lidx(int status) {
    if (status == LIDX_OK)
        return;
    fprintf(stderr, "%s\n", lidx_last_error());
    exit(1);
}

static void *allocate(size_t bytes) {
    void *memory;
    need(cudaMalloc(&memory, bytes), "cudaMalloc");
    need(cudaMemset(memory, 0, bytes), "cudaMemset");
    return memory;
}

/* A free page: in no particular order, as after some hours of service. */
static int32_t take_page(void) {
    return (n_pages++ * 37 + 11) % POOL;
}

/* A random key, as bf16 in [-1, 1), behind those of a sequence. */
static void append_key(int sequence, uint16_t key[DIM], cudaStream_t stream) {
    int32_t at = length[sequence]++;
    for (int d = 0; d < DIM; d++) {
        float x = (float)rand() / ((float)RAND_MAX / 2 + 1) - 1;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        key[d] = (uint16_t)(bits >> 16);
    }
    if (at % BLOCK == 0)
        table[sequence][at / BLOCK] = take_page();
    size_t row = (size_t)table[sequence][at / BLOCK] * BLOCK + (size_t)(at % BLOCK);
    need(cudaMemcpyAsync((uint16_t *)device.pool + row * DIM, key, DIM * sizeof *key,
                         cudaMemcpyHostToDevice, stream),
         "copying a key");
}

static void next_tokens(cudaStream_t stream) {
    for (int s = 0; s < SEQUENCES; s++) {
        append_key(s, query[s][0], stream);
        for (int h = 1; h < HEADS; h++)
            memcpy(query[s][h], query[s][0], sizeof query[s][0]);
    }
    need(cudaMemcpyAsync(device.query, query, sizeof query, cudaMemcpyHostToDevice, stream),
         "copying queries");
    need(cudaMemcpyAsync(device.length, length, sizeof length, cudaMemcpyHostToDevice, stream),
         "copying lengths");
    need(cudaMemcpyAsync(device.table, table, sizeof table, cudaMemcpyHostToDevice, stream),
         "copying the table");
}

static struct lidx_tensor tensor(void *data, uint8_t code, uint8_t bits, int ndim, int64_t *shape) {
    return (struct lidx_tensor){data, {LIDX_CUDA, 0}, ndim, {code, bits, 1}, shape, NULL, 0};
}

/* Asks how much workspace the call takes, gets it, and captures the call. */
static cudaGraphExec_t capture(struct lidx_context *context, cudaStream_t stream) {
    /* Weights have the first three sizes of query, lengths the first. */
    int64_t query_shape[] = {SEQUENCES, 1, HEADS, DIM}, key_shape[] = {POOL, BLOCK, 1, DIM};
    int64_t out_shape[] = {SEQUENCES, 1, 1, TOP_K}, table_shape[] = {SEQUENCES, MAX_PAGES};
    struct lidx_tensor q = tensor(device.query, LIDX_BFLOAT, 16, 4, query_shape);
    struct lidx_tensor k = tensor(device.pool, LIDX_BFLOAT, 16, 4, key_shape);
    struct lidx_tensor w = tensor(device.weights, LIDX_FLOAT, 32, 3, query_shape);
    struct lidx_tensor n = tensor(device.length, LIDX_INT, 32, 1, query_shape);
    struct lidx_tensor pages = tensor(device.table, LIDX_INT, 32, 2, table_shape);
    struct lidx_tensor best = tensor(device.best, LIDX_INT, 32, 4, out_shape);
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = &q;
    args.key = &k;
    args.weights = &w;
    args.actual_seq_lengths_key = &n;
    args.block_table = &pages;
    args.layout_key = LIDX_PA_BSND;
    args.sparse_count = TOP_K;
    args.sparse_indices = &best;
    args.stream = stream;
    args.error_word = device.error_word;
    need_lidx(lidx_workspace_size(context, &args, &args.workspace_size));
    args.workspace = device.workspace = allocate(args.workspace_size);

    cudaGraph_t graph;
    cudaGraphExec_t step;
    need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning the capture");
    need_lidx(lidx_run(context, &args));
    need(cudaStreamEndCapture(stream, &graph), "ending the capture");
    need(cudaGraphInstantiate(&step, graph, 0), "making the graph");
    need(cudaGraphDestroy(graph), "cudaGraphDestroy");
    return step;
}

/* Reads the last step's answer. Returns how many sequences do not have their newest key first. */
static int show(cudaStream_t stream) {
    static int32_t best[SEQUENCES][TOP_K];
    uint32_t errors; /* lengths and page ids out of range, in all steps */
    int wrong = 0;
    need(cudaMemcpyAsync(best, device.best, sizeof best, cudaMemcpyDeviceToHost, stream),
         "copying");
    need(cudaMemcpyAsync(&errors, device.error_word, sizeof errors, cudaMemcpyDeviceToHost, stream),
         "copying");
    need(cudaStreamSynchronize(stream), "running");
    for (int s = 0; s < SEQUENCES; s++) {
        printf("sequence %d: %d keys, best is key %d\n", s, (int)length[s], (int)best[s][0]);
        wrong += best[s][0] != length[s] - 1;
    }
    printf("%u lengths or pages were out of range\n", (unsigned)errors);
    return wrong + (errors != 0);
}

int main(void) {
    static float ones[SEQUENCES][HEADS];
    uint16_t key[DIM];
    cudaStream_t stream;
    struct lidx_context *context;
    need(cudaStreamCreate(&stream), "cudaStreamCreate");
    need_lidx(lidx_create(&context, NULL));
    device.query = allocate(sizeof query);
    device.pool = allocate((size_t)POOL * BLOCK * DIM * sizeof(uint16_t));
    device.weights = allocate(sizeof ones);
    device.length = allocate(sizeof length);
    device.table = allocate(sizeof table);
    device.best = allocate(SEQUENCES * TOP_K * sizeof(int32_t));
    device.error_word = allocate(sizeof(uint32_t));
    for (int i = 0; i < SEQUENCES * HEADS; i++)
        ones[i / HEADS][i % HEADS] = 1;
    need(cudaMemcpy(device.weights, ones, sizeof ones, cudaMemcpyHostToDevice), "copying weights");
    for (int s = 0; s < SEQUENCES; s++)
        for (int prompt = 0; prompt < 100 + 500 * s; prompt++)
            append_key(s, key, stream);

    cudaGraphExec_t step = capture(context, stream);
    for (int i = 0; i < STEPS; i++) {
        next_tokens(stream);
        need(cudaGraphLaunch(step, stream), "cudaGraphLaunch");
    }
    int wrong = show(stream);
    need(cudaGraphExecDestroy(step), "cudaGraphExecDestroy");
    need(cudaStreamDestroy(stream), "cudaStreamDestroy");
    void *memory[] = {device.query, device.pool, device.weights,    device.length,
                      device.table, device.best, device.error_word, device.workspace};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++)
        cudaFree(memory[i]);
    lidx_destroy(context);
    return wrong ? 1 : 0;
}
