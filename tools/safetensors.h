/* SPDX-License-Identifier: Apache-2.0
 *
 * The safetensors format: 8 bytes header length (little-endian), a JSON object that gives each
 * tensor its dtype, shape and range of bytes, then the bytes. Files are mapped, not read.
 */
#ifndef LIDX_SAFETENSORS_H
#define LIDX_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

struct cJSON;

enum { TENSOR_DIMS = 8 };

/* A file's element type: its name in the format and the size of one element in bits. */
struct element {
    const char *name;
    int bits;
};

struct tensor {
    const char *name; /* owned by the file, or by the caller for a file to be written */
    const struct element *element;
    int ndim;
    int64_t shape[TENSOR_DIMS];
    int64_t begin, end; /* within the bytes */
    const void *data;
};

struct safetensors {
    const char *path;
    void *map;
    size_t map_size;
    struct cJSON *header;
    struct tensor *tensors; /* in the order of their bytes */
    int n_tensors;
};

/* The row of this name ("BF16"), or NULL. */
const struct element *element_named(const char *name);

/* Returns EXIT_FINE or, after a sentence, EXIT_TROUBLE. Then every tensor lies within the file,
 * none overlaps another, no byte is left over and sizes fit shapes. */
int safetensors_open(struct safetensors *file, const char *path);
void safetensors_close(struct safetensors *file);

const struct tensor *safetensors_find(const struct safetensors *file, const char *name);

/* A string of the file's __metadata__, or NULL. */
const char *safetensors_metadata(const struct safetensors *file, const char *name);

/* Writes a file as output.h promises. `metadata` is an object of strings or NULL. `begin` and
 * `end` of the tensors are filled in. */
int safetensors_write(const char *path, struct tensor *tensors, int n_tensors,
                      const struct cJSON *metadata);

#endif
