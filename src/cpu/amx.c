/* SPDX-License-Identifier: Apache-2.0
 *
 * AMX: 16 keys in place against 16 heads at a time, in bf16 tiles.
 *
 * A slot is one head tile of one key block: 16 keys x 16 heads of dot products in one accumulator
 * tile. The tile registers:
 *
 *     tmm0, tmm1   accumulators of even and odd slots; row = key, lane = head
 *     tmm2..tmm5   bf16: the block's keys, 32 dimensions each, resident for all its slots
 *                  fp16: high and low parts of the keys, for even and odd steps
 *     tmm6, tmm7   packed query; bf16: even and odd steps, fp16: high and low parts
 *
 * A tile reaches the vector registers only through memory, so three slots are under way at once:
 * slot s is multiplied, slot s-1 is stored to a ring of two tiles, and slot s-2 is read back, sent
 * through ReLU, weighted and added to 16 running sums (zmm, one per key). Stored a slot late, a
 * tile never waits for its product. The vector work is dealt out between the tile instructions:
 * back to back these run slower on a core whose tile unit has another user. After the last head
 * tile of a block a transposing tree turns the 16 sums into 16 scores.
 *
 * A packed query is, for each head tile and each step of 32 dimensions, the 1 KiB tile that
 * TDPBF16PS wants as its second operand: row p holds a pair of dimensions of 16 heads. Behind the
 * tiles come the weights and, for fp16, a word that says whether all is finite.
 *
 * fp16 through bf16: an fp16 number is the sum of a bf16 number with its upper 8 significant bits
 * and one with the other 3. The four products of the parts of two numbers are exact in fp32, so
 * four TDPBF16PS add up the products of the fp16 numbers themselves. inf and NaN cannot be split
 * (inf * 0 would make a NaN where the true product is inf): a key or query that holds one is
 * scored by vector instructions instead.
 *
 * TDPBF16PS reads bf16 denormals (below 1.2e-38) as zero and flushes results as small. fp16
 * denormals are not affected, since they are normal numbers in bf16.
 */
#if defined(__x86_64__)

#include "kernel.h"

#include <immintrin.h>
#include <string.h>

#include "../dtype.h"
#include "features.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    LANES = 16,       /* heads of a tile, and its rows */
    STEP_DIMS = 32,   /* dimensions of one tile instruction */
    TILE_BYTES = 1024,
    NEAR_BLOCKS = 1,  /* how far ahead of the block in work lines are fetched into L1 ... */
    FAR_BLOCKS = 24,  /* ... and into L2 */
    FLAG_RING = 4,    /* key blocks from the split of keys to their score, a power of 2 */
    SPLIT_BYTES = KEY_BLOCK * MAX_HEAD_DIM * 4, /* both parts of a block of fp16 keys */
};

/* What TDPBF16PS multiplies: 2 bf16 numbers in a lane. */
typedef __m512i pairs;

/* ---- the packed query ------------------------------------------------------------------------ */

static int head_tiles(int n_heads) {
    return (n_heads + LANES - 1) / LANES;
}

/* Tiles that TDPBF16PS reads for one step: fp16 has two parts. */
static int parts_of(int dtype) {
    return dtype == DTYPE_FP16 ? 2 : 1;
}

static size_t tiles_bytes(int n_heads, int head_dim, int dtype) {
    return (size_t)head_tiles(n_heads) * (size_t)(head_dim / STEP_DIMS) *
           (size_t)parts_of(dtype) * TILE_BYTES;
}

static const float *packed_weights(const void *packed, int n_heads, int head_dim, int dtype) {
    return (const float *)((const unsigned char *)packed + tiles_bytes(n_heads, head_dim, dtype));
}

static size_t packed_size_bf16(int n_heads, int head_dim) {
    return tiles_bytes(n_heads, head_dim, DTYPE_BF16) +
           (size_t)head_tiles(n_heads) * LANES * sizeof(float);
}

static size_t packed_size_fp16(int n_heads, int head_dim) {
    return tiles_bytes(n_heads, head_dim, DTYPE_FP16) +
           (size_t)head_tiles(n_heads) * LANES * sizeof(float) + sizeof(uint32_t);
}

/* 16 x 16 words of 32 bits: four rounds, each doubling the rows that a register holds. */
INLINE void transpose(pairs out[LANES], const pairs in[LANES]) {
    pairs a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        pairs even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        pairs odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xDD);
        pairs even2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        pairs odd2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xDD);
        out[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xDD);
        out[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xDD);
    }
}

