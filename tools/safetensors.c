/* SPDX-License-Identifier: Apache-2.0
 *
 * A file may come from anywhere: nothing in its header is believed before it is checked.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* O_CLOEXEC, mmap */
#endif

#include "safetensors.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "message.h"
#include "output.h"

/* Parsed JSON takes some 100 times its text in memory; real headers have 100 bytes a tensor. */
#define HEADER_LIMIT ((uint64_t)16 << 20)
#define EXACT_LIMIT  9007199254740992.0 /* 2^53: JSON numbers are doubles here */

static const struct element elements[] = {
    {"F32", 32},    {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"F64", 64},
    {"I64", 64},    {"U64", 64},    {"U32", 32},    {"I16", 16},    {"U16", 16},
    {"I8", 8},      {"U8", 8},      {"BOOL", 8},    {"C64", 64},    {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
};

const struct element *element_named(const char *name) {
    for (size_t i = 0; i < sizeof elements / sizeof elements[0]; i++)
        if (strcmp(elements[i].name, name) == 0)
            return &elements[i];
    return NULL;
}

static int read_count(const cJSON *item, int64_t *value) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= EXACT_LIMIT))
        return 0;
    *value = (int64_t)item->valuedouble;
    return (double)*value == item->valuedouble;
}

static int read_shape(const struct safetensors *file, struct tensor *t, const cJSON *shape) {
    if (!cJSON_IsArray(shape))
        return refuse("%s: tensor \"%.60s\" has no list as its shape", file->path, t->name);
    const cJSON *item;
    cJSON_ArrayForEach(item, shape) {
        if (t->ndim == TENSOR_DIMS)
            return refuse("%s: tensor \"%.60s\" has more than %d dimensions", file->path, t->name,
                          TENSOR_DIMS);
        if (!read_count(item, &t->shape[t->ndim]))
            return refuse("%s: tensor \"%.60s\" has a size in its shape that is no whole number "
                          "from 0 to 2^53",
                          file->path, t->name);
        t->ndim++;
    }
    return EXIT_FINE;
}

/* Bytes that the shape asks for; -1 if that is more than any file has or no whole number. Sizes
 * beside a 0 count too, so that no later product of sizes can overflow. */
static int64_t shape_bytes(const struct tensor *t) {
    int64_t product = 1;
    int empty = 0;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0)
            empty = 1;
        else if (product > INT64_MAX / 64 / t->shape[i])
            return -1;
        else
            product *= t->shape[i];
    }
    if (empty)
        return 0;
    int64_t bits = product * t->element->bits;
    return bits % 8 ? -1 : bits / 8;
}

static int read_tensor(const struct safetensors *file, struct tensor *t, const cJSON *entry,
                       int64_t n_bytes) {
    memset(t, 0, sizeof *t);
    t->name = entry->string ? entry->string : "";
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    if (!cJSON_IsString(dtype))
        return refuse("%s: tensor \"%.60s\" has no dtype", file->path, t->name);
    t->element = element_named(dtype->valuestring);
    if (!t->element)
        return refuse("%s: tensor \"%.60s\" has dtype \"%.20s\"; it should be one of the format's, "
                      "such as BF16",
                      file->path, t->name, dtype->valuestring);
    int status = read_shape(file, t, cJSON_GetObjectItemCaseSensitive(entry, "shape"));
    if (status)
        return status;
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !read_count(cJSON_GetArrayItem(offsets, 0), &t->begin) ||
        !read_count(cJSON_GetArrayItem(offsets, 1), &t->end) || t->begin > t->end)
        return refuse("%s: tensor \"%.60s\" has data_offsets that are not two whole numbers, begin "
                      "and end",
                      file->path, t->name);
    if (t->end > n_bytes)
        return refuse("%s: tensor \"%.60s\" ends at byte %lld, but the file has only %lld bytes of "
                      "data; is it truncated?",
                      file->path, t->name, (long long)t->end, (long long)n_bytes);
    int64_t needed = shape_bytes(t);
    if (needed != t->end - t->begin)
        return refuse("%s: tensor \"%.60s\" has %lld bytes; its shape and dtype %s ask for %s%lld",
                      file->path, t->name, (long long)(t->end - t->begin), t->element->name,
                      needed < 0 ? "more than " : "",
                      (long long)(needed < 0 ? INT64_MAX / 64 : needed));
    return EXIT_FINE;
}

