# SPDX-License-Identifier: Apache-2.0
"""lidx run: what it reads, options, kernels, ties, special numbers.

LIDX_BIN=build/tools/lidx python -m pytest -q tests/test_lidx_run.py
"""

import json
import math
import struct

import pytest

from lidx_program import (
    CAPTURE,
    LIDX,
    MODEL_RESULT,
    PAIRS,
    kernels,
    lidx,
    pack,
    parse,
    problem,
    unpack,
    write,
)

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")


@pytest.mark.parametrize("layout_query, layout_key", PAIRS)
@pytest.mark.parametrize(
    "dtype, weights_dtype", [("BF16", "F32"), ("F16", "F16"), ("BF16", "BF16")]
)
@pytest.mark.parametrize("mode", [0, 3])
def test_round_trip(tmp_path, layout_query, layout_key, dtype, weights_dtype, mode):
    t, meta, expected = problem(layout_query, layout_key, dtype, weights_dtype, mode=mode, k=12)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    result = lidx("run", source, "-o", target)
    assert result.returncode == 0, result.stderr
    tensors, out_meta = parse(target)
    assert out_meta["layout_query"] == layout_query and out_meta["layout_key"] == layout_key
    assert out_meta["sparse_mode"] == str(mode)
    kind, shape, data = tensors["sparse_indices"]
    assert kind == "I32" and shape == t["query"][1][:-2] + [1, 12]
    indices = unpack("I32", data)
    values = unpack("F32", tensors["sparse_values"][2])
    for row, best in enumerate(expected):
        got = list(zip(values[row * 12 : row * 12 + 12], indices[row * 12 : row * 12 + 12]))
        assert [j for _, j in got[: len(best)]] == [j for _, j in best], row
        for (is_, _), (should, _) in zip(got, best):
            assert math.isclose(is_, should, rel_tol=1e-4, abs_tol=1e-4)
        assert got[len(best) :] == [(-math.inf, -1)] * (12 - len(best)), row
    checked = lidx("check", source, target)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(expected)} rows checked, {len(expected)} agree" in checked.stdout


@pytest.mark.parametrize("layout_query, layout_key", PAIRS)
def test_options_beat_metadata(tmp_path, layout_query, layout_key):
    t, _, expected = problem(layout_query, layout_key, mode=0, k=5)
    source = write(tmp_path / "in", t, {"sparse_count": "9", "sparse_mode": "3"})
    target = tmp_path / "out"
    assert (
        lidx(
            "run",
            source,
            "-o",
            target,
            "--layout-query",
            layout_query,
            "--layout-key",
            layout_key,
            "--sparse-count",
            5,
            "--sparse-mode=0",
        ).returncode
        == 0
    )
    tensors, meta = parse(target)
    assert meta["sparse_count"] == "5" and meta["sparse_mode"] == "0"
    indices = unpack("I32", tensors["sparse_indices"][2])
    for row, best in enumerate(expected):
        assert [j for j in indices[row * 5 : row * 5 + 5] if j >= 0] == [j for _, j in best]


def test_every_kernel_and_thread_count(tmp_path):
    bits = {}
    for kernel in kernels():
        for threads in (1, 3):
            target = tmp_path / f"{kernel}-{threads}"
            result = lidx("run", CAPTURE, "-o", target, "--kernel", kernel, "--threads", threads)
            assert result.returncode == 0, result.stderr
            assert lidx("check", CAPTURE, target, "--rows", 3).returncode == 0
            bits.setdefault(kernel, set()).add(parse(target)[0]["sparse_values"][2])
    assert bits and all(len(one) == 1 for one in bits.values())


def test_captured_model(tmp_path):
    target = tmp_path / "out"
    assert lidx("run", CAPTURE, "-o", target).returncode == 0
    assert lidx("check", CAPTURE, target).returncode == 0
    report = json.loads(lidx("check", CAPTURE, MODEL_RESULT, "--json").stdout)
    assert report["agree"] and report["rows"] == 24 and report["indices"] == 24 * 256
    indices = unpack("I32", parse(target)[0]["sparse_indices"][2])
    model = unpack("I32", parse(MODEL_RESULT)[0]["sparse_indices"][2])
    same = sum(
        len(set(indices[r * 256 : r * 256 + 256]) & set(model[r * 256 : r * 256 + 256]))
        for r in range(24)
    )
    assert same >= 24 * 256 - 24  # one key a row may be as good as another


def test_ties_are_in_order_of_position(tmp_path):
    t, meta, expected = problem(
        integers=True, heads=2, key_lengths=(200,), query_lengths=(3,), k=150, weights_dtype="F32"
    )
    t["weights"] = ("F32", t["weights"][1], pack("F32", [1.0, 1.0] * 4))
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    for kernel in kernels():
        assert lidx("run", source, "-o", target, "--kernel", kernel).returncode == 0
        tensors, _ = parse(target)
        indices = unpack("I32", tensors["sparse_indices"][2])
        values = unpack("F32", tensors["sparse_values"][2])
        assert len(set(values[:150])) < 100
        for s in range(1, 150):
            assert (-values[s - 1], indices[s - 1]) < (-values[s], indices[s])
        assert lidx("check", source, target).returncode == 0


def test_special_numbers(tmp_path):
    """NaN and infinite keys: visible, ranked last or first, and check agrees."""
    dim, rows = 64, [[1.0] * 64, [math.nan] * 64, [math.inf] * 64, [-math.inf] * 64, [2.0] * 64]
    t = {
        "query": ("BF16", [1, 1, 1, dim], pack("BF16", [1.0] * dim)),
        "weights": ("F32", [1, 1, 1], pack("F32", [1.0])),
    }
    content = b"".join(
        struct.pack("<64H", *([0x7FC0] * 64)) if row[0] != row[0] else pack("BF16", row)
        for row in rows
    )
    t["key"] = ("BF16", [1, 5, 1, dim], content)
    order = [2, 4, 0, 3, 1, -1]
    for kernel in kernels():
        for count in (3, 4, 5, 6):  # the NaN is left out, or in
            source = write(tmp_path / "in", t, {"sparse_count": str(count)})
            target = tmp_path / "out"
            assert lidx("run", source, "-o", target, "--kernel", kernel).returncode == 0
            assert unpack("I32", parse(target)[0]["sparse_indices"][2]) == order[:count]
            result = lidx("check", source, target)
            assert result.returncode == 0, result.stdout


def test_denormals_of_fp16(tmp_path):
    """Query, keys and weights below 2^-14: whole multiples of 2^-24, read as what they are."""
    t = {
        "query": ("F16", [1, 1, 1, 64], pack("F16", [3 * 2.0**-24] + [1.0] * 63)),
        "key": ("F16", [1, 4, 1, 64], b"".join(pack("F16", [x] + [0] * 63) for x in (1, 4, 2, 3))),
        "weights": ("F16", [1, 1, 1], pack("F16", [5 * 2.0**-24])),
    }
    source, target = write(tmp_path / "in", t, {"sparse_count": "4"}), tmp_path / "out"
    assert lidx("run", source, "-o", target).returncode == 0
    tensors, _ = parse(target)
    assert unpack("I32", tensors["sparse_indices"][2]) == [1, 3, 2, 0]
    assert unpack("F32", tensors["sparse_values"][2]) == [15 * n * 2.0**-48 for n in (4, 3, 2, 1)]
    assert lidx("check", source, target).returncode == 0