INLINE void store_tile(void *tile, const pairs rows[LANES]) {
    pairs columns[LANES];
    transpose(columns, rows);
    for (int p = 0; p < LANES; p++)
        _mm512_store_si512((pairs *)tile + p, columns[p]);
}

/* The two bf16 parts of 32 fp16 numbers. A lane pairs dimension p with dimension 16 + p, on both
 * sides of the product. Where a number is not finite, high is it and low is a NaN. */
INLINE void split(pairs *high, pairs *low, const void *halves) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    __m512i both = _mm512_loadu_si512(halves);
    __m512 a = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    __m512 b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    __m512i a_high = _mm512_and_si512(_mm512_castps_si512(a), upper);
    __m512i b_high = _mm512_and_si512(_mm512_castps_si512(b), upper);
    __m512 a_low = _mm512_sub_ps(a, _mm512_castsi512_ps(a_high)); /* exact, at most 3 bits */
    __m512 b_low = _mm512_sub_ps(b, _mm512_castsi512_ps(b_high));
    *high = _mm512_or_si512(_mm512_srli_epi32(a_high, 16), b_high);
    *low = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a_low), 16),
                           _mm512_castps_si512(b_low));
}

/* Lanes of 16 bits that are inf or NaN in fp16. */
INLINE __mmask32 not_finite(const void *halves) {
    const __m512i exponent = _mm512_set1_epi16(0x7C00);
    __m512i x = _mm512_loadu_si512(halves);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
}

static void pack_weights(float *weights, const struct query_row *row) {
    int padded = head_tiles(row->n_heads) * LANES;
    for (int h = 0; h < padded; h++)
        weights[h] = h < row->n_heads ? row->weights[h] : 0;
}

/* Not 0: the query holds an inf or NaN. */
static uint32_t query_special(const float *behind_weights) {
    uint32_t special;
    memcpy(&special, behind_weights, sizeof special);
    return special;
}

TARGET static void pack_bf16(void *packed, const struct query_row *row) {
    unsigned char *tile = packed;
    size_t head_bytes = (size_t)row->head_dim * 2;
    for (int first = 0; first < row->n_heads; first += LANES) {
        for (int dim = 0; dim < row->head_dim; dim += STEP_DIMS) {
            pairs heads[LANES];
            const unsigned char *source = row->query;
            source += (size_t)first * head_bytes + (size_t)dim * 2;
            for (int h = 0; h < LANES; h++)
                heads[h] = first + h < row->n_heads
                               ? _mm512_loadu_si512(source + (size_t)h * head_bytes)
                               : _mm512_setzero_si512();
            store_tile(tile, heads);
            tile += TILE_BYTES;
        }
    }
    pack_weights((float *)(void *)tile, row);
}

TARGET static void pack_fp16(void *packed, const struct query_row *row) {
    unsigned char *tile = packed;
    size_t head_bytes = (size_t)row->head_dim * 2;
    uint32_t special = 0;
    for (int first = 0; first < row->n_heads; first += LANES) {
        for (int dim = 0; dim < row->head_dim; dim += STEP_DIMS) {
            pairs high[LANES], low[LANES];
            const unsigned char *source = row->query;
            source += (size_t)first * head_bytes + (size_t)dim * 2;
            for (int h = 0; h < LANES; h++) {
                high[h] = low[h] = _mm512_setzero_si512();
                if (first + h < row->n_heads) {
                    split(&high[h], &low[h], source + (size_t)h * head_bytes);
                    special |= not_finite(source + (size_t)h * head_bytes);
                }
            }
            store_tile(tile, high);
            store_tile(tile + TILE_BYTES, low);
            tile += 2 * TILE_BYTES;
        }
    }
    float *weights = (float *)(void *)tile;
    pack_weights(weights, row);
    memcpy(weights + head_tiles(row->n_heads) * LANES, &special, sizeof special);
}

/* ---- tile instructions: register numbers are part of their names ------------------------------ */

INLINE void zero_sums(int c) {
    if (c == 0)
        _tile_zero(0);
    else
        _tile_zero(1);
}

INLINE void store_sums(int c, float *tile) {
    if (c == 0)
        _tile_stored(0, tile, 64);
    else
        _tile_stored(1, tile, 64);
}

INLINE void load_keys(int step, const void *keys, int64_t stride) {
    switch (step) {
    case 0:
        _tile_loadd(2, keys, stride);
        break;
    case 1:
        _tile_loadd(3, keys, stride);
        break;
    case 2:
        _tile_loadd(4, keys, stride);
        break;
    default:
        _tile_loadd(5, keys, stride);
    }
}

