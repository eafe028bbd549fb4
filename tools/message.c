/* SPDX-License-Identifier: Apache-2.0 */
#include "message.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

static const char *command = "";
static int progress_shown;

void message_command(const char *name) {
    command = name;
}

static void print_clean(const char *text) {
    for (; *text; text++)
        fputc(iscntrl((unsigned char)*text) ? '?' : *text, stderr);
}

int refuse(const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    progress_end();
    fflush(stdout);
    fprintf(stderr, "lidx%s%s: ", *command ? " " : "", command);
    print_clean(text);
    fputc('\n', stderr);
    return EXIT_TROUBLE;
}

void progress(const char *format, ...) {
    if (!isatty(STDERR_FILENO))
        return;
    va_list arguments;
    va_start(arguments, format);
    fputs("\r\033[K", stderr);
    vfprintf(stderr, format, arguments);
    fflush(stderr);
    va_end(arguments);
    progress_shown = 1;
}

void progress_end(void) {
    if (!progress_shown)
        return;
    fputs("\r\033[K", stderr);
    fflush(stderr);
    progress_shown = 0;
}
