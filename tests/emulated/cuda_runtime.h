/* SPDX-License-Identifier: Apache-2.0
 *
 * Just enough of CUDA, on one CPU thread, to run the selection kernels and the Hopper kernel's walk
 * where there is no GPU: one block or cluster at a time, its threads as fibers that switch at
 * barriers and warp operations. The order of blocks, of warps and of lanes is random, so that a
 * missing barrier is likely to show; a warp that splits at a collective, a barrier that some
 * threads miss, and a deadlock end the program. What it cannot show: races between lanes of one
 * warp, the memory model, speed.
 *
 *     g++ -std=c++17 -O2 -U_FORTIFY_SOURCE -x c++ -Itests/emulated tests/test_topk.cu \
 *         src/cuda/topk.cu -o test_topk && ./test_topk quick
 */
#ifndef EMULATED_CUDA_RUNTIME_H
#define EMULATED_CUDA_RUNTIME_H

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <ucontext.h>

/* Much of what follows is a list of CUDA's functions, a line each. */
/* clang-format off */

#define __device__
#define __global__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };

static inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) {
    return {a, b, c, d};
}
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

/* ---- fibers ---------------------------------------------------------------------------------- */

enum emulated_state { RUNS, AT_BARRIER, AT_WARP, AT_CLUSTER, ENDED };

struct emulated_thread {
    ucontext_t start;
    jmp_buf point;
    bool started;
    unsigned number;
    emulated_state state;
    unsigned arrivals, waits; /* at the cluster's barrier */
    uint64_t value;           /* what it shows to its warp */
};

/* Shared memory of a block: what every GPU has, or what those with clusters have. */
enum { EMULATED_SHARED = 99 << 10, EMULATED_CLUSTER_SHARED = 227 << 10, EMULATED_CLUSTER = 8 };
enum { EMULATED_STACK = 128 << 10, EMULATED_LANES = 32 };
struct emulated_memory { alignas(256) uint4 words[EMULATED_CLUSTER_SHARED / 16]; };
inline emulated_memory emulated_memories[EMULATED_CLUSTER];
inline uint4 (*emulated_shared)[]; /* of the block that runs */
#define dynamic_shared (*emulated_shared)
inline std::vector<emulated_thread> emulated_threads; /* of the cluster */
inline unsigned emulated_block_threads;
inline emulated_thread *emulated_now;
inline jmp_buf emulated_scheduler;
inline dim3 emulated_block, emulated_grid;
inline void (*emulated_call)(const void *, void **);
inline const void *emulated_kernel;
inline void **emulated_arguments;

inline void emulated_stop(const char *why) {
    fprintf(stderr, "block %u: %s\n", emulated_block.x, why);
    abort();
}

inline void emulated_leave(emulated_state state) {
    emulated_now->state = state;
    if (!_setjmp(emulated_now->point))
        _longjmp(emulated_scheduler, 1);
}

inline void emulated_entry(void) {
    emulated_call(emulated_kernel, emulated_arguments);
    emulated_leave(ENDED);
}

inline void emulated_enter(emulated_thread *t) {
    emulated_now = t;
    if (_setjmp(emulated_scheduler))
        return;
    if (t->started)
        _longjmp(t->point, 1);
    t->started = true;
    setcontext(&t->start);
}

/* Runs a warp until all its lanes wait at a block's or cluster's barrier or have ended. */
inline void emulated_run_warp(emulated_thread *warp) {
    for (;;) {
        int first = rand() % EMULATED_LANES, collective = 0;
        for (int i = 0; i < EMULATED_LANES; i++) {
            emulated_thread *t = warp + (first + i) % EMULATED_LANES;
            if (t->state == RUNS)
                emulated_enter(t);
            collective += t->state == AT_WARP;
        }
        if (!collective)
            return;
        if (collective != EMULATED_LANES)
            emulated_stop("a warp split at a collective");
        for (int i = 0; i < EMULATED_LANES; i++)
            warp[i].state = RUNS;
    }
}

/* Runs a block until it waits for its cluster or has ended; or, to mix the blocks of a cluster, now
 * and then only to the next barrier. */
inline void emulated_run_block(unsigned rank, bool alone) {
    unsigned n_threads = emulated_block_threads, n_warps = n_threads / EMULATED_LANES;
    emulated_thread *threads = &emulated_threads[rank * n_threads];
    emulated_shared = (uint4 (*)[])emulated_memories[rank].words;
    for (;;) {
        unsigned first = (unsigned)rand() % n_warps, in[ENDED + 1] = {0};
        for (unsigned i = 0; i < n_warps; i++)
            emulated_run_warp(threads + (first + i) % n_warps * EMULATED_LANES);
        for (unsigned i = 0; i < n_threads; i++)
            in[threads[i].state]++;
        if (in[ENDED] == n_threads || in[AT_CLUSTER] == n_threads)
            return;
        if (in[AT_BARRIER] != n_threads)
            emulated_stop("some threads miss a barrier");
        for (unsigned i = 0; i < n_threads; i++)
            threads[i].state = RUNS;
        if (!alone && rand() % 2)
            return;
    }
}

