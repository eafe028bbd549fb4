/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores of 16 bits: each float16 and bfloat16, what lies halfway to the next, and what lies just
 * beside that, rounds to the nearest, ties to even, beyond the largest to infinity.
 *
 * One query and one key, whose product is 1, serve all batches; a batch's weight is its score.
 */
#include "test.h"

#include "contexts.h"

enum { D = 64, PLACES = 4, HALVES = 1 << 16, N = PLACES * HALVES };

static float score[N];
static uint16_t rounded[N];
static int32_t indices[N];

static int is_finite(uint16_t h, int is_bf16) {
    return isfinite(test_from_half(h, is_bf16));
}

/* At a half, just below the middle between it and the next away from 0, there, just above. */
static void set_scores(int is_bf16) {
    for (int h = 0; h < HALVES; h++) {
        float at = test_from_half((uint16_t)h, is_bf16);
        double next = test_from_half((uint16_t)(h + 1), is_bf16);
        if (!is_finite((uint16_t)(h + 1), is_bf16))
            next = is_bf16 ? copysign(0x1p128, at) : copysign(0x1p16, at);
        float middle = is_finite((uint16_t)h, is_bf16) ? (float)((at + next) / 2) : at;
        float *place = score + PLACES * h;
        place[0] = at;
        place[1] = nextafterf(middle, 0);
        place[2] = middle;
        place[3] = nextafterf(middle, copysignf(INFINITY, at));
    }
}

static int run(struct lidx_context *context, int is_bf16) {
    static const struct lidx_device cpu = {LIDX_CPU, 0};
    static const struct lidx_dtype f32 = {LIDX_FLOAT, 32, 1}, int32 = {LIDX_INT, 32, 1};
    static int64_t row[] = {N, 1, 1, D}, one[] = {N, 1, 1, 1}, shared[] = {0, D, D, 1};
    struct lidx_dtype half = {is_bf16 ? LIDX_BFLOAT : LIDX_FLOAT, 16, 1};
    uint16_t unit[D] = {test_to_half(1, is_bf16)};
    struct lidx_tensor vector = {unit, cpu, 4, half, row, shared, 0},
                       weights = {score, cpu, 3, f32, one, NULL, 0},
                       positions = {indices, cpu, 4, int32, one, NULL, 0},
                       values = {rounded, cpu, 4, half, one, NULL, 0};
    struct lidx_args args = LIDX_ARGS_INIT;
    args.query = args.key = &vector;
    args.weights = &weights;
    args.sparse_count = 1;
    args.sparse_indices = &positions;
    args.sparse_values = &values;
    return lidx_run(context, &args);
}

static void check_type(struct lidx_context *context, int is_bf16) {
    set_scores(is_bf16);
    if (!CHECK(run(context, is_bf16) == LIDX_OK, "%s", lidx_last_error()))
        return;
    for (int i = 0; i < N; i++) {
        uint16_t want = test_to_half(score[i] + 0.0f, is_bf16); /* no score is -0 */
        int is_right =
            isnan(score[i]) ? isnan(test_from_half(rounded[i], is_bf16)) : rounded[i] == want;
        CHECK(is_right, "%.9g as %s is 0x%04x, should be 0x%04x", (double)score[i],
              is_bf16 ? "bfloat16" : "float16", rounded[i], want);
    }
}

int main(void) {
    struct lidx_context *context = make_context("scalar", 1); /* others may flush denormals */
    check_type(context, 1);
    check_type(context, 0);
    lidx_destroy(context);
    return test_end();
}
