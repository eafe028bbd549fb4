/* SPDX-License-Identifier: Apache-2.0
 *
 * What lidx says beside its results: one sentence about a failure, and progress on a terminal.
 */
#ifndef LIDX_MESSAGE_H
#define LIDX_MESSAGE_H

#if defined(__GNUC__)
#define PRINTF_LIKE(text, first) __attribute__((__format__(__printf__, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

/* What main returns. */
enum exit_status { EXIT_FINE = 0, EXIT_DIFFERS = 1, EXIT_TROUBLE = 2 };

/* The command in front of every sentence: "lidx run: ...". */
void message_command(const char *name);

/* Prints one sentence on stderr; returns EXIT_TROUBLE. Control characters, which may come from a
 * file's own text, are printed as '?'. */
int refuse(const char *format, ...) PRINTF_LIKE(1, 2);

/* One line on stderr that the next one overwrites; nothing unless stderr is a terminal. */
void progress(const char *format, ...) PRINTF_LIKE(1, 2);
void progress_end(void);

#endif
