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

/* Checks that each row of a rendering in any form is what was kept, bit by bit, and that nothing
 * was written between rows. The format, which says what was run, begins the sentence about the
 * first that is not. */
__attribute__((format(printf, 5, 6))) void
answers_check(const struct answers *a, const struct scenario *s, const struct rendering *r,
              const struct form *f, const char *run, ...);

#endif
