/* SPDX-License-Identifier: Apache-2.0
 *
 * What a process may do around the library: set its threads' floating-point environment, use
 * several contexts at once, hand a context from thread to thread, call from a thread with a small
 * stack, fork. None of it changes an answer, and nothing of it is changed by a run.
 *
 *     test_process [threads]      all, or what ThreadSanitizer can follow
 */
#include "scenario.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

#include "answers.h"
#include "contexts.h"

enum { TEAMS = 4, SIDE_BY_SIDE = 6, SMALL_STACK = 64 << 10 };

static const int team_sizes[TEAMS] = {1, 2, 3, 8};

/* A random problem in whole batches, with float32 values. */
struct subject {
    struct scenario s;
    struct form f;
    struct rendering r;
};

static void subject_make(struct subject *t, uint64_t seed, double work) {
    struct rng rng = rng_seed(seed);
    memset(t, 0, sizeof *t);
    scenario_make(&t->s, &rng, work);
    form_whole(&t->f, &t->s);
    form_random_layout(&t->f, &rng);
    t->f.values = 1;
    rendering_make(&t->r, &t->s, &t->f, &rng);
}

/* ---- the floating-point environment ---------------------------------------------------------- */

#if defined(__SSE2__)
#include <xmmintrin.h>
/* Flush to zero and denormals are zero; all exceptions trap. */
enum { FLUSH = 0x8040, MASKS = 0x1F80 };
static void set_flags(int on) {
    _mm_setcsr(on ? (_mm_getcsr() | FLUSH) & ~(unsigned)MASKS : (_mm_getcsr() & ~FLUSH) | MASKS);
}
static int flags_are_set(void) {
    return (_mm_getcsr() & (FLUSH | MASKS)) == FLUSH;
}
#else
static void set_flags(int on) {
    (void)on;
}
static int flags_are_set(void) {
    return 1;
}
#endif

/* The caller's rounding mode, flush-to-zero bits and traps are its own affair: they neither reach
 * the scores nor change through a run. OpenMP's threads inherit them when they start, so each run
 * has a team of its own that starts under them. */
