/* SPDX-License-Identifier: Apache-2.0
 *
 * CUDA's runtime and the launchers of this library for test_cuda_host.c: they do nothing, fail when
 * they are told to and note how they were called.
 */
#ifndef LIDX_CUDA_NOTES_H
#define LIDX_CUDA_NOTES_H

#include "../src/cuda/launch.h"

enum { DEVICES = 3, MOST_CALLS = 1 << 15 };
enum launcher { COUNT, PREPARE, SM90, SMXX, TOPK };

/* What the runtime says, and what it was asked. */
struct fake {
    int count, current, accepts;
    int compute[DEVICES], n_sm[DEVICES];
    long n_calls, fail_at; /* of the runtime and of launchers, counted from 0; -1: none fails */
    long n_asked;          /* for attributes */
    int is_error_left;     /* as cudaGetLastError() would tell */
};

/* A launch. */
struct call {
    enum launcher launcher;
    struct slab slab;
    void *stream;
    int device;
};

extern struct fake fake;
extern struct call calls[MOST_CALLS];
extern int n_launched;

/* Device 0 is a Hopper GPU, 1 a newer one and 2 one too old; 0 is current, and nothing was called.
 */
void forget(void);

#endif
