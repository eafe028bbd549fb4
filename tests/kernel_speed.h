/* SPDX-License-Identifier: Apache-2.0
 *
 * Times the calls that test_kernels checks.
 */
#ifndef TEST_KERNEL_SPEED_H
#define TEST_KERNEL_SPEED_H

#include "../src/cpu/kernel.h"

void kernel_speed_heading(void);

/* A line for each dtype and each of a few sizes, as a fraction of the core's peak. */
void kernel_speed(const struct kernel *kernel);

#endif
