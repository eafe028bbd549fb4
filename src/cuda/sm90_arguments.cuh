/* SPDX-License-Identifier: Apache-2.0
 *
 * What a launch of the Hopper score kernel passes to it beside the tensor maps.
 */
#ifndef LIDX_SM90_ARGUMENTS_CUH
#define LIDX_SM90_ARGUMENTS_CUH

#include "schedule.h"

namespace {

struct arguments {
    struct problem p;
    struct line line;
    float *scores;
    int64_t scores_stride;
    int32_t batch_begin; /* batches that have rows in the slab */
    int32_t batch_end;
    int32_t piece_shift; /* log2 of the keys that one TMA box brings */
    unsigned long long *cycles;
    int32_t page_shift; /* log2 of the boxes of a page; -1 if it is no power of two */
};

} // namespace

#endif
