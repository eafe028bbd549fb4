/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU backend: OpenMP threads take the plan's blocks, score and select each with one kernel,
 * and write its rows. A thread that finds no block left joins those that others are at: cores
 * differ in speed and come late. All memory is allocated with the context.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

#include "../backend.h"
#include "../error.h"
#include "answer.h"
#include "environment.h"
#include "features.h"
#include "kernels.h"
#include "split.h"

enum {
    ROW_BYTES = 3 << 19,  /* of a worker, for packed queries and candidates: 1.5 MiB */
    SLOT_BYTES = 9 << 18, /* of a worker, for what it brings to blocks of many: 2.25 MiB */
    WORKER_BYTES = ROW_BYTES + SLOT_BYTES + SCORE_BYTES,
    SPLITS_PER_WORKER = 64, /* cut blocks; each has at least two pieces and so two slots */
    SLOTS_PER_WORKER = 2 * SPLITS_PER_WORKER,
    MOST_KEYS_PER_US = 100,
};

struct cpu {
    const struct kernel *kernel;
    unsigned char *memory; /* n_workers x ROW_BYTES, then the slots, then the scores */
    struct split *splits;
    struct plan_block *cut;
    int n_workers;
};

static size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

static int count_workers(int asked) {
#ifdef _OPENMP
    int n = asked ? asked : omp_get_max_threads();
    return n < LIDX_MAX_THREADS ? n : LIDX_MAX_THREADS;
#else
    (void)asked;
    return 1;
#endif
}

static void cpu_destroy(void *state) {
    struct cpu *cpu = state;
    free(cpu->memory);
    free(cpu->splits);
    free(cpu->cut);
    free(cpu);
}

static int cpu_create(void **state, const struct lidx_options *options) {
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for the CPU's part of a context");
    cpu->n_workers = count_workers(options->n_threads);
    const struct kernel *forced = options->kernel ? lidx_kernel_choose(options->kernel) : NULL;
    cpu->kernel = forced ? forced : lidx_kernel_choose(NULL);
    size_t bytes = (size_t)cpu->n_workers * WORKER_BYTES;
    cpu->memory = aligned_alloc(4096, bytes);
    size_t splits = (size_t)cpu->n_workers * SPLITS_PER_WORKER;
    cpu->splits = aligned_alloc(_Alignof(struct split), splits * sizeof *cpu->splits);
    cpu->cut = calloc(splits, sizeof *cpu->cut);
    if (!cpu->memory || !cpu->splits || !cpu->cut) {
        int n = cpu->n_workers;
        cpu_destroy(cpu);
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for %d threads of %d bytes", n, WORKER_BYTES);
    }
    *state = cpu;
    return LIDX_OK;
}

static int cpu_workspace_size(void *state, const struct problem *p, int32_t device_id,
                              size_t *bytes) {
    (void)state;
    (void)p;
    (void)device_id;
    *bytes = 0;
    return LIDX_OK;
}

static void work_at(struct worker *w, const struct plan_block *block, int sharers) {
    if (block->n_pieces > 1) {
        lidx_split_share(w, &w->run->plan.cut[block->split], sharers);
    } else {
        lidx_worker_load(w, block);
        lidx_worker_score(w, block, 0, block->n_keys);
        lidx_worker_finish(w, block);
    }
}

/* Takes blocks that nobody has begun. */
static void take_blocks(struct worker *w) {
    struct run *run = w->run;
    const struct plan *plan = &run->plan;
    const int64_t n = plan->blocks_at_once;
    struct plan_cursor cursor;
    struct plan_block block;
    int sharers = run->n_workers / (int)(plan->n_splits ? plan->n_splits : 1);
    int64_t begin;
    if (plan->n_blocks == 1 && plan->n_splits == 1)
        return; /* all of it is help, and no thread need be the first */
    lidx_plan_start(&cursor, plan);
    while ((begin = atomic_fetch_add_explicit(&run->next_block, n, memory_order_relaxed)) <
           plan->n_blocks) {
        for (int64_t i = begin; i < begin + n && i < plan->n_blocks; i++) {
            lidx_plan_seek(&cursor, i, &block);
            work_at(w, &block, sharers ? sharers : 1);
        }
    }
}

/* What one thread does. The caller's rounding mode and flush-to-zero bits hold for its own thread
 * only, so every thread works in the default environment: bits must not depend on who works. */
static void work(struct run *run, int index, int n_threads) {
    struct worker w;
    const struct kernel *kernel = run->kernel;
    const struct float_environment callers = lidx_enter_default_environment();
    lidx_worker_start(&w, run, index);
    if (kernel->enter)
        kernel->enter();
    take_blocks(&w);
    lidx_split_help(&w);
    if (kernel->leave)
        kernel->leave();
    lidx_leave_default_environment(&callers);
    for (int64_t b = index; b < run->p->n_batch; b += n_threads)
        lidx_write_empty_rows(run->p, b);
    if (index == 0)
        lidx_write_rows_past_end(run->p);
}

