# SPDX-License-Identifier: Apache-2.0
"""lightning_indexer.lightning_indexer() on torch tensors: its way through `_dense`, which is shorter
where no list, layout or mode is given and torch does not look at calls."""

import re

import pytest
from torch_cases import OP, Case, run_python, torch

from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import _torch, lightning_indexer

DENSE = torch.ops.lightning_indexer._dense.default


class Names(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ways(monkeypatch):
    """The ways that calls of the function have gone, "dense" or "overload"."""
    gone = []
    for way in ("dense", "overload"):
        def call(*arguments, way=way, target=getattr(_torch, way)):
            gone.append(way)
            return target(*arguments)

        monkeypatch.setattr(_torch, way, call)
    return gone


def full(**options):
    return Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False, **options)


def test_opcheck():
    assert set(torch.library.opcheck(DENSE, (*full().tensors, 8)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("count", [None, 1, 39, 40, 41, 8192])
def test_answers_as_the_operator_does(count):
    tensors = full().tensors
    indices = lightning_indexer(*tensors, sparse_count=count)
    assert torch.equal(indices, OP(*tensors, sparse_count=count))
    assert torch.equal(indices, lightning_indexer(*tensors, None, None, None, None, None, count))


def test_goes_by_dense_only_where_nothing_else_is_given(ways):
    case = full()
    lightning_indexer(*case.tensors)
    lightning_indexer(*case.tensors, sparse_count=8)
    assert ways == ["dense", "dense"]
    lengths = torch.tensor([40, 3], dtype=torch.int32)
    more = (
        dict(actual_seq_lengths_key=lengths),
        dict(actual_seq_lengths_query=lengths.clamp(max=4)),
        dict(layout_query="BSND"),
        dict(layout_key="BSND"),
        dict(sparse_mode=0),
    )
    for options in more:
        ways.clear()
        indices = lightning_indexer(*case.tensors, **options, sparse_count=8)
        assert ways == ["overload"]
        assert torch.equal(indices, OP(*case.tensors, **options, sparse_count=8))


def test_who_looks_at_calls_sees_the_operator():
    tensors = full().tensors
    with Names() as names:
        lightning_indexer(*tensors)
    assert names.called == ["lightning_indexer.lightning_indexer.default"]

    class Module(torch.nn.Module):
        def forward(self, key):  # the others are constants to the trace
            return lightning_indexer(tensors[0], key, tensors[2], sparse_count=8)

    program = torch.export.export(Module(), (tensors[1],), strict=False)
    graph = make_fx(Module(), tracing_mode="real")(tensors[1])
    traced = torch.jit.trace(Module(), tensors[1])
    for text in (program.graph, graph.graph, traced.inlined_graph):
        called = set(re.findall(r"lightning_indexer(?:::|\.)(\w+)", str(text)))
        assert called == {"lightning_indexer"}


def test_tensors_of_other_classes_go_to_the_operator(ways):
    class Other(torch.Tensor):
        pass

    tensors = full().tensors
    for position in range(3):
        mixed = [t.as_subclass(Other) if i == position else t for i, t in enumerate(tensors)]
        assert torch.equal(lightning_indexer(*mixed), OP(*tensors))
    with pytest.raises(RuntimeError, match="lightning_indexer::lightning_indexer"):
        lightning_indexer(tensors[0], 1, tensors[2])
    assert ways == ["overload"] * 4


@pytest.mark.parametrize(
    "case",
    [Case(lists=False, heads=129), full(sparse_count=0), full(sparse_count=8193), full(sparse_count=2**40)],
)
def test_refuses_with_the_operators_sentence(case):
    count = case.options["sparse_count"]
    with pytest.raises(RuntimeError) as by_operator:
        OP(*case.tensors, sparse_count=count)
    with pytest.raises(RuntimeError) as by_function:
        lightning_indexer(*case.tensors, sparse_count=count)
    first_line = lambda error: str(error.value).splitlines()[0]
    assert first_line(by_function) == first_line(by_operator)


def test_a_missing_tensor_is_named():
    query, key, weights = full().tensors
    for arguments, name in (((query, None, weights), "key"), ((query, key, None), "weights")):
        with pytest.raises(RuntimeError, match=f"{name} is missing; it is a required argument"):
            lightning_indexer(*arguments)


def test_graphs_hold_the_operator_itself():
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    tensors = full().tensors
    call = lambda *tensors: lightning_indexer(*tensors, sparse_count=8)
    compiled = torch.compile(call, backend=keep, fullgraph=True)
    assert torch.equal(compiled(*tensors), call(*tensors))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    graphs.append(str(program.graph))
    assert torch.equal(program.module()(*tensors), call(*tensors))
    for graph in graphs:
        assert "lightning_indexer.lightning_indexer" in graph and "_dense" not in graph


def test_other_tensors_and_modes():
    query, key, weights = full().tensors
    expected = OP(query, key, weights)
    parameter = torch.nn.Parameter(query)
    assert torch.equal(lightning_indexer(parameter, key, weights), expected)
    indices = lightning_indexer(query.clone().requires_grad_(), key, weights)
    assert torch.equal(indices, expected) and not indices.requires_grad
    with torch.inference_mode():
        assert torch.equal(lightning_indexer(query, key, weights), expected)
    negated = torch._neg_view(query.neg())  # a view that is negated when it is read
    assert torch.equal(lightning_indexer(negated, key, weights), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (query, key, weights)]
        assert lightning_indexer(*fakes).shape == expected.shape


# The short way rests on names that are private to torch.
HOLES = {
    "is_dynamo_compiling": "del torch.compiler.is_dynamo_compiling",
    "_len_torch_dispatch_stack": "del torch._C._len_torch_dispatch_stack",
    "_is_tracing": "del torch._C._is_tracing",
    "_op": "torch.ops.lightning_indexer.__dict__['_dense'] = types.SimpleNamespace(default=None)",
}


@pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES)
def test_a_torch_without_a_private_name_goes_by_the_operator(hole):
    run_python(
        f"""
        import types, torch
        {hole}
        import lightning_indexer
        from lightning_indexer import _torch, lightning_indexer as function
        assert _torch.dense is None
        query, key = torch.randn(1, 2, 4, 64).half(), torch.randn(1, 9, 1, 64).half()
        weights = torch.ones(1, 2, 4)
        calls = []
        overload = _torch.overload
        _torch.overload = lambda *arguments: calls.append(1) or overload(*arguments)
        for options in ({{}}, {{"sparse_count": 5}}):
            expected = torch.ops.lightning_indexer.lightning_indexer(query, key, weights, **options)
            assert torch.equal(function(query, key, weights, **options), expected)
        assert len(calls) == 2
        """
    )
