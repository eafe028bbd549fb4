# SPDX-License-Identifier: Apache-2.0
"""lidx check finds each way in which a result can be wrong."""

import json
import math
import random

import pytest

from lidx_program import LIDX, lidx, pack, parse, problem, unpack, write

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")


def mutated(tmp_path, change, drop_values=False, mode=0, **options):
    """A right answer to a small problem, changed, and what check says about it."""
    options = {"query_lengths": (3, 2), "key_lengths": (30, 8), "k": 12, **options}
    t, meta, _ = problem(mode=mode, **options)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    assert lidx("run", source, "-o", target).returncode == 0
    tensors, out_meta = parse(target)
    indices = unpack("I32", tensors["sparse_indices"][2])
    values = unpack("F32", tensors["sparse_values"][2])
    change(indices, values)
    shape = tensors["sparse_indices"][1]
    changed = {"sparse_indices": ("I32", shape, pack("I32", indices))}
    if not drop_values:
        changed["sparse_values"] = ("F32", shape, pack("F32", values))
    return lidx("check", source, write(target, changed, out_meta))


def swap(a, b):
    def change(indices, values):
        indices[a], indices[b] = indices[b], indices[a]
        values[a], values[b] = values[b], values[a]

    return change


def put(slot, index=None, value=None):
    def change(indices, values):
        if index is not None:
            indices[slot] = index
        if value is not None:
            values[slot] = value

    return change


def take_worst(indices, values):
    """Row 0 chose 12 of 30: replace the best by one that it left out."""
    indices[0] = next(j for j in range(30) if j not in indices[:12])


@pytest.mark.parametrize(
    "change, drop, words",
    [
        (swap(0, 1), False, ["row 0, slot 1", "descending"]),
        (swap(0, 5), True, ["row 0, slot", "should be before"]),
        (put(13, index=30), False, ["row 1, slot 1", "none of the 30"]),
        (put(13, index=-1), False, ["row 1, slot 1", "none of the 30", "should be key"]),
        (put(13, index=-2), True, ["row 1, slot 1"]),
        (take_worst, False, ["row 0, slot 0", "should be key"]),
        (take_worst, True, ["row 0, slot 0", "should be key"]),
        (
            lambda indices, values: indices.__setitem__(3, indices[2]),
            True,
            ["row 0, slot 3", "second"],
        ),
        (
            lambda indices, values: values.__setitem__(0, values[0] * 1.01),
            False,
            ["row 0, slot 0", "got value"],
        ),
        (lambda indices, values: values.__setitem__(0, math.nan), False, ["row 0, slot"]),
        (put(11, value=math.nan), False, ["row 0, slot 11", "got value nan"]),
        (put(4 * 12 + 8, index=3), False, ["row 4, slot 8", "should be -1"]),
        (put(4 * 12 + 8, value=0.0), False, ["row 4, slot 8", "-inf"]),
        (put(3 * 12, index=0), True, ["row 3, slot 0", "should be -1"]),
    ],
)
def test_check_finds(tmp_path, change, drop, words):
    result = mutated(tmp_path, change, drop)
    assert result.returncode == 1, result.stdout + result.stderr
    first = result.stdout.splitlines()[0]
    for word in words:
        assert word in first, result.stdout
    assert "1 differ" in result.stdout


def test_check_finds_the_value_of_an_only_slot(tmp_path):
    result = mutated(tmp_path, put(0, value=1e9), k=1)
    assert result.returncode == 1 and "row 0, slot 0: got value 1e+09" in result.stdout


def test_check_names_its_file(tmp_path):
    t, meta, _ = problem()
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    assert lidx("run", source, "-o", target).returncode == 0
    report = json.loads(lidx("check", source, target, "--json").stdout)
    assert report["file"] == str(source) and report["agree"] is True


