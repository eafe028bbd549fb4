#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""coverage.py BUILD_DIR SOURCE_DIR [--skip STEM]... [--least PERCENT]

Line coverage of src/ from a build with -DLIDX_COVERAGE=ON after its tests have run: a line counts
as covered when any program ran it. --skip leaves out the files of a kernel that this machine cannot
run: STEM.c, STEM.h, and what begins with STEM_.
"""
import argparse
import gzip
import json
import pathlib
import subprocess
import sys
import tempfile


def collect(build, source):
    """{file: {line: count}} for the files of src/."""
    lines = {}
    with tempfile.TemporaryDirectory() as work:
        for data in sorted(build.rglob("*.gcda")):
            for old in pathlib.Path(work).glob("*.gz"):
                old.unlink()
            subprocess.run(["gcov", "--json-format", str(data)], cwd=work, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for report in pathlib.Path(work).glob("*.gz"):
                for entry in json.loads(gzip.open(report).read())["files"]:
                    path = (build / entry["file"]).resolve()
                    if source / "src" not in path.parents:
                        continue
                    counts = lines.setdefault(str(path.relative_to(source)), {})
                    for line in entry["lines"]:
                        number = line["line_number"]
                        counts[number] = counts.get(number, 0) + line["count"]
    return lines


def ranges(numbers):
    """[3, 4, 5, 9] -> "3-5 9"."""
    parts = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--least", type=float, default=0)
    options = parser.parse_args()
    lines = collect(options.build.resolve(), options.source.resolve())
    total = covered = 0
    for name, counts in sorted(lines.items()):
        missed = [number for number, count in counts.items() if count == 0]
        stem = pathlib.Path(name).stem
        if any(stem == skipped or stem.startswith(f"{skipped}_") for skipped in options.skip):
            print(f"{name}: not run on this machine, {len(counts)} lines left out")
            continue
        total += len(counts)
        covered += len(counts) - len(missed)
        print(f"{name}: {100 * (1 - len(missed) / len(counts)):.1f} % of {len(counts)} lines"
              + (f", not {ranges(missed)}" if missed else ""))
    if not total:
        sys.exit("coverage.py: no coverage data; was the build made with -DLIDX_COVERAGE=ON?")
    percent = 100 * covered / total
    print(f"line coverage of src/: {percent:.1f} % ({covered} of {total})")
    if percent < options.least:
        sys.exit(f"coverage.py: less than {options.least} %")


if __name__ == "__main__":
    main()
