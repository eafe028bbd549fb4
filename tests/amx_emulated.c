/* SPDX-License-Identifier: Apache-2.0
 *
 * The files of src/cpu/amx.h once more, their tile instructions emulated: the whole kernel,
 * packing, pipeline, tails and epilogue, on machines without AMX. Its vector code still needs
 * AVX-512.
 */
#include "amx_emulation.h"

#if defined(__x86_64__)

#define lidx_kernel_amx           lidx_kernel_amx_under_emulation
#define lidx_amx_packed_size_bf16 lidx_amx_packed_size_bf16_under_emulation
#define lidx_amx_packed_size_fp16 lidx_amx_packed_size_fp16_under_emulation
#define lidx_amx_pack_bf16        lidx_amx_pack_bf16_under_emulation
#define lidx_amx_pack_fp16        lidx_amx_pack_fp16_under_emulation
#define lidx_amx_score_bf16       lidx_amx_score_bf16_under_emulation
#define lidx_amx_score_fp16       lidx_amx_score_fp16_under_emulation
#define lidx_amx_score_two_bf16   lidx_amx_score_two_bf16_under_emulation
#include "../src/cpu/amx.c"
#include "../src/cpu/amx_bf16.c"
#include "../src/cpu/amx_fp16.c"
#undef lidx_kernel_amx

extern const struct kernel lidx_kernel_amx_emulated;

const struct kernel lidx_kernel_amx_emulated = {
    .name = "amx_emulated",
    .needs = FEATURE_AVX512 | FEATURE_FMA,
    .enter = enter,
    .leave = leave,
    .topk = &lidx_topk_avx512,
    .path = {[DTYPE_BF16] = {lidx_amx_packed_size_bf16, lidx_amx_pack_bf16, lidx_amx_score_bf16},
             [DTYPE_FP16] = {lidx_amx_packed_size_fp16, lidx_amx_pack_fp16, lidx_amx_score_fp16}},
    .score_two = {[DTYPE_BF16] = lidx_amx_score_two_bf16},
};

#endif