static void check_environment(int number, const char *kernel) {
    static const int modes[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    int mode = modes[number % 3], size = team_sizes[number % TEAMS];
    struct subject t;
    struct answers answers;
    subject_make(&t, (uint64_t)number + 77, 2e5);
    answers_make(&answers, &t.s);
    struct lidx_context *plain = make_context(kernel, 1), *team = make_context(kernel, size);
    rendering_poison(&t.r);
    CHECK_INT(lidx_run(plain, &t.r.args), LIDX_OK, "run");
    answers_keep(&answers, &t.s, &t.r, &t.f);
    rendering_poison(&t.r);
    feclearexcept(FE_ALL_EXCEPT);
    fesetround(mode);
    set_flags(1);
    int status = lidx_run(team, &t.r.args);
    int kept = fegetround() == mode && flags_are_set() && !fetestexcept(FE_ALL_EXCEPT);
    set_flags(0);
    fesetround(FE_TONEAREST);
    CHECK_INT(status, LIDX_OK, "run in another environment");
    CHECK(kept, "%s with %d threads changed the caller's floating-point environment", kernel, size);
    answers_check(&answers, &t.s, &t.r, &t.f, "%s with %d threads in another environment (%s)",
                  kernel, size, data_kind_name[t.s.kind]);
    lidx_destroy(plain);
    lidx_destroy(team);
    answers_free(&answers, &t.s);
    scenario_free(&t.s);
}

/* ---- threads --------------------------------------------------------------------------------- */

/* The subject's inputs with outputs of this thread's own. */
struct job {
    struct lidx_args args;
    struct lidx_tensor indices, values;
    struct lidx_context *context; /* or NULL: one of its own */
    const char *kernel;
    int n_threads, n_runs, status;
};

/* Of one of the subject's tensors. */
static size_t bytes_of(const struct subject *t, const struct lidx_tensor *tensor) {
    return t->r.bytes[tensor - t->r.tensor];
}

static const void *data_of(const struct subject *t, const struct lidx_tensor *tensor) {
    return t->r.data[tensor - t->r.tensor];
}

static struct lidx_tensor own_output(const struct subject *t, const struct lidx_tensor *tensor) {
    struct lidx_tensor own = *tensor;
    own.byte_offset = 0;
    own.data = malloc(bytes_of(t, tensor) + 1);
    memset(own.data, 0xA5, bytes_of(t, tensor));
    return own;
}

static void job_make(struct job *job, const struct subject *t, const char *kernel, int n_threads) {
    memset(job, 0, sizeof *job);
    job->args = t->r.args;
    job->indices = own_output(t, t->r.args.sparse_indices);
    job->values = own_output(t, t->r.args.sparse_values);
    job->args.sparse_indices = &job->indices;
    job->args.sparse_values = &job->values;
    job->kernel = kernel;
    job->n_threads = n_threads;
    job->n_runs = 1;
}

static void job_free(struct job *job) {
    free(job->indices.data);
    free(job->values.data);
}

static void *job_run(void *argument) {
    struct job *job = argument;
    struct lidx_context *context =
        job->context ? job->context : make_context(job->kernel, job->n_threads);
    for (int i = 0; i < job->n_runs && !job->status; i++)
        job->status = lidx_run(context, &job->args);
    if (!job->context)
        lidx_destroy(context);
    return NULL;
}

static int same_output(const struct subject *t, const struct lidx_tensor *shared,
                       const struct lidx_tensor *own) {
    return memcmp(own->data, data_of(t, shared), bytes_of(t, shared)) == 0;
}

/* Whether a job has what a plain run wrote into the subject. */
static int job_agrees(const struct job *job, const struct subject *t) {
    return job->status == LIDX_OK && same_output(t, t->r.args.sparse_indices, &job->indices) &&
           same_output(t, t->r.args.sparse_values, &job->values);
}

static void start(pthread_t *thread, const pthread_attr_t *attributes, struct job *job) {
    CHECK_INT(pthread_create(thread, attributes, job_run, job), 0, "a thread");
}

/* Contexts are independent: made and used at once by several threads, each with a team. */
static void check_side_by_side(const struct subject *t, const char *kernel) {
    struct job job[SIDE_BY_SIDE];
    pthread_t thread[SIDE_BY_SIDE];
    for (int i = 0; i < SIDE_BY_SIDE; i++) {
        job_make(&job[i], t, kernel, 1 + i % 3);
        job[i].n_runs = 3;
        start(&thread[i], NULL, &job[i]);
    }
    for (int i = 0; i < SIDE_BY_SIDE; i++) {
        pthread_join(thread[i], NULL);
        CHECK(job_agrees(&job[i], t), "%s: thread %d of %d answers otherwise", kernel, i,
              SIDE_BY_SIDE);
        job_free(&job[i]);
    }
}

/* One thread at a time may use a context, and it need not be the one that made it. */
static void check_handed_on(const struct subject *t, const char *kernel) {
    struct lidx_context *context = make_context(kernel, 2);
    for (int i = 0; i < 3; i++) {
        struct job job;
        pthread_t thread;
        job_make(&job, t, kernel, 0);
        job.context = context;
        start(&thread, NULL, &job);
        pthread_join(thread, NULL);
        CHECK(job_agrees(&job, t), "%s: a context in another thread answers otherwise", kernel);
        job_free(&job);
    }
    lidx_destroy(context);
}

#if !defined(__SANITIZE_ADDRESS__) && defined(__OPTIMIZE__)
static void check_small_stack(const struct subject *t, const char *kernel) {
    struct job job;
    pthread_attr_t attributes;
    pthread_t thread;
    job_make(&job, t, kernel, 1);
    pthread_attr_init(&attributes);
    long least = sysconf(_SC_THREAD_STACK_MIN);
    size_t size = least > SMALL_STACK ? (size_t)least : SMALL_STACK;
    CHECK_INT(pthread_attr_setstacksize(&attributes, size), 0, "a small stack");
    start(&thread, &attributes, &job);
    pthread_join(thread, NULL);
    CHECK(job_agrees(&job, t), "%s on a small stack answers otherwise", kernel);
    pthread_attr_destroy(&attributes);
    job_free(&job);
}
#endif

/* ---- fork ------------------------------------------------------------------------------------ */

/* OpenMP's threads stay behind in the parent; a child that waits for them waits for ever. */
static void check_fork(const struct subject *t, const char *kernel) {
    struct lidx_context *context = make_context(kernel, 3);
    struct job before;
    job_make(&before, t, kernel, 3);
    before.context = context;
    job_run(&before);
    for (int use_new = 0; use_new < 2; use_new++) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            struct job job;
            alarm(20);
            job_make(&job, t, kernel, 3);
            job.context = use_new ? NULL : context;
            job_run(&job);
            _exit(job_agrees(&job, t) ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        CHECK(status == 0, "%s, forked child with %s context: %s %d", kernel,
              use_new ? "a new" : "its parent's",
              WIFSIGNALED(status) ? "ended by signal" : "exit status",
              WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    lidx_destroy(context);
    CHECK(job_agrees(&before, t), "%s: the parent's answer", kernel);
    job_free(&before);
}

/* Rows enough for every worker, and a batch that is cut into pieces. */
static void make_subject(struct subject *t) {
    struct rng rng = rng_seed(12);
    memset(t, 0, sizeof *t);
    t->s = (struct scenario){.is_bf16 = 1,
                             .n_heads = 4,
                             .head_dim = 64,
                             .top_k = 300,
                             .mode = LIDX_MODE_CAUSAL,
                             .n_batch = 3,
                             .kind = DATA_NORMAL,
                             .n_query = {1, 9, 2},
                             .n_key = {9000, 700, 0}};
    scenario_fill(&t->s, &rng);
    form_whole(&t->f, &t->s);
    t->f.layout_query = LIDX_TND;
    t->f.layout_key = LIDX_PA_BSND;
    t->f.page_size = 64;
    t->f.values = 1;
    rendering_make(&t->r, &t->s, &t->f, &rng);
}

int main(int argc, char **argv) {
    int threads_only = argc > 1 && strcmp(argv[1], "threads") == 0;
    const char *cases = getenv("LIDX_TEST_CASES");
    char names[MAX_KERNELS][KERNEL_NAME];
    int environments = cases ? 12 : 48;
    struct subject t;
    int n_kernels = find_kernels("cpu", NULL, names);
    CHECK(n_kernels > 0, "no kernel to test");
    for (int i = 0; i < n_kernels; i++)
        for (int number = 0; number < environments && !threads_only; number++)
            check_environment(number, names[i]);
    make_subject(&t);
    for (int i = 0; i < n_kernels; i++) {
        struct lidx_context *plain = make_context(names[i], 1);
        rendering_poison(&t.r);
        CHECK_INT(lidx_run(plain, &t.r.args), LIDX_OK, "run");
        lidx_destroy(plain);
        check_side_by_side(&t, names[i]);
        check_handed_on(&t, names[i]);
        if (threads_only)
            continue;
#if !defined(__SANITIZE_ADDRESS__) && defined(__OPTIMIZE__)
        check_small_stack(&t, names[i]);
#endif
        check_fork(&t, names[i]);
    }
    scenario_free(&t.s);
    rendering_release();
    return test_end();
}
