/* SPDX-License-Identifier: Apache-2.0
 *
 * What a scenario was answered in a first form, to hold its other forms against.
 */
#ifndef LIDX_ANSWERS_H
#define LIDX_ANSWERS_H

#include "scenario.h"

/* By batch: [n_query][top_k]. */
struct answers {
    int32_t *index[MAX_BATCH];
    float *value[MAX_BATCH];
};

void answers_make(struct answers *a, const struct scenario *s);
void answers_free(struct answers *a, const struct scenario *s);

/* From a rendering in a form of whole batches with float32 values. */
void answers_keep(struct answers *a, const struct scenario *s, const struct rendering *r,
                  const struct form *f);

/* The first slot in which row i of segment g differs from what was kept, bit by bit; -1 if none
 * does. */
int64_t answers_difference(const struct answers *a, const struct scenario *s,
                           const struct rendering *r, const struct form *f, int g, int64_t i);

#endif
