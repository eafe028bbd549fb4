/* SPDX-License-Identifier: Apache-2.0
 *
 * This thread's last error sentence.
 */
#ifndef LIDX_ERROR_H
#define LIDX_ERROR_H

/* Stores the formatted sentence and returns `status`, so that a caller writes
 * `return lidx_fail(LIDX_ERR_SHAPE, "...")`. */
#if defined(__GNUC__)
__attribute__((cold, format(printf, 2, 3))) /* cold: apart from what a good call passes through */
#endif
int lidx_fail(int status, const char *format, ...);

#endif
