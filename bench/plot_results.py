# SPDX-License-Identifier: Apache-2.0
"""Draws results as charts beside them and prints what they say.

    python bench/plot_results.py [DIRECTORY [NAME...]]

A file's content tells what it is: bars of how many times torch eager takes the operator's time
(bench_cuda.py, bench_cpu_torch.py), of the fraction of peak (lidx bench --json), or, for
NAME-rivals.json (bench_cpu_rivals), groups of bars of the fraction of peak that the operator and its
rivals reach, torch among them if NAME-torch*.json or else NAME.json has it. With names, only NAME.json
and NAME-rivals.json.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

INK, FAINT = "#1a1a2e", "#c8c8d4"
COLOURS = {"lightning_indexer": INK, "oneDNN": "#2a7f9e", "libxsmm": "#7fb3a8",
           "torch eager": "#d97a3c", "torch.compile": "#e9b872"}
TITLES = {
    "h100": "NVIDIA H100, bf16, 64 heads x 128, top 2048, causal prefill",
    "h200": "NVIDIA H200, bf16, 64 heads x 128, top 2048, causal prefill",
    "xeon-emerald-rapids": "Xeon with AMX, 16 threads, bf16, 64 heads x 128, top 2048",
    "xeon-emerald-rapids-avx512": "Xeon (AVX-512 kernels, not its choice), bf16, 64 heads x 128, top 2048",
    "xeon-emerald-rapids-rivals": "Xeon with AMX, bf16, 64 heads x 128, top 2048 in order",
    "zen3": "Zen 3 (AVX2), bf16, 64 heads x 128, top 2048",
    "zen3-fp16": "Zen 3 (AVX2), fp16, 64 heads x 128, top 2048",
    "zen4": "Zen 4 (AVX-512 BF16), bf16, 64 heads x 128, top 2048",
    "zen4-rivals": "Zen 4 (AVX-512 BF16), bf16, 64 heads x 128, top 2048 in order",
    "zen4-fp32-kernels": "Zen 4, AVX2 and AVX-512 without BF16, 64 heads x 128, top 2048",
}


def gpu_bars(data):
    mark = ": torch eager / ours"
    rows = [r for r in data["rows"] if mark in r["case"]]
    return [(r["case"].replace(mark, ""), r["value"]) for r in rows], "times faster than torch eager"


def torch_bars(data):
    return [(c["case"], c["ratio"]) for c in data["cases"]], "times faster than torch eager"


def threads(n):
    return f"{n} thread{'s' if n > 1 else ''}"


def peak_bars(data):
    bars = []
    for c in data["cases"]:
        paged = f", pages of {c['block_size']}" if c["layout_key"] == "PA_BSND" else ""
        batches = f"{c['batches']} x " if c.get("batches", 1) > 1 else ""
        keys = f"~{c['keys']}" if c.get("lengths") == "lognormal" else c["keys"]
        name = f"{c['kernel']} {batches}{c['query_tokens']} x {keys}{paged}, {threads(c['threads'])}"
        bars.append((name, c["fraction_of_peak"]))
    return bars, "fraction of the peak of the kernel's multiply instruction (median)"


def times(ratio):
    return f"{ratio:.2f} x" if ratio < 2 else f"{ratio:.1f} x"


def torch_sides(directory, name):
    """By (tokens, keys, threads) what bench_cpu_torch.py has: [(side, times our time)]."""
    sides = {}
    for path in [*directory.glob(f"{name}.json"), *directory.glob(f"{name}-torch*.json")]:
        data = json.loads(path.read_text())
        if "torch" not in data:
            continue
        for c in data["cases"]:
            tokens, _, keys, *state = c["case"].split()
            if state != ["cold"]:
                found = [("torch eager", c["ratio"]), ("torch.compile", c.get("compiled_ratio"))]
                key = int(tokens), int(keys), data["threads"]
                sides[key] = [(side, ratio) for side, ratio in found if ratio]
    return sides


def rival_groups(data, others):
    """[(name of the case, {side: (fraction of peak, times our time)})]"""
    groups = []
    for r in data["rivals"]:
        bars = {s["name"].split()[0]: (s["fraction_of_peak"], s["of_our_time"]) for s in r["sides"]}
        ours = bars["lightning_indexer"][0]
        for side, ratio in others.get((r["query_tokens"], r["keys"], r["threads"]), []):
            bars[side] = (ours / ratio, ratio)
        groups.append((f"{r['query_tokens']} x {r['keys']}, {threads(r['threads'])}", bars))
    return groups


def print_groups(data, groups):
    names = [s for s in COLOURS if any(s in bars for _, bars in groups)]
    print(f"kernel {data['kernel']}; of the {data['peak_instruction']} peak, and times our time")
    print(f"{'case':>24} {'peak Tflop/s':>13} {'our us':>10}" + "".join(f"{n:>18}" for n in names))
    for (case, bars), r in zip(groups, data["rivals"]):
        cells = ""
        for n in names:
            fraction, ratio = bars.get(n, (None, None))
            slower = f" ({times(ratio)})" if n != names[0] and ratio else ""
            cells += f"{f'{fraction:.2f}{slower}' if ratio else '-':>18}"
        print(f"{case:>24} {r['peak_flop_per_s'] * 1e-12:13.2f} "
              f"{r['sides'][0]['median_s'] * 1e6:10.1f}{cells}")


def style(axes, title, meaning, most):
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(meaning, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, most * 1.12)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure, path):
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    print(path)


def draw(path, title, bars, meaning):
    names, values = zip(*reversed(bars))
    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(bars) + 1))
    drawn = axes.barh(names, values, color=INK, height=0.6)
    axes.bar_label(drawn, fmt="%.2f" if max(values) < 2 else "%.1f", padding=3, fontsize=8)
    style(axes, title, meaning, max(values))
    save(figure, path)


def draw_groups(path, title, groups, instruction):
    names = [s for s in COLOURS if any(s in bars for _, bars in groups)]
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(figsize=(7.5, (0.17 * len(names) + 0.1) * len(groups) + 1.2))
    for i, name in enumerate(names):
        found = [(g, bars[name]) for g, (_, bars) in enumerate(groups) if name in bars]
        places = [g + (i - (len(names) - 1) / 2) * height for g, _ in found]
        drawn = axes.barh(places, [bar[0] for _, bar in found], height, color=COLOURS[name],
                          label=name)
        labels = [f"{f:.2f}" if name == names[0] else f"{f:.2f}   {times(ratio)} our time"
                  for _, (f, ratio) in found]
        axes.bar_label(drawn, labels, padding=3, fontsize=6.5)
    axes.set_yticks(range(len(groups)), [case for case, _ in groups])
    style(axes, title, f"fraction of the {instruction} peak of these threads, measured in the same run",
          max(bar[0] for _, bars in groups for bar in bars.values()) * 1.12)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=10, pad=22)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncol=len(names), frameon=False)
    save(figure, path)


def draw_file(path):
    data = json.loads(path.read_text())
    picture, title = path.with_suffix(".svg"), TITLES.get(path.stem, path.stem)
    if "rivals" in data:
        others = torch_sides(path.parent, path.stem.removesuffix("-rivals"))
        groups = rival_groups(data, others)
        print_groups(data, groups)
        draw_groups(picture, title, groups, data["peak_instruction"])
        return
    kind = gpu_bars if "rows" in data else torch_bars if "torch" in data else peak_bars
    bars, meaning = kind(data)
    draw(picture, title, bars, meaning)


def main():
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    wanted = [f"{name}{part}" for name in sys.argv[2:] for part in ("", "-rivals")]
    for path in sorted(directory.glob("*.json")):
        if path.stem in wanted or not (wanted or "-torch" in path.stem):
            draw_file(path)


if __name__ == "__main__":
    main()
