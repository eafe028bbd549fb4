/* SPDX-License-Identifier: Apache-2.0
 *
 * Forms: the ways in which the same rows can be laid out.
 */
#include "scenario.h"

void form_whole(struct form *f, const struct scenario *s) {
    f->n_segments = s->n_batch;
    for (int b = 0; b < s->n_batch; b++)
        f->segment[b] = (struct segment){b, 0, s->n_query[b], s->n_key[b]};
}

void form_random_layout(struct form *f, struct rng *rng) {
    int pair = (int)rng_below(rng, 4);
    f->layout_query = pair & 1 ? LIDX_TND : LIDX_BSND;
    f->layout_key = pair & 2 ? LIDX_PA_BSND : f->layout_query;
    f->page_size = rng_one_in(rng, 2) ? 16 << rng_below(rng, 7) : 16 * rng_between(rng, 1, 64);
    f->values = (int)rng_below(rng, 3);
    f->strided = rng_one_in(rng, 2);
    f->lists = rng_one_in(rng, 2);
    f->share_pages = rng_one_in(rng, 2);
    f->after = rng_one_in(rng, 2);
    f->pad = rng_one_in(rng, 2) ? 0 : rng_between(rng, 1, 40);
}

/* Rows [begin, end) of batch b as a run of their own. */
static struct segment chunk(const struct scenario *s, int b, int64_t begin, int64_t end) {
    struct segment g = {b, begin, end - begin, s->n_key[b]};
    if (s->mode == LIDX_MODE_CAUSAL) {
        g.n_key = s->n_key[b] - s->n_query[b] + end;
        g.n_key = g.n_key < 0 ? 0 : g.n_key;
    }
    return g;
}

static void cut_batch(struct form *f, const struct scenario *s, struct rng *rng, int b,
                      int64_t most) {
    int64_t end, begin = 0;
    for (; begin < s->n_query[b]; begin = end) {
        end = begin + rng_between(rng, 1, most);
        end = end < s->n_query[b] && f->n_segments < MAX_SEGMENTS - MAX_BATCH ? end : s->n_query[b];
        f->segment[f->n_segments++] = chunk(s, b, begin, end);
    }
}

static void shuffle_segments(struct form *f, struct rng *rng) {
    for (int i = f->n_segments - 1; i > 0; i--) {
        int j = (int)rng_below(rng, (uint64_t)i + 1);
        struct segment g = f->segment[i];
        f->segment[i] = f->segment[j];
        f->segment[j] = g;
    }
}

void form_random_segments(struct form *f, const struct scenario *s, struct rng *rng) {
    f->n_segments = 0;
    if (s->n_batch == 0)
        return;
    int one = (int)rng_below(rng, (uint64_t)s->n_batch);
    switch (rng_below(rng, 5)) {
    case 0: /* one batch alone */
        f->segment[f->n_segments++] = chunk(s, one, 0, s->n_query[one]);
        return;
    case 1: /* one row alone */
        if (s->n_query[one]) {
            int64_t row = rng_between(rng, 0, s->n_query[one] - 1);
            f->segment[f->n_segments++] = chunk(s, one, row, row + 1);
        }
        return;
    case 2: /* decode steps */
        for (int b = 0; b < s->n_batch; b++)
            cut_batch(f, s, rng, b, 1);
        break;
    case 3: /* pieces of a prefill */
        for (int b = 0; b < s->n_batch; b++)
            cut_batch(f, s, rng, b, 1 + s->n_query[b] / 2);
        break;
    default:
        form_whole(f, s);
    }
    shuffle_segments(f, rng);
}

void form_text(const struct form *f, char *text, size_t size) {
    static const char *const name[] = {"BSND", "TND", "PA_BSND"};
    snprintf(text, size, "%s/%s page %lld, values %d, strided %d, lists %d, pad %lld, %d segments",
             name[f->layout_query], name[f->layout_key], (long long)f->page_size, f->values,
             f->strided, f->lists, (long long)f->pad, f->n_segments);
}
