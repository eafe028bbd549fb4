/* SPDX-License-Identifier: Apache-2.0
 *
 * lidx: the lightning indexer from the command line.
 */
#include <errno.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>

#include "commands.h"
#include "lightning_indexer.h"
#include "message.h"
#include "output.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"demo", command_demo, "a 32K-token context from a seed: what is found, how fast, a picture"},
    {"run", command_run, "run the operator on the tensors of a safetensors file"},
    {"check", command_check, "compare a result with a reference in double precision"},
    {"bench", command_bench, "time the operator beside this machine's measured peak"},
    {"info", command_info, "version, CPU features, kernels and which of them is chosen"},
};

enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_help(void) {
    printf("usage: lidx COMMAND [options]\n\n"
           "For each query token, the positions of the k keys with the best score\n"
           "sum over heads of weight * max(0, query . key).\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        printf("  %-8s%s\n", commands[i].name, commands[i].help);
    printf("\n`lidx COMMAND --help` tells more; --version prints the version.\n"
           "Exit status: 0 done, 1 a check found a difference, 2 trouble, with a sentence on "
           "stderr.\n");
}

static int dispatch(int argc, char **argv) {
    if (argc < 2) {
        return refuse("a command is missing; it should be demo, run, check, bench or info (lidx "
                      "--help tells more)");
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_help();
        return EXIT_FINE;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("lidx %s\n", lidx_version());
        return EXIT_FINE;
    }
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(argv[1], commands[i].name) == 0) {
            message_command(argv[1]);
            return commands[i].run(argc - 2, argv + 2);
        }
    return refuse("\"%.40s\" is no command; it should be demo, run, check, bench or info (lidx "
                  "--help tells more)",
                  argv[1]);
}

int main(int argc, char **argv) {
    setlocale(LC_CTYPE, ""); /* whether the terminal takes UTF-8; numbers stay as in C */
    output_handle_signals();
    int status = dispatch(argc, argv);
    progress_end();
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("cannot write to standard output: %s", strerror(errno ? errno : EIO));
    return status;
}
