# SPDX-License-Identifier: Apache-2.0
"""Bad files, tensors and arguments: a sentence on stderr, exit status 2, never a crash."""

import json
import random
import struct

import pytest

from lidx_program import (
    CAPTURE,
    LIDX,
    MODEL_RESULT,
    assemble,
    lidx,
    pack,
    problem,
    refused,
    small,
    unpack,
    write,
)

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")


def damaged_header(change):
    t, meta = small()
    content = assemble(t, meta)
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n])
    replaced = change(header)
    text = replaced if isinstance(replaced, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + n :]


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
    "not JSON": (struct.pack("<Q", 8) + b'{"a": 1 ', "JSON"),
    "binary": (struct.pack("<Q", 8) + b"{\x00\x01\x02\x03\x04\x05\x06", "JSON"),
    "behind the object": (struct.pack("<Q", 8) + b"{} {}   ", "follows"),
    "no tensors": (struct.pack("<Q", 8) + b"{}      ", 'no tensor "query"'),
    "bytes without a tensor": (struct.pack("<Q", 8) + b"{}      " + b"1234", "last 4 bytes"),
    "deep nesting": (struct.pack("<Q", 100000) + b'{"a":' + b"[" * 99995, "JSON"),
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
    "shape overflows to fit": (
        damaged_header(entry("query", shape=[1 << 32, 1 << 32, 1, 1])),
        "bytes",
    ),
    "shape overflows beside 0": (
        damaged_header(entry("key", shape=[0, 1 << 50, 1 << 50, 64])),
        "bytes",
    ),
    "shape of 1e300": (damaged_header(entry("query", shape=[1e300])), "shape"),
    "shape disagrees": (damaged_header(entry("query", shape=[1, 3, 3, 65])), "bytes"),
    "offsets missing": (
        damaged_header(lambda h: h["key"].pop("data_offsets") and None),
        "data_offsets",
    ),
    "offsets reversed": (
        damaged_header(lambda h: h["key"]["data_offsets"].reverse()),
        "data_offsets",
    ),
    "offsets negative": (damaged_header(entry("query", data_offsets=[-8, 0])), "data_offsets"),
    "offsets three": (damaged_header(entry("query", data_offsets=[0, 1, 2])), "data_offsets"),
    "offsets huge": (damaged_header(entry("query", data_offsets=[0, 1 << 62])), "data_offsets"),
    "offsets past the end": (
        damaged_header(entry("query", data_offsets=[0, 1 << 40])),
        "truncated",
    ),
    "overlap": (damaged_header(shift), "overlaps"),
    "two of a name": (damaged_header(duplicate), "two tensors"),
    "metadata a list": (damaged_header(lambda h: h.update(__metadata__=[1])), "__metadata__"),
    "metadata of numbers": (
        damaged_header(lambda h: h.update(__metadata__={"a": 1})),
        "__metadata__",
    ),
    "metadata count": (
        damaged_header(lambda h: h.update(__metadata__={"sparse_count": "x"})),
        "sparse_count",
    ),
    "metadata layout": (
        damaged_header(lambda h: h.update(__metadata__={"layout_key": "ABC"})),
        'layout_key "ABC"; it should be BSND | TND | PA_BSND',
    ),
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
            damaged[rng.randrange(8 + n)] = rng.choice(b'0123456789,:[]{}"\\ -eE.\x00\xff')
        source.write_bytes(damaged)
        result = lidx("run", source)
        assert result.returncode in (0, 2), (result.returncode, bytes(damaged[: 8 + n]))
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
        source.write_bytes(
            struct.pack("<Q", n + extra) + content[8 : 8 + n] + b" " * extra + content[8 + n :]
        )
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


@pytest.mark.parametrize(
    "change, options, words",
    [
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
        (None, ["--layout-query", "PA_BSND"], ["--layout-query", "BSND | TND"]),
        (None, ["--layout-key", "TND"], ["layout_key"]),
        (None, ["--layout-key", "PA_BSND"], ["block_size"]),
        (None, ["--kernel", "abacus"], ["kernel", "abacus", "scalar"]),
        (None, ["--device", "cuda"], ["cuda"]),
    ],
)
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["command"]),
        (["walk"], ["walk", "run", "--help"]),
        (["run"], ["file is missing"]),
        (["run", "/nonexistent/file"], ["/nonexistent/file", "No such file"]),
        (["run", "/"], ["regular file"]),
        (["run", "/dev/zero"], ["regular file"]),
        (["run", CAPTURE, "b"], ["too many"]),
        (["run", CAPTURE, "--frobnicate"], ["--frobnicate", "--help"]),
        (["run", CAPTURE, "-x"], ["-x"]),
        (["run", CAPTURE, "-"], ["-"]),
        (["run", CAPTURE, "--sparse-count"], ["--sparse-count", "value"]),
        (["run", CAPTURE, "--sparse-count", "0"], ["--sparse-count", '"0"', "1 to 8192"]),
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
        (["bench", "--shape", "1x12/24"], ["1x12/24", "pages of 16"]),
        (["bench", "--shape", "1x~12"], ["1x~12", "32x1x~8192"]),
        (["bench", "--shape", ","], ["--shape"]),
        (["bench", "--threads", "1,two"], ["--threads", "two"]),
        (["bench", "--dim", "96"], ["--dim", "64 or 128"]),
        (["bench", "--kernel", "abacus", "--shape", "1x64"], ["abacus"]),
        (["bench", "--block-size", "24"], ["--block-size"]),
        (["demo", "extra"], ["extra"]),
        (["demo", "--seed", "x"], ["--seed"]),
        (["info", "extra"], ["extra"]),
    ],
)
def test_bad_arguments(arguments, words):
    refused(lidx(*arguments), *words)
