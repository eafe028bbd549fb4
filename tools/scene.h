/* SPDX-License-Identifier: Apache-2.0
 *
 * The demo's input: a long context such as DeepSeek-V3.2's indexer sees it, made from a seed.
 *
 * Keys have 64 dimensions that carry a rotary position and 64 that carry content. The context is
 * a row of passages, 64 to 511 tokens each, whose tokens share a topic from a pool of 200. A few
 * planted passages have topics of their own. The query tokens are the last ones of the context;
 * each asks for one planted passage: two thirds of its heads look for that topic, and one third,
 * through the rotary part, for what is near. Keys lie in a paged cache, its pages shuffled.
 */
#ifndef LIDX_SCENE_H
#define LIDX_SCENE_H

#include <stdint.h>

enum { SCENE_HEADS = 64, SCENE_DIM = 128, SCENE_BLOCK = 64, MAX_PLANTED = 8, PLANTED_LENGTH = 256 };

struct scene {
    int64_t n_key, n_query;
    uint64_t seed;
    int n_planted;
    int64_t planted[MAX_PLANTED]; /* where each begins, ascending */
};

/* Decides where the planted passages are. n_key is a multiple of SCENE_BLOCK. */
void scene_plan(struct scene *scene, int64_t n_key, int64_t n_query, uint64_t seed);

/* The planted passage that query token i asks for. */
int scene_asked(const struct scene *scene, int64_t i);

/* Writes the tensors, with the layouts in __metadata__. Returns EXIT_FINE or, after a sentence,
 * EXIT_TROUBLE. */
int scene_write(const struct scene *scene, const char *path);

#endif
