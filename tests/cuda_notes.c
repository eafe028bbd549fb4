/* SPDX-License-Identifier: Apache-2.0 */
#include "cuda_notes.h"

#include <cuda_runtime_api.h>
#include <string.h>

struct fake fake;
struct call calls[MOST_CALLS];
int n_launched;

static int next_call(void) {
    fake.is_error_left = fake.n_calls++ == fake.fail_at;
    return fake.is_error_left ? 999 : 0;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = fake.count;
    return next_call();
}

cudaError_t cudaGetDevice(int *device) {
    *device = fake.current;
    return next_call();
}

cudaError_t cudaSetDevice(int device) {
    int code = next_call();
    fake.current = code ? fake.current : device;
    return code;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    int compute = fake.compute[device];
    fake.n_asked++;
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? compute / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? compute % 10
                                                              : fake.n_sm[device];
    return next_call();
}

cudaError_t cudaGetLastError(void) {
    int left = fake.is_error_left;
    fake.is_error_left = 0;
    return left ? 999 : 0;
}

const char *cudaGetErrorName(cudaError_t code) {
    return code == 999 ? "cudaErrorUnknown" : "another name";
}

const char *cudaGetErrorString(cudaError_t code) {
    return code == 999 ? "unknown error" : "another error";
}

static int note(enum launcher launcher, const struct slab *s, void *stream) {
    if (n_launched < MOST_CALLS)
        calls[n_launched++] = (struct call){launcher, *s, stream, fake.current};
    return next_call();
}

int lidx_launch_count(const struct slab *s, void *stream) {
    return note(COUNT, s, stream);
}

int lidx_prepare_topk(const struct slab *s, void *stream) {
    return note(PREPARE, s, stream);
}

int lidx_launch_score_sm90(const struct slab *s, void *stream) {
    return note(SM90, s, stream);
}

int lidx_launch_score_smxx(const struct slab *s, void *stream) {
    return note(SMXX, s, stream);
}

int lidx_launch_topk(const struct slab *s, void *stream) {
    return note(TOPK, s, stream);
}

int lidx_score_sm90_accepts(const struct problem *p) {
    return fake.accepts && p->n_heads > 0;
}

size_t lidx_topk_scratch(int64_t rows, int64_t max_key, int32_t top_k, int32_t n_sm) {
    return (size_t)(rows * 700 + max_key / 1000 + 8 * top_k + 512 * n_sm);
}

void forget(void) {
    memset(&fake, 0, sizeof fake);
    fake.count = DEVICES;
    fake.accepts = 1;
    fake.compute[0] = 90, fake.compute[1] = 120, fake.compute[2] = 75;
    fake.n_sm[0] = 132, fake.n_sm[1] = 170, fake.n_sm[2] = 40;
    fake.fail_at = -1;
    n_launched = 0;
}