INLINE void load_query(int which, const void *tile) {
    if (which == 0)
        _tile_loadd(6, tile, 64);
    else
        _tile_loadd(7, tile, 64);
}

INLINE void multiply(int c, int step) {
    switch (c * 4 + step) {
    case 0:
        _tile_dpbf16ps(0, 2, 6);
        break;
    case 1:
        _tile_dpbf16ps(0, 3, 7);
        break;
    case 2:
        _tile_dpbf16ps(0, 4, 6);
        break;
    case 3:
        _tile_dpbf16ps(0, 5, 7);
        break;
    case 4:
        _tile_dpbf16ps(1, 2, 6);
        break;
    case 5:
        _tile_dpbf16ps(1, 3, 7);
        break;
    case 6:
        _tile_dpbf16ps(1, 4, 6);
        break;
    default:
        _tile_dpbf16ps(1, 5, 7);
    }
}

/* The products of the high parts of keys with both parts of the query, or of the low ones. */
INLINE void multiply_parts(int c, int step, int low) {
    switch (c * 4 + step % 2 * 2 + low) {
    case 0:
        _tile_dpbf16ps(0, 2, 6);
        _tile_dpbf16ps(0, 2, 7);
        break;
    case 1:
        _tile_dpbf16ps(0, 3, 6);
        _tile_dpbf16ps(0, 3, 7);
        break;
    case 2:
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 4, 7);
        break;
    case 3:
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(0, 5, 7);
        break;
    case 4:
        _tile_dpbf16ps(1, 2, 6);
        _tile_dpbf16ps(1, 2, 7);
        break;
    case 5:
        _tile_dpbf16ps(1, 3, 6);
        _tile_dpbf16ps(1, 3, 7);
        break;
    case 6:
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        break;
    default:
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
    }
}

