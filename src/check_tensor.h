/* SPDX-License-Identifier: Apache-2.0
 *
 * What is asked of a tensor whatever its layout. Each check returns LIDX_OK, or a status after a
 * sentence that begins with the tensor's name.
 */
#ifndef LIDX_CHECK_TENSOR_H
#define LIDX_CHECK_TENSOR_H

#include "lightning_indexer.h"

/* What is known of one argument while it is checked. */
struct operand {
    const char *name;
    const struct lidx_tensor *tensor; /* NULL: optional and not given */
    void *data;                       /* with byte_offset; NULL when there are no elements */
    int dtype;                        /* enum dtype; -1 for int32 */
    int64_t n_elements;
    int64_t batch_stride; /* bytes along the first axis; 0 when packed */
};

/* What has to hold before a shape means anything: `t` is there, has ndim sizes, whose product is no
 * nonsense, and is on the device. Begins *o; the checks below come after it. */
int lidx_check_structure(struct operand *o, const char *name, const struct lidx_tensor *t, int ndim,
                         const struct lidx_device *device);

/* The enum dtype of a tensor's elements; DTYPE_COUNT when they are none of these. */
int lidx_tensor_dtype(const struct lidx_tensor *t);

/* Says "query has dtype float64; it should be ...", and returns LIDX_ERR_DTYPE. */
int lidx_refuse_dtype(const struct operand *o, const char *should_be, const char *why);

/* Elements of query's type or float32. */
int lidx_check_float_dtype(struct operand *o, int query_dtype);

int lidx_check_int32(struct operand *o);

/* The shape is `expected`, as many sizes as the tensor has; `meaning` tells what it stands for. */
int lidx_check_shape(const struct operand *o, const int64_t *expected, const char *meaning);

/* All axes but the first must be contiguous; the first too when `packed`. An output's batches
 * must not overlap. Axes of size 1 have no stride to speak of. */
int lidx_check_strides(struct operand *o, int packed, int is_output);

/* A pointer, aligned to its elements, where there are any. */
int lidx_check_data(struct operand *o);

#endif