/* Lets those go on for whose wait all threads that have not ended have arrived. */
inline bool emulated_open_cluster(void) {
    unsigned arrivals = ~0u;
    bool some = false;
    for (emulated_thread &t : emulated_threads)
        if (t.state != ENDED)
            arrivals = std::min(arrivals, t.arrivals);
    for (emulated_thread &t : emulated_threads)
        if (t.state == AT_CLUSTER && t.waits <= arrivals) {
            t.state = RUNS;
            some = true;
        }
    return some;
}

inline void emulated_run_cluster(unsigned first_block, unsigned cluster, unsigned n_threads) {
    static std::vector<char *> stacks;
    while (stacks.size() < n_threads * cluster)
        stacks.push_back((char *)malloc(EMULATED_STACK));
    emulated_block_threads = n_threads;
    emulated_threads.resize(n_threads * cluster);
    for (unsigned i = 0; i < n_threads * cluster; i++) {
        emulated_thread *t = &emulated_threads[i];
        t->number = i % n_threads;
        t->state = RUNS;
        t->started = false;
        t->arrivals = t->waits = 0;
        getcontext(&t->start);
        t->start.uc_stack.ss_sp = stacks[i];
        t->start.uc_stack.ss_size = EMULATED_STACK;
        t->start.uc_link = NULL;
        makecontext(&t->start, emulated_entry, 0);
    }
    for (unsigned i = 0; i < cluster; i++)
        memset(emulated_memories[i].words, 0xA5, sizeof emulated_memories[i].words);
    for (;;) {
        unsigned first = (unsigned)rand() % cluster;
        bool runs = false, ended = true;
        for (unsigned i = 0; i < cluster; i++) {
            unsigned rank = (first + i) % cluster;
            emulated_state state = emulated_threads[rank * n_threads].state;
            ended &= state == ENDED;
            if (state != RUNS)
                continue;
            emulated_block = dim3(first_block + rank);
            emulated_run_block(rank, cluster == 1);
            runs = true;
        }
        if (ended)
            return;
        if (!runs && !emulated_open_cluster())
            emulated_stop("a cluster waits for ever");
    }
}

#define threadIdx (dim3(emulated_now->number))
#define blockIdx emulated_block
#define gridDim emulated_grid

/* ---- what kernels call ----------------------------------------------------------------------- */

static inline void __syncthreads(void) { emulated_leave(AT_BARRIER); }
static inline void __syncwarp(void) { emulated_leave(AT_WARP); }
static inline void __threadfence(void) {}

/* Every lane shows x; `take` reads what the others show; then all go on. */
template <class T, class Take> static inline T emulated_warp(T x, Take take) {
    emulated_now->value = x;
    emulated_leave(AT_WARP);
    unsigned lane = emulated_now->number % EMULATED_LANES;
    const emulated_thread *warp = emulated_now - lane;
    T y = (T)take(warp, lane);
    emulated_leave(AT_WARP);
    return y;
}

static inline uint32_t __shfl_up_sync(uint32_t, uint32_t x, unsigned d) {
    return emulated_warp(x, [=](const emulated_thread *w, unsigned lane) {
        return w[lane >= d ? lane - d : lane].value;
    });
}

static inline uint32_t __shfl_sync(uint32_t, uint32_t x, unsigned from) {
    return emulated_warp(x, [=](const emulated_thread *w, unsigned) { return w[from].value; });
}

template <class Join> static inline uint32_t emulated_reduce(uint32_t x, Join join) {
    return emulated_warp(x, [=](const emulated_thread *w, unsigned) {
        uint32_t y = (uint32_t)w[0].value;
        for (int i = 1; i < EMULATED_LANES; i++)
            y = join(y, (uint32_t)w[i].value);
        return y;
    });
}

static inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
    return emulated_reduce(x, [](uint32_t a, uint32_t b) { return a + b; });
}
static inline uint32_t __reduce_min_sync(uint32_t, uint32_t x) {
    return emulated_reduce(x, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
static inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
    return emulated_reduce(x, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
static inline uint32_t __ballot_sync(uint32_t, int x) {
    uint32_t bit = x ? 1u << emulated_now->number % EMULATED_LANES : 0;
    return emulated_reduce(bit, [](uint32_t a, uint32_t b) { return a | b; });
}
static inline int __any_sync(uint32_t, int x) {
    return (int)emulated_reduce(x != 0, [](uint32_t a, uint32_t b) { return a | b; });
}

template <class T> static inline T atomicAdd(T *p, T x) {
    T old = *p;
    *p += x;
    return old;
}
template <class T> static inline T atomicExch(T *p, T x) {
    std::swap(*p, x);
    return x;
}
template <class T> static inline T atomicMin(T *p, T x) {
    T old = *p;
    *p = std::min(old, x);
    return old;
}
template <class T> static inline T atomicMax(T *p, T x) {
    T old = *p;
    *p = std::max(old, x);
    return old;
}
template <class T> static inline T __ldcg(const T *p) { return *p; }

static inline uint32_t __float_as_uint(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float __uint_as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
static inline float __fadd_rn(float a, float b) {
    volatile float x = a, y = b; /* the sum of -0 and 0 must be made */
    return x + y;
}
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
static inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8)
        c += (a >> i & 255) * (b >> i & 255);
    return c;
}
static inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)(((uint64_t)high << 32 | low) << by % 32 >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> by % 32);
}
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++)
        y |= (uint32_t)(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return y;
}
using std::max;
using std::min;

/* ---- the cluster ----------------------------------------------------------------------------- */

static inline uint32_t cluster_rank(void) {
    return (uint32_t)((size_t)(emulated_now - &emulated_threads[0]) / emulated_block_threads);
}
static inline void cluster_arrive(void) { emulated_now->arrivals++; }
static inline void cluster_wait(void) {
    emulated_now->waits++;
    emulated_leave(AT_CLUSTER);
}

/* An address: the block, and where in its memory. */
static inline uint32_t remote(const void *here, uint32_t rank) {
    size_t at = (size_t)((const char *)here - (const char *)*emulated_shared);
    if (rank >= EMULATED_CLUSTER || at >= EMULATED_CLUSTER_SHARED)
        emulated_stop("no shared address");
    return rank << 20 | (uint32_t)at;
}
template <class T> static inline T *emulated_there(uint32_t address) {
    return (T *)((char *)emulated_memories[address >> 20].words + (address & 0xFFFFF));
}
static inline void remote_store(uint32_t address, uint64_t x) {
    *emulated_there<uint64_t>(address) = x;
}
static inline uint32_t remote_add(uint32_t address, uint32_t x) {
    return atomicAdd(emulated_there<uint32_t>(address), x);
}
static inline void remote_count(uint32_t address, uint32_t x) { remote_add(address, x); }

/* ---- what the host calls --------------------------------------------------------------------- */

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaLaunchAttributeClusterDimension = 4 };
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
        struct { unsigned x, y, z; } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};


static inline cudaError_t emulated_launch(const cudaLaunchConfig_t *c, const void *kernel,
                                          void **arguments,
                                          void (*call)(const void *, void **)) {
    unsigned cluster = 1;
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension)
            cluster = c->attrs[i].val.clusterDim.x;
    if (c->dynamicSmemBytes > (cluster > 1 ? EMULATED_CLUSTER_SHARED : EMULATED_SHARED))
        emulated_stop("more shared memory than every supported GPU has");
    if (cluster > EMULATED_CLUSTER || c->gridDim.x % cluster)
        emulated_stop("no such cluster");
    emulated_call = call;
    emulated_kernel = kernel;
    emulated_arguments = arguments;
    emulated_grid = c->gridDim;
    std::vector<unsigned> order(c->gridDim.x / cluster);
    for (unsigned i = 0; i < order.size(); i++)
        std::swap(order[i] = i, order[(unsigned)rand() % (i + 1)]);
    for (unsigned i : order)
        emulated_run_cluster(i * cluster, cluster, c->blockDim.x);
    return cudaSuccess;
}

/* A template so that struct launch is complete where it is used. */
template <class Launch>
static inline void emulated_call_with(const void *kernel, void **arguments) {
    ((void (*)(Launch))kernel)(*(Launch *)arguments[0]);
}
#define cudaLaunchKernelExC(config, kernel, arguments)                                             \
    emulated_launch(config, kernel, arguments, emulated_call_with<struct launch>)

static inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
static inline cudaError_t cudaFuncSetAttribute(const void *, int, int) { return cudaSuccess; }
static inline cudaError_t cudaMalloc(void **p, size_t n) {
    *p = aligned_alloc(256, n / 256 * 256 + 256);
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind) {
    if (n)
        memcpy(to, from, n);
    return cudaSuccess;
}
static inline cudaError_t cudaMemset(void *p, int x, size_t n) {
    memset(p, x, n);
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *p, int x, size_t n, cudaStream_t) {
    return cudaMemset(p, x, n);
}
static inline cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
static inline cudaError_t cudaGetLastError(void) { return cudaSuccess; }
static inline const char *cudaGetErrorString(cudaError_t) { return "emulated"; }

#endif