/* Memory that C code wrote and a tile load reads next: the load says nothing of it to gcc. */
INLINE void publish(const void *memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

/* ---- one call of score() ---------------------------------------------------------------------- */

struct place {
    int tile; /* head tile */
    int block;
    int token; /* of the two of score_two() */
};

/* A query token and where its scores go. */
struct token {
    const unsigned char *tiles;
    const float *weights;
    float *score;
};

struct keys {
    const unsigned char *row;
    int64_t stride;
};

struct pass {
    struct token token[2];
    const struct key_run *run;
    unsigned char *scratch; /* bf16: a tail of less than 16 keys; fp16: the parts of 16 keys */
    float *ring;            /* two tiles of sums */
    unsigned flags[FLAG_RING]; /* fp16: keys that are not finite, of the last key blocks */
    int head_dim;
    int n_tiles;
    int n_tokens;
    int n_blocks;
    int n_listed;    /* with those that are there for prefetch */
    __mmask16 heads; /* of the last head tile */
    __mmask16 keys;  /* of the last key block */
};

static int rows_in_block(const struct key_run *run, int block) {
    int left = run->n_keys - block * KEY_BLOCK;
    return left < KEY_BLOCK ? left : KEY_BLOCK;
}

/* Where tile loads find the keys of a block. */
INLINE struct keys keys_of(const struct pass *p, int block) {
    if (rows_in_block(p->run, block) < KEY_BLOCK)
        return (struct keys){p->scratch, (int64_t)p->head_dim * 2};
    return (struct keys){p->run->block[block], p->run->row_stride};
}

/* Copies the rows of a partial block and zeroes the others: a tile load takes 16 rows, and those
 * behind the run must not be touched. */
INLINE void copy_tail(unsigned char *scratch, const struct key_run *run, size_t key_bytes) {
    int rows = run->n_keys % KEY_BLOCK;
    if (rows == 0)
        return;
    const unsigned char *source = run->block[run->n_keys / KEY_BLOCK];
    for (int r = 0; r < rows; r++)
        memcpy(scratch + (size_t)r * key_bytes, source + r * run->row_stride, key_bytes);
    memset(scratch + (size_t)rows * key_bytes, 0, (size_t)(KEY_BLOCK - rows) * key_bytes);
    publish(scratch);
}

/* Splits row r of a block of fp16 keys into the block's half of scratch: for each step a tile of
 * high and a tile of low parts. Flags a key that has no parts. Rows behind the run become zeros. */
INLINE void split_row(struct pass *p, int block, int r, int steps) {
    pairs *out = (pairs *)(void *)(p->scratch + block % 2 * SPLIT_BYTES) + r;
    __mmask32 special = 0;
    for (int step = 0; step < steps; step++) {
        pairs high = _mm512_setzero_si512(), low = high;
        if (r < rows_in_block(p->run, block)) {
            const unsigned char *key = p->run->block[block];
            key += p->run->row_stride * r + step * 64;
            split(&high, &low, key);
            special |= not_finite(key);
        }
        _mm512_store_si512(out + step * 2 * LANES, high);
        _mm512_store_si512(out + (step * 2 + 1) * LANES, low);
    }
    p->flags[block % FLAG_RING] |= (unsigned)(special != 0) << r;
}

INLINE __mmask16 heads_of(const struct pass *p, int tile) {
    return tile == p->n_tiles - 1 ? p->heads : 0xFFFF;
}

/* One fp16 key by vector FMA, lanes = heads, the packed query's parts put together again. */
TARGET static float score_special(const struct pass *p, const void *key) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    const pairs *high = (const pairs *)(const void *)p->token[0].tiles;
    float total[LANES];
    __m512 sum = _mm512_setzero_ps();
    for (int tile = 0; tile < p->n_tiles; tile++) {
        __m512 dot = _mm512_setzero_ps();
        for (int dim = 0; dim < p->head_dim; dim += STEP_DIMS, high += 2 * LANES) {
            for (int i = 0; i < LANES; i++) {
                __m512i h = high[i], l = high[LANES + i];
                __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
                __m512 b = _mm512_castsi512_ps(_mm512_and_si512(h, upper));
                __m512 a_low = _mm512_castsi512_ps(_mm512_slli_epi32(l, 16));
                __m512 b_low = _mm512_castsi512_ps(_mm512_and_si512(l, upper));
                /* A low part that is NaN stands beside an inf or NaN that says all. */
                a = _mm512_mask_add_ps(a, _mm512_cmp_ps_mask(a_low, a_low, _CMP_ORD_Q), a, a_low);
                b = _mm512_mask_add_ps(b, _mm512_cmp_ps_mask(b_low, b_low, _CMP_ORD_Q), b, b_low);
                dot = _mm512_fmadd_ps(a, _mm512_set1_ps(lidx_load(key, dim + i, DTYPE_FP16)), dot);
                dot = _mm512_fmadd_ps(
                    b, _mm512_set1_ps(lidx_load(key, dim + LANES + i, DTYPE_FP16)), dot);
            }
        }
        __m512 relu = _mm512_maskz_max_ps(heads_of(p, tile), _mm512_setzero_ps(), dot);
        sum = _mm512_fmadd_ps(relu, _mm512_load_ps(p->token[0].weights + tile * LANES), sum);
    }
    _mm512_storeu_ps(total, sum);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            total[i] += total[i + width];
    return total[0];
}

static const void *key_at(const struct key_run *run, int j) {
    return (const unsigned char *)run->block[j / KEY_BLOCK] + run->row_stride * (j % KEY_BLOCK);
}

TARGET static void score_flagged(const struct pass *p, int block, unsigned flags) {
    for (; flags; flags &= flags - 1) {
        int j = block * KEY_BLOCK + __builtin_ctz(flags);
        p->token[0].score[j] = score_special(p, key_at(p->run, j));
    }
}

/* ---- vector work ------------------------------------------------------------------------------ */

/* One key's 16 heads into its running sum. max with the dot product second keeps a NaN; the mask
 * keeps out what inf * 0 makes of heads that are not there. The FMA is written out because gcc
 * would move all of them behind the last tile instruction, and spill. */
INLINE void reduce_row(__m512 *sum, const float *tile, int row, __m512 weight, __mmask16 heads) {
    __m512 dot = _mm512_load_ps(tile + row * LANES);
    __m512 relu = _mm512_maskz_max_ps(heads, _mm512_setzero_ps(), dot);
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[row]) : "v"(relu), "v"(weight));
}

INLINE void reduce_rows(__m512 *sum, const float *tile, int row, int count, __m512 weight,
                        __mmask16 heads) {
    reduce_row(sum, tile, row, weight, heads);
    reduce_row(sum, tile, row + 1, weight, heads);
    if (count == 4) {
        reduce_row(sum, tile, row + 2, weight, heads);
        reduce_row(sum, tile, row + 3, weight, heads);
    }
}

/* Adds pairs of lanes of two vectors and leaves them in one; the same for every key, so that a
 * score does not depend on its place in the block. */
