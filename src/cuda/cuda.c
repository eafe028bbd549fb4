/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend's host side: which score kernel, how much workspace, the launches of a run.
 *
 * A run goes through the output in slabs of rows: scores of a slab into the workspace, then the
 * selection from it. A slab is as many rows as fit a fixed workspace, so memory does not grow
 * with the problem. Everything is enqueued on the caller's stream; lengths and tables are read by
 * the kernels alone, so a captured run can be replayed with others.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../backend.h"
#include "../error.h"
#include "launch.h"

enum { N_DEVICES = 64, ROW_ALIGNMENT = 64, KEY_ALIGNMENT = 64, WORKSPACE_ALIGNMENT = 256 };

static const size_t workspace_limit = (size_t)256 << 20;

/* ---- score kernels, best first --------------------------------------------------------------- */

struct score_kernel {
    const char *name;
    const char *needs; /* completes "needs ..." */
    int compute_min;
    int compute_max;
    int (*accepts)(const struct problem *p);
    int (*launch)(const struct slab *s, void *stream);
};

static int accepts_all(const struct problem *p) {
    (void)p;
    return 1;
}

static const struct score_kernel kernels[] = {
    {"sm90", "a Hopper GPU (compute capability 9.0)", 90, 90, lidx_score_sm90_accepts,
     lidx_launch_score_sm90},
    {"smxx", "a GPU of compute capability 8.0 or newer", 80, 1 << 20, accepts_all,
     lidx_launch_score_smxx},
};

enum { N_KERNELS = sizeof kernels / sizeof kernels[0] };

static int runs_on(const struct score_kernel *kernel, int compute) {
    return compute >= kernel->compute_min && compute <= kernel->compute_max;
}

/* ---- devices --------------------------------------------------------------------------------- */

struct device {
    int known;
    int compute; /* compute capability, 90 for 9.0 */
    int n_sm;
};

struct cuda_state {
    const struct score_kernel *forced; /* or NULL */
    struct device devices[N_DEVICES];
};

static int fail_cuda(const char *what, int code) {
    cudaGetLastError(); /* leaves no error behind that a later launch would be blamed for */
    return lidx_fail(LIDX_ERR_CUDA, "%s failed: %s (%s)", what,
                     cudaGetErrorString((cudaError_t)code), cudaGetErrorName((cudaError_t)code));
}

/* Works with or without a current CUDA context, and makes none. */
static int probe(int device_id, struct device *device) {
    int major, minor, n_sm, count;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code)
        return fail_cuda("looking for CUDA devices", code);
    if (device_id < 0 || device_id >= count)
        return lidx_fail(LIDX_ERR_DEVICE, "query is on CUDA device %d; it should be 0 to %d",
                         device_id, count - 1);
    if ((code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_id)) ||
        (code = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_id)) ||
        (code = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device_id)))
        return fail_cuda("asking for the device's properties", code);
    *device = (struct device){1, 10 * major + minor, n_sm};
    return LIDX_OK;
}

/* A device is asked once in a context's life. */
static int find_device(struct cuda_state *state, int device_id, struct device *device) {
    struct device *cached =
        device_id >= 0 && device_id < N_DEVICES ? &state->devices[device_id] : NULL;
    if (cached && cached->known) {
        *device = *cached;
        return LIDX_OK;
    }
    int status = probe(device_id, device);
    if (status == LIDX_OK && cached)
        *cached = *device;
    return status;
}

static int choose(const struct cuda_state *state, const struct problem *p,
                  const struct device *device, const struct score_kernel **chosen) {
    const struct score_kernel *forced = state->forced;
    if (forced) {
        if (!runs_on(forced, device->compute))
            return lidx_fail(LIDX_ERR_OPTION,
                             "kernel is \"%s\", which needs %s; the device has %d.%d", forced->name,
                             forced->needs, device->compute / 10, device->compute % 10);
        if (!forced->accepts(p))
            return lidx_fail(LIDX_ERR_OPTION,
                             "kernel is \"%s\", which does not take this problem's shapes, strides "
                             "and alignments; \"smxx\" takes all",
                             forced->name);
        *chosen = forced;
        return LIDX_OK;
    }
    for (int i = 0; i < N_KERNELS; i++)
        if (runs_on(&kernels[i], device->compute) && kernels[i].accepts(p)) {
            *chosen = &kernels[i];
            return LIDX_OK;
        }
    return lidx_fail(LIDX_ERR_DEVICE,
                     "the device has compute capability %d.%d; it should be 8.0 or newer",
                     device->compute / 10, device->compute % 10);
}

/* ---- workspace ------------------------------------------------------------------------------- */

/* How the workspace is divided: [scores of `rows` rows][the selection's scratch]. */
struct division {
    int64_t rows;   /* of a slab */
    int64_t stride; /* floats of a row of scores */
    size_t scores;  /* bytes */
    size_t scratch;
};

static int64_t round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

static struct division division_for(const struct problem *p, int64_t rows, int n_sm) {
    struct division d;
    d.rows = rows;
    d.stride = round_up(p->n_key > 0 ? p->n_key : 1, KEY_ALIGNMENT);
    d.scores = (size_t)round_up(rows * d.stride * (int64_t)sizeof(float), WORKSPACE_ALIGNMENT);
    d.scratch = lidx_topk_scratch(rows, p->n_key, p->top_k, n_sm);
    return d;
}

static int fits(const struct problem *p, int64_t rows, int n_sm) {
    struct division d = division_for(p, rows, n_sm);
    return d.scores <= workspace_limit && d.scratch <= workspace_limit - d.scores;
}

