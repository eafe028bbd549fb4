/* SPDX-License-Identifier: Apache-2.0
 *
 * What this machine can do at most: loops that keep everything in registers. A speed is worth
 * little without the peak measured beside it on the same cores.
 *
 * A path of a kernel is measured by the instruction that does its multiplications:
 *
 *     kernel        bfloat16             float16
 *     scalar        none                 none
 *     avx2          FMA ymm              FMA ymm
 *     avx512        FMA zmm              FMA zmm
 *     avx512_bf16   VDPBF16PS zmm        FMA zmm
 *     amx           TDPBF16PS            TDPBF16PS
 *     neon_bf16     BFMMLA               FMLA
 *     neon          FMLA                 FMLA
 *
 * Tile units of shared machines slow down when their instructions come back to back, so TDPBF16PS
 * has a second loop, "TDPBF16PS spaced", with other instructions between.
 *
 * On x86 a tile loop leaves the calling thread without tile configuration.
 *
 * All figures are the best of many slices of about a millisecond: what the core can do when
 * nobody disturbs it. Compare them with a best time, or measure both side by side.
 */
#ifndef LIDX_PEAK_H
#define LIDX_PEAK_H

/* The instruction that a kernel's path is measured by, or NULL where there is none on this
 * machine. `type_code` is LIDX_BFLOAT or LIDX_FLOAT. */
const char *peak_instruction(const char *kernel, int type_code);

/* Flop/s of that instruction on one core, spending `seconds`; 0 where peak_instruction() is
 * NULL. One multiplication and one addition are two flop. */
double peak_flops(const char *kernel, int type_code, double seconds);

/* The sum over n_threads OpenMP threads that run it at the same time; one thread where the build
 * has no OpenMP. */
double peak_flops_threads(const char *kernel, int type_code, double seconds, int n_threads);

/* The same by instruction: 0 when this CPU or its operating system does not offer it, or no such
 * name. */
double peak_flops_of(const char *instruction, double seconds, int n_threads);

#endif
