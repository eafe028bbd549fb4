/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend at full size: relaunches give one answer, and sampled rows are the CPU's.
 * The options are cuda_device.h's.
 */
#include "cuda_problem.h"

static double dot_score(const struct setup *s, const uint16_t *query, const uint16_t *weights,
                        const uint16_t *key, int is_bf16) {
    double sum = 0;
    int64_t heads = s->query_shape[2], dim = s->query_shape[3];
    for (int64_t h = 0; h < heads; h++) {
        double dot = 0;
        for (int64_t d = 0; d < dim; d++)
            dot += (double)test_from_half(query[h * dim + d], is_bf16) *
                   (double)test_from_half(key[d], is_bf16);
        sum += dot > 0 ? dot * (double)test_from_half(weights[h], is_bf16) : 0;
    }
    return sum;
}

/* One row of a causal prefill of one batch against a run of the CPU backend on that row alone:
 * indices that only one of them has must score like the true k-th. */
static void check_row(const struct setup *s, struct lidx_context *cpu, const int32_t *got,
                      int64_t row, int is_bf16, const char *name) {
    int64_t heads = s->query_shape[2], dim = s->query_shape[3], k = s->args.sparse_count;
    int64_t visible = s->key_shape[1] - s->query_shape[1] + row + 1, n = heads * dim;
    uint16_t *query = malloc(2 * (size_t)n), *weights = malloc(2 * (size_t)heads);
    uint16_t *key = malloc(2 * (size_t)(visible * dim));
    int32_t *want = malloc(4 * (size_t)k);
    unsigned char *chosen = calloc((size_t)visible, 1);
    copy_out(query, (unsigned char *)s->query.data + 2 * row * n, 2 * (size_t)n);
    copy_out(weights, (unsigned char *)s->weights.data + 2 * row * heads, 2 * (size_t)heads);
    copy_out(key, s->key.data, 2 * (size_t)(visible * dim));
    struct setup alone = *s;
    alone.args.query = &alone.query, alone.args.key = &alone.key;
    alone.args.weights = &alone.weights, alone.args.sparse_indices = &alone.indices;
    alone.args.actual_seq_lengths_query = alone.args.actual_seq_lengths_key = NULL;
    alone.args.sparse_values = NULL;
    alone.query_shape[1] = alone.weights_shape[1] = alone.out_shape[1] = 1;
    alone.key_shape[1] = visible;
    struct lidx_tensor *tensors[4] = {&alone.query, &alone.key, &alone.weights, &alone.indices};
    void *data[4] = {query, key, weights, want};
    int64_t *shapes[4] = {alone.query_shape, alone.key_shape, alone.weights_shape, alone.out_shape};
    for (int i = 0; i < 4; i++) {
        tensors[i]->data = data[i];
        tensors[i]->device.device_type = LIDX_CPU;
        tensors[i]->shape = shapes[i];
    }
    CHECK(lidx_run(cpu, &alone.args) == LIDX_OK, "CPU run of row %lld: %s", (long long)row,
          lidx_last_error());
    int64_t shared = visible < k ? visible : k, differing = 0;
    double bound = dot_score(s, query, weights, key + want[shared - 1] * dim, is_bf16);
    double top = dot_score(s, query, weights, key + want[0] * dim, is_bf16);
    double slack = fmax(1e-4 * fabs(bound), 1e-6 * fabs(top));
    for (int64_t i = 0; i < shared; i++)
        chosen[want[i]] ^= 1;
    for (int64_t i = 0; i < shared; i++) {
        if (!CHECK(got[i] >= 0 && got[i] < visible, "%s: row %lld has index %d of %lld keys", name,
                   (long long)row, (int)got[i], (long long)visible))
            break;
        chosen[got[i]] ^= 2;
    }
    for (int64_t j = 0; j < visible; j++)
        if (chosen[j] == 1 || chosen[j] == 2)
            differing += fabs(dot_score(s, query, weights, key + j * dim, is_bf16) - bound) > slack;
    CHECK(differing == 0, "%s: row %lld of %lld has %lld wrong indices", name, (long long)row,
          (long long)s->query_shape[1], (long long)differing);
    free(query);
    free(weights);
    free(key);
    free(want);
    free(chosen);
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
