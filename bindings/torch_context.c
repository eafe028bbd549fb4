/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* pthread_atfork */
#include "torch_context.h"

#include <pthread.h>

#include "torch_lookup.h"

struct thread_context {
    struct lidx_context *context;
    uint32_t n_threads;
    unsigned generation;
};

static pthread_key_t context_key;
static pthread_once_t context_once = PTHREAD_ONCE_INIT;
static unsigned fork_generation; /* forks that lie between the first process and this one */
static _Thread_local struct thread_context own;

static void free_context(void *memory) {
    struct thread_context *t = memory;
    /* What a parent process made is left alone: a device's part of it is not ours to free. */
    if (t->generation == fork_generation)
        lidx_destroy(t->context);
    t->context = NULL;
}

static void count_fork(void) {
    fork_generation++;
}

static void prepare_contexts(void) {
    pthread_key_create(&context_key, free_context);
}

/* From the beginning: torch, too, has OpenMP's threads, before it first calls the operator. */
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, count_fork);
}

struct lidx_context *torch_context(void) {
    uint32_t n_threads = 1;
    if (fork_generation == 0)
        torch.get_num_threads(&n_threads);
    if (n_threads > LIDX_MAX_THREADS)
        n_threads = LIDX_MAX_THREADS;
    if (own.context && own.n_threads == n_threads && own.generation == fork_generation)
        return own.context;

    struct lidx_options options = LIDX_OPTIONS_INIT;
    struct lidx_context *context;
    options.n_threads = (int32_t)n_threads;
    if (lidx_create(&context, &options))
        return NULL;
    pthread_once(&context_once, prepare_contexts);
    if (own.context)
        free_context(&own);
    own = (struct thread_context){context, n_threads, fork_generation};
    pthread_setspecific(context_key, &own);
    return context;
}
