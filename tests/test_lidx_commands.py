# SPDX-License-Identifier: Apache-2.0
"""The other commands, the examples, and a captured model."""

import json
import math
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import pytest

from lidx_program import CAPTURE, LIDX, ROOT, kernels, lidx, parse, refused, unpack

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")


def test_help_and_version():
    for arguments in (
        ["--help"],
        ["-h"],
        ["run", "--help"],
        ["check", "-h"],
        ["demo", "--help"],
        ["bench", "--help"],
        ["info", "--help"],
    ):
        result = lidx(*arguments)
        assert result.returncode == 0 and result.stdout.startswith("usage: lidx"), arguments
        assert result.stderr == ""
    version = lidx("--version").stdout
    assert re.fullmatch(r"lidx \d+\.\d+\.\d+\n", version)
    assert json.loads(lidx("info", "--json").stdout)["version"] == version.split()[1]


def test_man_page_names_all_commands():
    page = (pathlib.Path(ROOT) / "docs" / "lidx.1").read_text()
    commands = re.findall(r"^  (\w+) ", lidx("--help").stdout, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert re.search(rf'^\.BR? "?{command}\b', page, re.MULTILINE), command


def test_info():
    report = json.loads(lidx("info", "--json").stdout)
    names = [kernel["name"] for kernel in report["kernels"]]
    assert "scalar" in names and report["threads"] >= 1 and "cpu_features" in report
    for which in ("chosen_bf16", "chosen_fp16"):
        assert sum(k[which] for k in report["kernels"] if k["backend"] == "cpu") == 1
    assert all(kernel["reason"] for kernel in report["kernels"])
    text = lidx("info").stdout
    assert all(name in text for name in names)


def test_kernel_by_environment():
    report = json.loads(lidx("run", CAPTURE, "--json", env={"LIDX_KERNEL": "scalar"}).stdout)
    assert report["kernel"] == "scalar"
    refused(lidx("run", CAPTURE, env={"LIDX_KERNEL": "abacus"}), "lidx run: ", "abacus")


def test_run_prints_rows(tmp_path):
    result = lidx("run", CAPTURE, "--threads", 1)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("row 0:") and "24 rows of 256 slots" in result.stdout
    *rows, more, _ = result.stdout.splitlines()
    assert more.startswith(f"... and {24 - len(rows)} rows more")
    assert lidx("run", CAPTURE, "-o", tmp_path / "out").returncode == 0
    tensors, _ = parse(tmp_path / "out")
    indices = unpack("I32", tensors["sparse_indices"][2])
    values = unpack("F32", tensors["sparse_values"][2])
    for i, row in enumerate(rows):  # "row 1:  1020 (3.142)  17 (2.718) ..."
        best, value = row.split(":")[1].split()[:2]
        assert int(best) == indices[256 * i]
        assert math.isclose(float(value.strip("()")), values[256 * i], rel_tol=1e-3)
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
        found += len(positions & set(indices[i * 2048 : (i + 1) * 2048]))
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
        assert set(line[at - 1 : at + 2]) & set("-=+*#@"), (marks, line)
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
    result = lidx(
        "bench",
        "--shape",
        "1x300,4x200",
        "--rounds",
        2,
        "--round-ms",
        1,
        "--threads",
        "1,2",
        "--sparse-count",
        64,
        "--json",
    )
    assert result.returncode == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert len(report["cases"]) == 6  # the decode case dense and paged, each with 1 and 2 threads
    for case in report["cases"]:
        assert (
            case["median_s"] >= case["best_s"] > 0
            and case["memory_bytes"] <= (4 << 20) * case["threads"]
        )
        assert case["kernel"] in kernels()
    shapes = "1x100/dense,1x100/32,3x2x~100,3x2x100"
    result = lidx(
        "bench", "--shape", shapes, "--rounds", 1, "--round-ms", 0, "--threads", 1, "--json"
    )
    dense, paged, ragged, equal = json.loads(result.stdout)["cases"]
    assert dense["layout_key"] == "BSND" and paged["block_size"] == 32
    assert ragged["lengths"] == "lognormal" and equal["lengths"] == "equal"
    assert ragged["layout_key"] == equal["layout_key"] == "TND" and equal["batches"] == 3
    text = lidx(
        "bench",
        "--shape",
        "1x100",
        "--layout",
        "TND",
        "--dtype",
        "fp16",
        "--heads",
        8,
        "--dim",
        64,
        "--rounds",
        1,
        "--round-ms",
        0,
        "--kernel",
        "scalar",
        "--threads",
        1,
    )
    assert text.returncode == 0 and "ragged" in text.stdout and "scalar" in text.stdout
    markdown = lidx(
        "bench", "--shape", "1x100", "--rounds", 1, "--round-ms", 0, "--threads", 1, "--markdown"
    ).stdout
    assert markdown.startswith("| case") and "| :--- | ---: |" in markdown


@pytest.mark.parametrize("name", ["minimal", "paged_decode"])
def test_examples(tmp_path, name):
    library = next(iter(pathlib.Path(LIDX).parents[1].glob("liblightning_indexer.so")), None)
    library = library or next(iter(pathlib.Path(LIDX).parent.glob("liblightning_indexer.so")), None)
    if not library or not shutil.which("cc"):
        pytest.skip("no compiler, or no shared library beside the program")
    program = tmp_path / name
    subprocess.run(
        [
            "cc",
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT}/include",
            str(ROOT / "examples" / f"{name}.c"),
            str(library),
            f"-Wl,-rpath,{library.parent}",
            "-o",
            str(program),
        ],
        check=True,
    )
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if name == "minimal":
        best = [int(word) for word in result.stdout.split()]
        assert len(set(best)) == 8 and all(0 <= j < 1000 for j in best)
    else:
        assert "sequence 0: 200 keys, 200 chosen" in result.stdout
        assert "sequence 2: 1600 keys, 256 chosen" in result.stdout


def test_capture_example(tmp_path):
    """The model's own indexer and this operator choose the same keys of what was captured."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers.models.deepseek_v32")
    source, model, target = (tmp_path / name for name in ("capture", "model", "out"))
    made = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "capture_transformers.py"),
            str(ROOT / "LICENSE"),
            str(source),
            "--model-result",
            str(model),
            "--keys",
            "512",
            "--queries",
            "8",
            "--top-k",
            "64",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert lidx("run", source, "-o", target).returncode == 0
    assert lidx("check", source, target).returncode == 0
    result = lidx("check", source, model)
    assert result.returncode == 0, result.stdout
