/* SPDX-License-Identifier: Apache-2.0
 *
 * The safetensors reader on a file of any bytes. A file that it accepts keeps its promises: every
 * tensor within the file, none overlapping another, sizes that fit shapes, names that are unique.
 */
#include "../test.h"

#include "../../tools/message.h"
#include "../../tools/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int n_sentences;

/* In place of message.c: counts, does not print. */
int refuse(const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    n_sentences += vsnprintf(text, sizeof text, format, arguments) > 15;
    va_end(arguments);
    return EXIT_TROUBLE;
}

__attribute__((noreturn)) static void complain(const char *what) {
    fprintf(stderr, "fuzz_safetensors: %s\n", what);
    abort();
}

static unsigned sum_of_bytes;

static void check_tensor(const struct safetensors *file, const struct tensor *t) {
    const unsigned char *bytes = t->data, *map = file->map;
    if (t->ndim < 0 || t->ndim > TENSOR_DIMS || !t->element || !t->name)
        complain("a tensor without a description");
    double n = t->element->bits / 8.0;
    for (int i = 0; i < t->ndim; i++)
        n *= (double)t->shape[i];
    if (t->begin < 0 || t->end < t->begin || n != (double)(t->end - t->begin))
        complain("a tensor whose size does not fit its shape");
    if (bytes < map + 8 || bytes + (t->end - t->begin) > map + file->map_size)
        complain("a tensor outside of the file");
    for (int64_t i = 0; i < t->end - t->begin; i++)
        sum_of_bytes += bytes[i];
    if (safetensors_find(file, t->name) != t)
        complain("a tensor that is not found by its name");
}

static void check_file(const struct safetensors *file) {
    int64_t reached = 0;
    for (int i = 0; i < file->n_tensors; i++) {
        const struct tensor *t = &file->tensors[i];
        check_tensor(file, t);
        if (t->begin != reached)
            complain("tensors that overlap or leave a hole");
        reached = t->end;
    }
    (void)safetensors_metadata(file, "layout_query");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    struct safetensors file;
    if (fd < 0) {
        fd = memfd_create("fuzz", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (fd < 0 || ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
        complain("no file to test with");
    n_sentences = 0;
    int status = safetensors_open(&file, path);
    if (status == EXIT_FINE) {
        check_file(&file);
        safetensors_close(&file);
    } else if (status != EXIT_TROUBLE || n_sentences != 1) {
        complain("a refusal that is not one sentence");
    }
    return 0;
}
