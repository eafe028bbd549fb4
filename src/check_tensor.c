/* SPDX-License-Identifier: Apache-2.0 */
#include "check_tensor.h"

#include <stdio.h>

#include "dtype.h"
#include "error.h"

enum { TEXT = 96 }; /* of a shape or a type in a sentence */

/* A size of 0 counts as 1 here, so that no product of some of the sizes overflows later. */
static int count_elements(struct operand *o) {
    const struct lidx_tensor *t = o->tensor;
    int64_t n = 1;
    int empty = 0;
    for (int i = 0; i < t->ndim; i++) {
        int64_t size = t->shape[i];
        if (size < 0)
            return lidx_fail(LIDX_ERR_SHAPE,
                             "%s has size %lld in dimension %d; sizes are 0 or more", o->name,
                             (long long)size, i);
        if (size == 0)
            empty = 1;
        else if (__builtin_mul_overflow(n, size, &n) || n > INT64_MAX / 64)
            return lidx_fail(LIDX_ERR_SHAPE, "%s has more elements than 64 bits can address",
                             o->name);
    }
    o->n_elements = empty ? 0 : n;
    return LIDX_OK;
}

int lidx_check_structure(struct operand *o, const char *name, const struct lidx_tensor *t, int ndim,
                         const struct lidx_device *device) {
    *o = (struct operand){.name = name, .tensor = t};
    if (!t)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s is missing; it is a required argument", name);
    if (t->ndim != ndim)
        return lidx_fail(LIDX_ERR_SHAPE, "%s has %d dimensions; it should have %d", name,
                         (int)t->ndim, ndim);
    if (!t->shape)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s.shape is NULL; it should list %d sizes", name,
                         ndim);
    if (t->dtype.lanes != 1)
        return lidx_fail(LIDX_ERR_DTYPE, "%s has %d lanes an element; it should have 1", name,
                         (int)t->dtype.lanes);
    int status = count_elements(o);
    if (status)
        return status;
    if (t->device.device_type != device->device_type || t->device.device_id != device->device_id)
        return lidx_fail(LIDX_ERR_DEVICE,
                         "%s is on device (%d, %d) and query on (%d, %d); all tensors should be on "
                         "one device",
                         name, (int)t->device.device_type, (int)t->device.device_id,
                         (int)device->device_type, (int)device->device_id);
    return LIDX_OK;
}

int lidx_tensor_dtype(const struct lidx_tensor *t) {
    for (int i = 0; i < DTYPE_COUNT; i++)
        if (t->dtype.code == lidx_dtypes[i].code && t->dtype.bits == lidx_dtypes[i].bits)
            return i;
    return DTYPE_COUNT;
}

/* "int64", "float8_e4m3fn": DLPack's name of a type, or its numbers where it has none. */
static void name_dtype(char text[TEXT], const struct lidx_dtype *t) {
    static const char *const kinds[] = {"int", "uint", "float", NULL, "bfloat", "complex"};
    static const char *const names[] = {
        "bool",          "float8_e3m4",     "float8_e4m3", "float8_e4m3b11fnuz",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
        "float8_e8m0fnu"};
    enum { KINDS = sizeof kinds / sizeof kinds[0], NAMES = sizeof names / sizeof names[0] };
    unsigned code = t->code, bits = t->bits;
    if (code < KINDS && kinds[code])
        snprintf(text, TEXT, "%s%u", kinds[code], bits);
    else if (code >= KINDS && code < KINDS + NAMES)
        snprintf(text, TEXT, "%s", names[code - KINDS]);
    else
        snprintf(text, TEXT, "(code %u, %u bits)", code, bits);
}

int lidx_refuse_dtype(const struct operand *o, const char *should_be, const char *why) {
    char is[TEXT];
    name_dtype(is, &o->tensor->dtype);
    return lidx_fail(LIDX_ERR_DTYPE, "%s has dtype %s; it should be %s%s", o->name, is, should_be,
                     why);
}

