/* SPDX-License-Identifier: Apache-2.0
 *
 * Hopper: scores of a slab by TMA, wgmma and specialised warps. docs/kernel-sm90.md has the whole
 * story; in short:
 *
 * A CTA, one to an SM, walks its run of the line (schedule.h). Warpgroups 0 and 1 compute
 * tiles of 64 keys (A) x N query columns (B) in turns, so that one's multiplications hide the
 * other's head sum. In warpgroup 2 one warp feeds queries and keys by TMA, another the weights
 * and what the consumers must know of an item.
 *
 * The score of one (query, key) is summed in one fixed order whatever N: head h belongs to
 * chain (h % 8), a chain adds its products in ascending h, and with P(l) = chain(2l) +
 * chain(2l + 1) the score is (P(0) + P(2)) + (P(1) + P(3)). Columns are arranged (by the
 * query's tensor map) so that each lane of a quad holds whole chains: a lane has whole queries
 * where N >= 4 heads, and 2 or 4 lanes share a query otherwise. With LANES of them,
 * column 8g + 2l + b is query l / LANES, head 2 LANES g + 2 (l % LANES) + b.
 */
#include <cuda.h>
#include <cuda_runtime.h>

#include "allow_shared.cuh"
#include "sm90_consume.cuh"
#include "sm90_feed.cuh"

namespace {

/* ---- Kernel -------------------------------------------------------------------------------- */

/* By one warp, a place of the rings to a lane. */
template <class S> __device__ __forceinline__ void init_barriers(struct shared_memory<S> &s) {
    int lane = threadIdx.x & 31;
    if (lane < 2) {
        mbarrier_init(smem_address(&s.query_full[lane]), 1 + 32); /* TMA warp, items warp */
        mbarrier_init(smem_address(&s.query_empty[lane]), CONSUMERS * 4);
    }
    if (lane < S::STAGES) {
        mbarrier_init(smem_address(&s.key_full[lane]), 1);
        mbarrier_init(smem_address(&s.key_empty[lane]), 4);
    }
    mbarrier_init_fence();
    __syncwarp();
}

/* The last warpgroup: two warps feed, a third makes the barriers while these find their run; in
 * decode the fourth has the page table brought into L2 meanwhile. Feeders and consumers await the
 * barriers at a named one each, since all that wait at one should do so at the same place of the
 * code: synccheck takes anything else for an error. */
template <class S>
__device__ __forceinline__ void feed(const struct arguments &a, struct shared_memory<S> &s,
                                     const CUtensorMap *query_map, const CUtensorMap *key_map) {
    int warp = threadIdx.x / 32 % 4; /* by a shuffle it would cost prefill 4 percent */
    if (warp < 2) {
        struct walk w = S::LEAN ? find_lean_run(a) : find_run<S>(a, s.chunks);
        named_barrier(BARRIER_FEED, 3 * 32);
        if (warp == 0)
            feed_tensors<S>(a, s, query_map, key_map, w);
        else
            feed_items<S>(a, s, w);
    } else if (warp == 2) {
        if (elect_one()) {
            tma_prefetch_map(query_map);
            tma_prefetch_map(key_map);
        }
        __syncwarp();
        init_barriers<S>(s);
        named_barrier_arrive(BARRIER_FEED, 3 * 32);
        named_barrier_arrive(BARRIER_CONSUME, CONSUMERS * WARPGROUP + 32);
    } else if (S::LEAN || (S::DECODE && a.p.page_size)) {
        prefetch_table<S>(a);
    }
}

template <class T, class S>
__global__ void __launch_bounds__(THREADS, 1)
    score_sm90(const __grid_constant__ struct arguments a,
               const __grid_constant__ CUtensorMap query_map,
               const __grid_constant__ CUtensorMap key_map) {
    extern __shared__ __align__(1024) uint8_t raw[];
    struct shared_memory<S> &s = *(struct shared_memory<S> *)raw;
    long long begin = clock64();
    if (!S::LEAN) /* there feed_items does */
        allow_next_kernel();
    if (!S::LEAN && chunk_size(a) > LANE_BATCHES) {
        sum_chunks<THREADS / 32>(a, s.chunks);
        __syncthreads();
    }
    /* Through a shuffle, so that the compiler knows it, and all that follows from it, to be the
     * same in a warp. */
    int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<S::PRODUCER_REGISTERS>();
        feed<S>(a, s, &query_map, &key_map);
    } else {
        registers_grow<S::CONSUMER_REGISTERS>();
        named_barrier(BARRIER_CONSUME, CONSUMERS * WARPGROUP + 32);
        consume<T, S>(a, s, group);
        if (a.cycles && threadIdx.x == 0)
            atomicAdd(a.cycles, (unsigned long long)(clock64() - begin));
    }
}

