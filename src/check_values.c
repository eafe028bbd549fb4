/* SPDX-License-Identifier: Apache-2.0 */
#include "check_values.h"

#include "error.h"
#include "lightning_indexer.h"
#include "visible.h"

/* Lengths in 0..limit, or prefix sums that do not decrease and end in it. */
static int check_lengths(const char *name, const int32_t *list, int64_t n_batch, int packed,
                         int64_t limit, const char *limit_is) {
    int64_t floor = 0;
    for (int64_t b = 0; list && b < n_batch; b++) {
        if (list[b] < floor || list[b] > limit)
            return lidx_fail(LIDX_ERR_VALUE, "%s[%lld] is %d; it should be %lld to %lld (%s%s)",
                             name, (long long)b, (int)list[b], (long long)floor, (long long)limit,
                             packed ? "prefix sums up to " : "", limit_is);
        if (packed)
            floor = list[b];
    }
    return LIDX_OK;
}

static int check_page_ids(const struct problem *p) {
    if (!p->page_size || p->n_query == 0)
        return LIDX_OK;
    for (int64_t b = 0; b < p->n_batch; b++) {
        struct extent e = lidx_extent(p, b);
        if (e.n_query == 0 || e.n_key == 0)
            continue;
        const int32_t *row =
            (const int32_t *)((const unsigned char *)p->page_table + b * p->page_table_stride);
        int64_t needed = (e.n_key + p->page_size - 1) / p->page_size;
        for (int64_t i = 0; i < needed; i++)
            if (row[i] < 0 || row[i] >= p->n_pages)
                return lidx_fail(LIDX_ERR_VALUE,
                                 "block_table[%lld][%lld] is %d; it should be one of key's %lld "
                                 "blocks, counted from 0",
                                 (long long)b, (long long)i, (int)row[i], (long long)p->n_pages);
    }
    return LIDX_OK;
}

int lidx_check_values(const struct problem *p) {
    const char *keys = p->page_size ? "the room of a row of block_table" : "the size of key";
    int status;
    if ((status = check_lengths("actual_seq_lengths_query", p->query_lengths, p->n_batch,
                                p->query_packed, p->n_query, "the size of query")) ||
        (status = check_lengths("actual_seq_lengths_key", p->key_lengths, p->n_batch, p->key_packed,
                                p->n_key, keys)))
        return status;
    return check_page_ids(p);
}
