# SPDX-License-Identifier: Apache-2.0
"""lightning_indexer.lightning_indexer() on torch tensors: its way through `_dense`, which is shorter
where no list, layout or mode is given, and where it must not go that way."""

import pytest
from torch_cases import OP, Case, torch

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import lightning_indexer

DENSE = torch.ops.lightning_indexer._dense.default


class Names(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def full(**options):
    return Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False, **options)


def names_of(call):
    with Names() as names:
        call()
    return [name for name in names.called if name.startswith("lightning_indexer")]


def test_opcheck():
    assert set(torch.library.opcheck(DENSE, (*full().tensors, 8)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("count", [None, 1, 39, 40, 41, 8192])
def test_answers_as_the_operator_does(count):
    tensors = full().tensors
    indices = lightning_indexer(*tensors, sparse_count=count)
    assert torch.equal(indices, OP(*tensors, sparse_count=count))
    assert torch.equal(indices, lightning_indexer(*tensors, None, None, None, None, None, count))


def test_goes_by_dense_only_where_nothing_else_is_given():
    case = full()
    assert names_of(lambda: lightning_indexer(*case.tensors)) == ["lightning_indexer._dense.default"]
    lengths = torch.tensor([40, 3], dtype=torch.int32)
    more = (
        dict(actual_seq_lengths_key=lengths),
        dict(actual_seq_lengths_query=lengths.clamp(max=4)),
        dict(layout_query="BSND"),
        dict(layout_key="BSND"),
        dict(sparse_mode=0),
    )
    for options in more:
        call = lambda: lightning_indexer(*case.tensors, **options, sparse_count=8)
        assert names_of(call) == ["lightning_indexer.lightning_indexer.default"]
        assert torch.equal(call(), OP(*case.tensors, **options, sparse_count=8))


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
