/* SPDX-License-Identifier: Apache-2.0
 *
 * The commands of lidx. Each takes the arguments behind its name and returns an exit_status.
 */
#ifndef LIDX_COMMANDS_H
#define LIDX_COMMANDS_H

int command_run(int argc, char **argv);
int command_check(int argc, char **argv);
int command_demo(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_info(int argc, char **argv);

#endif
