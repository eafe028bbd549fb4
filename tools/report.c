/* SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <cjson/cJSON.h>
#include <string.h>

void format_seconds(char text[CELL], double seconds) {
    if (seconds >= 1)
        snprintf(text, CELL, "%.3g s", seconds);
    else if (seconds >= 1e-3)
        snprintf(text, CELL, "%.3g ms", seconds * 1e3);
    else
        snprintf(text, CELL, "%.3g us", seconds * 1e6);
}

void format_count(char text[CELL], double count) {
    static const char *const names[] = {"", " k", " M", " G", " T"};
    int i = 0;
    for (; i < 4 && count >= 999.5; i++)
        count /= 1000;
    snprintf(text, CELL, "%.3g%s", count, names[i]);
}

void format_ratio(char text[CELL], double ratio) {
    if (ratio > 0)
        snprintf(text, CELL, "%.2f", ratio);
    else
        snprintf(text, CELL, "-");
}

void print_and_delete(cJSON *json) {
    char *text = cJSON_Print(json);
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(json);
}

void table_add(struct table *table, const char *const *cells) {
    if (table->n_rows == TABLE_ROWS)
        return;
    for (int c = 0; c < table->n_columns; c++)
        snprintf(table->cells[table->n_rows][c], CELL, "%s", cells[c]);
    table->n_rows++;
}

static int width(const struct table *table, int column) {
    int widest = 0;
    for (int r = 0; r < table->n_rows; r++)
        if ((int)strlen(table->cells[r][column]) > widest)
            widest = (int)strlen(table->cells[r][column]);
    return widest;
}

static void print_rule(const struct table *table) {
    for (int c = 0; c < table->n_columns; c++)
        printf(c ? " ---: |" : "| :--- |");
    printf("\n");
}

void table_print(const struct table *table, int as_markdown) {
    for (int r = 0; r < table->n_rows; r++) {
        for (int c = 0; c < table->n_columns; c++) {
            const char *before = as_markdown ? (c ? " " : "| ") : c ? "  " : "";
            printf("%s%*s%s", before, c ? width(table, c) : -width(table, c), table->cells[r][c],
                   as_markdown ? " |" : "");
        }
        printf("\n");
        if (r == 0 && as_markdown)
            print_rule(table);
    }
}
