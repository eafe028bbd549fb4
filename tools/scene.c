/* SPDX-License-Identifier: Apache-2.0 */
#include "scene.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"
#include "numbers.h"
#include "safetensors.h"

enum { ROTARY = 64, PAIRS = ROTARY / 2, CONTENT = SCENE_DIM - ROTARY, TOPICS = 200 };

/* Topics of the pool, then those of the planted passages; and the vector that every key's rotary
 * part is turned from, so that a query's rotary part finds what is near. */
struct vectors {
    float topic[TOPICS + MAX_PLANTED][CONTENT];
    float base[ROTARY];
    double frequency[PAIRS];
};

void scene_plan(struct scene *scene, int64_t n_key, int64_t n_query, uint64_t seed) {
    struct random random = {seed};
    *scene = (struct scene){.n_key = n_key, .n_query = n_query, .seed = seed, .n_planted = 4};
    /* One in each part of the context, the last part ending well before the queries. */
    int64_t part = (n_key - n_query) * 15 / 16 / scene->n_planted;
    for (int p = 0; p < scene->n_planted; p++)
        scene->planted[p] = p * part + random_below(&random, part - PLANTED_LENGTH);
}

int scene_asked(const struct scene *scene, int64_t i) {
    return (int)(i * scene->n_planted / scene->n_query);
}

static void make_vectors(struct vectors *v, struct random *random) {
    for (int t = 0; t < TOPICS + MAX_PLANTED; t++)
        for (int d = 0; d < CONTENT; d++)
            v->topic[t][d] = random_normal(random);
    for (int d = 0; d < ROTARY; d++)
        v->base[d] = random_normal(random);
    for (int p = 0; p < PAIRS; p++)
        v->frequency[p] = pow(10000.0, -(double)p / PAIRS);
}

/* Turns pair p = (x[p], x[p + PAIRS]) by position * frequency[p]. */
static void rotate(const struct vectors *v, int64_t position, float *x) {
    for (int p = 0; p < PAIRS; p++) {
        double angle = (double)position * v->frequency[p];
        float c = (float)cos(angle), s = (float)sin(angle), a = x[p], b = x[p + PAIRS];
        x[p] = a * c - b * s;
        x[p + PAIRS] = a * s + b * c;
    }
}

/* Which topic each token of the context has. */
static void make_topics(const struct scene *scene, struct random *random, int16_t *topic) {
    for (int64_t j = 0; j < scene->n_key;) {
        int64_t end = j + 64 + random_below(random, 448);
        int16_t chosen = (int16_t)random_below(random, TOPICS);
        for (; j < end && j < scene->n_key; j++)
            topic[j] = chosen;
    }
    for (int p = 0; p < scene->n_planted; p++)
        for (int64_t j = 0; j < PLANTED_LENGTH; j++)
            topic[scene->planted[p] + j] = (int16_t)(TOPICS + p);
}

static void make_key(const struct vectors *v, struct random *random, int topic, int64_t position,
                     uint16_t *key) {
    float x[SCENE_DIM];
    for (int d = 0; d < ROTARY; d++)
        x[d] = 0.8f * v->base[d] + 0.6f * random_normal(random);
    for (int d = 0; d < CONTENT; d++)
        x[ROTARY + d] = 0.7f * v->topic[topic][d] + 0.7f * random_normal(random);
    rotate(v, position, x);
    for (int d = 0; d < SCENE_DIM; d++)
        key[d] = float_to_bf16(x[d]);
}

static void make_head(const struct vectors *v, struct random *random, int head, int topic,
                      int64_t position, uint16_t *query, uint16_t *weight) {
    float x[SCENE_DIM];
    int is_local = head % 3 == 0;
    float near = is_local ? 0.9f : 0.1f, about = is_local ? 0.1f : 0.8f;
    for (int d = 0; d < ROTARY; d++)
        x[d] = near * v->base[d] + random_normal(random);
    for (int d = 0; d < CONTENT; d++)
        x[ROTARY + d] = about * v->topic[topic][d] + random_normal(random);
    rotate(v, position, x);
    for (int d = 0; d < SCENE_DIM; d++)
        query[d] = float_to_bf16(x[d]);
    /* Mostly positive, scaled as the model scales: heads^-0.5 * dim^-0.5. */
    *weight = float_to_bf16((0.6f + 0.4f * random_normal(random)) / (8.0f * 11.3137f));
}

