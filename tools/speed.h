/* SPDX-License-Identifier: Apache-2.0
 *
 * How fast a call is, beside what the machine can do in the same seconds. Peak and calls alternate
 * in short rounds. The peak that counts is the highest of the rounds, since one that is measured
 * while other work has the core would flatter the calls.
 */
#ifndef LIDX_SPEED_H
#define LIDX_SPEED_H

#include "lightning_indexer.h"

struct speed {
    double seconds;       /* of one call: the median over rounds of a round's median */
    double best;          /* the fastest call */
    double peak_before;   /* flop/s of all threads at once, before the first call ... */
    double peak_after;    /* ... and after the last; 0 where the kernel has no peak loop */
    double fraction;      /* the median against the highest peak */
    double best_fraction; /* the fastest call against it */
    double fraction_one;  /* the median against n_threads times the highest peak of one core */
    int calls;
};

struct speed_effort {
    int rounds;           /* at most; three, if calls are long for their round */
    double round_seconds; /* of calls in a round; at least one call is made */
    double peak_seconds;  /* of each peak measurement */
};

/* Times lidx_run(context, args), of which the caller has made one call before and which does `flop`
 * operations with the named kernel. Returns EXIT_FINE or, after a sentence, EXIT_TROUBLE. */
int speed_measure(struct lidx_context *context, const struct lidx_args *args, const char *kernel,
                  int n_threads, double flop, const struct speed_effort *effort,
                  struct speed *speed);

/* What the process uses: begin with memory_mark(), and memory_growth() is by how many bytes its
 * heap has grown since, or its resident memory at its largest, whichever is more. -1 where the
 * system tells neither. */
struct memory {
    double heap, resident; /* -1: unknown */
};
struct memory memory_mark(void);
double memory_growth(struct memory mark);

#endif