INLINE __m512 fold_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

INLINE __m512 fold_pairs(__m512 a, __m512 b) {
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

INLINE __m512 fold_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    return fold_pairs(fold_lanes(a, b), fold_lanes(c, d));
}

/* Lane j of the result is the sum of the lanes of s[j]. */
INLINE __m512 sum_lanes(const __m512 *s) {
    __m512 a = fold_four(s[0], s[1], s[2], s[3]);
    __m512 b = fold_four(s[4], s[5], s[6], s[7]);
    __m512 c = fold_four(s[8], s[9], s[10], s[11]);
    __m512 d = fold_four(s[12], s[13], s[14], s[15]);
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

INLINE void clear_sums(__m512 *s) {
    s[0] = s[1] = s[2] = s[3] = s[4] = s[5] = s[6] = s[7] = _mm512_setzero_ps();
    s[8] = s[9] = s[10] = s[11] = s[12] = s[13] = s[14] = s[15] = _mm512_setzero_ps();
}

/* After the last head tile of a block. Blocks below 0 are what the pipeline holds as it fills. */
INLINE void finish_block(struct pass *p, __m512 *sum, struct place back, int fp16) {
    const int block = back.block;
    if (block >= 0) {
        __mmask16 keys = block == p->n_blocks - 1 ? p->keys : 0xFFFF;
        _mm512_mask_store_ps(p->token[back.token].score + block * KEY_BLOCK, keys, sum_lanes(sum));
        if (fp16 && p->flags[block % FLAG_RING])
            score_flagged(p, block, p->flags[block % FLAG_RING]);
    }
    clear_sums(sum);
}

/* ---- slots ------------------------------------------------------------------------------------ */

/* The lines of a block are fetched four rows at a time, dealt out to the slots of the block. */
struct fetch {
    const unsigned char *near, *far; /* first row of this slot; far may be NULL */
    int64_t stride;
    int groups;
};

INLINE int groups_of(int n_tiles) {
    return n_tiles >= 4 ? 1 : n_tiles == 1 ? 4 : 2;
}

INLINE struct fetch fetch_plan(const struct pass *p, struct place front, int fp16) {
    int per_slot = groups_of(p->n_tiles);
    int first = front.tile * per_slot;
    int near = front.block + NEAR_BLOCKS + fp16, far = front.block + FAR_BLOCKS;
    if (near >= p->n_listed)
        near = 0; /* where the next query token's call begins */
    struct fetch f = {NULL, NULL, p->run->row_stride, per_slot};
    if (first >= 4 || front.token > 0)
        return f;
    f.near = (const unsigned char *)p->run->block[near] + first * 4 * f.stride;
    if (p->run->n_ahead && far < p->n_listed)
        f.far = (const unsigned char *)p->run->block[far] + first * 4 * f.stride;
    return f;
}

INLINE void fetch_lines(const struct fetch *f, int step) {
    if (!f->near)
        return;
    for (int i = 0; i < f->groups * 4; i += 4) {
        const unsigned char *line = f->near + i * f->stride + step * 64;
        _mm_prefetch((const char *)line, _MM_HINT_T0);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T0);
        _mm_prefetch((const char *)(line + 2 * f->stride), _MM_HINT_T0);
        _mm_prefetch((const char *)(line + 3 * f->stride), _MM_HINT_T0);
    }
    if (!f->far)
        return;
    for (int i = 0; i < f->groups * 4; i += 4) {
        const unsigned char *line = f->far + i * f->stride + step * 64;
        _mm_prefetch((const char *)line, _MM_HINT_T1);
        _mm_prefetch((const char *)(line + f->stride), _MM_HINT_T1);
        _mm_prefetch((const char *)(line + 2 * f->stride), _MM_HINT_T1);
        _mm_prefetch((const char *)(line + 3 * f->stride), _MM_HINT_T1);
    }
}

/* One step of slot s: 4 or 8 rows of slot s-2 around one product (fp16: four) of slot s. */
struct step {
    const unsigned char *query; /* tiles of the slot */
    const float *tile;          /* of slot s-2 */
    __m512 weight;
    __mmask16 heads;
    int reload; /* take the next block's keys once this block is done with the register */
    struct keys next;
    struct fetch fetch;
    const unsigned char *parts; /* fp16: of the block's keys */
    int block;
    int split_row;              /* fp16: where this slot's share of the next block begins, */
    int split_rows;             /* rows in each step, or 0 */
};