struct buffers {
    struct vectors vectors;
    int16_t *topic;
    int32_t *table;
    uint16_t *key, *query, *weights;
};

static int allocate(const struct scene *scene, struct buffers *b) {
    size_t n_key = (size_t)scene->n_key, n_query = (size_t)scene->n_query;
    b->topic = malloc(n_key * sizeof *b->topic);
    b->table = malloc(n_key / SCENE_BLOCK * sizeof *b->table);
    b->key = malloc(n_key * SCENE_DIM * sizeof *b->key);
    b->query = malloc(n_query * SCENE_HEADS * SCENE_DIM * sizeof *b->query);
    b->weights = malloc(n_query * SCENE_HEADS * sizeof *b->weights);
    return b->topic && b->table && b->key && b->query && b->weights;
}

static void free_buffers(struct buffers *b) {
    free(b->topic);
    free(b->table);
    free(b->key);
    free(b->query);
    free(b->weights);
    free(b);
}

static void fill(const struct scene *scene, struct buffers *b) {
    struct random random = {scene->seed ^ 0x5CE7E};
    make_vectors(&b->vectors, &random);
    make_topics(scene, &random, b->topic);
    for (int64_t p = 0; p < scene->n_key / SCENE_BLOCK; p++)
        b->table[p] = (int32_t)p;
    random_shuffle(&random, b->table, scene->n_key / SCENE_BLOCK);
    for (int64_t j = 0; j < scene->n_key; j++) {
        int64_t row = (int64_t)b->table[j / SCENE_BLOCK] * SCENE_BLOCK + j % SCENE_BLOCK;
        make_key(&b->vectors, &random, b->topic[j], j, b->key + row * SCENE_DIM);
    }
    for (int64_t i = 0; i < scene->n_query; i++)
        for (int h = 0; h < SCENE_HEADS; h++)
            make_head(&b->vectors, &random, h, TOPICS + scene_asked(scene, i),
                      scene->n_key - scene->n_query + i,
                      b->query + (i * SCENE_HEADS + h) * SCENE_DIM,
                      b->weights + i * SCENE_HEADS + h);
}

static int save(const struct scene *scene, const struct buffers *b, const char *path) {
    const struct element *bf16 = element_named("BF16"), *i32 = element_named("I32");
    int32_t n_query = (int32_t)scene->n_query, n_key = (int32_t)scene->n_key;
    int64_t pages = scene->n_key / SCENE_BLOCK;
    struct tensor tensors[] = {
        {.name = "query",
         .element = bf16,
         .ndim = 3,
         .data = b->query,
         .shape = {scene->n_query, SCENE_HEADS, SCENE_DIM}},
        {.name = "key",
         .element = bf16,
         .ndim = 4,
         .data = b->key,
         .shape = {pages, SCENE_BLOCK, 1, SCENE_DIM}},
        {.name = "block_table", .element = i32, .ndim = 2, .data = b->table, .shape = {1, pages}},
        {.name = "actual_seq_lengths_query",
         .element = i32,
         .ndim = 1,
         .data = &n_query,
         .shape = {1}},
        {.name = "actual_seq_lengths_key", .element = i32, .ndim = 1, .data = &n_key, .shape = {1}},
        {.name = "weights",
         .element = bf16,
         .ndim = 2,
         .data = b->weights,
         .shape = {scene->n_query, SCENE_HEADS}},
    };
    cJSON *metadata = cJSON_CreateObject();
    cJSON_AddStringToObject(metadata, "layout_query", "TND");
    cJSON_AddStringToObject(metadata, "layout_key", "PA_BSND");
    cJSON_AddStringToObject(metadata, "sparse_count", "2048");
    cJSON_AddStringToObject(metadata, "sparse_mode", "3");
    int status = safetensors_write(path, tensors, sizeof tensors / sizeof tensors[0], metadata);
    cJSON_Delete(metadata);
    return status;
}

int scene_write(const struct scene *scene, const char *path) {
    struct buffers *b = calloc(1, sizeof *b);
    if (!b || !allocate(scene, b)) {
        if (b)
            free_buffers(b);
        return refuse("no memory for a context of %lld keys", (long long)scene->n_key);
    }
    fill(scene, b);
    int status = save(scene, b, path);
    free_buffers(b);
    return status;
}
