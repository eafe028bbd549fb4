# SPDX-License-Identifier: Apache-2.0
"""The command line as a program: what it reads, writes, says and leaves alone.

    LIDX_BIN=build/tools/lidx python -m pytest -q tests/test_lidx.py
"""
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

DATA = pathlib.Path(__file__).resolve().parent / "data"
CAPTURE = DATA / "deepseek_v32.safetensors"
MODEL_RESULT = DATA / "deepseek_v32_result.safetensors"
ROOT = DATA.parent.parent
LIDX = os.environ.get("LIDX_BIN")

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")

if LIDX:
    LIDX = str(pathlib.Path(LIDX).resolve())


def lidx(*arguments, **options):
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **options.pop("env", {})}
    options.setdefault("timeout", 120)
    return subprocess.run([LIDX, *map(str, arguments)], stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, env=environment, **options)


def refused(result, *words):
    """One sentence on stderr that has these words, status 2, nothing on stdout."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lidx"), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


# ---- the file format, written apart from the program -------------------------------------------


def bf16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def from_bf16(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def pack(dtype, numbers):
    if dtype == "BF16":
        return struct.pack(f"<{len(numbers)}H", *(bf16(x) for x in numbers))
    return struct.pack(f"<{len(numbers)}" + {"F16": "e", "F32": "f", "I32": "i", "I64": "q"}[dtype],
                       *numbers)


def unpack(dtype, data):
    if dtype == "BF16":
        return [from_bf16(bits) for bits in struct.unpack(f"<{len(data) // 2}H", data)]
    code, size = {"F16": ("e", 2), "F32": ("f", 4), "I32": ("i", 4)}[dtype]
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def assemble(tensors, metadata=None, pad=8):
    """`tensors`: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


def parse(path):
    content = pathlib.Path(path).read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + n])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], content[8 + n + begin:8 + n + end])
    return tensors, metadata


# ---- random problems ---------------------------------------------------------------------------


def prefix_sums(lengths):
    total, sums = 0, []
    for length in lengths:
        total += length
        sums.append(total)
    return sums


