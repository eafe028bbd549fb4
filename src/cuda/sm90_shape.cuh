/* SPDX-License-Identifier: Apache-2.0
 *
 * What the parts of the Hopper score kernel share: an instance's constants and the layout of
 * shared memory.
 */
#ifndef LIDX_SM90_SHAPE_CUH
#define LIDX_SM90_SHAPE_CUH

#include "hopper.cuh"
#include "launch.h"
#include "sm90_arguments.cuh"

namespace {

enum {
    WARPGROUP = 128,
    CONSUMERS = 2,
    THREADS = (CONSUMERS + 1) * WARPGROUP,
    MAX_SHARED = 232448, /* what a CTA of an SM90 may have */
    SPARE_SHARED = 8192, /* of it, for all but queries and keys */
    READ_AHEAD = 98304,  /* bytes of keys asked for ahead in decode: see docs/kernel-sm90.md */
    BARRIER_TURN = 1,    /* named barriers 1 and 2 */
    BARRIER_FEED = 3,    /* the barriers in shared memory are made */
    BARRIER_CONSUME = 4,
};

/* What an instance fixes: heads, head_dim, columns of an item. LEAN: decode as it mostly is,
 * without the code for what else there may be (see is_lean), which costs time at the head of a
 * launch. */
template <int HEADS_, int DIM_, int COLUMNS_, bool LEAN_ = false> struct shape {
    static constexpr bool LEAN = LEAN_;
    static constexpr int HEADS = HEADS_;
    static constexpr int DIM = DIM_;
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int BLOCK = COLUMNS / HEADS; /* query rows of an item */
    static constexpr int LANES = 4 * HEADS > COLUMNS ? 4 * HEADS / COLUMNS : 1;
    static constexpr int GROUPS = COLUMNS > 4 * HEADS ? COLUMNS / (4 * HEADS) : 1;
    static constexpr int GROUP_ROWS = COLUMNS / GROUPS; /* columns that one query box fills */
    static constexpr int HALVES = DIM / 64;             /* 128-byte pieces of a row */
    static constexpr int QUERY_BYTES = COLUMNS * DIM * 2;
    static constexpr int KEY_BYTES = TILE_KEYS * DIM * 2;
    static constexpr int ROOM = (MAX_SHARED - SPARE_SHARED - 2 * QUERY_BYTES) / KEY_BYTES;
    /* Two consumers of 128 accumulators need the tensor cores in turns; with fewer the memory
     * is the limit and they may run as they come. */
    static constexpr bool TURNS = COLUMNS == 256;
    /* Without turns a stage must always serve the same consumer, so their number is even: one
     * that was not there when a stage's last phase completed could take that phase's parity
     * for the next one's. */
    static constexpr int MOST = TURNS ? 16 : READ_AHEAD / KEY_BYTES;
    static constexpr int STAGES = ROOM >= MOST ? MOST : TURNS ? ROOM : ROOM / 2 * 2;
    /* Twice the consumers' and once the producers' are 3 x 168, the registers at launch. */
    static constexpr int CONSUMER_REGISTERS = COLUMNS == 256 ? 216 : 208;
    static constexpr int PRODUCER_REGISTERS = COLUMNS == 256 ? 72 : 88;
    /* Decode reads keys once and writes few scores: L2 then has room for all of these until the
     * selection reads them, if keys do not drive them out. Prefill reads its keys many times. */
    static constexpr enum keep KEEP_KEYS = COLUMNS == 256 ? KEEP_NORMAL : KEEP_SHORT;
    static constexpr bool DECODE = COLUMNS < 256;
    static constexpr int CHARGE = COLUMNS == 256 ? 2 : COLUMNS / 64;
    static constexpr int LANE_COLUMNS = COLUMNS / 4;
    static constexpr int WEIGHT_PITCH = LANE_COLUMNS + 4; /* no bank conflict between lanes */
};

struct item {
    int64_t scores; /* where in the slab the score of its first query and first key lies */
    int32_t key;    /* first key */
    int32_t n_tiles;
};

template <class S> struct shared_memory {
    uint8_t query[2][S::QUERY_BYTES];
    uint8_t key[S::STAGES][S::KEY_BYTES];
    float weights[2][4][S::WEIGHT_PITCH];
    int32_t limits[2][S::BLOCK]; /* keys that each query sees */
    struct item items[2];
    uint32_t masked[S::STAGES]; /* bit w: keys 16w .. 16w + 15 have no valid page */
    uint64_t query_full[2];
    uint64_t query_empty[2];
    uint64_t key_full[S::STAGES];
    uint64_t key_empty[S::STAGES];
    uint32_t chunks[32]; /* places of the batches, in 32 chunks, if these are large */
};

/* A ring of places: consumers and producers step through it alike. */
struct ring {
    int place;
    uint32_t phase;
};

template <int PLACES, int STEP> __device__ __forceinline__ void ring_step(struct ring &r) {
    r.place += STEP;
    if (r.place >= PLACES) {
        r.place -= PLACES;
        r.phase ^= 1;
    }
}

} // namespace

#endif
