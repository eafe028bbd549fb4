/* SPDX-License-Identifier: Apache-2.0
 *
 * The answer's rows: entries to indices and values, and what fills the rest of a row.
 */
#ifndef LIDX_ANSWER_H
#define LIDX_ANSWER_H

#include "../problem.h"

/* Writes n entries of a batch's row to its places `first`, first + 1, ... */
void lidx_write_entries(const struct problem *p, int64_t batch, int64_t row, int first,
                        const uint64_t *entry, int n);

/* Writes -1 and -inf to the places of a row from `first` on. */
void lidx_write_missing(const struct problem *p, int64_t batch, int64_t row, int first);

/* Rows of a batch past its real length. */
void lidx_write_empty_rows(const struct problem *p, int64_t batch);

/* Rows of a packed query past the last batch. */
void lidx_write_rows_past_end(const struct problem *p);

#endif