/* Where tokens are few each is a block of its own, whose answer needs no bringing together, unless
 * the kernel gains more by their sharing keys; one thread has nothing to bring together. */
static int rows_wanted(const struct cpu *cpu, int dtype) {
    const struct kernel *kernel = cpu->kernel;
    int is_pair_free = kernel->score_two[dtype] && cpu->n_workers == 1;
    return kernel->shares_keys[dtype] || is_pair_free ? 4 : 1;
}

/* How many keys a thread scores in a microsecond, about; where heads are few the rest counts. */
static int keys_per_us(const struct kernel *kernel, const struct problem *p) {
    const int products_per_ns = kernel->products_per_ns ? kernel->products_per_ns : 100;
    const int keys = products_per_ns * 1000 / (p->n_heads * p->head_dim);
    return keys < 1 ? 1 : keys < MOST_KEYS_PER_US ? keys : MOST_KEYS_PER_US;
}

static void prepare_run(struct run *run, const struct cpu *cpu, const struct problem *p) {
    size_t n_workers = (size_t)cpu->n_workers;
    run->p = p;
    run->kernel = cpu->kernel;
    run->path = &cpu->kernel->path[p->dtype];
    run->loops = cpu->kernel->topk ? cpu->kernel->topk : &lidx_topk_portable;
    run->n_workers = cpu->n_workers;
    run->memory = cpu->memory;
    run->row_bytes = ROW_BYTES;
    run->packed_bytes = round_up(run->path->packed_size(p->n_heads, p->head_dim), 64);
    run->entry_bytes = round_up(sizeof(uint64_t) * (size_t)lidx_topk_capacity(p->top_k), 64);
    run->splits = cpu->splits;
    run->slots = cpu->memory + n_workers * ROW_BYTES;
    run->scores = run->slots + n_workers * SLOT_BYTES;
    run->slot_bytes = lidx_slot_bytes(p->top_k);
    atomic_init(&run->next_block, 0);
    size_t rows = ROW_BYTES / (run->packed_bytes + run->entry_bytes);
    size_t slots = n_workers * SLOT_BYTES / run->slot_bytes, most = n_workers * SLOTS_PER_WORKER;
    const struct plan_limits limits = {cpu->n_workers, rows < PLAN_ROWS ? (int)rows : PLAN_ROWS,
                                       (int64_t)(slots < most ? slots : most),
                                       rows_wanted(cpu, p->dtype), keys_per_us(cpu->kernel, p)};
    lidx_plan_build(&run->plan, p, &limits, cpu->cut);
    memset(cpu->splits, 0, sizeof *cpu->splits * (size_t)run->plan.n_splits);
}

#ifdef _OPENMP
/* OpenMP's threads do not survive a fork, and a child that asks GNU's runtime for them waits for
 * ever: the child of a process that has had a team works on one thread. */
static atomic_int has_had_team, works_alone;

static void remember_team(void) {
    if (atomic_load(&has_had_team))
        atomic_store(&works_alone, 1);
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, remember_team);
}

/* Always the whole team, even for fewer items: OpenMP runtimes end and restart threads when the
 * size of a team changes from call to call. */
static void work_in_team(struct run *run, int n_threads) {
    if (atomic_load_explicit(&works_alone, memory_order_relaxed)) {
        work(run, 0, 1);
        return;
    }
    atomic_store_explicit(&has_had_team, 1, memory_order_relaxed);
#pragma omp parallel num_threads(n_threads)
    work(run, omp_get_thread_num(), omp_get_num_threads());
}
#else
static void work_in_team(struct run *run, int n_threads) {
    (void)n_threads;
    work(run, 0, 1);
}
#endif

static int cpu_run(void *state, const struct problem *p, const struct run_resources *resources) {
    struct cpu *cpu = state;
    struct run run;
    (void)resources;
    if (p->n_query == 0)
        return LIDX_OK;
    prepare_run(&run, cpu, p);
    if (run.plan.n_workers == 1)
        work(&run, 0, 1);
    else
        work_in_team(&run, cpu->n_workers);
    return LIDX_OK;
}

static int cpu_kernel_count(void) {
    int count = 0;
    while (lidx_kernels[count])
        count++;
    return count;
}

static void cpu_kernel_info(int index, struct lidx_kernel_info *info) {
    const struct kernel *kernel = lidx_kernels[index];
    int chosen = kernel == lidx_kernel_choose(NULL);
    info->name = kernel->name;
    info->available = lidx_kernel_usable(kernel);
    info->chosen_bf16 = info->chosen_fp16 = chosen;
    info->reason = lidx_kernel_reason(kernel);
}

const char *lidx_cpu_features(void) {
    return lidx_features_names();
}

const struct backend lidx_backend_cpu = {
    .name = "cpu",
    .device_type = LIDX_CPU,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .workspace_size = cpu_workspace_size,
    .run = cpu_run,
    .kernel_count = cpu_kernel_count,
    .kernel_info = cpu_kernel_info,
};