static int by_begin(const void *a, const void *b) {
    const struct tensor *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end); /* an empty one stands before its neighbour */
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int check_names(const struct safetensors *file) {
    const char **names = malloc(((size_t)file->n_tensors + 1) * sizeof *names);
    int status = EXIT_FINE;
    if (!names)
        return refuse("no memory for the header of %s", file->path);
    for (int i = 0; i < file->n_tensors; i++)
        names[i] = file->tensors[i].name;
    qsort(names, (size_t)file->n_tensors, sizeof *names, by_name);
    for (int i = 1; i < file->n_tensors && !status; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            status = refuse("%s: there are two tensors called \"%.60s\"", file->path, names[i]);
    free(names);
    return status;
}

/* The format wants the bytes used once each, without holes. */
static int check_ranges(const struct safetensors *file, int64_t n_bytes) {
    int64_t reached = 0;
    for (int i = 0; i < file->n_tensors; i++) {
        const struct tensor *t = &file->tensors[i];
        if (t->begin < reached)
            return refuse("%s: tensor \"%.60s\" begins at byte %lld and overlaps the one before, "
                          "which ends at %lld",
                          file->path, t->name, (long long)t->begin, (long long)reached);
        if (t->begin > reached)
            return refuse("%s: bytes %lld to %lld of the data belong to no tensor", file->path,
                          (long long)reached, (long long)t->begin);
        reached = t->end;
    }
    if (reached != n_bytes)
        return refuse("%s: the last %lld bytes belong to no tensor", file->path,
                      (long long)(n_bytes - reached));
    return EXIT_FINE;
}

static int check_metadata(const struct safetensors *file, const cJSON *metadata) {
    if (!cJSON_IsObject(metadata))
        return refuse("%s: __metadata__ is not an object of strings", file->path);
    const cJSON *item;
    cJSON_ArrayForEach(item, metadata) {
        if (!cJSON_IsString(item))
            return refuse("%s: __metadata__ has \"%.60s\", which is not a string", file->path,
                          item->string);
    }
    return EXIT_FINE;
}

static int read_tensors(struct safetensors *file, const unsigned char *bytes, int64_t n_bytes) {
    int count = cJSON_GetArraySize(file->header), status;
    file->tensors = calloc((size_t)count + 1, sizeof *file->tensors);
    if (!file->tensors)
        return refuse("no memory for the header of %s", file->path);
    const cJSON *entry;
    cJSON_ArrayForEach(entry, file->header) {
        if (entry->string && strcmp(entry->string, "__metadata__") == 0)
            status = check_metadata(file, entry);
        else
            status = read_tensor(file, &file->tensors[file->n_tensors++], entry, n_bytes);
        if (status)
            return status;
    }
    qsort(file->tensors, (size_t)file->n_tensors, sizeof *file->tensors, by_begin);
    for (int i = 0; i < file->n_tensors; i++)
        file->tensors[i].data = bytes + file->tensors[i].begin;
    status = check_ranges(file, n_bytes);
    return status ? status : check_names(file);
}

static int parse(struct safetensors *file) {
    const unsigned char *map = file->map;
    uint64_t length = 0, left = file->map_size - 8;
    for (int i = 0; i < 8; i++)
        length |= (uint64_t)map[i] << (8 * i);
    if (length > left)
        return refuse(
            "%s: its first 8 bytes say that a header of %llu bytes follows, but only %llu "
            "bytes do; it is truncated or no safetensors file",
            file->path, (unsigned long long)length, (unsigned long long)left);
    if (length > HEADER_LIMIT)
        return refuse("%s: its header has %llu bytes; it should have at most %llu", file->path,
                      (unsigned long long)length, (unsigned long long)HEADER_LIMIT);
    const char *text = (const char *)map + 8, *end = NULL;
    if (length < 2 || text[0] != '{')
        return refuse("%s: its header does not begin with '{'; it is no safetensors file",
                      file->path);
    file->header = cJSON_ParseWithLengthOpts(text, length, &end, 0);
    if (!cJSON_IsObject(file->header))
        return refuse("%s: its header is not valid JSON", file->path);
    for (; end < text + length; end++)
        if (*end != ' ' && *end != '\n' && *end != '\t' && *end != '\r')
            return refuse("%s: something follows the JSON object in its header", file->path);
    return read_tensors(file, map + 8 + length, (int64_t)(left - length));
}

static int map_file(struct safetensors *file) {
    struct stat status;
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* do not wait for a pipe */
    if (fd < 0)
        return refuse("cannot open %s: %s", file->path, strerror(errno));
    int result = EXIT_FINE;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
        result = refuse("%s is not a regular file; it should be a safetensors file", file->path);
    } else if (status.st_size < 8) {
        result = refuse("%s has %lld bytes; a safetensors file has at least 8", file->path,
                        (long long)status.st_size);
    } else {
        file->map_size = (size_t)status.st_size;
        file->map = mmap(NULL, file->map_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (file->map == MAP_FAILED) {
            file->map = NULL;
            result = refuse("cannot map %s: %s", file->path, strerror(errno));
        }
    }
    close(fd);
    return result;
}

int safetensors_open(struct safetensors *file, const char *path) {
    memset(file, 0, sizeof *file);
    file->path = path;
    int status = map_file(file);
    if (!status)
        status = parse(file);
    if (status)
        safetensors_close(file);
    return status;
}

void safetensors_close(struct safetensors *file) {
    if (file->map)
        munmap(file->map, file->map_size);
    cJSON_Delete(file->header);
    free(file->tensors);
    memset(file, 0, sizeof *file);
}

const struct tensor *safetensors_find(const struct safetensors *file, const char *name) {
    for (int i = 0; i < file->n_tensors; i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *name) {
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(file->header, "__metadata__");
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(metadata, name));
}

static cJSON *describe(struct tensor *tensors, int n_tensors, const cJSON *metadata) {
    cJSON *header = cJSON_CreateObject();
    if (metadata)
        cJSON_AddItemToObject(header, "__metadata__", cJSON_Duplicate(metadata, 1));
    int64_t reached = 0;
    for (int i = 0; i < n_tensors; i++) {
        struct tensor *t = &tensors[i];
        t->begin = reached;
        t->end = reached += shape_bytes(t);
        cJSON *entry = cJSON_AddObjectToObject(header, t->name);
        cJSON_AddStringToObject(entry, "dtype", t->element->name);
        cJSON *shape = cJSON_AddArrayToObject(entry, "shape");
        for (int d = 0; d < t->ndim; d++)
            cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t->shape[d]));
        cJSON *offsets = cJSON_AddArrayToObject(entry, "data_offsets");
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)t->begin));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)t->end));
    }
    return header;
}

static int put_all(struct output *output, const char *text, const struct tensor *tensors, int n) {
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    unsigned char size[8];
    for (int i = 0; i < 8; i++)
        size[i] = (unsigned char)((uint64_t)padded >> (8 * i));
    int status = output_put(output, size, sizeof size);
    if (!status)
        status = output_put(output, text, length);
    if (!status)
        status = output_put(output, "        ", padded - length); /* data begins aligned */
    for (int i = 0; i < n && !status; i++)
        status = output_put(output, tensors[i].data, (size_t)(tensors[i].end - tensors[i].begin));
    return status;
}

int safetensors_write(const char *path, struct tensor *tensors, int n_tensors,
                      const struct cJSON *metadata) {
    cJSON *header = describe(tensors, n_tensors, metadata);
    char *text = cJSON_PrintUnformatted(header);
    cJSON_Delete(header);
    if (!text)
        return refuse("no memory for the header of %s", path);
    struct output output;
    int status = output_open(&output, path);
    if (!status)
        status = put_all(&output, text, tensors, n_tensors);
    if (!status)
        status = output_commit(&output);
    if (status)
        output_abandon(&output);
    cJSON_free(text);
    return status;
}
