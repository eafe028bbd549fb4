/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend at full size: relaunches give one answer, and sampled rows are the CPU's.
 * The options are cuda_device.h's.
 */
#include "cuda_problem.h"

/* One row of a causal prefill of one batch, copied to the host with the keys that it sees. */
struct row {
    const struct setup *s;
    int64_t number;
    int64_t visible;
    int is_bf16;
    uint16_t *query, *weights, *key;
};

static void row_copy(struct row *r, const struct setup *s, int64_t number, int is_bf16) {
    int64_t heads = s->query_shape[2], dim = s->query_shape[3];
    size_t query = 2 * (size_t)(heads * dim), weights = 2 * (size_t)heads;
    int64_t visible = s->key_shape[1] - s->query_shape[1] + number + 1;
    size_t key = 2 * (size_t)(visible * dim);
    *r = (struct row){s, number, visible, is_bf16, malloc(query), malloc(weights), malloc(key)};
    copy_out(r->query, (unsigned char *)s->query.data + number * (int64_t)query, query);
    copy_out(r->weights, (unsigned char *)s->weights.data + number * (int64_t)weights, weights);
    copy_out(r->key, s->key.data, key);
}

static void row_free(struct row *r) {
    free(r->query);
    free(r->weights);
    free(r->key);
}

static double row_score(const struct row *r, int64_t j) {
    double sum = 0;
    int64_t heads = r->s->query_shape[2], dim = r->s->query_shape[3];
    for (int64_t h = 0; h < heads; h++) {
        double dot = 0;
        for (int64_t d = 0; d < dim; d++)
            dot += (double)test_from_half(r->query[h * dim + d], r->is_bf16) *
                   (double)test_from_half(r->key[j * dim + d], r->is_bf16);
        sum += dot > 0 ? dot * (double)test_from_half(r->weights[h], r->is_bf16) : 0;
    }
    return sum;
}

/* Runs the CPU backend on the row alone. */
static void row_run(const struct row *r, struct lidx_context *cpu, int32_t *want) {
    struct setup alone = *r->s;
    alone.args.query = &alone.query, alone.args.key = &alone.key;
    alone.args.weights = &alone.weights, alone.args.sparse_indices = &alone.indices;
    alone.args.actual_seq_lengths_query = alone.args.actual_seq_lengths_key = NULL;
    alone.args.sparse_values = NULL;
    alone.query_shape[1] = alone.weights_shape[1] = alone.out_shape[1] = 1;
    alone.key_shape[1] = r->visible;
    struct lidx_tensor *tensors[4] = {&alone.query, &alone.key, &alone.weights, &alone.indices};
    void *data[4] = {r->query, r->key, r->weights, want};
    int64_t *shapes[4] = {alone.query_shape, alone.key_shape, alone.weights_shape, alone.out_shape};
    for (int i = 0; i < 4; i++) {
        tensors[i]->data = data[i];
        tensors[i]->device.device_type = LIDX_CPU;
        tensors[i]->shape = shapes[i];
    }
    CHECK(lidx_run(cpu, &alone.args) == LIDX_OK, "CPU run of row %lld: %s", (long long)r->number,
          lidx_last_error());
}

/* How many of the indices that only one of `got` and `want` has do not score like the true k-th. */
static int64_t row_differs(const struct row *r, const int32_t *got, const int32_t *want, int64_t k,
                           const char *name) {
    unsigned char *chosen = calloc((size_t)r->visible, 1);
    int64_t shared = r->visible < k ? r->visible : k, differing = 0;
    double bound = row_score(r, want[shared - 1]), top = row_score(r, want[0]);
    double slack = fmax(1e-4 * fabs(bound), 1e-6 * fabs(top));
    for (int64_t i = 0; i < shared; i++)
        chosen[want[i]] ^= 1;
    for (int64_t i = 0; i < shared; i++) {
        if (!CHECK(got[i] >= 0 && got[i] < r->visible, "%s: row %lld has index %d of %lld keys",
                   name, (long long)r->number, (int)got[i], (long long)r->visible))
            break;
        chosen[got[i]] ^= 2;
    }
    for (int64_t j = 0; j < r->visible; j++)
        if (chosen[j] == 1 || chosen[j] == 2)
            differing += fabs(row_score(r, j) - bound) > slack;
    free(chosen);
    return differing;
}

/* A row of the device's answer against a run of the CPU backend on that row alone. */
static void check_row(const struct setup *s, struct lidx_context *cpu, const int32_t *got,
                      int64_t number, int is_bf16, const char *name) {
    int64_t k = s->args.sparse_count;
    int32_t *want = malloc(4 * (size_t)k);
    struct row r;
    row_copy(&r, s, number, is_bf16);
    row_run(&r, cpu, want);
    int64_t differing = row_differs(&r, got, want, k, name);
    CHECK(differing == 0, "%s: row %lld of %lld has %lld wrong indices", name, (long long)number,
          (long long)s->query_shape[1], (long long)differing);
    row_free(&r);
    free(want);
}

static void check_full(void) {
    static const struct {
        int64_t n_query, n_key;
        int relaunches;
    } shapes[] = {{2048, 65536, 12}, {8192, 8192, 12}};
    struct lidx_context *cpu;
    CHECK_INT(lidx_create(&cpu, NULL), LIDX_OK, "CPU context");
    for (int i = 0; i < 8; i++) {
        int is_bf16 = i % 2, heads = i / 2 % 2 ? 32 : 64;
        int64_t n_query = shapes[i / 4].n_query, n_key = shapes[i / 4].n_key;
        struct setup s;
        char text[TEXT], name[TEXT];
        forget();
        setup_make(&s, 0, is_bf16, 1, n_query, n_key, heads, 128, 2048, 0, 0, 0);
        s.args.actual_seq_lengths_query = s.args.actual_seq_lengths_key = NULL;
        s.args.sparse_values = NULL;
        unsigned char *got, *want;
        size_t n = output_bytes(&s);
        MUST(cudaMallocHost((void **)&got, n));
        MUST(cudaMallocHost((void **)&want, n));
        for (int j = 0; j < n_kernels; j++) {
            snprintf(name, sizeof name, "%s, %lld x %lld, %d heads, %s", kernels[j].name,
                     (long long)n_query, (long long)n_key, heads, is_bf16 ? "bf16" : "fp16");
            int differing = 0;
            for (int launch = 0; launch < shapes[i / 4].relaunches; launch++) {
                MUST(cudaMemset(s.indices.data, 0xA5, n));
                if (!run_device(&kernels[j], &s.args))
                    break;
                copy_out(launch ? got : want, s.indices.data, n);
                differing += launch && memcmp(got, want, n) != 0;
            }
            CHECK(differing == 0, "%s: %d relaunches differ", name, differing);
            const int32_t *rows = (const int32_t *)(const void *)want;
            for (int sample = 0; sample < 4; sample++) {
                int64_t row = sample ? n_query * sample / 3 - 1 : 5;
                snprintf(text, sizeof text, "%.200s", name);
                check_row(&s, cpu, rows + row * 2048, row, is_bf16, text);
            }
        }
        MUST(cudaFreeHost(got));
        MUST(cudaFreeHost(want));
    }
    lidx_destroy(cpu);
}

int main(int argc, char **argv) {
    if (!device_open(argc, argv))
        return 77;
    check_full();
    SAY("full");
    CHECK(device_close(), "a kernel took nothing");
    return test_end();
}
