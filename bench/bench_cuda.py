# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA backend against the floors that this GPU has in the same run.

    python3 bench/bench_cuda.py --library PATH [--json FILE] [--section NAME] [--only TEXT]
                                [--kernel NAME] [--quick]
    python3 bench/bench_cuda.py --merge FILE... --json FILE

Every time is the median of CUDA-event times of whole runs (scores and ordered top-k), with 256 MB
read between them so that nothing of theirs is left in L2, and no written lines whose way to memory
would be charged to the next run. Floors: R is the rate of an 8192^3 bf16 matrix
product (cuBLAS through torch), C that of a device copy, counting bytes read and written. The floor
of a prefill is its visible pairs' products at R, of a decode step its keys' bytes at C. The clock
follows the power limit and changes within seconds, so what is compared is measured in turns: the
product or copy, then the run, again and again; each row has the R or C of its own repeats.

The library is called through ctypes, torch only provides memory, events and the comparisons. One
that is linked with bench/count_cycles.c also reports how busy the tensor cores are.
"""
import argparse
import ctypes
import json
import statistics
import sys

import interface
import torch

TOP_K = 2048
FLUSH_BYTES = 256 << 20
SECTIONS = ("prefill", "variants", "decode")
CAUSAL = 3

# Microseconds of DeepGEMM 2.6.1 fp8_mqa_logits or fp8_paged_mqa_logits (fp8 elements, no top-k) and
# FlashInfer's top-k (no order, not deterministic) on its logits, together, and the bound on ours,
# in bf16 and with the order. Measured earlier on another H100 SXM 80 GB, medians of 15 with L2
# flushed; not measured in this run.
OTHERS = {"prefill 2048 x 8192": (367, None), "prefill 8192 x 8192": (881, 1.2),
          "prefill 2048 x 65536": (2471, 1.2), "prefill 8192 x 65536": (10238, 1.2),
          "decode 1 x 8192": (19, 1), "decode 1 x 131072": (58, 1), "decode 8 x 65536": (73, 1),
          "decode 64 x 8192": (51, None), "decode 64 x 65536": (254, None),
          "decode 64 x 65536 next_n 2": (269, None), "decode 256 x 16384": (246, None),
          "decode 128 x 65536": (484, None)}


class Library:
    def __init__(self, path):
        self.lib = interface.load(path)
        self.dll = self.lib.library
        self.contexts = {}

    def context(self, kernel):
        if kernel not in self.contexts:
            self.contexts[kernel] = self.lib.create(kernel=kernel)
        return self.contexts[kernel]

    def runner(self, problem, kernel=None):
        """A function that enqueues one run, and the bytes of workspace it has."""
        context = self.context(kernel)
        layouts = self.lib.LAYOUTS
        layout_key = layouts["PA_BSND" if "block_table" in problem.tensors else "BSND"]
        args = interface.arguments(self.lib, problem.tensors, layout_query=layouts["BSND"],
                                   layout_key=layout_key, sparse_count=TOP_K, sparse_mode=CAUSAL)
        size = ctypes.c_size_t()
        self.lib.check(self.dll.lidx_workspace_size(context, ctypes.byref(args),
                                                    ctypes.byref(size)))
        workspace = torch.empty(size.value + 256, dtype=torch.uint8, device="cuda")
        args.workspace = (workspace.data_ptr() + 255) // 256 * 256
        args.workspace_size = size.value
        args.stream = torch.cuda.current_stream().cuda_stream

        def run():
            self.lib.check(self.dll.lidx_run(context, ctypes.byref(args)))

        run.owner = workspace, args
        return run, size.value


class Prefill:
    rate = "R"

    def __init__(self, n_query, n_key, n_heads=64, dtype=torch.bfloat16, head_dim=128):
        self.name = f"prefill {n_query} x {n_key}"
        self.pairs = sum(n_key - n_query + i + 1 for i in range(n_query))
        self.work = 2 * self.pairs * n_heads * head_dim
        self.n_heads, self.head_dim = n_heads, head_dim
        self.tensors = {
            "query": torch.randn(1, n_query, n_heads, head_dim, device="cuda", dtype=dtype),
            "key": torch.randn(1, n_key, 1, head_dim, device="cuda", dtype=dtype),
            "weights": torch.randn(1, n_query, n_heads, device="cuda", dtype=dtype),
            "sparse_indices": torch.empty(1, n_query, 1, TOP_K, device="cuda", dtype=torch.int32),
        }


class Decode:
    rate = "C"

    def __init__(self, n_batch, n_key, next_n=1, n_heads=64, page=64, dtype=torch.bfloat16):
        self.name = f"decode {n_batch} x {n_key}" + (f" next_n {next_n}" if next_n > 1 else "")
        self.work = n_batch * n_key * 128 * 2
        width = n_key // page
        table = torch.randperm(n_batch * width, device="cuda").to(torch.int32)
        keys = torch.empty(n_batch * width, page, 1, 128, device="cuda", dtype=dtype)
        keys.normal_()
        lengths = torch.full((n_batch,), n_key, device="cuda", dtype=torch.int32)
        shape = (n_batch, next_n, n_heads)
        self.tensors = {
            "query": torch.randn(*shape, 128, device="cuda", dtype=dtype),
            "key": keys,
            "weights": torch.randn(*shape, device="cuda", dtype=dtype),
            "actual_seq_lengths_key": lengths,
            "block_table": table.view(n_batch, width).contiguous(),
            "sparse_indices": torch.empty(n_batch, next_n, 1, TOP_K, device="cuda",
                                          dtype=torch.int32),
        }


def seconds_in_turns(runs, repeats, flush, back=False):
    """Seconds of each of several functions, a list each, in turns; with `back`, every other round
    the other way round. All is enqueued before the first is waited for, and each flush is longer
    than enqueueing what follows it: no gap of the host's is timed."""
    spans = [[] for _ in runs]
    for run in runs:
        run()
        run()
    torch.cuda.synchronize()
    for repeat in range(repeats):
        turns = list(zip(runs, spans))
        for run, mine in turns[::-1] if back and repeat % 2 else turns:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            start.record()
            run()
            end.record()
            mine.append((start, end))
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) * 1e-3 for start, end in mine] for mine in spans]


