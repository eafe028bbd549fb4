/* SPDX-License-Identifier: Apache-2.0
 *
 * The public functions: check, pick the backend that serves the tensors' device, run.
 */
#include "lightning_indexer.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "check.h"
#include "error.h"

static const struct backend *const backends[] = {
    &lidx_backend_cpu,
#ifdef LIDX_WITH_CUDA
    &lidx_backend_cuda,
#endif
};

enum { N_BACKENDS = sizeof backends / sizeof backends[0] };

struct lidx_context {
    void *state[N_BACKENDS];
};

/* The first published version's structs end here; later fields may be absent. */
enum {
    ARGS_MINIMUM = offsetof(struct lidx_args, error_word) + sizeof(uint32_t *),
    OPTIONS_MINIMUM = offsetof(struct lidx_options, kernel) + sizeof(const char *),
    INFO_MINIMUM = offsetof(struct lidx_kernel_info, reason) + sizeof(const char *),
    STRUCT_MAXIMUM = 4096, /* a size above this is no struct's of any version */
};

#define TEXT(number)                      #number
#define VERSION_TEXT(major, minor, patch) TEXT(major) "." TEXT(minor) "." TEXT(patch)

const char *lidx_version(void) {
    return VERSION_TEXT(LIDX_VERSION_MAJOR, LIDX_VERSION_MINOR, LIDX_VERSION_PATCH);
}

int lidx_kernel_count(void) {
    int count = 0;
    for (int i = 0; i < N_BACKENDS; i++)
        count += backends[i]->kernel_count();
    return count;
}

int lidx_kernel_info(int index, struct lidx_kernel_info *info) {
    if (!info || info->size < INFO_MINIMUM || info->size > STRUCT_MAXIMUM)
        return lidx_fail(LIDX_ERR_ARGUMENT, "info is NULL or its size is wrong; it should be "
                                            "sizeof(struct lidx_kernel_info)");
    for (int i = 0; i < N_BACKENDS && index >= 0; i++) {
        int count = backends[i]->kernel_count();
        if (index < count) {
            struct lidx_kernel_info known = {.size = info->size};
            backends[i]->kernel_info(index, &known);
            known.backend = backends[i]->name;
            memset(info, 0, known.size); /* what a newer caller's struct has besides */
            memcpy(info, &known, known.size < sizeof known ? known.size : sizeof known);
            return LIDX_OK;
        }
        index -= count;
    }
    return lidx_fail(LIDX_ERR_ARGUMENT, "index is out of range; it should be 0 to %d",
                     lidx_kernel_count() - 1);
}

/* Copies a caller's struct of `size` bytes (its first field) into `target` of `target_size`
 * bytes: what an older caller lacks is zero, what a newer one adds must be zero. */
static int copy_sized(void *target, size_t target_size, const void *source, size_t minimum,
                      const char *name) {
    size_t size;
    memcpy(&size, source, sizeof size);
    if (size < minimum || size > STRUCT_MAXIMUM)
        return lidx_fail(LIDX_ERR_ARGUMENT,
                         "%s.size is %zu; it should be sizeof(struct %s), %zu in this version",
                         name, size, name, target_size);
    const unsigned char *bytes = source;
    for (size_t i = target_size; i < size; i++)
        if (bytes[i] != 0)
            return lidx_fail(LIDX_ERR_ARGUMENT,
                             "%s has a field at byte %zu that this version (%s) does not know; it "
                             "should be zero",
                             name, i, lidx_version());
    memset(target, 0, target_size);
    memcpy(target, source, size < target_size ? size : target_size);
    return LIDX_OK;
}

/* A forced kernel must exist in this build and run on this machine. */
static int check_kernel_name(const char *name) {
    char known[256] = "";
    for (int i = 0; i < lidx_kernel_count(); i++) {
        struct lidx_kernel_info info = {.size = sizeof info};
        lidx_kernel_info(i, &info);
        if (strcmp(name, info.name) == 0)
            return info.available
                       ? LIDX_OK
                       : lidx_fail(LIDX_ERR_OPTION, "kernel is \"%s\": %s", name, info.reason);
        if (strlen(known) + strlen(info.name) + 3 < sizeof known) {
            strcat(known, i ? ", " : "");
            strcat(known, info.name);
        }
    }
    return lidx_fail(LIDX_ERR_OPTION, "kernel is \"%.40s\"; it should be one of %s", name, known);
}

