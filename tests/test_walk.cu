/* SPDX-License-Identifier: Apache-2.0
 *
 * How the Hopper kernel's producer warps find and walk their runs, on emulated warps: over random
 * lengths (hostile ones too), layouts and slabs, the walks of all CTAs together come to every
 * visible (query row, key tile) of the slab exactly once, in the lean form as in the general one.
 * What schedule.h computes is test_schedule's.
 */
#include <cuda_runtime.h>

#include "../src/cuda/sm90_walk.cuh"

enum {
    SETTINGS = 400,
    MAX_BATCH = 600, /* more than the warps sum up in 32 chunks of LANE_BATCHES */
    MAX_QUERY = 40,
    MAX_KEY = 1500,
    MAX_ROWS = 4000,
    MAX_TILES = MAX_KEY / TILE_KEYS + 1,
    WARPS = 2,
};

template <int BLOCK_, int CHARGE_, bool LEAN_ = false> struct shape {
    static constexpr int BLOCK = BLOCK_, CHARGE = CHARGE_;
    static constexpr bool LEAN = LEAN_;
};

struct launch {
    struct arguments a;
};

static int32_t query_lengths[MAX_BATCH], key_lengths[MAX_BATCH];
static uint8_t covered[MAX_ROWS][MAX_TILES];
static long passed, failed, lean_walks, large_chunks;

static void check(bool holds, const char *what, long number) {
    passed += holds;
    if (!holds && failed++ < 20)
        printf("setting %ld: %s\n", number, what);
}

static int32_t below(int32_t n) {
    return rand() % n;
}

/* ---- the kernel ------------------------------------------------------------------------------ */

static long splits; /* places where lanes of a warp differ */

template <class S> static void cover(const struct arguments &a, const struct walk &w) {
    int64_t row = a.p.query_packed ? w.part.query_begin : (int64_t)w.next.batch * a.p.n_query;
    for (int32_t i = w.query; i < w.query + S::BLOCK && i < w.part.last; i++)
        for (int32_t tile = w.begin; tile < w.end; tile++)
            covered[row + i][tile]++;
}

template <class S> static void walk_all(struct launch l) {
    const struct arguments &a = l.a;
    uint32_t *chunks = (uint32_t *)dynamic_shared;
    if (chunk_size(a) > LANE_BATCHES) {
        sum_chunks<WARPS>(a, chunks);
        __syncthreads();
    }
    if (threadIdx.x >= 32)
        return;
    struct walk w = S::LEAN ? find_lean_run(a) : find_run<S>(a, chunks);
    while (walk_next<S>(a, w)) {
        uint32_t mine = (uint32_t)((w.next.batch * 31 + w.query) * 31 + w.begin) * 31 + w.end;
        splits += __shfl_sync(0xffffffffu, mine, 0) != mine;
        if (threadIdx.x == 0)
            cover<S>(a, w);
    }
}

/* ---- settings -------------------------------------------------------------------------------- */

static int64_t fill_lengths(int32_t *lengths, int64_t n, int32_t most, bool packed) {
    int64_t sum = 0;
    for (int64_t b = 0; b < n; b++) {
        int32_t kind = below(8), length = kind == 0 ? 0 : kind == 1 ? most : below(most + 1);
        sum += length;
        lengths[b] = packed ? (int32_t)sum : length;
        if (!packed && below(20) == 0)
            lengths[b] = below(2) ? INT32_MIN + length : INT32_MAX - length;
    }
    return sum;
}

