/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "speed.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "message.h"
#include "numbers.h"
#include "peak.h"

enum { ROUNDS = 64, CALLS = 4096 };

/* One round's calls; the median of their times. */
static int time_calls(struct lidx_context *context, const struct lidx_args *args, double budget,
                      struct speed *speed, double *middle) {
    double seconds[CALLS], begin = now();
    int n = 0;
    do {
        double start = now();
        if (lidx_run(context, args))
            return refuse("%s", lidx_last_error());
        seconds[n] = now() - start;
        if (speed->best == 0 || seconds[n] < speed->best)
            speed->best = seconds[n];
        n++;
    } while (n < CALLS && now() - begin < budget);
    speed->calls += n;
    *middle = median(seconds, n);
    return EXIT_FINE;
}

static double larger(double a, double b) {
    return a > b ? a : b;
}

int speed_measure(struct lidx_context *context, const struct lidx_args *args, const char *kernel,
                  int n_threads, double flop, const struct speed_effort *effort,
                  struct speed *speed) {
    int type = args->query->dtype.code, n = effort->rounds < ROUNDS ? effort->rounds : ROUNDS;
    double seconds[ROUNDS], budget = effort->peak_seconds;
    /* A slow kernel's long calls end the rounds early, but not before the third. */
    double end = now() + 4 * n * (effort->round_seconds + 2 * budget);
    *speed = (struct speed){0};
    double one = peak_flops_threads(kernel, type, budget, 1);
    double peak = peak_flops_threads(kernel, type, budget, n_threads), highest = peak;
    speed->peak_before = peak;
    int r = 0;
    for (; r < n && (r < 3 || now() < end); r++) {
        if (time_calls(context, args, effort->round_seconds, speed, &seconds[r]))
            return EXIT_TROUBLE;
        one = larger(one, peak_flops_threads(kernel, type, budget, 1));
        peak = peak_flops_threads(kernel, type, budget, n_threads);
        highest = larger(highest, peak);
    }
    speed->peak_after = peak;
    speed->seconds = median(seconds, r);
    if (highest > 0) {
        speed->fraction = flop / speed->seconds / highest;
        speed->best_fraction = flop / speed->best / highest;
        speed->fraction_one = flop / speed->seconds / (one * n_threads);
    }
    return EXIT_FINE;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* A line of /proc/self/status in bytes, such as "VmHWM:"; -1 if there is none. */
static double status_line(const char *name) {
    char line[128];
    double kib = -1;
    FILE *file = fopen("/proc/self/status", "r");
    if (!file)
        return -1;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0)
            sscanf(line + strlen(name), "%lf", &kib);
    fclose(file);
    return kib < 0 ? -1 : kib * 1024;
}

/* Bytes that malloc has handed out, whether touched or not; -1 where the C library does not say. */
static double heap_bytes(void) {
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)
    struct mallinfo2 info = mallinfo2();
    return (double)info.uordblks + (double)info.hblkhd;
#else
    return -1;
#endif
}

struct memory memory_mark(void) {
    struct memory mark = {heap_bytes(), -1};
    int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t written = write(fd, "5", 1); /* the high-water mark starts again from here */
        close(fd);
        if (written == 1)
            mark.resident = status_line("VmRSS:");
    }
    return mark;
}

double memory_growth(struct memory mark) {
    double high = status_line("VmHWM:"), growth = -1;
    if (mark.heap >= 0)
        growth = larger(heap_bytes() - mark.heap, 0);
    if (mark.resident >= 0 && high >= 0)
        growth = larger(growth, high - mark.resident);
    return growth;
}
