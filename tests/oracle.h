/* SPDX-License-Identifier: Apache-2.0
 *
 * What a run must answer, worked out naively in float64 from the public arguments alone. It shares
 * no code with src/: its own decoding of 16-bit floats, its own layout arithmetic, its own order.
 *
 * Two answers agree when every index in which they differ has a true score within 1e-4 relative,
 * or 1e-6 of the row's largest |score|, of the true k-th score. The oracle asks for more wherever
 * more is certain:
 *
 *   - rows whose sums are exact in fp32 in any order must match index by index and bit by bit;
 *   - keys with the same bytes, and keys that certainly score 0, NaN or inf, are ties, and among
 *     them the lower position comes first and gets in first;
 *   - float32 values must stand in strict order: descending, equal ones by position, NaN last.
 *
 * It asks for less only where fp32 itself leaves the answer open: sums that cancel to less than a
 * rounding (2^-23) of the sum of their terms' magnitudes, sums that may overflow, and bf16
 * denormals, which dot-product instructions take for zero.
 */
#ifndef LIDX_ORACLE_H
#define LIDX_ORACLE_H

#include <stddef.h>
#include <stdint.h>

#include "lightning_indexer.h"

struct oracle;

/* The truth for arguments that lidx_run accepts. */
struct oracle *oracle_make(const struct lidx_args *args);
void oracle_free(struct oracle *oracle);

/* Output rows, and how many keys row r sees. */
int64_t oracle_rows(const struct oracle *oracle);
int64_t oracle_visible(const struct oracle *oracle, int64_t row);

/* Rows that had to match exactly, among those with something to select from. */
int64_t oracle_exact_rows(const struct oracle *oracle);

/* 0 when the outputs of `args` (the same inputs, whatever the output's strides) are right; else 1
 * and a sentence. */
int oracle_check(const struct oracle *oracle, const struct lidx_args *args, char *why,
                 size_t why_size);

#endif
