/* SPDX-License-Identifier: Apache-2.0 */
#include <cjson/cJSON.h>
#include <stdio.h>

#include "commands.h"
#include "lightning_indexer.h"
#include "message.h"
#include "numbers.h"
#include "options.h"
#include "report.h"

static int as_json;

static const struct option options[] = {
    {.name = "json", .kind = OPTION_FLAG, .target = &as_json, .help = "print JSON"},
    {.name = NULL},
};

static const struct command command = {
    "info",
    "",
    "Prints the version, what the CPU offers, and every kernel of this build: whether this\n"
    "machine can run it, whether it is chosen when none is forced, and why. LIDX_KERNEL\n"
    "forces one.",
    0,
    0,
    {options, NULL},
};

static void print_text(void) {
    printf("lightning_indexer %s\nCPU features: %s\nthreads: %d\n\n", lidx_version(),
           lidx_cpu_features(), default_threads());
    for (int i = 0; i < lidx_kernel_count(); i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        if (lidx_kernel_info(i, &info))
            continue;
        printf("%-5s%-14s%-10s%s\n", info.backend, info.name,
               info.chosen_bf16 && info.chosen_fp16 ? "bf16 fp16"
               : info.chosen_bf16                   ? "bf16"
               : info.chosen_fp16                   ? "fp16"
                                                    : "-",
               info.reason);
    }
}

static void print_json(void) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "version", lidx_version());
    cJSON_AddStringToObject(json, "cpu_features", lidx_cpu_features());
    cJSON_AddNumberToObject(json, "threads", default_threads());
    cJSON *kernels = cJSON_AddArrayToObject(json, "kernels");
    for (int i = 0; i < lidx_kernel_count(); i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        if (lidx_kernel_info(i, &info))
            continue;
        cJSON *kernel = cJSON_CreateObject();
        cJSON_AddStringToObject(kernel, "name", info.name);
        cJSON_AddStringToObject(kernel, "backend", info.backend);
        cJSON_AddBoolToObject(kernel, "available", info.available);
        cJSON_AddBoolToObject(kernel, "chosen_bf16", info.chosen_bf16);
        cJSON_AddBoolToObject(kernel, "chosen_fp16", info.chosen_fp16);
        cJSON_AddStringToObject(kernel, "reason", info.reason);
        cJSON_AddItemToArray(kernels, kernel);
    }
    print_and_delete(json);
}

int command_info(int argc, char **argv) {
    const char *files[MAX_POSITIONAL];
    int status = options_parse(&command, argc, argv, files);
    if (status >= 0)
        return status;
    if (as_json)
        print_json();
    else
        print_text();
    return EXIT_FINE;
}