def medians(runs, repeats, flush):
    """Median seconds of each of several functions, in turns."""
    return [statistics.median(mine) for mine in seconds_in_turns(runs, repeats, flush)]


def ratio_in_turns(run, to, repeats, flush):
    """The median, over rounds, of the time of `run` to that of `to`. Each follows the other as
    often as itself: the clock of a run depends on what drew power before it."""
    mine, others = seconds_in_turns([run, to], repeats, flush, back=True)
    return statistics.median(x / y for x, y in zip(mine, others))


class Yardstick:
    """What the chip can do: a matrix product and a copy."""

    def __init__(self):
        n = 8192
        self.a, self.b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)
        self.flops, self.bytes = 2 * n**3, 2 * self.source.numel()

    def product(self):
        self.a @ self.b

    def copy(self):
        self.target.copy_(self.source)

    def reference(self, rate):
        """What measures R or C, and how many operations or bytes it takes."""
        return (self.product, self.flops) if rate == "R" else (self.copy, self.bytes)

    def rates(self, flush):
        for _ in range(20):
            self.product()
        product, copy = medians([self.product, self.copy], 15, flush)
        return {"R": self.flops / product, "C": self.bytes / copy}


def split_seconds(run, flush):
    """Mean kernel times of a run by what they do, or nothing where the profiler does not work."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(5):
                flush.sum()
                run()
            torch.cuda.synchronize()
        parts = {"scores": 0.0, "selection": 0.0}
        for event in record.key_averages():
            if "score" in event.key:
                parts["scores"] += event.device_time_total * 1e-6 / 5
            elif "kernel" in event.key and "at::" not in event.key:
                parts["selection"] += event.device_time_total * 1e-6 / 5
        return parts if parts["scores"] else {}
    except Exception as error:  # the profiler is a convenience: never fail the benchmark for it
        print(f"# no profile: {error}", file=sys.stderr)
        return {}


def eager(problem):
    """The formula in torch, bf16, in blocks of queries whose scores fit 4 GiB, each against the keys that its last
    query sees."""
    q, k, w = (problem.tensors[n] for n in ("query", "key", "weights"))
    n_query, n_key, n_heads = q.shape[1], k.shape[1], q.shape[2]
    rows = max(1, min(n_query, (4 << 30) // (2 * n_heads * n_key)))
    position = torch.arange(n_key, device="cuda")
    keys = k[0, :, 0]

    def run():
        for first in range(0, n_query, rows):
            last = min(first + rows, n_query)
            visible = n_key - n_query + last
            dots = torch.einsum("qhd,kd->qhk", q[0, first:last], keys[:visible]).relu_()
            scores = torch.einsum("qhk,qh->qk", dots, w[0, first:last])
            seen = n_key - n_query + torch.arange(first, last, device="cuda")
            scores.masked_fill_(position[None, :visible] > seen[:, None], float("-inf"))
            scores.topk(min(TOP_K, visible), dim=-1)

    return run


def busy(library, problem, kernel):
    """Ideal tensor-core cycles of the visible pairs over the cycles that blocks took."""
    if not hasattr(library.dll, "bench_count_cycles"):
        return None
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    run, _ = library.runner(problem, kernel)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    library.dll.bench_count_cycles(ctypes.c_void_p(counter.data_ptr()))
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    library.dll.bench_count_cycles(None)
    cycles = counter.item() / 5
    return problem.pairs * problem.n_heads * problem.head_dim / 2048 / cycles if cycles else None


class Report:
    def __init__(self, library, yardstick, flush, options):
        self.library, self.yardstick, self.flush = library, yardstick, flush
        self.rates = yardstick.rates(flush)
        self.only, self.quick, self.kernel = options.only, options.quick, options.kernel
        self.path = options.json
        self.rows = []

    def save(self):
        """After each row, so that a run that is cut off leaves what it has."""
        if self.path:
            write_json(self.path, {"device": torch.cuda.get_device_name(), "rates": self.rates,
                                   "forced_kernel": self.kernel, "rows": self.rows})

    def wants(self, name):
        return not self.only or self.only in name

    def add(self, problem, must=None, aim=None, kernel=None, label="", absolute=False, repeats=15):
        """`must` and `aim` are multiples of the floor, or seconds when `absolute`."""
        name = problem.name + label
        if not self.wants(name):
            return None
        run, workspace = self.library.runner(problem, kernel or self.kernel)
        reference, amount = self.yardstick.reference(problem.rate)
        repeats = 5 if self.quick else repeats
        if absolute:  # microseconds: in what state a gigabyte's copy leaves caches would count
            reference_s = medians([reference], repeats, self.flush)[0]
            seconds = medians([run], repeats, self.flush)[0]
        else:
            reference_s, seconds = medians([reference, run], repeats, self.flush)
        rate = amount / reference_s
        floor = problem.work / rate
        value = seconds if absolute else seconds / floor
        row = {"case": name, "us": seconds * 1e6, "floor_us": floor * 1e6,
               "times_floor": seconds / floor, problem.rate: rate, "must": must, "aim": aim,
               "absolute": absolute,
               "met": None if must is None else value <= must,
               "aim_met": None if aim is None else value <= aim,
               "workspace_mib": workspace / 2**20}
        if kernel is None:
            row.update({f"{k}_us": v * 1e6 for k, v in split_seconds(run, self.flush).items()})
        self.rows.append(row)
        self.save()
        self.show(row)
        if name in OTHERS and kernel is None:
            others_us, bound = OTHERS[name]
            self.ratio(f"{name}: ours / DeepGEMM + FlashInfer ({others_us} us, earlier, fp8)",
                       seconds * 1e6 / others_us, bound)
        return row

    def show(self, row):
        unit = 1e6 if row["absolute"] else 1
        suffix = " us" if row["absolute"] else " x"
        bounds = ", ".join(f"{k} {row[k] * unit:g}{suffix}" for k in ("must", "aim") if row[k])
        verdict = {None: "", True: "ok", False: "MISSED"}[row["met"]]
        if row["met"] and row["aim_met"]:
            verdict = "ok, aim too"
        rate = "  ".join(f"{name} {row[name] * 1e-12:.4g}" for name in ("R", "C") if name in row)
        parts = " + ".join(f"{row[k]:.1f}" for k in ("scores_us", "selection_us") if k in row)
        print(f"{row['case']:38s} {row['us']:10.1f} us  floor {row['floor_us']:9.1f}  "
              f"{row['times_floor']:6.3f} x  {rate}  [{parts}]  {bounds} {verdict}", flush=True)

    def ratio(self, name, value, must, aim=None, more_is_better=False):
        """`must` None: reported, not judged."""
        def meets(bound):
            return None if bound is None else value >= bound if more_is_better else value <= bound

        self.rows.append({"case": name, "value": value, "must": must, "aim": aim,
                          "met": meets(must), "aim_met": meets(aim)})
        self.save()
        bounds = ", ".join(f"{k} {v:g}" for k, v in (("must", must), ("aim", aim)) if v)
        verdict = {None: "", True: "ok", False: "MISSED"}[meets(must)]
        print(f"{name:46s} {value:8.3f}  {bounds} {verdict}", flush=True)


PREFILL = [(8192, 65536, 1.12, 1.06, 7), (2048, 65536, 1.15, 1.08, 11),
           (8192, 8192, 1.35, 1.15, 15), (2048, 8192, 1.40, 1.25, 15)]
DECODE = [(64, 65536, 1, 1.15, 1.08, False), (64, 65536, 2, 1.15, 1.08, False),
          (128, 65536, 1, 1.15, 1.08, False), (128, 65536, 2, 1.15, 1.08, False),
          (8, 65536, 1, 1.4, 1.2, False), (1, 131072, 1, 28e-6, 20e-6, True),
          (1, 8192, 1, 15e-6, 9e-6, True), (64, 8192, 1, None, None, False),
          (256, 16384, 1, None, None, False)]


def run_prefill(report):
    for n_query, n_key, must, aim, repeats in PREFILL:
        problem = Prefill(n_query, n_key)
        row = report.add(problem, must, aim, repeats=repeats)
        if row is None:
            continue
        report.add(problem, kernel="smxx", label=", smxx", repeats=min(repeats, 5))
        if report.kernel is None:
            smxx, best = (report.library.runner(problem, kernel)[0] for kernel in ("smxx", None))
            report.ratio(f"{problem.name}: smxx / best",
                         ratio_in_turns(smxx, best, repeats, report.flush), 2.2)
        share = busy(report.library, problem, report.kernel)
        if share:
            must_busy = 0.97 if n_key == 65536 else None
            report.ratio(f"{problem.name}: tensor cores busy", share, must_busy,
                         more_is_better=True)
        torch_us = medians([eager(problem)], 3, report.flush)[0] * 1e6
        report.ratio(f"{problem.name}: torch eager / ours", torch_us / row["us"], 8, 10, True)
        torch.cuda.empty_cache()


def run_variants(report):
    for dtype, label in ((torch.bfloat16, ", bf16"), (torch.float16, ", fp16")):
        report.add(Prefill(2048, 65536, dtype=dtype), 1.15, 1.08, label=label, repeats=11)
    compare_types(report)
    report.add(Prefill(2048, 65536, n_heads=32), 1.2, label=", 32 heads", repeats=11)
    report.add(Prefill(8192, 8192, n_heads=32), label=", 32 heads")
    report.add(Prefill(2048, 65536, n_heads=16), label=", 16 heads", repeats=11)
    report.add(Prefill(2048, 65536, head_dim=64), label=", D 64", repeats=11)


def compare_types(report):
    """fp16 against bf16 in turns, ours and cuBLAS's: both at the clock that the two leave together.
    The rows of each by itself show more, if the multipliers of fp16 draw more power."""
    name = "prefill 2048 x 65536: fp16 / bf16"
    if not report.wants(name):
        return
    bf16, fp16 = (report.library.runner(Prefill(2048, 65536, dtype=dtype), report.kernel)[0]
                  for dtype in (torch.bfloat16, torch.float16))
    a, b = (x.to(torch.float16) for x in (report.yardstick.a, report.yardstick.b))
    report.ratio(name, ratio_in_turns(fp16, bf16, 30, report.flush), 1.03)
    report.ratio("matrix product of cuBLAS: fp16 / bf16",
                 ratio_in_turns(lambda: a @ b, report.yardstick.product, 30, report.flush), None)


def run_decode(report):
    for n_batch, n_key, next_n, must, aim, absolute in DECODE:
        problem = Decode(n_batch, n_key, next_n)
        report.add(problem, must, aim, absolute=absolute, repeats=21)
        report.add(problem, kernel="smxx", label=", smxx", repeats=11)
        del problem
        torch.cuda.empty_cache()


def write_json(path, content):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def summary(rows):
    judged = [r for r in rows if r["met"] is not None]
    missed = [r["case"] for r in judged if not r["met"]]
    return (f"{len(judged) - len(missed)} of {len(judged)} bounds met" +
            (f"; missed: {'; '.join(missed)}" if missed else ""))


def merge(paths, target):
    """Several sections' files as one; sections that left nothing are named."""
    parts, rows, absent = {}, [], []
    for path in paths:
        name = path.rsplit("/", 1)[-1].removesuffix(".json")
        retried = path.removesuffix(".json") + "_smxx.json"
        found = False
        for candidate in (path, retried):
            try:
                with open(candidate, encoding="utf-8") as file:
                    part = json.load(file)
            except (OSError, ValueError):
                continue
            found = True
            label = f" ({part['forced_kernel']})" if part["forced_kernel"] else ""
            rows += [{**row, "case": row["case"] + label} for row in part.pop("rows")]
            parts[name + label] = part
        if not found:
            absent.append(name)
    write_json(target, {"sections": parts, "absent": absent, "rows": rows})
    print(summary(rows) + (f"; without results: {', '.join(absent)}" if absent else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library")
    parser.add_argument("--json")
    parser.add_argument("--section", choices=SECTIONS, help="only this part of the table")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--kernel", help="force a score kernel where the table leaves the choice")
    parser.add_argument("--quick", action="store_true", help="5 repeats each")
    parser.add_argument("--merge", nargs="+", metavar="FILE")
    options = parser.parse_args()
    if options.merge:
        merge(options.merge, options.json)
        return
    torch.manual_seed(0)
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    report = Report(Library(options.library), Yardstick(), flush, options)
    rates = report.rates
    print(f"{torch.cuda.get_device_name()}: bf16 matrix product {rates['R'] * 1e-12:.0f} TFLOP/s, "
          f"device copy {rates['C'] * 1e-12:.2f} TB/s", flush=True)
    runs = {"prefill": run_prefill, "variants": run_variants, "decode": run_decode}
    for section in SECTIONS:
        if options.section in (None, section):
            runs[section](report)
    after = report.yardstick.rates(flush)
    print(f"at the end: {after['R'] * 1e-12:.0f} TFLOP/s, {after['C'] * 1e-12:.2f} TB/s")
    print(summary(report.rows))


if __name__ == "__main__":
    main()
