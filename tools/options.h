/* SPDX-License-Identifier: Apache-2.0
 *
 * Command line options as tables: one parser and one --help for every command.
 */
#ifndef LIDX_OPTIONS_H
#define LIDX_OPTIONS_H

#include <stddef.h>
#include <stdint.h>

enum option_kind {
    OPTION_FLAG,    /* int, becomes 1 */
    OPTION_INTEGER, /* int64_t in low..high */
    OPTION_TEXT,    /* const char * */
    OPTION_CHOICE   /* int, the index in `choices` */
};

struct option {
    const char *name; /* "sparse-count"; NULL ends a table */
    char letter;      /* 'o', or 0 */
    enum option_kind kind;
    void *target;
    int64_t low, high;
    const char *const *choices; /* ended by NULL */
    const char *value;          /* what --help calls the value */
    const char *help;
};

struct command {
    const char *name;
    const char *arguments; /* "FILE.safetensors" */
    const char *summary;
    int min_positional, max_positional;
    const struct option *tables[4]; /* ended by NULL */
};

enum { MAX_POSITIONAL = 2 };

/* Fills targets and `positional` (NULL where not given). Returns -1 to go on, or the exit status:
 * EXIT_FINE after --help, EXIT_TROUBLE after a sentence. */
int options_parse(const struct command *command, int argc, char **argv,
                  const char *positional[MAX_POSITIONAL]);

/* The whole of `text` as a number in low..high, else 0. */
int parse_integer(const char *text, int64_t low, int64_t high, int64_t *value);

/* The index of `text` in `choices`, or -1. */
int parse_choice(const char *text, const char *const *choices);

/* "BSND | TND", as --help and refusals have it. */
void join_choices(char *text, size_t size, const char *const *choices);

/* Copies the next item of a comma-separated list, cut to `size`; returns where the rest begins, or
 * NULL when there was none left. */
const char *next_item(const char *list, char *item, int size);

#endif