/* Returns false where there is nothing to walk. */
static bool make_slab(struct slab *slab, int32_t block) {
    struct problem *p = &slab->p;
    memset(slab, 0, sizeof *slab);
    p->n_batch = 1 + below(below(3) ? 40 : MAX_BATCH);
    int32_t most_query = 1 + below(below(2) ? block : MAX_QUERY);
    while (most_query * p->n_batch > MAX_ROWS)
        most_query /= 2;
    int32_t most_key = 1 + below(below(2) ? MAX_KEY : 100);
    p->query_packed = below(3) == 0;
    p->key_packed = p->query_packed && below(2);
    p->page_size = p->key_packed ? 0 : TILE_KEYS << below(3);
    p->sparse_mode = below(3) ? 3 : 0;
    int64_t queries = fill_lengths(query_lengths, p->n_batch, most_query, p->query_packed);
    int64_t keys = fill_lengths(key_lengths, p->n_batch, most_key, p->key_packed);
    p->n_query = p->query_packed ? queries : most_query;
    p->n_key = p->key_packed ? keys : most_key;
    p->query_lengths = p->query_packed || below(4) ? query_lengths : NULL;
    p->key_lengths = p->key_packed || below(4) ? key_lengths : NULL;
    int64_t rows = lidx_rows(p), step = !p->query_packed && below(2) ? p->n_query : 1;
    if (!rows || !p->n_key)
        return false;
    slab->row_begin = below(2) ? below((int32_t)(rows / step)) * step : 0;
    slab->row_end = rows;
    if (below(2))
        slab->row_end =
            slab->row_begin + (1 + below((int32_t)((rows - slab->row_begin) / step))) * step;
    slab->scores_stride = (p->n_key + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS;
    return true;
}

static void check_covered(const struct slab *slab, long number) {
    const struct problem *p = &slab->p;
    long wrong = 0;
    for (int64_t b = 0; b < p->n_batch; b++) {
        struct extent e = lidx_extent(p, b);
        for (int64_t i = 0; i < e.n_slots; i++) {
            int64_t row = (p->query_packed ? e.query_begin : b * p->n_query) + i;
            int64_t tiles = (lidx_visible(p, &e, i) + TILE_KEYS - 1) / TILE_KEYS;
            for (int64_t tile = 0; tile < tiles; tile++)
                wrong += covered[row][tile] != (row >= slab->row_begin && row < slab->row_end);
        }
    }
    check(!wrong, "visible tiles of the slab are not come to once", number);
}

template <class S> static void check_walks(const struct slab *slab, long number) {
    static struct launch l;
    struct arguments *a = &l.a;
    memset(&l, 0, sizeof l);
    a->p = slab->p;
    a->line = {slab->row_begin, slab->row_end, __builtin_ctz(S::BLOCK), S::CHARGE};
    a->scores_stride = slab->scores_stride;
    batches_of_line(&a->p, &a->line, &a->batch_begin, &a->batch_end);
    lean_walks += S::LEAN;
    large_chunks += chunk_size(*a) > LANE_BATCHES;
    memset(covered, 0, sizeof covered);
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3(1 + (unsigned)below(below(2) ? 140 : 8));
    c.blockDim = dim3(WARPS * 32);
    void *arguments[] = {&l};
    cudaLaunchKernelExC(&c, (const void *)walk_all<S>, arguments);
    check_covered(slab, number);
    check(splits == 0, "lanes of a warp walk differently", number);
}

template <int BLOCK, int CHARGE> static void check_setting(long number) {
    static struct slab slab;
    if (!make_slab(&slab, BLOCK))
        return;
    check_walks<shape<BLOCK, CHARGE>>(&slab, number);
    if (is_lean<shape<BLOCK, CHARGE, true>>(&slab))
        check_walks<shape<BLOCK, CHARGE, true>>(&slab, number);
}

int main(void) {
    srand(1);
    for (long number = 0; number < SETTINGS; number += 4) {
        check_setting<1, 1>(number);
        check_setting<2, 2>(number + 1);
        check_setting<8, 1>(number + 2);
        check_setting<4, 2>(number + 3);
    }
    check(lean_walks > SETTINGS / 8, "lean walks were rare", SETTINGS);
    check(large_chunks > SETTINGS / 50, "large chunks were rare", SETTINGS);
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
