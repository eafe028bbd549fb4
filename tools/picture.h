/* SPDX-License-Identifier: Apache-2.0
 *
 * Which positions a query token chose, as one line of a terminal: each character is a stretch of
 * the context, and its height the share of it that was chosen, rounded to eighths.
 */
#ifndef LIDX_PICTURE_H
#define LIDX_PICTURE_H

#include <stdint.h>

enum { PICTURE_WIDTH = 160 };

struct picture {
    int width;      /* characters */
    int ascii;      /* no block characters */
    int64_t n_keys; /* of the context */
};

/* As wide as the terminal leaves beside `margin` characters; blocks where the locale has UTF-8. */
void picture_init(struct picture *picture, int64_t n_keys, int margin, int ascii);

/* A mark above its position, such as 'A': fills `line`, of PICTURE_WIDTH + 1 characters, which
 * begins as an empty string. */
void picture_mark(const struct picture *picture, char *line, int64_t position, char mark);

/* Prints the chosen positions, without a newline. Those below 0 or from n_keys on are left out. */
void picture_print(const struct picture *picture, const int32_t *positions, int64_t n);

#endif
