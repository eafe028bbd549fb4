# SPDX-License-Identifier: Apache-2.0
"""What a call of the operator costs beside torch.add, on tiny tensors, in one run.

    python bench/bench_torch_call.py [--json]

The rows alternate, round by round, so that a noisy machine is noisy for all; of each row the best
round counts. `torch.add` is called through torch's own bindings and, as the operator is, through
`torch.ops`, which by itself about doubles the cost of a small call.
"""

import argparse
import json
import time

import torch

import lightning_indexer


def seconds_per_call(call, n):
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def rows():
    a, b = torch.randn(1), torch.randn(1)
    op = torch.ops.lightning_indexer.lightning_indexer
    query = torch.randn(1, 1, 1, 64).bfloat16()
    key = torch.randn(1, 1, 1, 64).bfloat16()
    weights = torch.randn(1, 1, 1)
    empty, none = query[:, :0].contiguous(), weights[:, :0].contiguous()
    one = torch.ones(1, dtype=torch.int32)
    return {
        "torch.add": lambda: torch.add(a, b),
        "torch.ops.aten.add": lambda: torch.ops.aten.add(a, b),
        "operator, no query tokens": lambda: op(empty, key, none),
        "operator, 1 token, 1 key": lambda: op(query, key, weights, sparse_count=1),
        "operator, 1 token, 1 key, lengths": lambda: op(
            query, key, weights, one, one, sparse_count=1
        ),
        "lightning_indexer(), 1 token, 1 key": lambda: lightning_indexer.lightning_indexer(
            query, key, weights, sparse_count=1
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    calls = rows()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(options.rounds):
        for name, call in calls.items():
            best[name] = min(best[name], seconds_per_call(call, 2000))
    add = best["torch.add"]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "seconds": best}, indent=2))
        return
    print(f"torch {torch.__version__}, best of {options.rounds} rounds of 2000 calls")
    for name, seconds in best.items():
        print(f"{seconds * 1e6:7.2f} us  {seconds / add:5.2f} x torch.add   {name}")


if __name__ == "__main__":
    main()
