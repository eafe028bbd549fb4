# SPDX-License-Identifier: Apache-2.0
"""The program lidx for the tests of it: calls, its file format written apart from it, problems."""

import json
import math
import os
import pathlib
import random
import struct
import subprocess

DATA = pathlib.Path(__file__).resolve().parent / "data"
CAPTURE = DATA / "deepseek_v32.safetensors"
MODEL_RESULT = DATA / "deepseek_v32_result.safetensors"
ROOT = DATA.parent.parent
LIDX = os.environ.get("LIDX_BIN")

if LIDX:
    LIDX = str(pathlib.Path(LIDX).resolve())


def lidx(*arguments, **options):
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **options.pop("env", {})}
    options.setdefault("timeout", 120)
    return subprocess.run(
        [LIDX, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        env=environment,
        **options,
    )


def refused(result, *words):
    """One sentence on stderr that has these words, status 2, nothing on stdout."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lidx"), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def bf16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def from_bf16(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def pack(dtype, numbers):
    if dtype == "BF16":
        return struct.pack(f"<{len(numbers)}H", *(bf16(x) for x in numbers))
    return struct.pack(
        f"<{len(numbers)}" + {"F16": "e", "F32": "f", "I32": "i", "I64": "q"}[dtype], *numbers
    )


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
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


def parse(path):
    content = pathlib.Path(path).read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], content[8 + n + begin : 8 + n + end])
    return tensors, metadata


def prefix_sums(lengths):
    total, sums = 0, []
    for length in lengths:
        total += length
        sums.append(total)
    return sums


def problem(
    layout_query="BSND",
    layout_key="BSND",
    dtype="BF16",
    weights_dtype="F32",
    heads=3,
    dim=64,
    query_lengths=(4, 0, 7),
    key_lengths=(40, 9, 5),
    block=16,
    seed=0,
    k=12,
    mode=3,
    integers=False,
):
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
    weights = [
        unpack(weights_dtype, pack(weights_dtype, [rng.uniform(-0.5, 1) for _ in range(heads)]))
        for _ in range(rows)
    ]
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
                for j, one in enumerate(keys[b][p * block : (p + 1) * block]):
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
    return (
        t,
        meta,
        [answer(q, w, seen, k, heads, dim) for q, w, seen in zip(query, weights, expected)],
    )


def answer(query, weights, keys, k, heads, dim):
    """The k best (score, position) of a row, by the definition, in Python's doubles."""
    scores = []
    for j, key in enumerate(keys):
        total = 0.0
        for h in range(heads):
            dot = math.fsum(a * b for a, b in zip(query[h * dim : (h + 1) * dim], key))
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


def small():
    t, meta, _ = problem(query_lengths=(2,), key_lengths=(20,))
    return t, meta
