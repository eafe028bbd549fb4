# SPDX-License-Identifier: Apache-2.0
"""python -m lightning_indexer info | plot"""

import argparse
import json
import sys

import lightning_indexer

from . import _library


def torch_facts():
    """What torch this is and what was registered with it."""
    torch = sys.modules.get("torch")
    if torch is None or lightning_indexer._torch_error:
        return {"registered": False, "why": lightning_indexer._torch_error or "torch is not imported"}
    from . import _torch

    return {"registered": True, "version": torch.__version__, **_torch.state}


def info(options):
    facts = {
        "version": lightning_indexer.version(),
        "library": _library._path(),
        "cpu_features": lightning_indexer.cpu_features(),
        "kernels": lightning_indexer.kernels(),
        "torch": torch_facts(),
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    print(f"lightning_indexer {facts['version']}\nlibrary   {facts['library']}")
    print(f"CPU       {facts['cpu_features']}\nkernels")
    for kernel in facts["kernels"]:
        mark = "*" if kernel["chosen_bf16"] or kernel["chosen_fp16"] else " "
        print(f"  {mark} {kernel['backend']:4} {kernel['name']:12} {kernel['reason']}")
    print("torch")
    for name, value in facts["torch"].items():
        print(f"    {name:26} {value}")


def plot(options):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("plot needs matplotlib: pip install matplotlib")
    from . import plot as drawing

    for path in drawing.draw(options.out, options.keys, options.count, options.seed):
        print(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m lightning_indexer", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("info", help="version, kernels, and what is registered with torch")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=info)
    command = commands.add_parser("plot", help="draw a selection map and a benchmark chart")
    command.add_argument("--out", default=".", help="folder for the two PNG files")
    command.add_argument("--keys", type=int, default=2048, help="context length of the map")
    command.add_argument("--count", type=int, default=256, help="sparse_count of the map")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=plot)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
