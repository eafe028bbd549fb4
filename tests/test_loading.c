/* SPDX-License-Identifier: Apache-2.0
 *
 * test_loading LIBRARY.so: a plugin's life. The library is loaded, used with several threads and
 * closed, in a program that does not have it or OpenMP otherwise; what its threads do afterwards
 * must not bring the program down, and it can be loaded again.
 */
#include "test.h"

#include <dlfcn.h>

#include "lightning_indexer.h"

enum { S1 = 16, D = 64, S2 = 3000, K = 8, TIMES = 3 };

static const struct lidx_dtype BF16 = {LIDX_BFLOAT, 16, 1}, INT32 = {LIDX_INT, 32, 1};

/* POSIX has a function's address come as one of data. */
static void find(void *library, const char *name, void *function) {
    void *address = dlsym(library, name);
    CHECK(address != NULL, "no %s", name);
    memcpy(function, &address, sizeof address);
}

static void use(void *library) {
    int (*create)(struct lidx_context **, const struct lidx_options *);
    int (*run)(struct lidx_context *, const struct lidx_args *);
    void (*destroy)(struct lidx_context *);
    find(library, "lidx_create", &create);
    find(library, "lidx_run", &run);
    find(library, "lidx_destroy", &destroy);
    static uint16_t query[S1 * D], key[S2 * D], weights[S1];
    static int32_t indices[S1 * K];
    int64_t query_shape[] = {1, S1, 1, D}, key_shape[] = {1, S2, 1, D}, out_shape[] = {1, S1, 1, K};
    struct lidx_tensor q = {query, {LIDX_CPU, 0}, 4, BF16, query_shape, NULL, 0};
    struct lidx_tensor k = {key, {LIDX_CPU, 0}, 4, BF16, key_shape, NULL, 0};
    struct lidx_tensor w = {weights, {LIDX_CPU, 0}, 3, BF16, query_shape, NULL, 0};
    struct lidx_tensor o = {indices, {LIDX_CPU, 0}, 4, INT32, out_shape, NULL, 0};
    struct lidx_args args = LIDX_ARGS_INIT;
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context = NULL;
    for (int i = 0; i < S1; i++)
        weights[i] = query[i * D] = test_to_bf16(1);
    for (int j = 0; j < S2; j++)
        key[j * D] = test_to_bf16(j == 1234 ? 2.0f : 1.0f);
    args.query = &q, args.key = &k, args.weights = &w, args.sparse_indices = &o;
    args.sparse_count = K;
    options.n_threads = 3;
    memset(indices, 0xA5, sizeof indices);
    CHECK_INT(create(&context, &options), LIDX_OK, "create");
    CHECK_INT(run(context, &args), LIDX_OK, "run");
    for (int i = 0; i < S1; i++)
        CHECK(indices[i * K] == 1234 && indices[i * K + 1] == 0, "row %d begins with %d, %d", i,
              indices[i * K], indices[i * K + 1]);
    destroy(context);
}

int main(int argc, char **argv) {
    for (int i = 0; argc > 1 && i < TIMES; i++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (!CHECK(library != NULL, "%s", dlerror()))
            break;
        use(library);
        CHECK_INT(dlclose(library), 0, "dlclose");
        usleep(100000); /* time for a thread to wake and find its code gone */
    }
    return test_end();
}