INLINE void run_step(struct pass *p, __m512 *sum, const struct step *t, int c, int step, int steps,
                     int fp16) {
    const int rows = 8 / steps; /* on either side of the product */
    if (fp16) {
        const unsigned char *keys = t->parts + step * 2 * TILE_BYTES;
        load_query(0, t->query + step * 2 * TILE_BYTES);
        load_query(1, t->query + (step * 2 + 1) * TILE_BYTES);
        load_keys(step % 2 * 2, keys, 64);
        load_keys(step % 2 * 2 + 1, keys + TILE_BYTES, 64);
    } else {
        load_query(step % 2, t->query + step * TILE_BYTES);
    }
    reduce_rows(sum, t->tile, step * 2 * rows, rows, t->weight, t->heads);
    if (fp16)
        multiply_parts(c, step, 0);
    else
        multiply(c, step);
    if (step == 0)
        store_sums(!c, p->ring + !c * LANES * LANES);
    reduce_rows(sum, t->tile, step * 2 * rows + rows, rows, t->weight, t->heads);
    if (t->reload)
        load_keys(step, t->next.row + step * 64, t->next.stride);
    fetch_lines(&t->fetch, step);
    if (fp16) {
        for (int i = 0; i < t->split_rows; i++)
            split_row(p, t->block + 1, t->split_row + step * t->split_rows + i, steps);
        multiply_parts(c, step, 1);
        publish(p->scratch);
    }
}

/* The head tile and block of slots s and s-2. */
struct places {
    struct place front, back;
};

/* The rows of the next block are split four at a time like its lines are fetched, by the vector
 * units while the tile unit is busy. */
INLINE void plan_split(struct pass *p, struct step *t, struct place front, int steps) {
    int groups = groups_of(p->n_tiles);
    t->block = front.block;
    t->parts = p->scratch + front.block % 2 * SPLIT_BYTES;
    t->split_row = front.tile * groups * 4;
    t->split_rows = 0;
    if (t->split_row < KEY_BLOCK && front.block + 1 < p->n_blocks)
        t->split_rows = groups * 4 / steps;
    if (front.tile == 0)
        p->flags[(front.block + 1) % FLAG_RING] = 0;
}

/* Slot s with accumulator c = s % 2; slot s-2 used the same one and the same place in the ring. */
INLINE void slot(struct pass *p, __m512 *sum, int c, struct places at, int steps, int fp16) {
    const int slot_bytes = steps * (fp16 ? 2 : 1) * TILE_BYTES;
    struct step t;
    t.query = p->token[at.front.token].tiles + (int64_t)at.front.tile * slot_bytes;
    t.tile = p->ring + c * LANES * LANES;
    t.weight = _mm512_load_ps(p->token[at.back.token].weights + at.back.tile * LANES);
    t.heads = heads_of(p, at.back.tile);
    t.reload = !fp16 && at.front.tile == p->n_tiles - 1 && at.front.token == p->n_tokens - 1 &&
               at.front.block + 1 < p->n_blocks;
    t.next = keys_of(p, at.front.block + t.reload);
    t.fetch = fetch_plan(p, at.front, fp16);
    if (fp16)
        plan_split(p, &t, at.front, steps);
    zero_sums(c);
    run_step(p, sum, &t, c, 0, steps, fp16);
    run_step(p, sum, &t, c, 1, steps, fp16);
    if (steps == 4) {
        run_step(p, sum, &t, c, 2, steps, fp16);
        run_step(p, sum, &t, c, 3, steps, fp16);
    }
    if (at.back.tile == p->n_tiles - 1)
        finish_block(p, sum, at.back, fp16);
}

/* What remains of a slot whose tile is in the ring. */
INLINE void drain(struct pass *p, __m512 *sum, int c, struct place back, int fp16) {
    const float *tile = p->ring + c * LANES * LANES;
    const __m512 weight = _mm512_load_ps(p->token[back.token].weights + back.tile * LANES);
    const __mmask16 heads = heads_of(p, back.tile);
    reduce_rows(sum, tile, 0, 4, weight, heads);
    reduce_rows(sum, tile, 4, 4, weight, heads);
    reduce_rows(sum, tile, 8, 4, weight, heads);
    reduce_rows(sum, tile, 12, 4, weight, heads);
    if (back.tile == p->n_tiles - 1)
        finish_block(p, sum, back, fp16);
}

INLINE void advance(struct place *place, int n_tiles) {
    if (++place->tile == n_tiles) {
        place->tile = 0;
        place->block++;
    }
}

