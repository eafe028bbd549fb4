/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* realpath, mkstemp */
#endif

#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "message.h"

/* The temporary file that a signal would have to remove. */
static char pending[OUTPUT_PATH];
static volatile sig_atomic_t is_pending;

/* What else has to go in the end. */
static char scratch[SCRATCH_PATHS][OUTPUT_PATH];
static volatile sig_atomic_t n_scratch;

static void remove_pending(void) {
    if (is_pending)
        unlink(pending);
    is_pending = 0;
}

void output_add_scratch(const char *path) {
    if (n_scratch == SCRATCH_PATHS)
        return;
    snprintf(scratch[n_scratch], sizeof scratch[0], "%s", path);
    n_scratch++;
}

void output_remove_scratch(void) {
    for (int i = 0; i < n_scratch; i++)
        if (unlink(scratch[i]) != 0)
            rmdir(scratch[i]);
    n_scratch = 0;
}

static void end_by_signal(int number) {
    remove_pending();
    output_remove_scratch();
    signal(number, SIG_DFL);
    raise(number);
}

static void input_shrank(int number) {
    static const char text[] = "lidx: a mapped file could not be read: it shrank, or its disk "
                               "failed; it should stay as it is while lidx runs\n";
    (void)number;
    remove_pending();
    output_remove_scratch();
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(EXIT_TROUBLE);
    _exit(EXIT_TROUBLE);
}

void output_handle_signals(void) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = end_by_signal;
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        struct sigaction old;
        if (sigaction(ends[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            sigaction(ends[i], &action, NULL);
    }
    action.sa_handler = input_shrank;
    sigaction(SIGBUS, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);
}

/* What the new file's permissions should be: the old file's, or what the umask leaves. */
static mode_t wanted_mode(const char *target) {
    struct stat old;
    if (stat(target, &old) == 0)
        return old.st_mode & 07777;
    mode_t mask = umask(0);
    umask(mask);
    return 0666 & ~mask;
}

static int failed(const struct output *output, const char *what) {
    return refuse("cannot %s %s: %s%s", what, output->name, strerror(errno),
                  output->direct ? "" : "; nothing was changed there");
}

static int open_temporary(struct output *output) {
    int used = snprintf(output->temporary, sizeof output->temporary, "%s.XXXXXX", output->target);
    if (used >= (int)sizeof output->temporary) {
        errno = ENAMETOOLONG;
        return failed(output, "create");
    }
    /* A signal between the file's creation and its registration would leave it behind. */
    sigset_t all, old;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &old);
    output->fd = mkstemp(output->temporary);
    int error = errno;
    if (output->fd >= 0) {
        memcpy(pending, output->temporary, sizeof pending);
        is_pending = 1;
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
    errno = error;
    return output->fd < 0 ? failed(output, "create") : EXIT_FINE;
}

int output_open(struct output *output, const char *path) {
    struct stat status;
    output->fd = -1;
    output->name = path;
    output->direct = 0;
    output->temporary[0] = 0;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        output->direct = 1;
        output->fd = open(path, O_WRONLY | O_CLOEXEC);
        return output->fd < 0 ? failed(output, "open") : EXIT_FINE;
    }
    /* Behind a symbolic link it is the file that is replaced, not the link. */
    char resolved[OUTPUT_PATH];
    const char *target = realpath(path, resolved) ? resolved : path;
    if (snprintf(output->target, sizeof output->target, "%s", target) >=
        (int)sizeof output->target) {
        errno = ENAMETOOLONG;
        return failed(output, "create");
    }
    return open_temporary(output);
}

int output_put(struct output *output, const void *bytes, size_t size) {
    const char *from = bytes;
    while (size > 0) {
        ssize_t written = write(output->fd, from, size);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return failed(output, "write");
        from += written;
        size -= (size_t)written;
    }
    return EXIT_FINE;
}

/* The rename is on disk only when the directory is. */
static void sync_directory(const char *target) {
    char directory[OUTPUT_PATH];
    snprintf(directory, sizeof directory, "%s", target);
    char *slash = strrchr(directory, '/');
    if (!slash)
        snprintf(directory, sizeof directory, ".");
    else
        slash[slash == directory] = 0;
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    fsync(fd);
    close(fd);
}

int output_commit(struct output *output) {
    int fd = output->fd;
    if (!output->direct && (fchmod(fd, wanted_mode(output->target)) != 0 || fsync(fd) != 0))
        return failed(output, "write");
    output->fd = -1;
    if (close(fd) != 0)
        return failed(output, "write");
    if (output->direct)
        return EXIT_FINE;
    if (rename(output->temporary, output->target) != 0)
        return failed(output, "replace");
    is_pending = 0;
    sync_directory(output->target);
    return EXIT_FINE;
}

void output_abandon(struct output *output) {
    if (output->fd >= 0)
        close(output->fd);
    output->fd = -1;
    if (!output->direct && output->temporary[0])
        remove_pending();
}
