/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the CUDA backend share: its kernels, one context each; device memory; runs from
 * scenarios. Options of all of them:
 *
 *     [--kernel NAME] [--cases N] [--first N] [--quick] [--exact] [--sanitizer]
 *
 * --exact gives every buffer an allocation of its own, so that a memory checker sees its bounds;
 * --quick leaves out most cases, --sanitizer more. A failure names its case; `--first CASE
 * --cases 1` runs it alone. Without a GPU the tests end with status 77: skipped.
 */
#ifndef LIDX_CUDA_DEVICE_H
#define LIDX_CUDA_DEVICE_H

#include "scenario.h"

#include "contexts.h"

#include <cuda_runtime_api.h>

enum { TEXT = 400, WORKSPACE_ROOM = 256 << 20 };

struct kernel {
    const char *name;
    struct lidx_context *context;
    long runs;
    long refused; /* problems that a forced kernel does not take */
};

struct device_options {
    int exact, quick, sanitizer;
    long first, cases; /* cases -1: the usual number */
};

extern struct kernel kernels[MAX_KERNELS];
extern int n_kernels;
extern struct device_options options;

/* Reads the options and finds the kernels; 0 where there is no GPU, which it says. */
int device_open(int argc, char **argv);
/* Says what each kernel did; 0 if one took nothing. */
int device_close(void);

/* Ends the test when a CUDA call fails: a context that has faulted answers nothing any more. */
void must(cudaError_t code, const char *what, const char *file, int line);
#define MUST(call) must((call), #call, __FILE__, __LINE__)

/* Device memory until forget(). `offset` bytes into a 256-byte line. */
unsigned char *give(size_t size, size_t offset);
void forget(void);
void copy_in(void *to, const void *from, size_t size);
void copy_out(void *to, const void *from, size_t size);

/* Enqueues a run with `workspace`, or the shared one when NULL, of exactly the wanted size. */
int enqueue(struct kernel *kernel, struct lidx_args *args, void *workspace, cudaStream_t stream);

/* Runs to the end, with a poisoned workspace. False is a forced kernel's refusal of the problem;
 * any other failure, and a byte written behind the workspace, ends the test. */
int run_device(struct kernel *kernel, struct lidx_args *args);

/* Runs on the device what a rendering has in the host's memory. False as run_device. */
int run_rendering(struct kernel *kernel, struct rendering *r, struct rng *rng);

/* Prints the counts so far. */
#define SAY(section)                                                                               \
    printf("%-8s %ld passed, %ld failed\n", (section), test_passed, test_failed), fflush(stdout)

#endif