static int resolve_options(struct lidx_options *resolved, const struct lidx_options *options) {
    *resolved = (struct lidx_options)LIDX_OPTIONS_INIT;
    if (options) {
        int status =
            copy_sized(resolved, sizeof *resolved, options, OPTIONS_MINIMUM, "lidx_options");
        if (status)
            return status;
    }
    if (resolved->n_threads < 0 || resolved->n_threads > LIDX_MAX_THREADS)
        return lidx_fail(LIDX_ERR_OPTION, "n_threads is %d; it should be 0 (all) to %d",
                         (int)resolved->n_threads, LIDX_MAX_THREADS);
    if (!resolved->kernel)
        resolved->kernel = getenv("LIDX_KERNEL");
    if (resolved->kernel && !*resolved->kernel)
        resolved->kernel = NULL;
    return resolved->kernel ? check_kernel_name(resolved->kernel) : LIDX_OK;
}

int lidx_create(struct lidx_context **context, const struct lidx_options *options) {
    if (!context)
        return lidx_fail(LIDX_ERR_ARGUMENT, "context is NULL; it should point at where the new "
                                            "context goes");
    *context = NULL;
    struct lidx_options resolved;
    int status = resolve_options(&resolved, options);
    if (status)
        return status;
    struct lidx_context *made = calloc(1, sizeof *made);
    if (!made)
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for a context of %zu bytes", sizeof *made);
    for (int i = 0; i < N_BACKENDS; i++) {
        status = backends[i]->create(&made->state[i], &resolved);
        if (status) {
            lidx_destroy(made);
            return status;
        }
    }
    *context = made;
    return LIDX_OK;
}

void lidx_destroy(struct lidx_context *context) {
    if (!context)
        return;
    for (int i = 0; i < N_BACKENDS; i++)
        if (context->state[i])
            backends[i]->destroy(context->state[i]);
    free(context);
}

/* What lidx_run and lidx_workspace_size have in common: arguments to a problem and its backend.
 * *args comes to point at `copy` where the caller's struct is not of this version's size. */
static int prepare(struct lidx_context *context, const struct lidx_args **args,
                   enum check_depth depth, struct lidx_args *copy, struct problem *p,
                   struct lidx_device *device, int *backend) {
    int status = LIDX_OK;
    if (!context || !*args)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s is NULL; it is a required argument",
                         context ? "args" : "context");
    if ((*args)->size != sizeof **args) {
        status = copy_sized(copy, sizeof *copy, *args, ARGS_MINIMUM, "lidx_args");
        *args = copy;
    }
    if (status || (status = lidx_check(*args, depth, p, device)))
        return status;
    int type = device->device_type;
    if (type == LIDX_CUDA_HOST)
        type = LIDX_CPU;
    if (type == LIDX_CUDA_MANAGED)
        type = LIDX_CUDA;
    for (int i = 0; i < N_BACKENDS; i++)
        if (backends[i]->device_type == type) {
            *backend = i;
            return LIDX_OK;
        }
    return lidx_fail(LIDX_ERR_DEVICE, "query is on device type %d%s; this build serves CPU (1)%s",
                     (int)device->device_type, type == LIDX_CUDA ? " (CUDA)" : "",
                     N_BACKENDS > 1 ? " and CUDA (2)" : " only");
}

int lidx_workspace_size(struct lidx_context *context, const struct lidx_args *args, size_t *bytes) {
    struct lidx_args copy;
    struct problem p;
    struct lidx_device device;
    int i, status = prepare(context, &args, CHECK_SIZES, &copy, &p, &device, &i);
    if (status)
        return status;
    if (!bytes)
        return lidx_fail(LIDX_ERR_ARGUMENT,
                         "bytes is NULL; it should point at where the size goes");
    return backends[i]->workspace_size(context->state[i], &p, device.device_id, bytes);
}

static int check_workspace(const struct lidx_args *args, size_t needed) {
    if (needed == 0)
        return LIDX_OK;
    if (!args->workspace || args->workspace_size < needed)
        return lidx_fail(LIDX_ERR_WORKSPACE,
                         "workspace has %zu bytes; it should have %zu (lidx_workspace_size)",
                         args->workspace ? args->workspace_size : (size_t)0, needed);
    if ((uintptr_t)args->workspace % 256)
        return lidx_fail(LIDX_ERR_WORKSPACE, "workspace is not aligned; it should be a multiple of "
                                             "256");
    return LIDX_OK;
}

int lidx_run(struct lidx_context *context, const struct lidx_args *args) {
    struct lidx_args copy;
    struct problem p;
    struct lidx_device device;
    size_t needed;
    int i, status = prepare(context, &args, CHECK_DATA, &copy, &p, &device, &i);
    if (status)
        return status;
    status = backends[i]->workspace_size(context->state[i], &p, device.device_id, &needed);
    if (status || (status = check_workspace(args, needed)))
        return status;
    const struct run_resources resources = {args->stream, args->workspace, device.device_id};
    return backends[i]->run(context->state[i], &p, &resources);
}
