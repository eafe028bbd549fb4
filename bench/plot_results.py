# SPDX-License-Identifier: Apache-2.0
"""Draws bench/results/*.json as charts beside them.

    python bench/plot_results.py [DIRECTORY]

h100.json (bench_cuda.py) and xeon-*.json (bench_cpu_torch.py) become bars of how many times torch
eager takes the operator's time; zen4.json (lidx bench --json) bars of the fraction of peak.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

INK, FAINT = "#1a1a2e", "#c8c8d4"


def gpu_bars(data):
    mark = ": torch eager / ours"
    rows = [r for r in data["rows"] if mark in r["case"]]
    return [(r["case"].replace(mark, ""), r["value"]) for r in rows], "times faster than torch eager"


def torch_bars(data):
    return [(c["case"], c["ratio"]) for c in data["cases"]], "times faster than torch eager"


def peak_bars(data):
    bars = []
    for c in data["cases"]:
        paged = f", pages of {c['block_size']}" if c["layout_key"] == "PA_BSND" else ""
        threads = f"{c['threads']} thread{'s' if c['threads'] > 1 else ''}"
        name = f"{c['kernel']} {c['query_tokens']} x {c['keys']}{paged}, {threads}"
        bars.append((name, c["best_fraction_of_peak"]))
    return bars, "fraction of the peak of the kernel's multiply instruction (fastest call)"


def draw(path, title, bars, meaning):
    names, values = zip(*reversed(bars))
    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(bars) + 1))
    drawn = axes.barh(names, values, color=INK, height=0.6)
    axes.bar_label(drawn, fmt="%.2f" if max(values) < 2 else "%.1f", padding=3, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(meaning, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, max(values) * 1.12)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    print(path)


def main():
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    titles = {
        "h100": "NVIDIA H100, bf16, 64 heads x 128, top 2048, causal prefill",
        "xeon-emerald-rapids": "Xeon with AMX, 16 threads, bf16, 64 heads x 128, top 2048",
        "zen4": "Zen 4 (AVX-512 BF16), bf16, 64 heads x 128, top 2048",
        "zen4-fp32-kernels": "Zen 4, AVX2 and AVX-512 without BF16, 64 heads x 128, top 2048",
    }
    for path in sorted(directory.glob("*.json")):
        data = json.loads(path.read_text())
        kind = gpu_bars if "rows" in data else torch_bars if "torch" in data else peak_bars
        bars, meaning = kind(data)
        draw(path.with_suffix(".svg"), titles.get(path.stem, path.stem), bars, meaning)


if __name__ == "__main__":
    main()