/* All slots, for any number of head tiles. */
INLINE void run_slots(struct pass *p, int steps, int fp16) {
    __m512 sum[KEY_BLOCK];
    const int n_tiles = p->n_tiles;
    int64_t n_slots = (int64_t)p->n_blocks * n_tiles;
    struct places at = {{0, 0, 0}, {n_tiles == 1 ? 0 : n_tiles - 2, n_tiles == 1 ? -2 : -1, 0}};
    clear_sums(sum);
    for (int64_t s = 0; s < n_slots; s++) {
        if (s % 2 == 0)
            slot(p, sum, 0, at, steps, fp16);
        else
            slot(p, sum, 1, at, steps, fp16);
        advance(&at.front, n_tiles);
        advance(&at.back, n_tiles);
    }
    if (n_slots % 2) {
        store_sums(0, p->ring);
        drain(p, sum, 1, at.back, fp16);
        advance(&at.back, n_tiles);
        drain(p, sum, 0, at.back, fp16);
    } else {
        store_sums(1, p->ring + LANES * LANES);
        drain(p, sum, 0, at.back, fp16);
        advance(&at.back, n_tiles);
        drain(p, sum, 1, at.back, fp16);
    }
}

/* The same for four head tiles, 49 to 64 heads, with all that depends on the head tile known to
 * the compiler. */
INLINE void run_slots_of_4(struct pass *p, int steps, int fp16) {
    __m512 sum[KEY_BLOCK];
    int block = 0;
    p->n_tiles = 4;
    p->n_tokens = 1;
    clear_sums(sum);
    for (; block < p->n_blocks; block++) {
        slot(p, sum, 0, (struct places){{0, block, 0}, {2, block - 1, 0}}, steps, fp16);
        slot(p, sum, 1, (struct places){{1, block, 0}, {3, block - 1, 0}}, steps, fp16);
        slot(p, sum, 0, (struct places){{2, block, 0}, {0, block, 0}}, steps, fp16);
        slot(p, sum, 1, (struct places){{3, block, 0}, {1, block, 0}}, steps, fp16);
    }
    store_sums(1, p->ring + LANES * LANES);
    drain(p, sum, 0, (struct place){2, block - 1, 0}, fp16);
    drain(p, sum, 1, (struct place){3, block - 1, 0}, fp16);
}

/* The same for two query tokens, whose slots take turns over the keys that tmm2..tmm5 hold. */
INLINE void run_slots_of_4_twice(struct pass *p, int steps) {
    __m512 sum[KEY_BLOCK];
    int block = 0;
    p->n_tiles = 4;
    p->n_tokens = 2;
    clear_sums(sum);
    for (; block < p->n_blocks; block++) {
        slot(p, sum, 0, (struct places){{0, block, 0}, {2, block - 1, 1}}, steps, 0);
        slot(p, sum, 1, (struct places){{1, block, 0}, {3, block - 1, 1}}, steps, 0);
        slot(p, sum, 0, (struct places){{2, block, 0}, {0, block, 0}}, steps, 0);
        slot(p, sum, 1, (struct places){{3, block, 0}, {1, block, 0}}, steps, 0);
        slot(p, sum, 0, (struct places){{0, block, 1}, {2, block, 0}}, steps, 0);
        slot(p, sum, 1, (struct places){{1, block, 1}, {3, block, 0}}, steps, 0);
        slot(p, sum, 0, (struct places){{2, block, 1}, {0, block, 1}}, steps, 0);
        slot(p, sum, 1, (struct places){{3, block, 1}, {1, block, 1}}, steps, 0);
    }
    store_sums(1, p->ring + LANES * LANES);
    drain(p, sum, 0, (struct place){2, block - 1, 1}, 0);
    drain(p, sum, 1, (struct place){3, block - 1, 1}, 0);
}

/* ---- score ------------------------------------------------------------------------------------ */

static struct token token_of(float *score, const void *packed, int n_heads, int head_dim,
                             int dtype) {
    return (struct token){packed, packed_weights(packed, n_heads, head_dim, dtype), score};
}

