/* SPDX-License-Identifier: Apache-2.0 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "lightning_indexer.h"

static _Thread_local char message[512];

int lidx_fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

const char *lidx_last_error(void) {
    return message;
}

const char *lidx_status_name(int status) {
    static const char *const names[] = {
        "LIDX_OK",         "LIDX_ERR_ARGUMENT",  "LIDX_ERR_LAYOUT", "LIDX_ERR_SHAPE",
        "LIDX_ERR_DTYPE",  "LIDX_ERR_STRIDE",    "LIDX_ERR_OPTION", "LIDX_ERR_VALUE",
        "LIDX_ERR_DEVICE", "LIDX_ERR_WORKSPACE", "LIDX_ERR_MEMORY", "LIDX_ERR_CUDA",
    };
    if (status < 0 || status >= (int)(sizeof names / sizeof names[0]))
        return "unknown status";
    return names[status];
}