def problem(layout_query="BSND", layout_key="BSND", dtype="BF16", weights_dtype="F32", heads=3,
            dim=64, query_lengths=(4, 0, 7), key_lengths=(40, 9, 5), block=16, seed=0, k=12, mode=3,
            integers=False):
    """Tensors of a problem, and for each output row its query, weights and visible keys."""
    rng = random.Random(seed)
    batches = len(query_lengths)

    def numbers(n):
        if integers:  # exact in every precision, with many equal scores
            return [float(rng.randint(-1, 1)) for _ in range(n)]
        return unpack(dtype, pack(dtype, [rng.gauss(0, 1) for _ in range(n)]))

    longest_query = max(query_lengths) + 1
    rows = sum(query_lengths) + 1 if layout_query == "TND" else batches * longest_query
    query = [numbers(heads * dim) for _ in range(rows)]
    weights = [unpack(weights_dtype, pack(weights_dtype, [rng.uniform(-0.5, 1) for _ in range(heads)]))
               for _ in range(rows)]
    keys = [[numbers(dim) for _ in range(n)] for n in key_lengths]

    def flat(lists):
        return [x for one in lists for x in one]

    filler = [math.nan] * dim  # what no query may see
    t = {}
    shape = [rows] if layout_query == "TND" else [batches, longest_query]
    t["query"] = (dtype, shape + [heads, dim], pack(dtype, flat(query)))
    t["weights"] = (weights_dtype, shape + [heads], pack(weights_dtype, flat(weights)))
    sums = prefix_sums(query_lengths) if layout_query == "TND" else list(query_lengths)
    t["actual_seq_lengths_query"] = ("I32", [batches], pack("I32", sums))
    sums = prefix_sums(key_lengths) if layout_key == "TND" else list(key_lengths)
    t["actual_seq_lengths_key"] = ("I32", [batches], pack("I32", sums))
    if layout_key == "TND":
        stored = flat(keys) + [filler]
        key_shape = [len(stored), 1, dim]
    elif layout_key == "BSND":
        longest = max(key_lengths) + 2
        stored = flat([one + [filler] * (longest - len(one)) for one in keys])
        key_shape = [batches, longest, 1, dim]
    else:
        width = max(-(-n // block) for n in key_lengths) + 1
        order = list(range(batches * width + 3))
        rng.shuffle(order)
        stored, table = [filler] * (len(order) * block), []
        for b in range(batches):
            for p in range(width):
                needed = p * block < key_lengths[b]
                page = order.pop() if needed else -7  # never to be read
                table.append(page)
                for j, one in enumerate(keys[b][p * block:(p + 1) * block]):
                    stored[page * block + j] = one
        key_shape = [len(stored) // block, block, 1, dim]
        t["block_table"] = ("I32", [batches, width], pack("I32", table))
    t["key"] = (dtype, key_shape, pack(dtype, flat(stored)))

    expected = []
    for b in range(batches):
        slots = query_lengths[b] if layout_query == "TND" else longest_query
        for i in range(slots):
            visible = len(keys[b])
            if mode == 3:
                visible = min(max(visible - query_lengths[b] + i + 1, 0), visible)
            expected.append(keys[b][:visible] if i < query_lengths[b] else [])
    expected += [[]] * (rows - len(expected))
    meta = {"sparse_count": str(k), "sparse_mode": str(mode)}
    return t, meta, [answer(q, w, seen, k, heads, dim)
                     for q, w, seen in zip(query, weights, expected)]


def answer(query, weights, keys, k, heads, dim):
    """The k best (score, position) of a row, by the definition, in Python's doubles."""
    scores = []
    for j, key in enumerate(keys):
        total = 0.0
        for h in range(heads):
            dot = math.fsum(a * b for a, b in zip(query[h * dim:(h + 1) * dim], key))
            total += weights[h] * max(0.0, dot)
        scores.append((-total, j))
    return [(-s, j) for s, j in sorted(scores)[:k]]


PAIRS = [("BSND", "BSND"), ("TND", "TND"), ("BSND", "PA_BSND"), ("TND", "PA_BSND")]


def write(path, tensors, metadata=None, **options):
    path.write_bytes(assemble(tensors, metadata, **options))
    return path


def kernels():
    listed = json.loads(lidx("info", "--json").stdout)["kernels"]
    return [one["name"] for one in listed if one["available"] and one["backend"] == "cpu"]


# ---- run and check -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout_query, layout_key", PAIRS)
@pytest.mark.parametrize("dtype, weights_dtype", [("BF16", "F32"), ("F16", "F16"), ("BF16", "BF16")])
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
        got = list(zip(values[row * 12:row * 12 + 12], indices[row * 12:row * 12 + 12]))
        assert [j for _, j in got[:len(best)]] == [j for _, j in best], row
        for (is_, _), (should, _) in zip(got, best):
            assert math.isclose(is_, should, rel_tol=1e-4, abs_tol=1e-4)
        assert got[len(best):] == [(-math.inf, -1)] * (12 - len(best)), row
    checked = lidx("check", source, target)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(expected)} rows checked, {len(expected)} agree" in checked.stdout


@pytest.mark.parametrize("layout_query, layout_key", PAIRS)
def test_options_beat_metadata(tmp_path, layout_query, layout_key):
    t, _, expected = problem(layout_query, layout_key, mode=0, k=5)
    source = write(tmp_path / "in", t, {"sparse_count": "9", "sparse_mode": "3"})
    target = tmp_path / "out"
    assert lidx("run", source, "-o", target, "--layout-query", layout_query, "--layout-key",
                layout_key, "--sparse-count", 5, "--sparse-mode=0").returncode == 0
    tensors, meta = parse(target)
    assert meta["sparse_count"] == "5" and meta["sparse_mode"] == "0"
    indices = unpack("I32", tensors["sparse_indices"][2])
    for row, best in enumerate(expected):
        assert [j for j in indices[row * 5:row * 5 + 5] if j >= 0] == [j for _, j in best]


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
    same = sum(len(set(indices[r * 256:r * 256 + 256]) & set(model[r * 256:r * 256 + 256]))
               for r in range(24))
    assert same >= 24 * 256 - 24  # one key a row may be as good as another


def test_ties_are_in_order_of_position(tmp_path):
    t, meta, expected = problem(integers=True, heads=2, key_lengths=(200,), query_lengths=(3,), k=150,
                                weights_dtype="F32")
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


@pytest.mark.parametrize("change, drop, words", [
    (swap(0, 1), False, ["row 0, slot 1", "descending"]),
    (swap(0, 5), True, ["row 0, slot", "should be before"]),
    (put(13, index=30), False, ["row 1, slot 1", "none of the 30"]),
    (put(13, index=-1), False, ["row 1, slot 1", "none of the 30", "should be key"]),
    (put(13, index=-2), True, ["row 1, slot 1"]),
    (take_worst, False, ["row 0, slot 0", "should be key"]),
    (take_worst, True, ["row 0, slot 0", "should be key"]),
    (lambda indices, values: indices.__setitem__(3, indices[2]), True, ["row 0, slot 3", "second"]),
    (lambda indices, values: values.__setitem__(0, values[0] * 1.01), False,
     ["row 0, slot 0", "got value"]),
    (lambda indices, values: values.__setitem__(0, math.nan), False, ["row 0, slot"]),
    (put(4 * 12 + 8, index=3), False, ["row 4, slot 8", "should be -1"]),
    (put(4 * 12 + 8, value=0.0), False, ["row 4, slot 8", "-inf"]),
    (put(3 * 12, index=0), True, ["row 3, slot 0", "should be -1"]),
])
def test_check_finds(tmp_path, change, drop, words):
    result = mutated(tmp_path, change, drop)
    assert result.returncode == 1, result.stdout + result.stderr
    first = result.stdout.splitlines()[0]
    for word in words:
        assert word in first, result.stdout
    assert "1 differ" in result.stdout


def test_check_finds_a_wrong_tie(tmp_path):
    """A plateau of exact zeros across the k-th place, in which a later key was taken."""
    heads, dim, keys = 2, 64, 40
    t = {"query": ("BF16", [1, 1, heads, dim], pack("BF16", [1.0] * (heads * dim))),
         "key": ("BF16", [1, keys, 1, dim],
                 pack("BF16", [2.0] * (4 * dim) + [-1.0] * ((keys - 4) * dim))),
         "weights": ("F32", [1, 1, heads], pack("F32", [1.0, 0.5]))}
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
    wrong = {"sparse_indices": ("I32", [1, 1, 1, 10], pack("I32", [0, 1, 2, 3, 4, 5, 6, 7, 9, 8])),
             "sparse_values": tensors["sparse_values"]}
    assert lidx("check", source, write(target, wrong, meta)).returncode == 1


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


def test_special_numbers(tmp_path):
    """NaN and infinite keys: visible, ranked last or first, and check agrees."""
    dim, rows = 64, [[1.0] * 64, [math.nan] * 64, [math.inf] * 64, [-math.inf] * 64, [2.0] * 64]
    t = {"query": ("BF16", [1, 1, 1, dim], pack("BF16", [1.0] * dim)),
         "weights": ("F32", [1, 1, 1], pack("F32", [1.0]))}
    content = b"".join(struct.pack("<64H", *([0x7FC0] * 64)) if row[0] != row[0] else pack("BF16", row)
                       for row in rows)
    t["key"] = ("BF16", [1, 5, 1, dim], content)
    source, target = write(tmp_path / "in", t, {"sparse_count": "6"}), tmp_path / "out"
    for kernel in kernels():
        assert lidx("run", source, "-o", target, "--kernel", kernel).returncode == 0
        assert unpack("I32", parse(target)[0]["sparse_indices"][2]) == [2, 4, 0, 3, 1, -1]
        result = lidx("check", source, target)
        assert result.returncode == 0, result.stdout


# ---- bad input ---------------------------------------------------------------------------------


def small():
    t, meta, _ = problem(query_lengths=(2,), key_lengths=(20,))
    return t, meta


def damaged_header(change):
    t, meta = small()
    content = assemble(t, meta)
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + n])
    replaced = change(header)
    text = replaced if isinstance(replaced, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + n:]


