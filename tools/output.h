/* SPDX-License-Identifier: Apache-2.0
 *
 * A file that appears whole or not at all: bytes go to a temporary file in the same directory,
 * which replaces the target when all of them are on disk. A full disk, a limit or a signal leaves
 * the old file as it was and removes the temporary one. A target that is no regular file (a pipe,
 * a device) is written directly.
 */
#ifndef LIDX_OUTPUT_H
#define LIDX_OUTPUT_H

#include <stddef.h>

enum { OUTPUT_PATH = 4096 };

struct output {
    int fd;
    int direct; /* writing to the target itself */
    char target[OUTPUT_PATH];
    char temporary[OUTPUT_PATH];
    const char *name; /* as the user called it */
};

/* To be called once: SIGINT, SIGTERM and SIGHUP remove an unfinished file before they end the
 * process, a failed write is an error and not a signal, and so is an input that shrinks while it
 * is mapped. */
void output_handle_signals(void);

/* Files, and after them their directory, that are to go when output_remove_scratch() is called or
 * such a signal comes. At most SCRATCH_PATHS. */
enum { SCRATCH_PATHS = 3 };
void output_add_scratch(const char *path);
void output_remove_scratch(void);

/* Each returns EXIT_FINE or, after a sentence, EXIT_TROUBLE; after that only output_abandon(). */
int output_open(struct output *output, const char *path);
int output_put(struct output *output, const void *bytes, size_t size);
int output_commit(struct output *output);
void output_abandon(struct output *output);

#endif
