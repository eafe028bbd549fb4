#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The CPU operator beside torch in bfloat16 (matmul, relu, weighted sum, topk), in one run: eager
and, where torch finds a compiler, the same function through torch.compile.

    python3 bench/bench_cpu_torch.py --library build/liblightning_indexer.so [--threads N] [--out F]

They take turns, a few calls each, so that all meet the machine's good and bad moments; what
is compared are medians over the turns. "hot" repeats one call, "cold" walks through a pool of
keys of --pool MiB, so choose it well above the last-level cache. Every case is checked: where
the indices differ from those of a float32 reference, the scores must not, beyond 1e-4 relative.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time

import interface

HEADS, DIM, TOP_K = 64, 128, 2048
# Seconds. torch's wheels bring an OpenMP of their own, beside the one that the library finds; the
# threads of either wait for more work, spinning, on the cores that the other's would have.
THREADS_SPIN = 0.04
CASES = [  # name, query tokens, keys, cold
    ("1 x 8192 hot", 1, 8192, False),
    ("1 x 8192 cold", 1, 8192, True),
    ("1 x 65536 hot", 1, 65536, False),
    ("1 x 65536 cold", 1, 65536, True),
    ("64 x 8192", 64, 8192, False),
    ("512 x 8192", 512, 8192, False),
]


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", help="liblightning_indexer.so; default: LIDX_LIBRARY")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kernel", help="force a kernel by name")
    parser.add_argument("--seconds", type=float, default=4.0, help="about this long for each case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--pool", type=int, default=1024, help="MiB of keys for the cold cases")
    parser.add_argument("--case", action="append", help="only cases whose name contains this")
    parser.add_argument("--out", "--json", dest="out", help="also write the results, JSON, here")
    return parser.parse_args()


class Operator:
    """The library through ctypes with arguments made once, as an engine in C would call it."""

    def __init__(self, lib, threads, kernel):
        self.lib = lib
        self.handle = lib.create(threads, kernel)

    def prepare(self, query, key, weights, indices):
        """A function that runs the operator on these tensors."""
        tensors = {"query": query, "key": key, "weights": weights, "sparse_indices": indices}
        args = interface.arguments(self.lib, tensors, sparse_count=indices.shape[-1], sparse_mode=0)
        run, handle, pointer = self.lib.library.lidx_run, self.handle, ctypes.byref(args)
        return lambda: self.lib.check(run(handle, pointer))


def eager(query, key, weights):
    """What a model written in torch does."""
    import torch

    tokens = query.shape[0]
    dots = torch.matmul(query.view(tokens * HEADS, DIM), key.t()).view(tokens, HEADS, -1)
    scores = torch.einsum("thk,th->tk", torch.relu(dots), weights)
    return torch.topk(scores, TOP_K, dim=-1).indices


def compiled_or_reason():
    """eager() through torch.compile and None, or None and why there is none."""
    import torch

    try:
        function = torch.compile(eager, dynamic=False)
        function(*(torch.zeros(shape, dtype=torch.bfloat16)
                   for shape in ((1, HEADS, DIM), (TOP_K, DIM), (1, HEADS))))
    except Exception as error:  # whatever its compiler is missing
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]
    return function, None


def check_rows(query, key, weights, indices):
    """The first rows against float32; raises AssertionError."""
    import torch

    for t in range(min(2, query.shape[0])):
        dots = torch.relu(query[t].float() @ key.float().t())
        scores = (dots * weights[t].float()[:, None]).sum(0)
        ours = scores[indices[t].long()]
        best = torch.topk(scores, TOP_K).values
        tolerance = 1e-4 * best.abs().max()
        assert len(set(indices[t].tolist())) == TOP_K, "an index twice"
        assert (ours - best).abs().max() <= tolerance, "not the best keys, or not in order"