/* ---- Host ---------------------------------------------------------------------------------- */

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

encode_function tensor_map_encoder() {
    void *function = NULL;
    enum cudaDriverEntryPointQueryResult found;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_function)function
                                                                        : NULL;
}

int encode_map(CUtensorMap *map, const struct problem *p, const void *base, int rank,
               const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box) {
    static encode_function found; /* racing threads store the same */
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    encode_function encode = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (!encode) {
        encode = tensor_map_encoder();
        if (!encode)
            return cudaErrorNotSupported;
        __atomic_store_n(&found, encode, __ATOMIC_RELAXED);
    }
    CUresult result = encode(map,
                             p->dtype == DTYPE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                             rank, (void *)base, sizes, strides, box, ones,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/* Four queries (or 4 / LANES), all heads, 64 dims, in the order of the columns: 2 LANES heads of
 * a query, then the next query, then the next 2 LANES heads. */
template <class S> int query_tensor_map(CUtensorMap *map, const struct problem *p) {
    const cuuint64_t heads = 2 * S::LANES, row = S::DIM * 2, token = S::HEADS * row;
    cuuint64_t batches = p->query_packed ? 1 : p->n_batch;
    cuuint64_t stride = batches > 1 ? p->query_batch_stride : token * p->n_query;
    const cuuint64_t sizes[5] = {S::DIM, heads, (cuuint64_t)p->n_query, S::HEADS / heads, batches};
    const cuuint64_t strides[4] = {row, token, heads * row, stride};
    const cuuint32_t box[5] = {64, 2 * S::LANES, 4 / S::LANES, S::HEADS / (2 * S::LANES), 1};
    return encode_map(map, p, p->query, 5, sizes, strides, box);
}

int key_piece_shift(const struct problem *p) {
    return p->page_size % 64 == 0 ? 6 : p->page_size % 32 == 0 ? 5 : 4;
}

/* A piece of one batch or page; a whole tile's piece brings both halves of its rows at once. */
template <class S> int key_tensor_map(CUtensorMap *map, const struct problem *p) {
    int shift = key_piece_shift(p);
    cuuint64_t rows = p->page_size ? p->page_size : p->n_key, row = S::DIM * 2;
    cuuint64_t outer = p->page_size ? p->n_pages : p->key_packed ? 1 : p->n_batch;
    cuuint64_t stride = outer > 1 ? p->key_batch_stride : row * rows;
    const cuuint64_t sizes[4] = {64, rows, S::HALVES, outer};
    const cuuint64_t strides[3] = {row, 128, stride};
    const cuuint32_t box[4] = {64, 1u << shift, shift == TILE_SHIFT ? S::HALVES : 1u, 1};
    return encode_map(map, p, p->key, 4, sizes, strides, box);
}

int page_shift(const struct problem *p) {
    int pieces = p->page_size >> key_piece_shift(p);
    return pieces && !(pieces & (pieces - 1)) ? __builtin_ctz(pieces) : -1;
}

unsigned long long *cycle_counter;

template <class T, class S> int launch(const struct slab *slab, cudaStream_t stream) {
    CUtensorMap query_map, key_map;
    struct arguments a;
    a.p = slab->p;
    a.line = {slab->row_begin, slab->row_end, __builtin_ctz(S::BLOCK), S::CHARGE};
    a.scores = slab->scores;
    a.scores_stride = slab->scores_stride;
    batches_of_line(&a.p, &a.line, &a.batch_begin, &a.batch_end);
    a.piece_shift = key_piece_shift(&slab->p);
    a.page_shift = page_shift(&slab->p);
    a.cycles = cycle_counter;
    int error = query_tensor_map<S>(&query_map, &slab->p);
    if (!error)
        error = key_tensor_map<S>(&key_map, &slab->p);
    static uint64_t allowed; /* see allow_shared */
    const int bytes = sizeof(struct shared_memory<S>);
    static_assert(bytes <= MAX_SHARED, "shared memory");
    if (!error)
        error = allow_shared((const void *)score_sm90<T, S>, bytes, &allowed);
    /* The schedule counts places in 32 bits. */
    double places = (double)(slab->row_end - slab->row_begin) *
                    (double)(slab->scores_stride / TILE_KEYS + 1 + S::CHARGE);
    if (!error && places > INT32_MAX)
        error = cudaErrorInvalidValue;
    if (error)
        return error;
    score_sm90<T, S><<<slab->n_sm, THREADS, bytes, stream>>>(a, query_map, key_map);
    return cudaGetLastError();
}

/* Columns of an item: the fewest that hold an average batch's queries, since a batch with few
 * queries is limited by the reading of its keys. */
int item_columns(const struct problem *p) {
    int64_t queries = p->query_packed ? (p->n_query + p->n_batch - 1) / p->n_batch : p->n_query;
    int64_t columns = queries * p->n_heads;
    if (columns <= 64)
        return 64;
    return columns <= 128 && p->n_heads >= 64 ? 128 : 256;
}

template <class T, int HEADS, int DIM, int COLUMNS>
int launch_decode(const struct slab *s, cudaStream_t stream) {
    typedef shape<HEADS, DIM, COLUMNS, true> lean;
    if (is_lean<lean>(s))
        return launch<T, lean>(s, stream);
    return launch<T, shape<HEADS, DIM, COLUMNS>>(s, stream);
}

template <class T, int HEADS, int DIM>
int launch_columns(const struct slab *s, cudaStream_t stream) {
    int columns = item_columns(&s->p);
    if constexpr (HEADS <= 64)
        if (columns == 64)
            return launch_decode<T, HEADS, DIM, 64>(s, stream);
    if constexpr (HEADS >= 64)
        if (columns == 128)
            return launch_decode<T, HEADS, DIM, 128>(s, stream);
    return launch<T, shape<HEADS, DIM, 256>>(s, stream);
}

template <class T, int DIM> int launch_heads(const struct slab *s, cudaStream_t stream) {
    switch (s->p.n_heads) {
    case 8:
        return launch_columns<T, 8, DIM>(s, stream);
    case 16:
        return launch_columns<T, 16, DIM>(s, stream);
    case 32:
        return launch_columns<T, 32, DIM>(s, stream);
    case 128:
        return launch_columns<T, 128, DIM>(s, stream);
    case 64:
        return launch_columns<T, 64, DIM>(s, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

template <class T> int launch_dim(const struct slab *s, cudaStream_t stream) {
    if (s->p.head_dim == 64)
        return launch_heads<T, 64>(s, stream);
    return launch_heads<T, 128>(s, stream);
}

/* A dimension that TMA coordinates reach, with room for a last box that begins inside. */
bool fits_coordinate(int64_t size) {
    return size >= 0 && size <= INT32_MAX - 1024;
}

bool fits_stride(int64_t stride, int64_t count) {
    return count <= 1 || (stride > 0 && stride % 16 == 0 && stride < (int64_t)1 << 40);
}

} // namespace

extern "C" int lidx_score_sm90_accepts(const struct problem *p) {
    bool heads = p->n_heads == 8 || p->n_heads == 16 || p->n_heads == 32 || p->n_heads == 64 ||
                 p->n_heads == 128;
    bool type = p->dtype == DTYPE_BF16 || p->dtype == DTYPE_FP16;
    int64_t key_outer = p->page_size ? p->n_pages : p->key_packed ? 1 : p->n_batch;
    /* Without a page there is nothing to map, yet lengths may ask for keys: these are masked. */
    bool pages = !p->page_size || (p->page_size % 16 == 0 && p->n_pages > 0);
    return heads && type && (p->head_dim == 64 || p->head_dim == 128) && pages &&
           (uintptr_t)p->query % 16 == 0 && (uintptr_t)p->key % 16 == 0 &&
           fits_stride(p->query_batch_stride, p->query_packed ? 1 : p->n_batch) &&
           fits_stride(p->key_batch_stride, key_outer) && fits_coordinate(p->n_batch) &&
           fits_coordinate(p->n_query) && fits_coordinate(p->n_key) && fits_coordinate(p->n_pages);
}

extern "C" int lidx_launch_score_sm90(const struct slab *s, void *stream) {
    if (s->row_begin >= s->row_end || !s->p.n_batch || !s->p.n_key)
        return cudaSuccess;
    if (s->p.dtype == DTYPE_BF16)
        return launch_dim<__nv_bfloat16>(s, (cudaStream_t)stream);
    return launch_dim<__half>(s, (cudaStream_t)stream);
}

/* For the benchmark alone: from now on each CTA adds the SM cycles that it runs to *counter, in
 * device memory. NULL ends it. */
extern "C" void lidx_score_sm90_count_cycles(unsigned long long *counter) {
    cycle_counter = counter;
}
