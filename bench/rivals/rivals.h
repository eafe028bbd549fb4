/* SPDX-License-Identifier: Apache-2.0
 *
 * The operator put together from a library's matrix product, as a competent user would do it: a
 * tile of products small enough for the cache, ReLU, weights and the sum over heads on the tile,
 * a row of scores, and the best of the row by counting.
 *
 *     main.c      the cases, the race against lidx_run(), the report
 *     compose.c   one rival's whole operator on some threads
 *     select.c    the best k of a row, in order
 *     onednn.c    \  a library's product of one tile; left out where the
 *     libxsmm.c   /  build does not find the library
 */
#ifndef RIVALS_H
#define RIVALS_H

#include <stddef.h>
#include <stdint.h>

enum { HEADS = 64, DIM = 128, TOP_K = 2048 };

/* Random bfloat16 queries [n_query][HEADS][DIM] and keys [n_key][DIM], f32 weights. Every query
 * sees every key. */
struct problem {
    int n_query, n_key, n_threads;
    const uint16_t *query, *key;
    const float *weights;
};

/* How the products of a tile lie in memory. The other operand is the packed one: queries for
 * HEADS_FASTEST, which leaves the keys in place, and keys for KEYS_FASTEST. */
enum order { HEADS_FASTEST, KEYS_FASTEST };

struct tile {
    int tokens, keys;
    enum order order;
};

/* A tile's products by one library. What open() returns is used by one thread at a time. */
struct library {
    const char *name;
    const char *(*version)(void);
    void *(*open)(const struct tile *tile); /* NULL: the library has no kernel for it */
    void (*close)(void *op);
    size_t (*packed_bytes)(void *op); /* of one tile's packed operand */
    void (*pack)(void *op, const uint16_t *rows, void *packed);
    void (*multiply)(void *op, const void *query, const void *key, float *dots);
    const char *(*implementation)(void *op);
};

extern const struct library onednn, libxsmm;

/* ---- compose.c ------------------------------------------------------------------------------- */

struct composition;

/* NULL if the library has no kernel for the tile or memory is short. Packs what the tile wants
 * packed: that is not part of a run. */
struct composition *composition_create(const struct library *library, const struct problem *problem,
                                       const struct tile *tile);
void composition_run(struct composition *composition, int32_t *indices, float *values);
const char *composition_implementation(const struct composition *composition);
void composition_destroy(struct composition *composition);

void *allocate(size_t bytes); /* aligned to pages; NULL if it cannot be had */

/* ---- select.c -------------------------------------------------------------------------------- */

/* Several shares of a row can be counted and collected by a thread each:
 * share_count(); then, once, selection_cut(); share_collect(); then, once, selection_finish(). */
enum { BINS = 2048 };

struct share {
    uint32_t counts[BINS];
    uint64_t *above, *within; /* room for all keys of the share, each */
    int n_above, n_within;
};

void share_count(struct share *share, const float *scores, int begin, int end);
int selection_cut(const struct share *shares, int n_shares, int k);
void share_collect(struct share *share, const float *scores, int begin, int end, int cut);

/* `scratch` has room for 2 * (k + all within). */
void selection_finish(const struct share *shares, int n_shares, int k, uint64_t *scratch,
                      int32_t *indices, float *values);

#endif
