/* SPDX-License-Identifier: Apache-2.0 */
#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"

enum { NAME = 64 };

int parse_integer(const char *text, int64_t low, int64_t high, int64_t *value) {
    char *end;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end || errno || number < low || number > high)
        return 0;
    *value = number;
    return 1;
}

int parse_choice(const char *text, const char *const *choices) {
    for (int i = 0; choices[i]; i++)
        if (strcmp(text, choices[i]) == 0)
            return i;
    return -1;
}

const char *next_item(const char *list, char *item, int size) {
    if (!list || !*list)
        return NULL;
    size_t length = strcspn(list, ",");
    snprintf(item, (size_t)size, "%.*s", (int)length, list);
    return list + length + (list[length] == ',');
}

void join_choices(char *text, size_t size, const char *const *choices) {
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; choices[i] && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%s", i ? " | " : "", choices[i]);
}

static void print_option(const struct option *option) {
    char left[NAME * 2], choices[NAME];
    const char *value = option->value ? option->value : "";
    if (option->kind == OPTION_CHOICE) {
        join_choices(choices, sizeof choices, option->choices);
        value = choices;
    }
    if (option->letter)
        snprintf(left, sizeof left, "-%c, --%s %s", option->letter, option->name, value);
    else
        snprintf(left, sizeof left, "--%s %s", option->name, value);
    if (strlen(left) > 29)
        printf("  %s\n  %-30s%s\n", left, "", option->help);
    else
        printf("  %-30s%s\n", left, option->help);
}

/* "lidx run FILE.safetensors [options]" */
static const char *usage(const struct command *command) {
    static char text[NAME * 2];
    snprintf(text, sizeof text, "lidx %s%s%s [options]", command->name,
             *command->arguments ? " " : "", command->arguments);
    return text;
}

static void print_help(const struct command *command) {
    printf("usage: %s\n\n%s\n\n", usage(command), command->summary);
    for (int t = 0; command->tables[t]; t++)
        for (const struct option *option = command->tables[t]; option->name; option++)
            print_option(option);
    printf("  %-30s%s\n", "-h, --help", "this text");
}

static const struct option *find(const struct command *command, const char *name, size_t length) {
    for (int t = 0; command->tables[t]; t++)
        for (const struct option *option = command->tables[t]; option->name; option++)
            if ((strlen(option->name) == length && memcmp(option->name, name, length) == 0))
                return option;
    return NULL;
}

static const struct option *find_letter(const struct command *command, char letter) {
    for (int t = 0; command->tables[t]; t++)
        for (const struct option *option = command->tables[t]; option->name; option++)
            if (option->letter && option->letter == letter)
                return option;
    return NULL;
}

static int store(const struct option *option, const char *value) {
    char choices[NAME];
    int choice;
    switch (option->kind) {
    case OPTION_FLAG:
        *(int *)option->target = 1;
        return -1;
    case OPTION_TEXT:
        if (!*value)
            return refuse("--%s is empty; it should be %s", option->name, option->value);
        *(const char **)option->target = value;
        return -1;
    case OPTION_INTEGER:
        if (parse_integer(value, option->low, option->high, option->target))
            return -1;
        return refuse("--%s is \"%.40s\"; it should be a whole number from %lld to %lld",
                      option->name, value, (long long)option->low, (long long)option->high);
    case OPTION_CHOICE:
        choice = parse_choice(value, option->choices);
        if (choice >= 0) {
            *(int *)option->target = choice;
            return -1;
        }
        join_choices(choices, sizeof choices, option->choices);
        return refuse("--%s is \"%.40s\"; it should be %s", option->name, value, choices);
    }
    return -1;
}

/* argv[*i] begins with '-'. Takes its value from behind '=' or from the next argument. */
static int parse_option(const struct command *command, int argc, char **argv, int *i) {
    const char *argument = argv[*i], *value = NULL;
    const struct option *option;
    if (argument[1] == '-') {
        size_t length = strcspn(argument + 2, "=");
        option = find(command, argument + 2, length);
        value = argument[2 + length] ? argument + 3 + length : NULL;
    } else {
        option = find_letter(command, argument[1]);
        value = argument[1] && argument[2] ? argument + 2 : NULL;
    }
    if (!option)
        return refuse("there is no option \"%.60s\"; `lidx %s --help` lists them", argument,
                      command->name);
    if (option->kind == OPTION_FLAG) {
        if (value)
            return refuse("--%s is given a value; it should stand alone", option->name);
        return store(option, NULL);
    }
    if (!value) {
        if (*i + 1 >= argc)
            return refuse("--%s stands last; a value should follow it", option->name);
        value = argv[++*i];
    }
    return store(option, value);
}

static int is_help(const char *argument) {
    return strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0;
}

int options_parse(const struct command *command, int argc, char **argv,
                  const char *positional[MAX_POSITIONAL]) {
    int n_positional = 0, only_positional = 0;
    for (int i = 0; i < MAX_POSITIONAL; i++)
        positional[i] = NULL;
    for (int i = 0; i < argc; i++) {
        if (!only_positional && strcmp(argv[i], "--") == 0) {
            only_positional = 1;
        } else if (!only_positional && is_help(argv[i])) {
            print_help(command);
            return EXIT_FINE;
        } else if (!only_positional && argv[i][0] == '-') {
            int status = parse_option(command, argc, argv, &i);
            if (status >= 0)
                return status;
        } else if (n_positional == command->max_positional) {
            return refuse("\"%.60s\" is one argument too many; usage: %s", argv[i], usage(command));
        } else {
            positional[n_positional++] = argv[i];
        }
    }
    if (n_positional < command->min_positional)
        return refuse("the file is missing; usage: %s", usage(command));
    return -1;
}
