#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Makes sure that the Debian packages named on the command line are there: installs them when
# root, or else prints the one command that would. Quick when nothing is missing. Under `make -j`
# several may be called at once: one after the other, since apt takes no second.
set -eu
if command -v flock >/dev/null; then
    exec 9<"$0"
    flock 9
fi

missing=
for package in "$@"; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing="$missing $package"
done
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: cannot tell whether these are installed; they are needed:$missing" >&2
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "setup: packages are missing; run: sudo apt-get install$missing" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of names
apt-get install -y -q $missing >/dev/null 2>&1 ||
    { apt-get update -q >/dev/null && apt-get install -y -q $missing >/dev/null; }