int lidx_check_float_dtype(struct operand *o, int query_dtype) {
    o->dtype = lidx_tensor_dtype(o->tensor);
    if (o->dtype == query_dtype || o->dtype == DTYPE_F32)
        return LIDX_OK;
    return lidx_refuse_dtype(o, lidx_dtypes[query_dtype].name, ", as query, or float32");
}

int lidx_check_int32(struct operand *o) {
    o->dtype = -1;
    if (o->tensor->dtype.code == LIDX_INT && o->tensor->dtype.bits == 32)
        return LIDX_OK;
    return lidx_refuse_dtype(o, "int32", "");
}

static void format_shape(char text[TEXT], const int64_t *shape, int ndim) {
    size_t used = (size_t)snprintf(text, TEXT, "[");
    for (int i = 0; i < ndim && used < TEXT - 1; i++)
        used +=
            (size_t)snprintf(text + used, TEXT - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    if (used < TEXT - 1)
        snprintf(text + used, TEXT - used, "]");
}

int lidx_check_shape(const struct operand *o, const int64_t *expected, const char *meaning) {
    const struct lidx_tensor *t = o->tensor;
    int i = 0;
    while (i < t->ndim && t->shape[i] == expected[i])
        i++;
    if (i == t->ndim)
        return LIDX_OK;
    char is[TEXT], should_be[TEXT];
    format_shape(is, t->shape, t->ndim);
    format_shape(should_be, expected, t->ndim);
    return lidx_fail(LIDX_ERR_SHAPE, "%s has shape %s; it should be %s, %s", o->name, is, should_be,
                     meaning);
}

static int element_bytes(const struct operand *o) {
    return o->tensor->dtype.bits / 8;
}

int lidx_check_strides(struct operand *o, int packed, int is_output) {
    const struct lidx_tensor *t = o->tensor;
    int64_t inner = 1;
    for (int i = t->ndim - 1; i > 0; i--) {
        if (t->strides && o->n_elements && t->shape[i] != 1 && t->strides[i] != inner)
            return lidx_fail(
                LIDX_ERR_STRIDE,
                "%s has stride %lld in dimension %d; it should be %lld (all dimensions "
                "but the first are contiguous)",
                o->name, (long long)t->strides[i], i, (long long)inner);
        inner *= t->shape[i];
    }
    int64_t stride = inner;
    if (t->strides && o->n_elements && t->shape[0] > 1) {
        int64_t least = is_output ? inner : 0, most = INT64_MAX / 16 / t->shape[0];
        stride = t->strides[0];
        if (packed && stride != inner)
            return lidx_fail(LIDX_ERR_STRIDE,
                             "%s has stride %lld in dimension 0; it should be %lld (contiguous)",
                             o->name, (long long)stride, (long long)inner);
        if (stride < least || stride > most)
            return lidx_fail(LIDX_ERR_STRIDE,
                             "%s has stride %lld in dimension 0; it should be at %s %lld", o->name,
                             (long long)stride, stride < least ? "least" : "most",
                             (long long)(stride < least ? least : most));
    }
    o->batch_stride = packed ? 0 : stride * element_bytes(o);
    return LIDX_OK;
}

int lidx_check_data(struct operand *o) {
    const struct lidx_tensor *t = o->tensor;
    if (o->n_elements == 0)
        return LIDX_OK;
    if (!t->data)
        return lidx_fail(LIDX_ERR_ARGUMENT, "%s.data is NULL; it should point at %lld elements",
                         o->name, (long long)o->n_elements);
    o->data = (unsigned char *)t->data + t->byte_offset;
    if ((uintptr_t)o->data & (uintptr_t)(element_bytes(o) - 1)) /* a power of two */
        return lidx_fail(LIDX_ERR_ARGUMENT,
                         "%s.data is not aligned to its elements; it should be a multiple of %d",
                         o->name, element_bytes(o));
    return LIDX_OK;
}
