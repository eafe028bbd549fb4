# SPDX-License-Identifier: Apache-2.0
"""What the operator looks up in torch, and which names it is registered under."""

import ctypes
import os
import shutil
import subprocess

import pytest
from torch_cases import run_python, torch

from lightning_indexer import _torch


def library_path(name):
    return os.path.join(os.path.dirname(torch.__file__), "lib", f"{name}.so")


def test_every_symbol_is_in_the_installed_torch():
    torch_cpu = ctypes.CDLL(library_path("libtorch_cpu"))
    symbols = _torch.symbols()
    assert len(symbols) > 25
    needed = [name for name, library in symbols if library == "libtorch_cpu"]
    one_of = [name for name, library in symbols if library == "libtorch_cpu?"]
    assert [name for name in needed if not hasattr(torch_cpu, name)] == []
    assert any(hasattr(torch_cpu, name) for name in one_of)
    if torch.version.cuda:
        torch_cuda = ctypes.CDLL(library_path("libtorch_cuda"))
        for name, library in symbols:
            assert library != "libtorch_cuda" or hasattr(torch_cuda, name)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler for a torch with a hole")
def test_a_missing_symbol_is_named(tmp_path):
    op = _torch._load_op()
    symbols = _torch.symbols(op)
    needed = [name for name, library in symbols if library in ("libtorch_cpu", "libtorch_cuda")]
    source = tmp_path / "stub.c"
    source.write_text(
        "\n".join(f"#ifndef no_{name}\nvoid {name}(void) {{}}\n#endif" for name in needed)
    )
    for name in needed:
        stub = tmp_path / f"stub_{name}.so"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Dno_{name}", "-o", stub, source], check=True)
        alive = ctypes.CDLL(str(stub))
        sentence = op.lidx_torch_load(str(stub).encode(), str(stub).encode()).decode()
        assert name in sentence and "torch 2.10 or newer" in sentence
        del alive
    no_cell = tmp_path / "no_cell.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", no_cell, source], check=True)
    alive = ctypes.CDLL(str(no_cell))
    assert b"_ZdlPv" in op.lidx_torch_load(str(no_cell).encode(), None)
    del alive


def test_torch_that_is_not_loaded_is_said():
    sentence = _torch._load_op().lidx_torch_load(b"libtorch_not_there.so", None).decode()
    assert "libtorch_not_there.so is not loaded" in sentence


CALL = """
q, k, w = torch.ones(1, 2, 4, 64).half(), torch.ones(1, 5, 1, 64).half(), torch.ones(1, 2, 4)
expected = [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]
"""


def test_alias_is_defined_where_nobody_owns_npu():
    run_python(
        "import torch, lightning_indexer"
        + CALL
        + """
assert torch.ops.npu.lightning_indexer(q, k, w, sparse_count=4).tolist() == [expected]
indices, values = torch.ops.npu.npu_lightning_indexer(q, k, w, sparse_count=4, return_value=True)
assert indices.tolist() == [expected] and values.dtype == torch.float16
# Another package may still define the rest of the namespace.
torch.library.Library("npu", "FRAGMENT").define("other(Tensor x) -> Tensor")
lightning_indexer._torch.register()
"""
    )


def test_alias_can_be_turned_off():
    run_python(
        """
        import torch, lightning_indexer
        assert not hasattr(torch.ops.npu, "lightning_indexer")
        assert "LIDX_NPU_ALIAS" in lightning_indexer._torch.state["npu::lightning_indexer"]
        """,
        LIDX_NPU_ALIAS="0",
    )


@pytest.mark.parametrize("owner", ["torch_npu", "sgl_kernel_npu"])
def test_alias_is_left_to_its_owner(tmp_path, owner):
    (tmp_path / f"{owner}.py").write_text("")
    run_python(
        f"""
        import torch, lightning_indexer
        assert not hasattr(torch.ops.npu, "lightning_indexer")
        assert "{owner}" in lightning_indexer._torch.state["npu::lightning_indexer"]
        torch.library.Library("npu", "DEF")
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )


def run_beside_npu(more, checks):
    """Runs `checks` after a call's arguments, in a process where npu has the operator and `more`."""
    schema = _torch._load_op().lidx_torch_schema(b"lightning_indexer").decode()
    run_python(
        f"""
import torch
npu = torch.library.Library("npu", "DEF")
npu.define({schema!r})
{more}
import lightning_indexer
{CALL}
{checks}
"""
    )


def test_alias_adds_cpu_to_an_operator_that_exists():
    run_beside_npu(
        'npu.define("npu_lightning_indexer(Tensor query, int selected_count) -> Tensor")',
        """
assert torch.ops.npu.lightning_indexer(q, k, w, sparse_count=4).tolist() == [expected]
state = lightning_indexer._torch.state
assert state["npu::lightning_indexer"].startswith("implemented")
assert state["npu::npu_lightning_indexer"] == "left alone: it exists with another schema"
""",
    )


def test_alias_is_left_alone_where_the_operator_serves_the_cpu():
    run_beside_npu(
        'npu.impl("lightning_indexer", lambda query, *others, **options: query[0], "CPU")',
        """
assert torch.ops.npu.lightning_indexer(q, k, w, sparse_count=4).dtype == torch.float16
state = lightning_indexer._torch.state["npu::lightning_indexer"]
assert state == "left alone: it exists and serves CPU", state
""",
    )


def test_a_registration_that_fails_does_not_fail_the_import():
    run_python(
        """
        import warnings, numpy, torch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import lightning_indexer
        assert any("not registered with torch" in str(w.message) for w in caught)
        q = numpy.ones((1, 1, 1, 64), "float16")
        assert lightning_indexer.lightning_indexer(q, q, q[..., 0], sparse_count=1) == 0
        try:
            lightning_indexer.lightning_indexer(torch.ones(1), None, None)
        except RuntimeError as error:
            assert "not registered" in str(error)
        else:
            raise AssertionError
        """,
        LIDX_TORCH_LIBRARY="/nowhere/op.so",
    )