static struct pass pass_of(float *score, const void *packed, int n_heads, int head_dim, int dtype,
                           const struct key_run *run) {
    struct pass p = {.run = run, .head_dim = head_dim, .n_tokens = 1};
    p.token[0] = token_of(score, packed, n_heads, head_dim, dtype);
    p.n_tiles = head_tiles(n_heads);
    p.n_blocks = (run->n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    p.n_listed = p.n_blocks + run->n_ahead;
    p.heads = (__mmask16)(0xFFFF >> (p.n_tiles * LANES - n_heads));
    p.keys = (__mmask16)(0xFFFF >> (p.n_blocks * KEY_BLOCK - run->n_keys));
    return p;
}

/* Loads the first block's keys, a tail copied before. */
INLINE void load_first_keys(const struct pass *p, int steps) {
    const struct keys first = keys_of(p, 0);
    load_keys(0, first.row, first.stride);
    load_keys(1, first.row + 64, first.stride);
    if (steps == 4) {
        load_keys(2, first.row + 128, first.stride);
        load_keys(3, first.row + 192, first.stride);
    }
}

TARGET static void score_bf16(float *score, const void *packed, int n_heads, int head_dim,
                              const struct key_run *run) {
    _Alignas(64) float ring[2 * LANES * LANES];
    _Alignas(64) unsigned char scratch[KEY_BLOCK * MAX_HEAD_DIM * 2];
    struct pass p = pass_of(score, packed, n_heads, head_dim, DTYPE_BF16, run);
    p.ring = ring;
    p.scratch = scratch;
    memset(ring, 0, TILE_BYTES);
    copy_tail(scratch, run, (size_t)head_dim * 2);
    load_first_keys(&p, head_dim / STEP_DIMS);
    if (head_dim == 64 && p.n_tiles == 4)
        run_slots_of_4(&p, 2, 0);
    else if (head_dim == 64)
        run_slots(&p, 2, 0);
    else if (p.n_tiles == 4)
        run_slots_of_4(&p, 4, 0);
    else
        run_slots(&p, 4, 0);
}

TARGET static void score_two_bf16(float *const score[2], const void *const packed[2], int n_heads,
                                  int head_dim, const struct key_run *run) {
    _Alignas(64) float ring[2 * LANES * LANES];
    _Alignas(64) unsigned char scratch[KEY_BLOCK * MAX_HEAD_DIM * 2];
    if (head_tiles(n_heads) != 4 || head_dim != 128) {
        score_bf16(score[0], packed[0], n_heads, head_dim, run);
        score_bf16(score[1], packed[1], n_heads, head_dim, run);
        return;
    }
    struct pass p = pass_of(score[0], packed[0], n_heads, head_dim, DTYPE_BF16, run);
    p.token[1] = token_of(score[1], packed[1], n_heads, head_dim, DTYPE_BF16);
    p.ring = ring;
    p.scratch = scratch;
    memset(ring, 0, TILE_BYTES);
    copy_tail(scratch, run, (size_t)head_dim * 2);
    load_first_keys(&p, 4);
    run_slots_of_4_twice(&p, 4);
}

TARGET static void score_fp16(float *score, const void *packed, int n_heads, int head_dim,
                              const struct key_run *run) {
    _Alignas(64) float ring[2 * LANES * LANES];
    _Alignas(64) unsigned char scratch[2 * SPLIT_BYTES];
    struct pass p = pass_of(score, packed, n_heads, head_dim, DTYPE_FP16, run);
    p.ring = ring;
    p.scratch = scratch;
    if (query_special(p.token[0].weights + p.n_tiles * LANES)) {
        for (int j = 0; j < run->n_keys; j++)
            score[j] = score_special(&p, key_at(run, j));
        return;
    }
    memset(ring, 0, TILE_BYTES);
    for (int r = 0; r < KEY_BLOCK; r++)
        split_row(&p, 0, r, head_dim / STEP_DIMS);
    publish(scratch);
    if (head_dim == 64)
        run_slots(&p, 2, 1);
    else if (p.n_tiles == 4)
        run_slots_of_4(&p, 4, 1);
    else
        run_slots(&p, 4, 1);
}

/* ---- the row of the table --------------------------------------------------------------------- */

/* Eight tiles of 16 rows of 64 bytes, as LDTILECFG reads them. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

TARGET static void enter(void) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    publish(&config);
    _tile_loadconfig(&config);
}

TARGET static void leave(void) {
    _tile_release();
}

const struct kernel lidx_kernel_amx = {
    .name = "amx",
    .needs = FEATURE_AMX_BF16 | FEATURE_AVX512,
    .enter = enter,
    .leave = leave,
    .topk = &lidx_topk_avx512,
    .path = {[DTYPE_BF16] = {packed_size_bf16, pack_bf16, score_bf16},
             [DTYPE_FP16] = {packed_size_fp16, pack_fp16, score_fp16}},
    .score_two = {[DTYPE_BF16] = score_two_bf16},
};

#endif
