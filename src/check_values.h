/* SPDX-License-Identifier: Apache-2.0
 *
 * The values of lists and tables, which are read on the CPU only.
 */
#ifndef LIDX_CHECK_VALUES_H
#define LIDX_CHECK_VALUES_H

#include "problem.h"

/* Lengths within their tensors, prefix sums that do not decrease, and for each page that a query
 * could see an id of a page that exists. Returns LIDX_OK, or LIDX_ERR_VALUE after a sentence. */
int lidx_check_values(const struct problem *p);

#endif
