/* SPDX-License-Identifier: Apache-2.0
 *
 * Results for people and for programs: numbers in words, tables as text or markdown, JSON.
 */
#ifndef LIDX_REPORT_H
#define LIDX_REPORT_H

#include <stdio.h>

struct cJSON;

enum { CELL = 32 };

void format_seconds(char text[CELL], double seconds); /* "1.23 ms" */
void format_count(char text[CELL], double count);     /* "13.9 M" */
void format_ratio(char text[CELL], double ratio);     /* "0.94"; "-" when it is 0 */

/* Prints and frees it. */
void print_and_delete(struct cJSON *json);

enum { TABLE_COLUMNS = 12, TABLE_ROWS = 256 };

/* Cells are text; the first column is aligned left and the others right. */
struct table {
    int n_columns, n_rows; /* row 0 is the heading */
    char cells[TABLE_ROWS][TABLE_COLUMNS][CELL];
};

/* Adds one row of n_columns cells; rows beyond TABLE_ROWS are dropped. */
void table_add(struct table *table, const char *const *cells);
void table_print(const struct table *table, int as_markdown);

#endif