def measure(sides, seconds):
    """Alternating turns; for each side the turns' means of a call, in seconds."""
    def turn(functions, calls):
        begin = time.perf_counter()
        for i in range(calls):
            functions[i % len(functions)]()
        return (time.perf_counter() - begin) / calls

    times, calls = [[] for _ in sides], []
    for functions in sides:
        turn(functions, 2)
        calls.append(max(1, min(200, int(0.03 / turn(functions, 3)))))
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[0]) < 5:
        for functions, n, list_of_times in zip(sides, calls, times):
            time.sleep(THREADS_SPIN)
            for _ in range(3):
                functions[-1]()  # wakes this side's threads; cold keys of the turn stay cold
            list_of_times.append(turn(functions, n))
    return times


def run_case(operator, case, pool_bytes, seconds, compiled):
    import torch

    name, tokens, n_keys, cold = case
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    query, weights = random(tokens, HEADS, DIM), random(tokens, HEADS)
    first = random(n_keys, DIM)
    copies = max(2, pool_bytes // (n_keys * DIM * 2)) if cold else 1
    pool = first.repeat(copies, 1).view(copies, n_keys, DIM)
    indices = torch.empty(1, tokens, 1, TOP_K, dtype=torch.int32)
    ours = [
        operator.prepare(query[None], pool[i][None, :, None], weights[None], indices)
        for i in range(copies)
    ]
    ours[0]()
    check_rows(query, first, weights, indices[0, :, 0])
    sides = [ours]
    for function in (eager, compiled):
        if function:
            sides.append([lambda f=function, key=pool[i]: f(query, key, weights)
                          for i in range(copies)])
    times = measure(sides, seconds)
    flop = 2 * tokens * n_keys * HEADS * DIM
    mine = statistics.median(times[0])
    row = {"case": name, "us": mine * 1e6, "us_best": min(times[0]) * 1e6,
           "tflops": flop / mine * 1e-12, "key_gbps": n_keys * DIM * 2 / mine * 1e-9,
           "turns": len(times[0])}
    for prefix, ratio, side in zip(("torch", "compiled"), ("ratio", "compiled_ratio"), times[1:]):
        other = statistics.median(side)
        row |= {f"{prefix}_us": other * 1e6, f"{prefix}_us_best": min(side) * 1e6,
                ratio: other / mine}
    return row


def main():
    chosen = options()
    lib = interface.load(chosen.library)
    try:
        import torch
    except ImportError:
        sys.exit("bench_cpu_torch.py needs torch, to compare with it: pip install torch")

    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    operator = Operator(lib, chosen.threads, chosen.kernel)
    kernel = chosen.kernel or next(
        k["name"] for k in lib.kernels() if k["backend"] == "cpu" and k["chosen_bf16"]
    )
    print(f"lightning_indexer {lib.version()} kernel {kernel}, torch {torch.__version__}, "
          f"{chosen.threads} threads, {HEADS} heads x {DIM}, top {TOP_K} in order")
    compiled, reason = (None, "not asked for") if chosen.no_compile else compiled_or_reason()
    if reason:
        print(f"torch.compile left out: {reason}")
    print(f"{'case':>16} {'us':>9} {'best':>9} {'eager us':>10} {'best':>10} {'ratio':>6} "
          f"{'compiled':>10} {'ratio':>6} {'TFLOP/s':>8} {'keys GB/s':>9}")
    rows = []
    for case in CASES:
        if chosen.case and not any(part in case[0] for part in chosen.case):
            continue
        row = run_case(operator, case, chosen.pool << 20, chosen.seconds, compiled)
        rows.append(row)
        theirs = (f"{row['compiled_us']:10.1f} {row['compiled_ratio']:6.1f}" if compiled
                  else f"{'-':>10} {'-':>6}")
        print(f"{row['case']:>16} {row['us']:9.1f} {row['us_best']:9.1f} {row['torch_us']:10.1f} "
              f"{row['torch_us_best']:10.1f} {row['ratio']:6.1f} {theirs} {row['tflops']:8.3f} "
              f"{row['key_gbps']:9.1f}", flush=True)
    if chosen.out:
        with open(chosen.out, "w", encoding="utf-8") as file:
            json.dump({"kernel": kernel, "torch": torch.__version__, "threads": chosen.threads,
                       "torch_compile": reason or "timed",
                       "features": lib.cpu_features(), "cases": rows}, file, indent=1)


if __name__ == "__main__":
    main()