def entry(name, **fields):
    return lambda header: header[name].update(fields)


def shift(header):
    header["key"]["data_offsets"][0] -= 2
    header["key"]["data_offsets"][1] -= 2


def duplicate(header):
    text = json.dumps(header)
    return text.replace('"weights": {', '"query": {', 1).encode()


BAD_FILES = {
    "empty": (b"", "at least 8"),
    "short": (b"1234567", "at least 8"),
    "only a length": (struct.pack("<Q", 0), "'{'"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "truncated"),
    "length of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "truncated"),
    "no object": (struct.pack("<Q", 8) + b"[1,2,3] ", "'{'"),
    "not JSON": (struct.pack("<Q", 8) + b"{\"a\": 1 ", "JSON"),
    "binary": (struct.pack("<Q", 8) + b"{\x00\x01\x02\x03\x04\x05\x06", "JSON"),
    "behind the object": (struct.pack("<Q", 8) + b"{} {}   ", "follows"),
    "no tensors": (struct.pack("<Q", 8) + b"{}      ", "no tensor \"query\""),
    "bytes without a tensor": (struct.pack("<Q", 8) + b"{}      " + b"1234", "last 4 bytes"),
    "deep nesting": (struct.pack("<Q", 100000) + b"{\"a\":" + b"[" * 99995, "JSON"),
    "text file": (b"# this is a README, and no safetensors file at all\n", "truncated"),
    "tensor is a number": (damaged_header(lambda h: h.update(query=3)), "dtype"),
    "dtype missing": (damaged_header(lambda h: h["query"].pop("dtype") and None), "dtype"),
    "dtype unknown": (damaged_header(entry("query", dtype="BF17")), "BF17"),
    "dtype a list": (damaged_header(entry("query", dtype=[1])), "dtype"),
    "shape missing": (damaged_header(lambda h: h["key"].pop("shape") and None), "shape"),
    "shape negative": (damaged_header(entry("query", shape=[1, -3, 3, 64])), "shape"),
    "shape fraction": (damaged_header(entry("query", shape=[1, 1.5, 3, 64])), "shape"),
    "shape text": (damaged_header(entry("query", shape=["1", 3, 3, 64])), "shape"),
    "shape too long": (damaged_header(entry("query", shape=[1] * 9)), "dimensions"),
    "shape overflows": (damaged_header(entry("query", shape=[1 << 40, 1 << 40, 3, 64])), "bytes"),
    "shape overflows to fit": (damaged_header(entry("query", shape=[1 << 32, 1 << 32, 1, 1])), "bytes"),
    "shape overflows beside 0": (damaged_header(entry("key", shape=[0, 1 << 50, 1 << 50, 64])), "bytes"),
    "shape of 1e300": (damaged_header(entry("query", shape=[1e300])), "shape"),
    "shape disagrees": (damaged_header(entry("query", shape=[1, 3, 3, 65])), "bytes"),
    "offsets missing": (damaged_header(lambda h: h["key"].pop("data_offsets") and None), "data_offsets"),
    "offsets reversed": (damaged_header(lambda h: h["key"]["data_offsets"].reverse()), "data_offsets"),
    "offsets negative": (damaged_header(entry("query", data_offsets=[-8, 0])), "data_offsets"),
    "offsets three": (damaged_header(entry("query", data_offsets=[0, 1, 2])), "data_offsets"),
    "offsets huge": (damaged_header(entry("query", data_offsets=[0, 1 << 62])), "data_offsets"),
    "offsets past the end": (damaged_header(entry("query", data_offsets=[0, 1 << 40])), "truncated"),
    "overlap": (damaged_header(shift), "overlaps"),
    "two of a name": (damaged_header(duplicate), "two tensors"),
    "metadata a list": (damaged_header(lambda h: h.update(__metadata__=[1])), "__metadata__"),
    "metadata of numbers": (damaged_header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    "metadata count": (damaged_header(lambda h: h.update(__metadata__={"sparse_count": "x"})), "sparse_count"),
    "metadata layout": (damaged_header(lambda h: h.update(__metadata__={"layout_key": "ABC"})), "layout_key"),
    "escape codes": (damaged_header(entry("query", dtype="\x1b[31m\n")), "dtype"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    content, word = BAD_FILES[name]
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(content)
    target.write_bytes(b"old")
    refused(lidx("run", source, "-o", target), word)
    refused(lidx("check", source), word)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_truncated_anywhere(tmp_path):
    t, meta = small()
    content = assemble(t, meta)
    source = tmp_path / "in"
    for length in [0, 7, 8, 9, 100, 300, len(content) // 2, len(content) - 1]:
        source.write_bytes(content[:length])
        refused(lidx("run", source))
    source.write_bytes(content + b"\0")
    refused(lidx("run", source), "belong to no tensor")


def test_random_damage_never_crashes(tmp_path):
    rng = random.Random(1)
    t, meta = small()
    content = assemble(t, meta)
    n = struct.unpack("<Q", content[:8])[0]
    source = tmp_path / "in"
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(8 + n)] = rng.choice(b"0123456789,:[]{}\"\\ -eE.\x00\xff")
        source.write_bytes(damaged)
        result = lidx("run", source)
        assert result.returncode in (0, 2), (result.returncode, bytes(damaged[:8 + n]))
        if result.returncode == 2:
            refused(result)
        outcomes.add(result.returncode)
    assert 2 in outcomes


def test_misaligned_data(tmp_path):
    t, meta = small()
    for pad in range(1, 9):
        source = tmp_path / f"in{pad}"
        content = assemble(t, meta, pad=1)
        n = struct.unpack("<Q", content[:8])[0]
        extra = (pad - n) % 8
        source.write_bytes(struct.pack("<Q", n + extra) + content[8:8 + n] + b" " * extra + content[8 + n:])
        result = lidx("run", source)
        if pad % 4 == 0:
            assert result.returncode == 0, result.stderr
        else:
            refused(result, "aligned")


def without(*names):
    return lambda t: [t.pop(name) for name in names] and None


def typed(name, dtype):
    def change(t):
        old, shape, data = t[name]
        numbers = unpack(old, data)
        if dtype in ("I32", "I64"):
            numbers = [int(x) if x == x else 0 for x in numbers]
        del t[name]  # goes to the end, so that no other tensor loses its alignment
        t[name] = (dtype, shape, pack(dtype, numbers))
    return change


def shaped(name, shape):
    def change(t):
        t[name] = (t[name][0], shape, t[name][2])
    return change


def valued(name, numbers):
    def change(t):
        t[name] = ("I32", [len(numbers)], pack("I32", numbers))
    return change


@pytest.mark.parametrize("change, options, words", [
    (without("query"), [], ["query"]),
    (without("key"), [], ["key"]),
    (without("weights"), [], ["weights"]),
    (without("weights", "key"), [], ["key"]),
    (typed("query", "F32"), [], ["query", "F32", "BF16 or F16"]),
    (typed("query", "F16"), [], ["key", "dtype"]),
    (typed("key", "I32"), [], ["key", "I32", "BF16 or F16"]),
    (typed("weights", "F16"), [], ["weights", "dtype"]),
    (typed("actual_seq_lengths_key", "I64"), [], ["actual_seq_lengths_key", "I64", "I32"]),
    (typed("actual_seq_lengths_key", "F32"), [], ["actual_seq_lengths_key", "F32", "I32"]),
    (shaped("query", [3, 1, 3, 64]), [], ["shape"]),
    (shaped("query", [1, 3, 192]), [], ["query"]),
    (shaped("query", [576]), [], ["query"]),
    (shaped("query", [1, 9, 1, 64]), [], ["weights", "shape"]),
    (shaped("query", [1, 6, 3, 32]), [], ["query", "32", "64 or 128"]),
    (shaped("key", [1, 11, 1, 128]), [], ["key", "shape"]),
    (shaped("weights", [1, 3, 3, 1]), [], ["weights"]),
    (shaped("actual_seq_lengths_key", [1, 1]), [], ["actual_seq_lengths_key"]),
    (valued("actual_seq_lengths_key", [23]), [], ["actual_seq_lengths_key"]),
    (valued("actual_seq_lengths_key", [-1]), [], ["actual_seq_lengths_key"]),
    (valued("actual_seq_lengths_query", [4]), [], ["actual_seq_lengths_query"]),
    (valued("block_table", [0]), [], ["key"]),
    (None, ["--layout-query", "TND"], ["layout_key", "TND"]),
    (None, ["--layout-query", "TND", "--layout-key", "TND"], ["query", "dimensions"]),
    (None, ["--layout-query", "PA_BSND"], ["layout_query"]),
    (None, ["--layout-key", "TND"], ["layout_key"]),
    (None, ["--layout-key", "PA_BSND"], ["block_size"]),
    (None, ["--kernel", "abacus"], ["kernel", "abacus", "scalar"]),
    (None, ["--device", "cuda"], ["cuda"]),
])
def test_bad_tensors(tmp_path, change, options, words):
    t, meta = small()
    if change:
        change(t)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    target.write_bytes(b"old")
    refused(lidx("run", source, "-o", target, *options), *words)
    refused(lidx("check", source, *options), *words)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("table, word", [([99, 1], "block_table"), ([-1, 1], "block_table")])
def test_bad_page(tmp_path, table, word):
    t, meta, _ = problem(layout_key="PA_BSND", query_lengths=(2,), key_lengths=(20,))
    t["block_table"] = ("I32", [1, 2], pack("I32", table))
    refused(lidx("run", write(tmp_path / "in", t, meta)), word)


def test_rows_for_no_bytes(tmp_path):
    """Shapes with a 0 claim 2^40 rows for no bytes: refused before memory is asked for."""
    t, meta = small()
    t["query"] = ("BF16", [1, 1 << 40, 0, 64], b"")
    t["weights"] = ("F32", [1, 1 << 40, 0], b"")
    refused(lidx("run", write(tmp_path / "in", t, meta)), "query")


@pytest.mark.parametrize("arguments, words", [
    ([], ["command"]),
    (["walk"], ["walk", "run"]),
    (["run"], ["file is missing"]),
    (["run", "/nonexistent/file"], ["/nonexistent/file", "No such file"]),
    (["run", "/"], ["regular file"]),
    (["run", "/dev/zero"], ["regular file"]),
    (["run", CAPTURE, "b"], ["too many"]),
    (["run", CAPTURE, "--frobnicate"], ["--frobnicate", "--help"]),
    (["run", CAPTURE, "-x"], ["-x"]),
    (["run", CAPTURE, "-"], ["-"]),
    (["run", CAPTURE, "--sparse-count"], ["--sparse-count", "value"]),
    (["run", CAPTURE, "--sparse-count", "0"], ["--sparse-count", "\"0\"", "1 to 8192"]),
    (["run", CAPTURE, "--sparse-count", "8193"], ["8193"]),
    (["run", CAPTURE, "--sparse-count", "12x"], ["12x"]),
    (["run", CAPTURE, "--sparse-count", "99999999999999999999"], ["--sparse-count"]),
    (["run", CAPTURE, "--sparse-mode", "1"], ["--sparse-mode", "0 | 3"]),
    (["run", CAPTURE, "--layout-key", "NSBD"], ["NSBD", "PA_BSND"]),
    (["run", CAPTURE, "--threads", "-1"], ["--threads"]),
    (["run", CAPTURE, "--json=yes"], ["--json"]),
    (["run", CAPTURE, "-o", ""], ["--output"]),
    (["run", CAPTURE, "-o", "/nonexistent/directory/out"], ["cannot create"]),
    (["run", CAPTURE, "-o", "/"], ["/"]),
    (["check", CAPTURE, CAPTURE], ["sparse_indices"]),
    (["check", CAPTURE, "/nonexistent"], ["/nonexistent"]),
    (["check", CAPTURE, MODEL_RESULT, "--sparse-count", "7"], ["sparse_indices"]),
    (["check", CAPTURE, "--rows", "0"], ["--rows"]),
    (["bench", "--shape", "12"], ["--shape", "64x8192"]),
    (["bench", "--shape", "0x12"], ["--shape"]),
    (["bench", "--shape", ","], ["--shape"]),
    (["bench", "--threads", "1,two"], ["--threads", "two"]),
    (["bench", "--dim", "96"], ["--dim", "64 or 128"]),
    (["bench", "--kernel", "abacus", "--shape", "1x64"], ["abacus"]),
    (["bench", "--block-size", "24"], ["--block-size"]),
    (["demo", "extra"], ["extra"]),
    (["demo", "--seed", "x"], ["--seed"]),
    (["info", "extra"], ["extra"]),
])
def test_bad_arguments(arguments, words):
    refused(lidx(*arguments), *words)


# ---- the output file ---------------------------------------------------------------------------


def test_output_replaces_and_keeps_mode(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    assert lidx("run", CAPTURE, "-o", tmp_path / "link").returncode == 0
    assert (tmp_path / "link").is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert "sparse_indices" in parse(target)[0]
    fresh = tmp_path / "fresh"
    assert lidx("run", CAPTURE, "-o", fresh).returncode == 0
    mask = os.umask(0)
    os.umask(mask)
    assert fresh.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "link", "out"]


def test_output_onto_its_input(tmp_path):
    target = tmp_path / "file"
    shutil.copy(CAPTURE, target)
    assert lidx("run", target, "-o", target).returncode == 0
    assert lidx("check", CAPTURE, target).returncode == 0


def test_output_in_the_working_directory(tmp_path):
    assert lidx("run", CAPTURE, "-o", "out", cwd=tmp_path).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_device():
    refused(lidx("run", CAPTURE, "-o", "/dev/full"), "/dev/full", "No space left")
    assert not pathlib.Path("/dev/full").is_file()


def test_output_to_a_pipe(tmp_path):
    with open(tmp_path / "copy", "wb") as copy:
        result = subprocess.run([LIDX, "run", str(CAPTURE), "-o", "/dev/stderr", "--json"],
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, timeout=60)
        copy.write(result.stderr)
    assert result.returncode == 0 and json.loads(result.stdout)["rows"] == 24
    assert "sparse_values" in parse(tmp_path / "copy")[0]


def test_standard_output_full():
    with open("/dev/full", "w") as full:
        result = subprocess.run([LIDX, "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and "standard output" in result.stderr


def test_file_size_limit(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    refused(lidx("run", CAPTURE, "-o", target, preexec_fn=limit), "File too large", "nothing was")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_memory_limit(tmp_path):
    """Outputs of 2 x 1 GiB where 1 GiB is allowed: a sentence."""
    rows = 1 << 15
    t = {"query": ("BF16", [1, rows, 1, 64], bytes(rows * 128)),
         "key": ("BF16", [1, 1, 1, 64], bytes(128)),
         "weights": ("F32", [1, rows, 1], bytes(rows * 4))}
    source, target = write(tmp_path / "in", t), tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    result = lidx("run", source, "-o", target, "--sparse-count", 8192, "--threads", 1,
                  preexec_fn=limit)
    if "Sanitizer" in result.stderr:
        pytest.skip("sanitizers want more address space than the limit allows")
    refused(result, "memory")
    assert not target.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(tmp_path, number):
    """Interrupt while the temporary file is being written, which a large output makes likely."""
    rows = 6000
    t = {"query": ("BF16", [1, rows, 1, 64], bytes(rows * 128)),
         "key": ("BF16", [1, 16, 1, 64], bytes(16 * 128)),
         "weights": ("F32", [1, rows, 1], bytes(rows * 4))}
    source, target = write(tmp_path / "in", t), tmp_path / "out"
    hit = 0
    for attempt in range(8):
        target.write_bytes(b"old")
        process = subprocess.Popen([LIDX, "run", str(source), "-o", str(target), "--sparse-count",
                                    "8192", "--threads", "1"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(tmp_path.iterdir())) > 2:
                break
        process.send_signal(number)
        status = process.wait(timeout=60)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
        if status == -number:
            assert target.read_bytes() == b"old"
            hit += 1
        else:
            assert status == 0 and target.stat().st_size > rows * 8192
        if hit:
            break
    assert hit


def test_interrupted_demo_leaves_nothing(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([LIDX, "demo"], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("lidx-demo-*/input*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_input_that_shrinks(tmp_path):
    """The file is cut while it is mapped and read: a sentence instead of a SIGBUS."""
    tokens, keys = 64, 16384
    t = {"query": ("BF16", [1, tokens, 64, 128], bytes(tokens * 64 * 256)),
         "key": ("BF16", [1, keys, 1, 128], bytes(keys * 256)),
         "weights": ("F32", [1, tokens, 64], bytes(tokens * 256))}
    source, target = write(tmp_path / "in", t), tmp_path / "out"
    target.write_bytes(b"old")
    process = subprocess.Popen([LIDX, "run", str(source), "-o", str(target), "--kernel", "scalar",
                                "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    time.sleep(0.3)  # of some seconds that this takes
    os.truncate(source, 4096)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and stdout == "", (process.returncode, stderr)
    assert len(stderr.splitlines()) == 1 and stderr.startswith("lidx")
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


# ---- the other commands ------------------------------------------------------------------------


def test_help_and_version():
    for arguments in (["--help"], ["-h"], ["run", "--help"], ["check", "-h"], ["demo", "--help"],
                      ["bench", "--help"], ["info", "--help"]):
        result = lidx(*arguments)
        assert result.returncode == 0 and result.stdout.startswith("usage: lidx"), arguments
        assert result.stderr == ""
    version = lidx("--version").stdout
    assert re.fullmatch(r"lidx \d+\.\d+\.\d+\n", version)
    assert json.loads(lidx("info", "--json").stdout)["version"] == version.split()[1]


def test_info():
    report = json.loads(lidx("info", "--json").stdout)
    names = [kernel["name"] for kernel in report["kernels"]]
    assert "scalar" in names and report["threads"] >= 1
    for which in ("chosen_bf16", "chosen_fp16"):
        assert sum(k[which] for k in report["kernels"] if k["backend"] == "cpu") == 1
    assert all(kernel["reason"] for kernel in report["kernels"])
    text = lidx("info").stdout
    assert all(name in text for name in names)


def test_kernel_by_environment():
    report = json.loads(lidx("run", CAPTURE, "--json", env={"LIDX_KERNEL": "scalar"}).stdout)
    assert report["kernel"] == "scalar"
    refused(lidx("run", CAPTURE, env={"LIDX_KERNEL": "abacus"}), "abacus")


def test_run_prints_rows():
    result = lidx("run", CAPTURE, "--threads", 1)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("row 0:") and "24 rows of 256 slots" in result.stdout
    report = json.loads(lidx("run", CAPTURE, "--json").stdout)
    assert report["rows"] == 24 and report["pairs"] == sum(range(1001, 1025))


def test_demo(tmp_path):
    keep = tmp_path / "scene.safetensors"
    result = lidx("demo", "--json", "--seed", 5, "--keep", keep, env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["recall"] > 0.95 and report["rows_differ"] == 0 and report["rows_checked"] == 2
    assert abs(report["recall_by_chance"] - 2048 / 32768) < 1e-9
    assert [p.name for p in tmp_path.iterdir()] == [keep.name]
    # The recall is what the written result says: count again from a run of one's own.
    target = tmp_path / "out"
    assert lidx("run", keep, "-o", target).returncode == 0
    indices = unpack("I32", parse(target)[0]["sparse_indices"][2])
    n, found, wanted = report["query_tokens"], 0, 0
    for i in range(n):
        passage = report["passages"][i * len(report["passages"]) // n]
        positions = set(range(passage["begin"], passage["begin"] + passage["length"]))
        found += len(positions & set(indices[i * 2048:(i + 1) * 2048]))
        wanted += len(positions)
    assert abs(report["recall"] - found / wanted) < 1e-9


def test_demo_picture():
    plain = lidx("demo", env={"LC_ALL": "C"}).stdout
    assert plain.isascii() and plain.count(" asks ") == 16 and "recall" in plain
    lines = [line for line in plain.splitlines() if " asks " in line]
    assert len({len(line) for line in lines}) == 1
    marks = next(line for line in plain.splitlines() if line.split() == ["A", "B", "C", "D"])
    for line in lines:  # a tall bar under the mark of what a token asks for
        at = marks.index(line.split()[2])
        assert set(line[at - 1:at + 2]) & set("-=+*#@"), (marks, line)
    if "C.utf8" in subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout:
        drawn = lidx("demo", env={"LC_ALL": "C.UTF-8"}).stdout
        assert "\u2581" in drawn
        assert lidx("demo", "--ascii", env={"LC_ALL": "C.UTF-8"}).stdout.isascii()


def test_demo_without_room(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    refused(lidx("demo", env={"TMPDIR": str(tmp_path)}, preexec_fn=limit), "File too large")
    assert list(tmp_path.iterdir()) == []
    refused(lidx("demo", env={"TMPDIR": "/nonexistent"}), "/nonexistent")


def test_bench():
    result = lidx("bench", "--shape", "1x300,4x200", "--rounds", 2, "--round-ms", 1, "--threads",
                  "1,2", "--sparse-count", 64, "--json")
    assert result.returncode == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert len(report["cases"]) == 6  # the decode case dense and paged, each with 1 and 2 threads
    for case in report["cases"]:
        assert case["median_s"] >= case["best_s"] > 0 and case["memory_bytes"] <= (4 << 20) * case["threads"]
        assert case["kernel"] in kernels()
    text = lidx("bench", "--shape", "1x100", "--layout", "TND", "--dtype", "fp16", "--heads", 8,
                "--dim", 64, "--rounds", 1, "--round-ms", 0, "--kernel", "scalar", "--threads", 1)
    assert text.returncode == 0 and "ragged" in text.stdout and "scalar" in text.stdout
    markdown = lidx("bench", "--shape", "1x100", "--rounds", 1, "--round-ms", 0, "--threads", 1,
                    "--markdown").stdout
    assert markdown.startswith("| case") and "| :--- | ---: |" in markdown


@pytest.mark.parametrize("name", ["minimal", "paged_decode"])
def test_examples(tmp_path, name):
    library = next(iter(pathlib.Path(LIDX).parents[1].glob("liblightning_indexer.so")), None)
    library = library or next(iter(pathlib.Path(LIDX).parent.glob("liblightning_indexer.so")), None)
    if not library or not shutil.which("cc"):
        pytest.skip("no compiler, or no shared library beside the program")
    program = tmp_path / name
    subprocess.run(["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/include",
                    str(ROOT / "examples" / f"{name}.c"), str(library),
                    f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if name == "minimal":
        best = [int(word) for word in result.stdout.split()]
        assert len(set(best)) == 8 and all(0 <= j < 1000 for j in best)
    else:
        assert "sequence 0: 200 keys, 200 chosen" in result.stdout
        assert "sequence 2: 1600 keys, 256 chosen" in result.stdout


def test_check_survives_any_result(tmp_path):
    """Indices from nowhere: found, row by row, and never used as an address."""
    rng = random.Random(2)
    t, meta, expected = problem("TND", "PA_BSND", query_lengths=(3, 2), key_lengths=(30, 8), k=12)
    source, target = write(tmp_path / "in", t, meta), tmp_path / "out"
    shape, n = [len(expected), 1, 12], len(expected) * 12
    for low, high in [(-2, 31), (-1, 8), (-(1 << 31), (1 << 31) - 1)]:
        for _ in range(5):
            indices = pack("I32", [rng.randint(low, high) for _ in range(n)])
            values = pack("F32", [rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e38])
                                  for _ in range(n)])
            write(target, {"sparse_indices": ("I32", shape, indices),
                           "sparse_values": ("F32", shape, values)}, meta)
            result = lidx("check", source, target)
            assert result.returncode == 1 and "differ" in result.stdout, result.stderr


def test_capture_example(tmp_path):
    """The model's own indexer and this operator choose the same keys of what was captured."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers.models.deepseek_v32")
    source, model, target = (tmp_path / name for name in ("capture", "model", "out"))
    made = subprocess.run([sys.executable, str(ROOT / "examples" / "capture_transformers.py"),
                           str(ROOT / "LICENSE"), str(source), "--model-result", str(model),
                           "--keys", "512", "--queries", "8", "--top-k", "64"],
                          capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    assert lidx("run", source, "-o", target).returncode == 0
    assert lidx("check", source, target).returncode == 0
    result = lidx("check", source, model)
    assert result.returncode == 0, result.stdout