/* The most rows that fit, then as many as make all slabs alike. Rows in multiples of 64 where
 * there are that many keep the score kernels' blocks of queries whole. A row that does not fit by
 * itself (some 60 million keys) still gets its workspace. */
static struct division divide(const struct problem *p, int n_sm) {
    int64_t total = lidx_rows(p), row = round_up(p->n_key > 0 ? p->n_key : 1, KEY_ALIGNMENT) * 4;
    int64_t low = 1, high = (int64_t)workspace_limit / row;
    if (high > total)
        high = total;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (fits(p, middle, n_sm))
            low = middle;
        else
            high = middle - 1;
    }
    if (low < total && low > ROW_ALIGNMENT)
        low -= low % ROW_ALIGNMENT;
    int64_t n_slabs = (total + low - 1) / low;
    int64_t even = n_slabs > 0 ? round_up((total + n_slabs - 1) / n_slabs, ROW_ALIGNMENT) : low;
    return division_for(p, even < low ? even : low, n_sm);
}

static int cuda_workspace_size(void *state, const struct problem *p, int32_t device_id,
                               size_t *bytes) {
    struct device device;
    *bytes = 0;
    if (lidx_rows(p) == 0)
        return LIDX_OK;
    int status = find_device(state, device_id, &device);
    if (status)
        return status;
    struct division d = divide(p, device.n_sm);
    *bytes = d.scores + d.scratch;
    return LIDX_OK;
}

/* ---- run ------------------------------------------------------------------------------------- */

static int run_slabs(const struct score_kernel *kernel, const struct problem *p,
                     const struct device *device, const struct run_resources *resources) {
    struct division d = divide(p, device->n_sm);
    struct slab slab = {
        .p = *p,
        .scores = resources->workspace,
        .scores_stride = d.stride,
        .scratch = d.scratch ? (unsigned char *)resources->workspace + d.scores : NULL,
        .n_sm = device->n_sm,
        .compute = device->compute,
    };
    int64_t total = lidx_rows(p);
    slab.row_end = d.rows < total ? d.rows : total;
    int code = lidx_launch_count(&slab, resources->stream);
    if (code)
        return fail_cuda("launching the count of bad lengths and pages", code);
    if ((code = lidx_prepare_topk(&slab, resources->stream)))
        return fail_cuda("preparing the selection", code);
    slab.prepared = 1;
    for (; slab.row_begin < total; slab.row_begin = slab.row_end) {
        slab.row_end = slab.row_begin + d.rows < total ? slab.row_begin + d.rows : total;
        if ((code = kernel->launch(&slab, resources->stream)))
            return fail_cuda("launching the scores", code);
        if ((code = lidx_launch_topk(&slab, resources->stream)))
            return fail_cuda("launching the selection", code);
    }
    return LIDX_OK;
}

static int cuda_run(void *state, const struct problem *p, const struct run_resources *resources) {
    const struct score_kernel *kernel = NULL;
    struct device device;
    int current, status;
    if (lidx_rows(p) == 0)
        return LIDX_OK;
    if ((status = find_device(state, resources->device_id, &device)) ||
        (status = choose(state, p, &device, &kernel)))
        return status;
    cudaError_t code = cudaGetDevice(&current);
    if (!code && current != resources->device_id)
        code = cudaSetDevice(resources->device_id);
    if (code)
        return fail_cuda("switching to the tensors' device", code);
    status = run_slabs(kernel, p, &device, resources);
    if (current != resources->device_id && (code = cudaSetDevice(current)) && !status)
        return fail_cuda("switching back to the caller's device", code);
    return status;
}

/* ---- the backend ----------------------------------------------------------------------------- */

static int cuda_create(void **state, const struct lidx_options *options) {
    struct cuda_state *made = calloc(1, sizeof *made);
    if (!made)
        return lidx_fail(LIDX_ERR_MEMORY, "no memory for a CUDA state of %zu bytes", sizeof *made);
    for (int i = 0; i < N_KERNELS; i++)
        if (options->kernel && strcmp(options->kernel, kernels[i].name) == 0)
            made->forced = &kernels[i];
    *state = made;
    return LIDX_OK;
}

static void cuda_destroy(void *state) {
    free(state);
}

static int cuda_kernel_count(void) {
    return N_KERNELS;
}

/* Speaks of the current device, or of device 0 before there is one. */
static void cuda_kernel_info(int index, struct lidx_kernel_info *info) {
    static _Thread_local char reason[192];
    const struct score_kernel *kernel = &kernels[index];
    struct device device;
    int device_id = 0;
    *info = (struct lidx_kernel_info){.size = info->size, .name = kernel->name, .reason = reason};
    if (cudaGetDevice(&device_id))
        device_id = 0;
    if (probe(device_id, &device)) {
        snprintf(reason, sizeof reason, "no CUDA device can be used: %.128s", lidx_last_error());
        return;
    }
    int best = 0;
    while (best < N_KERNELS && !runs_on(&kernels[best], device.compute))
        best++;
    info->available = runs_on(kernel, device.compute);
    info->chosen_bf16 = info->chosen_fp16 = index == best;
    const char *verdict = !info->available ? "which is not this one"
                          : index == best  ? "and is this one's best"
                                           : "and takes what the better ones do not";
    snprintf(reason, sizeof reason, "device %d has compute capability %d.%d; needs %s, %s",
             device_id, device.compute / 10, device.compute % 10, kernel->needs, verdict);
}

const struct backend lidx_backend_cuda = {
    .name = "cuda",
    .device_type = LIDX_CUDA,
    .create = cuda_create,
    .destroy = cuda_destroy,
    .workspace_size = cuda_workspace_size,
    .run = cuda_run,
    .kernel_count = cuda_kernel_count,
    .kernel_info = cuda_kernel_info,
};
