/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory: each allocation made to fail in turn gives LIDX_ERR_MEMORY and leaks nothing; a context
 * takes at most 4 MiB a thread; runs allocate nothing. Linked with the static library and
 * -Wl,--wrap for the allocator's functions, so that the library's calls come through here.
 */
#include "test.h"

#include "lightning_indexer.h"
#include "scenario.h"

static long n_calls;      /* allocations asked for */
static long fail_at = -1; /* the one that is refused, counted from 0 */
static long n_live;
static size_t n_bytes;

/* 1 when this call is to fail. */
static int refused(size_t size) {
    n_bytes += size;
    return n_calls++ == fail_at;
}

static void *counted(void *pointer) {
    n_live += pointer != NULL;
    return pointer;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *pointer, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void __real_free(void *pointer);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *pointer, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void __wrap_free(void *pointer);

void *__wrap_malloc(size_t size) {
    return refused(size) ? NULL : counted(__real_malloc(size));
}

void *__wrap_calloc(size_t n, size_t size) {
    return refused(n * size) ? NULL : counted(__real_calloc(n, size));
}

void *__wrap_realloc(void *pointer, size_t size) {
    n_live -= pointer != NULL;
    return refused(size) ? NULL : counted(__real_realloc(pointer, size));
}

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    return refused(size) ? NULL : counted(__real_aligned_alloc(alignment, size));
}

void __wrap_free(void *pointer) {
    n_live -= pointer != NULL;
    __real_free(pointer);
}

static void check_faults(int n_threads) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context = NULL;
    options.n_threads = n_threads;
    n_calls = 0;
    n_bytes = 0;
    n_live = 0;
    CHECK_INT(lidx_create(&context, &options), LIDX_OK, "create");
    long calls = n_calls;
    CHECK(calls > 0, "%ld allocations seen: is the wrapper linked?", calls);
    CHECK(n_bytes <= (size_t)n_threads * (4 << 20), "%zu bytes for %d threads", n_bytes, n_threads);
    lidx_destroy(context);
    CHECK_INT(n_live, 0, "allocations that outlive the context");
    for (long i = 0; i < calls; i++) {
        int marker;
        context = (struct lidx_context *)(void *)&marker;
        fail_at = n_calls + i;
        n_live = 0;
        int status = lidx_create(&context, &options);
        fail_at = -1;
        CHECK(status == LIDX_ERR_MEMORY, "allocation %ld refused: %s", i, lidx_status_name(status));
        CHECK(context == NULL, "allocation %ld refused: there is a context", i);
        CHECK(strstr(lidx_last_error(), "memory"), "\"%s\"", lidx_last_error());
        CHECK_INT(n_live, 0, "allocations that outlive a refusal");
    }
    CHECK_INT(lidx_create(&context, &options), LIDX_OK, "create after refusals");
    lidx_destroy(context);
}

/* The wrapped functions are the library's and this file's own: scenarios are made before. */
static void check_runs(int n_threads, long cases) {
    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    options.n_threads = n_threads;
    CHECK_INT(lidx_create(&context, &options), LIDX_OK, "create");
    for (long c = 0; c < cases; c++) {
        struct rng rng = rng_seed((uint64_t)c + 9);
        struct scenario s;
        struct form f = {0};
        struct rendering r;
        scenario_make(&s, &rng, 1e6);
        form_whole(&f, &s);
        form_random_layout(&f, &rng);
        rendering_make(&r, &s, &f, &rng);
        long before = n_calls;
        fail_at = n_calls;
        int status = lidx_run(context, &r.args);
        fail_at = -1;
        CHECK(status == LIDX_OK && n_calls == before, "run %ld: %s, %ld allocations", c,
              lidx_status_name(status), n_calls - before);
        scenario_free(&s);
    }
    lidx_destroy(context);
}

int main(void) {
    static const int threads[] = {1, 2, 8, 1024};
    for (int i = 0; i < 4; i++)
        check_faults(threads[i]);
    check_runs(1, 100);
    check_runs(4, 100);
    rendering_release();
    return test_end();
}
