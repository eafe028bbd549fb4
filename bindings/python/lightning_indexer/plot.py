# SPDX-License-Identifier: Apache-2.0
"""Two pictures: which keys each query selects, and how long a decode step takes."""

import os
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot
import matplotlib.ticker
import numpy

import lightning_indexer

HEADS, DIM = 16, 64
INK, FAINT, ACCENT = "#1a1a2e", "#d8d8e0", "#c2410c"


def _walk(random, n):
    """Vectors that drift, so that a query resembles what came shortly before, and recur."""
    drift = random.standard_normal((n, DIM)).cumsum(0)
    topic = random.standard_normal((8, DIM))[random.integers(0, 8, n // 64 + 1).repeat(64)[:n]]
    return drift / numpy.sqrt(numpy.arange(1, n + 1))[:, None] + 2 * topic


def selection_map(path, n_keys, count, seed):
    """Causal self-selection over one synthetic context: a row for each query, ink where it looks."""
    random = numpy.random.default_rng(seed)
    key = _walk(random, n_keys)
    query = key[:, None] + 2 * random.standard_normal((n_keys, HEADS, DIM))
    indices = lightning_indexer.lightning_indexer(
        query[None].astype("float16"),
        key[None, :, None].astype("float16"),
        numpy.ones((1, n_keys, HEADS), "float32"),
        sparse_count=count,
    )[0, :, 0]
    chosen = numpy.zeros((n_keys, n_keys), bool)
    rows, slots = numpy.nonzero(indices >= 0)
    chosen[rows, indices[rows, slots]] = True

    figure, axes = pyplot.subplots(figsize=(7, 7), layout="constrained")
    colours = matplotlib.colors.ListedColormap(["white", INK])
    axes.imshow(chosen, cmap=colours, interpolation="antialiased", aspect="equal")
    axes.plot([0, n_keys - 1], [0, n_keys - 1], color=ACCENT, linewidth=1)
    limits = dict(xlim=(-0.5, n_keys - 0.5), ylim=(n_keys - 0.5, -0.5))
    axes.set(xlabel="key position", ylabel="query position", **limits)
    share = chosen.sum() / (n_keys * (n_keys + 1) / 2)
    axes.set_title(
        f"{count} of up to {n_keys} keys for each query: {share:.0%} of the causal triangle\n"
        "a synthetic context of recurring topics", fontsize=11
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _decode_seconds(n_keys):
    """The best of some runs of one query token, 64 heads of 128, k = 2048."""
    random = numpy.random.default_rng(0)
    query = random.standard_normal((1, 1, 64, 128)).astype("float16")
    key = random.standard_normal((1, n_keys, 1, 128)).astype("float16")
    weights = random.standard_normal((1, 1, 64)).astype("float32")
    best = numpy.inf
    for _ in range(7):
        start = time.perf_counter()
        lightning_indexer.lightning_indexer(query, key, weights)
        best = min(best, time.perf_counter() - start)
    return best


def benchmark_chart(path):
    """Time of one decode step on this machine's CPU, over the context's length."""
    lengths = [2048 << i for i in range(7)]
    seconds = [_decode_seconds(n) for n in lengths]
    chosen = [k["name"] for k in lightning_indexer.kernels() if k["chosen_fp16"]]

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.loglog(lengths, [s * 1e3 for s in seconds], "o-", color=INK)
    for n, s in zip(lengths, seconds):
        axes.annotate(
            f"{s * 1e3:.2g}", (n, s * 1e3), (0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths], minor=False)
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=FAINT)
    axes.set(xlabel="keys", ylabel="milliseconds")
    axes.set_title(
        "One decode token, 64 heads of 128, float16, k = 2048\n"
        f"kernel {chosen[0]}, {os.cpu_count()} logical CPUs, best of 7 runs",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(folder, n_keys, count, seed):
    """Writes both pictures into `folder` and returns their paths."""
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in ("selection.png", "benchmark.png")]
    selection_map(paths[0], n_keys, count, seed)
    benchmark_chart(paths[1])
    return paths