def test_check_finds_a_wrong_tie(tmp_path):
    """A plateau of exact zeros across the k-th place, in which a later key was taken."""
    heads, dim, keys = 2, 64, 40
    t = {
        "query": ("BF16", [1, 1, heads, dim], pack("BF16", [1.0] * (heads * dim))),
        "key": (
            "BF16",
            [1, keys, 1, dim],
            pack("BF16", [2.0] * (4 * dim) + [-1.0] * ((keys - 4) * dim)),
        ),
        "weights": ("F32", [1, 1, heads], pack("F32", [1.0, 0.5])),
    }
    source, target = write(tmp_path / "in", t, {"sparse_count": "10"}), tmp_path / "out"
    assert lidx("run", source, "-o", target).returncode == 0
    tensors, meta = parse(target)
    assert unpack("I32", tensors["sparse_indices"][2]) == list(range(10))
    assert lidx("check", source, target).returncode == 0
    wrong = {"sparse_indices": ("I32", [1, 1, 1, 10], pack("I32", list(range(9)) + [20]))}
    for extra in ({}, {"sparse_values": tensors["sparse_values"]}):
        result = lidx("check", source, write(target, {**wrong, **extra}, meta))
        assert result.returncode == 1, result.stdout
        assert "got key 20 with score 0, should be key 9" in result.stdout
    wrong = {
        "sparse_indices": ("I32", [1, 1, 1, 10], pack("I32", [0, 1, 2, 3, 4, 5, 6, 7, 9, 8])),
        "sparse_values": tensors["sparse_values"],
    }
    assert lidx("check", source, write(target, wrong, meta)).returncode == 1


def agrees(tmp_path, scores, indices):
    """What check says of keys with just these scores, where these of them were chosen."""
    zeros = [0.0] * 63
    t = {
        "query": ("BF16", [1, 1, 2, 64], pack("BF16", [1.0] + zeros + [-1.0] + zeros)),
        "key": ("BF16", [1, len(scores), 1, 64], pack("BF16", [x for s in scores for x in [s] + zeros])),
        "weights": ("F32", [1, 1, 2], pack("F32", [1.0, -1.0])),
    }
    source = write(tmp_path / "in", t, {"sparse_count": str(len(indices))})
    result = {"sparse_indices": ("I32", [1, 1, 1, len(indices)], pack("I32", indices))}
    return json.loads(lidx("check", source, write(tmp_path / "out", result), "--json").stdout)["agree"]


@pytest.mark.parametrize(
    "scores, indices, agree",
    [
        ([8.0, 7.5, 7.0], [0, 2], False),
        ([1e6, 8.0, 7.5, 7.0], [0, 1, 3], True),
        ([8.0, 7.5, 7.0, -1e6], [0, 2], True),
        ([8.0, 7.5, 7.0, 1e5, -1e5], [3, 0, 2], False),
        ([math.inf, 8.0, 7.5, 7.0], [0, 1, 3], False),
        ([8.0, 7.5, 7.0, -math.inf], [0, 2], False),
    ],
)
def test_check_allows_a_millionth_of_the_largest_finite_score(tmp_path, scores, indices, agree):
    assert agrees(tmp_path, scores, indices) is agree


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_check_reads_16_bit_values(tmp_path, dtype):
    t, meta, _ = problem(mode=0)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    assert lidx("run", source, "-o", target).returncode == 0
    tensors, out_meta = parse(target)
    _, shape, data = tensors["sparse_values"]
    tensors["sparse_values"] = (dtype, shape, pack(dtype, unpack("F32", data)))
    result = lidx("check", source, write(target, tensors, out_meta))
    assert result.returncode == 0, result.stdout


def test_check_survives_any_result(tmp_path):
    """Indices from nowhere: found, row by row, and never used as an address."""
    rng = random.Random(2)
    t, meta, expected = problem("TND", "PA_BSND", query_lengths=(3, 2), key_lengths=(30, 8), k=12)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    shape, n = [len(expected), 1, 12], len(expected) * 12
    for low, high in [(-2, 31), (-1, 8), (-(1 << 31), (1 << 31) - 1)]:
        for _ in range(5):
            indices = pack("I32", [rng.randint(low, high) for _ in range(n)])
            values = pack(
                "F32", [rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e38]) for _ in range(n)]
            )
            write(
                target,
                {
                    "sparse_indices": ("I32", shape, indices),
                    "sparse_values": ("F32", shape, values),
                },
                meta,
            )
            result = lidx("check", source, target)
            assert result.returncode == 1 and "differ" in result.stdout, result.stderr
