/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* TIOCGWINSZ */
#endif

#include "picture.h"

#include <langinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LEVELS = 9 };

static int terminal_width(void) {
    struct winsize size;
    if (isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        return size.ws_col;
    return 100;
}

void picture_init(struct picture *picture, int64_t n_keys, int margin, int ascii) {
    int width = terminal_width() - margin;
    picture->width = width < 16 ? 16 : width > PICTURE_WIDTH ? PICTURE_WIDTH : width;
    picture->ascii = ascii || strcmp(nl_langinfo(CODESET), "UTF-8") != 0;
    picture->n_keys = n_keys;
}

/* The column of a position; column c begins at position ceil(c * n_keys / width). */
static int column(const struct picture *picture, int64_t position) {
    return (int)(position * picture->width / picture->n_keys);
}

void picture_mark(const struct picture *picture, char *line, int64_t position, char mark) {
    int at = column(picture, position);
    for (int c = (int)strlen(line); c <= at; c++) {
        line[c] = ' ';
        line[c + 1] = 0;
    }
    line[at] = mark;
}

void picture_print(const struct picture *picture, const int32_t *positions, int64_t n) {
    static const char *const blocks[LEVELS] = {" ",      "\u2581", "\u2582", "\u2583", "\u2584",
                                               "\u2585", "\u2586", "\u2587", "\u2588"};
    static const char *const letters[LEVELS] = {" ", ".", ":", "-", "=", "+", "*", "#", "@"};
    int64_t chosen[PICTURE_WIDTH] = {0};
    for (int64_t s = 0; s < n; s++)
        if (positions[s] >= 0 && positions[s] < picture->n_keys)
            chosen[column(picture, positions[s])]++;
    for (int c = 0; c < picture->width; c++) {
        int64_t begin = (c * picture->n_keys + picture->width - 1) / picture->width;
        int64_t end = ((c + 1) * picture->n_keys + picture->width - 1) / picture->width;
        int64_t room = end > begin ? end - begin : 1;
        int64_t level = (chosen[c] * (LEVELS - 1) + room / 2) / room;
        fputs((picture->ascii ? letters : blocks)[level], stdout);
    }
}
