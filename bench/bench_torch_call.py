# SPDX-License-Identifier: Apache-2.0
"""What a call of the operator costs beside torch.add, on tiny tensors, in one run.

    python bench/bench_torch_call.py [--json FILE] [--device cpu|cuda] [--rounds 40]

The rows alternate, round by round, so that a noisy machine is noisy for all; of each row the best
round counts. On a CUDA device it is the host's time that counts: a round makes few enough calls
that the queue of launches never fills, and is waited for after its time has been taken. The first
calls of a round find cold caches and are not counted.

`torch.add` is called through torch's own Python bindings. The operator, like `torch.ops.aten.add`,
is called through `torch.ops`, which parses the arguments against the schema again at every call.
What that route takes by itself is what the rows named `floor` show: an operator with the same
schema that makes the same output, on the CPU all -1, and does nothing else (bench_torch_floor.c; it
needs a C compiler). `function` is lightning_indexer.lightning_indexer().
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import time

import torch

import lightning_indexer

HERE = os.path.dirname(os.path.abspath(__file__))
CALLS = {"cpu": 2000, "cuda": 200}  # of a round; a CUDA stream queues about a thousand launches
UNCOUNTED = 50  # before them

alive = []  # a registration made in Python lives as long as its library


def floor():
    """The operator that scores nothing, or None where it cannot be built."""
    if not shutil.which("cc"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "floor.so")
        source = os.path.join(HERE, "bench_torch_floor.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
        library = ctypes.CDLL(path)
    schema = lightning_indexer._torch.schema("lightning_indexer")
    if library.lidx_floor_define(b"libtorch_cpu.so", schema.encode()):
        raise RuntimeError("torch refused the operator that scores nothing")
    fallthrough = torch.library.Library("lightning_indexer_floor", "IMPL")
    fallthrough.impl("lightning_indexer", torch.library.fallthrough_kernel, "Autograd")
    alive.append(fallthrough)
    return torch.ops.lightning_indexer_floor.lightning_indexer


def make_calls(device):
    """{row: call}"""
    a, b = torch.randn(1, device=device), torch.randn(1, device=device)
    query = torch.randn(1, 1, 1, 64, device=device).bfloat16()
    key = torch.randn(1, 1, 1, 64, device=device).bfloat16()
    weights = torch.randn(1, 1, 1, device=device)
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    add, op = torch.ops.aten.add, torch.ops.lightning_indexer.lightning_indexer
    add_default, op_default = add.Tensor, op.default
    nothing = floor()
    function = lightning_indexer.lightning_indexer
    calls = {
        "torch.add(a, b)": lambda: torch.add(a, b),
        "torch.ops.aten.add(a, b)": lambda: add(a, b),
        "torch.ops.aten.add.Tensor(a, b)": lambda: add_default(a, b),
        "floor(q, k, w)": lambda: nothing(query, key, weights),
        "op(q, k, w)": lambda: op(query, key, weights),
        "op.default(q, k, w)": lambda: op_default(query, key, weights),
        "function(q, k, w)": lambda: function(query, key, weights),
        "floor(q, k, w, sparse_count=1)": lambda: nothing(query, key, weights, sparse_count=1),
        "op(q, k, w, sparse_count=1)": lambda: op(query, key, weights, sparse_count=1),
        "function(q, k, w, sparse_count=1)": lambda: function(query, key, weights, sparse_count=1),
        "floor(q, k, w, l, l, sparse_count=1)": lambda: nothing(
            query, key, weights, lengths, lengths, sparse_count=1
        ),
        "op(q, k, w, l, l, sparse_count=1)": lambda: op(
            query, key, weights, lengths, lengths, sparse_count=1
        ),
        "function(q, k, w, l, l, sparse_count=1)": lambda: function(
            query, key, weights, lengths, lengths, sparse_count=1
        ),
    }
    return {row: call for row, call in calls.items() if nothing or not row.startswith("floor")}


def seconds_per_call(call, n, wait):
    for _ in range(UNCOUNTED):
        call()
    start = time.perf_counter()
    for _ in range(n):
        call()
    seconds = (time.perf_counter() - start) / n
    wait()
    return seconds


def measure(device, rounds):
    """{row: seconds of the best round}"""
    calls = make_calls(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for row, call in calls.items():
            best[row] = min(best[row], seconds_per_call(call, CALLS[device], wait))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    parser.add_argument("--device", choices=sorted(CALLS), default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    best = measure(options.device, options.rounds)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, best of "
        f"{options.rounds} rounds of {CALLS[options.device]} calls"
    )
    add = best["torch.add(a, b)"]
    for row, seconds in best.items():
        print(f"{seconds * 1e6:7.2f} us  {seconds / add:5.2f} x torch.add   {row}")
    if options.json:
        facts = {"torch": torch.__version__, "device": options.device, "seconds": best}
        with open(options.json, "w") as file:
            json.dump(facts, file, indent=2)


if __name__ == "__main__":
    main()
