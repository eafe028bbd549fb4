# SPDX-License-Identifier: Apache-2.0
"""The output file: replaced whole or left alone, whatever happens on the way."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time

import pytest

from lidx_program import CAPTURE, LIDX, lidx, parse, refused, write

pytestmark = pytest.mark.skipif(not LIDX, reason="LIDX_BIN does not name the program")


def heed_interrupts():
    """For a child: a shell that runs the tests in the background has SIGINT ignored, and the program
    leaves what is ignored as it is."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
        result = subprocess.run(
            [LIDX, "run", str(CAPTURE), "-o", "/dev/stderr", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
        )
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
    t = {
        "query": ("BF16", [1, rows, 1, 64], bytes(rows * 128)),
        "key": ("BF16", [1, 1, 1, 64], bytes(128)),
        "weights": ("F32", [1, rows, 1], bytes(rows * 4)),
    }
    source, target = write(tmp_path / "in", t), tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    result = lidx(
        "run", source, "-o", target, "--sparse-count", 8192, "--threads", 1, preexec_fn=limit
    )
    if "Sanitizer" in result.stderr:
        pytest.skip("sanitizers want more address space than the limit allows")
    refused(result, "memory")
    assert not target.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(tmp_path, number):
    """Interrupt while the temporary file is being written, which a large output makes likely."""
    rows = 6000
    t = {
        "query": ("BF16", [1, rows, 1, 64], bytes(rows * 128)),
        "key": ("BF16", [1, 16, 1, 64], bytes(16 * 128)),
        "weights": ("F32", [1, rows, 1], bytes(rows * 4)),
    }
    source, target = write(tmp_path / "in", t), tmp_path / "out"
    hit = 0
    for attempt in range(8):
        target.write_bytes(b"old")
        process = subprocess.Popen(
            [
                LIDX,
                "run",
                str(source),
                "-o",
                str(target),
                "--sparse-count",
                "8192",
                "--threads",
                "1",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=heed_interrupts,
        )
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
    process = subprocess.Popen([LIDX, "demo"], env=environment, stdout=subprocess.DEVNULL,
                               preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("lidx-demo-*/input*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_input_that_shrinks(tmp_path):
    """The file is cut while it is mapped and read: a sentence instead of a SIGBUS."""
    tokens, keys = 64, 16384
    t = {
        "query": ("BF16", [1, tokens, 64, 128], bytes(tokens * 64 * 256)),
        "key": ("BF16", [1, keys, 1, 128], bytes(keys * 256)),
        "weights": ("F32", [1, tokens, 64], bytes(tokens * 256)),
    }
    source, target = write(tmp_path / "in", t), tmp_path / "out"
    target.write_bytes(b"old")
    process = subprocess.Popen(
        [LIDX, "run", str(source), "-o", str(target), "--kernel", "scalar", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while str(source) not in maps.read_text() and process.poll() is None:
        time.sleep(0.001)
    os.truncate(source, 4096)  # long before the scores are there, which takes seconds
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and stdout == "", (process.returncode, stderr)
    assert len(stderr.splitlines()) == 1 and stderr.startswith("lidx") and "it shrank" in stderr
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
