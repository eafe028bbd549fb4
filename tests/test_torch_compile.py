# SPDX-License-Identifier: Apache-2.0
"""The operator under torch's own machinery: opcheck, compile, export, fake tensors, autograd."""

import shutil

import pytest
from torch_cases import NPU_OP, OP, PAIRS, Case, make_cases, torch  # skips first where it must

from torch._dynamo.testing import CompileCounterWithBackend

import lightning_indexer


@pytest.mark.parametrize("layouts, lists", list(make_cases()))
def test_opcheck(layouts, lists):
    # Without the lists every batch is full.
    lengths = {} if lists else {"query_lengths": (4, 4), "key_lengths": (40, 40)}
    case = Case(layouts, lists=lists, **lengths)
    assert set(torch.library.opcheck(OP.default, case.positional()).values()) == {"SUCCESS"}
    for return_value in (False, True):
        args, kwargs = case.keywords(return_value=return_value)
        assert set(torch.library.opcheck(NPU_OP.default, args, kwargs).values()) == {"SUCCESS"}


def test_defaults():
    case = Case(query_lengths=(2,), key_lengths=(3000,), lists=False, sparse_count=2048)
    shortest = OP(*case.tensors)
    assert shortest.shape == (1, 2, 1, 2048)
    assert torch.equal(shortest, OP(*case.positional()))
    assert torch.equal(shortest, NPU_OP(*case.tensors)[0])
    case.check(shortest)


def test_npu_spelling_returns_values_only_when_asked():
    args, kwargs = Case().keywords()
    indices, values = NPU_OP(*args, **kwargs)
    assert values.shape == (0,) and values.dtype == torch.bfloat16
    again, values = NPU_OP(*args, **kwargs, return_value=True)
    assert values.shape == indices.shape and values.dtype == torch.bfloat16
    assert torch.equal(indices, again)


@pytest.mark.parametrize("layouts", PAIRS)
def test_compiles_once_for_many_shapes(layouts):
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, weights, lengths_query, lengths_key, table):
        # Something to fuse before and after.
        indices = OP(
            query * 2, key, weights, lengths_query, lengths_key, table, *layouts, 8, 3
        )
        return indices.clamp(min=0).sum(-1), NPU_OP(
            query,
            key,
            weights,
            actual_seq_lengths_query=lengths_query,
            actual_seq_lengths_key=lengths_key,
            block_table=table,
            layout_query=layouts[0],
            layout_key=layouts[1],
            sparse_count=8,
            return_value=True,
        )

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for n in range(4, 9):
        case = Case(layouts, query_lengths=(n, n + 1, n), key_lengths=(20 * n, 7, 16 * n + 1), seed=n)
        arguments = (*case.tensors, *case.lists, case.table)
        expected = call(*arguments)
        got = compiled(*arguments)
        assert torch.equal(got[0], expected[0])
        assert all(map(torch.equal, got[1], expected[1]))
    assert counter.frame_count == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    case = Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False)
    call = lambda q, k, w: OP(q + 0, k + 0, w * 2, sparse_count=8) + 1
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*case.tensors), call(*case.tensors))


def test_the_python_function_compiles_whole():
    case = Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False)
    call = lambda *tensors: lightning_indexer.lightning_indexer(
        *tensors, sparse_count=8, return_values=True
    )
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*case.tensors), call(*case.tensors)))


def test_exports_with_dynamic_shapes():
    class Module(torch.nn.Module):
        def forward(self, query, key, weights):
            return OP(query, key, weights, sparse_count=8)

    n, m = torch.export.Dim("n", min=2, max=64), torch.export.Dim("m", min=2, max=512)
    case = Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False)
    shapes = ({1: n}, {1: m}, {1: n})
    program = torch.export.export(Module(), tuple(case.tensors), dynamic_shapes=shapes)
    assert "lightning_indexer" in str(program.graph)
    other = Case(query_lengths=(6, 6), key_lengths=(77, 77), lists=False)
    assert torch.equal(program.module()(*other.tensors), OP(*other.positional()))


def test_fake_refuses_what_the_operator_refuses():
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(2, 3, 4, 64, dtype=torch.float16)
        with pytest.raises(RuntimeError, match="sparse_count is 9000"):
            OP(query, query[:, :, :1], query[..., 0], sparse_count=9000)
        with pytest.raises(RuntimeError, match="query has 4 dimensions; it should have 3"):
            OP(query, query, query, layout_query="TND")


def test_works_under_inference_mode_and_autograd():
    case = Case()
    expected = OP(*case.positional())
    with torch.inference_mode():
        assert torch.equal(OP(*case.positional()), expected)
    case.tensors[0].requires_grad_()
    indices = OP(*case.positional())
    assert torch.equal(indices, expected) and not indices.requires_grad
