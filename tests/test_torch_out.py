# SPDX-License-Identifier: Apache-2.0
"""`lightning_indexer_out`, which writes into the caller's tensors."""

import pytest
from torch_cases import NPU_OP, OP, PAIRS, Case, make_cases, refused, torch

OUT = torch.ops.lightning_indexer.lightning_indexer_out


def buffers(case, fill=77, values_dtype=torch.float32):
    """Outputs of the case, full of something else."""
    shape = (*case.tensors[0].shape[:-2], 1, case.options["sparse_count"])
    return torch.full(shape, fill, dtype=torch.int32), torch.full(shape, fill, dtype=values_dtype)


def keywords(case, **more):
    _, named = case.keywords(**more)
    del named["sparse_count"]
    return named


@pytest.mark.parametrize("layouts, lists", list(make_cases()))
def test_opcheck(layouts, lists):
    lengths = {} if lists else {"query_lengths": (4, 4), "key_lengths": (40, 40)}
    case = Case(layouts, lists=lists, **lengths)
    for outputs in (buffers(case)[:1], buffers(case)):
        checks = torch.library.opcheck(OUT.default, (*case.tensors, *outputs), keywords(case))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layouts", PAIRS)
def test_writes_what_the_operator_returns(layouts):
    case = Case(layouts)
    expected, rounded = NPU_OP(*case.keywords()[0], **case.keywords(return_value=True)[1])
    for values_dtype in (torch.float32, torch.bfloat16):
        indices, values = buffers(case, values_dtype=values_dtype)
        assert OUT(*case.tensors, indices, values, **keywords(case)) is None
        assert torch.equal(indices, expected) and torch.equal(values.bfloat16(), rounded)
    indices = buffers(case)[0]
    OUT(*case.tensors, indices, **keywords(case))
    assert torch.equal(indices, expected)


def test_the_first_rows_of_a_larger_buffer():
    case = Case()
    everything = torch.full((5, *buffers(case)[0].shape[1:]), 77, dtype=torch.int32)
    OUT(*case.tensors, everything[:2], **keywords(case))
    assert torch.equal(everything[:2], OP(*case.positional())) and (everything[2:] == 77).all()


def other(name, make):
    """A call in which one tensor is not what it should be."""
    case = Case()
    indices, values = buffers(case)
    tensors = dict(sparse_indices=indices, sparse_values=values, error_word=torch.zeros(1).int())
    tensors[name] = make(tensors[name])
    return case, tensors


@pytest.mark.parametrize(
    "name, make, sentence",
    [
        ("sparse_indices", lambda t: None, "sparse_indices is missing; it is a required argument"),
        ("sparse_indices", lambda t: t.long(), "sparse_indices has dtype int64; it should be int32"),
        ("sparse_indices", lambda t: t[0], "sparse_indices has 3 dimensions; it should have 4"),
        ("sparse_indices", lambda t: t[0, 0, 0, 0], "sparse_indices has 0 dimensions"),
        ("sparse_indices", lambda t: t[..., :0], "sparse_count is 0; it should be 1 to 8192"),
        ("sparse_indices", lambda t: t[..., :4], "sparse_indices has stride 8 in dimension 1"),
        ("sparse_indices", lambda t: t[:1], r"sparse_indices has shape \[1, 4, 1, 8\]"),
        ("sparse_indices", lambda t: t[:1].expand(2, 4, 1, 8), "sparse_indices has stride 0"),
        ("sparse_values", lambda t: t.half(), "sparse_values has dtype float16; it should be bfloat16"),
        ("sparse_values", lambda t: t[..., :7].contiguous(), "sparse_values has shape"),
        ("error_word", lambda t: t.long(), r"it should be int32 \[1\] on query's device"),
        ("error_word", lambda t: torch.zeros(2).int(), r"it should be int32 \[1\] on query's device"),
    ],
)
def test_refuses_outputs_that_do_not_fit(name, make, sentence):
    case, tensors = other(name, make)
    with pytest.raises(RuntimeError, match=sentence):
        OUT(*case.tensors, **tensors, **keywords(case))
    for tensor in tensors.values():
        assert tensor is None or ((tensor == 77) | (tensor == 0)).all(), "an output was touched"


@pytest.mark.parametrize("name", ["sparse_indices", "sparse_values", "error_word"])
def test_refuses_outputs_of_another_device(name):
    case, tensors = other(name, lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=f"{name} is on meta and query on cpu"):
        OUT(*case.tensors, **tensors, **keywords(case))


def test_autograd_sees_that_a_tensor_is_overwritten():
    case = Case()
    indices, values = buffers(case)
    a = torch.ones(values.shape, requires_grad=True)
    product = (a * values).sum()
    OUT(*case.tensors, indices, values, **keywords(case))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    version = indices._version
    OUT(*case.tensors, sparse_values=values, sparse_indices=indices, **keywords(case))
    assert indices._version == version + 1


def test_refuses_to_overwrite_what_has_a_gradient():
    case = Case()
    indices, values = buffers(case)
    values.requires_grad_()
    with pytest.raises(RuntimeError, match="sparse_values requires grad"):
        OUT(*case.tensors, indices, values, **keywords(case))
    assert (indices == 77).all()
    with torch.no_grad():
        OUT(*case.tensors, indices, values, **keywords(case))
    assert torch.equal(indices, OP(*case.positional()))


def test_works_under_inference_mode():
    with torch.inference_mode():
        case = Case()
        indices, values = buffers(case)
        OUT(*case.tensors, indices, values, **keywords(case))
        assert torch.equal(indices, OP(*case.positional()))


def test_compiles_whole_and_once_for_many_shapes():
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(query, key, weights, buffer):
        OUT(query * 2, key, weights, buffer[: query.shape[0]])
        return buffer.clamp(min=0).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for n in range(2, 6):
        case = Case(query_lengths=(4,) * n, key_lengths=(40 + n,) * n, lists=False, seed=n)
        # The first size of the buffer is the same for all, as is an engine's.
        mine, its = (torch.full((9, 4, 1, 8), 7, dtype=torch.int32) for _ in range(2))
        assert torch.equal(call(*case.tensors, mine), compiled(*case.tensors, its))
        assert torch.equal(mine, its) and (its[n:] == 7).all()
    assert counter.frame_count == 1


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, query, key, weights, buffer):
            OUT(query, key, weights, buffer)
            return buffer + 1

    case = Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False)
    indices = buffers(case)[0]
    program = torch.export.export(Module(), (*case.tensors, indices))
    assert torch.equal(program.module()(*case.tensors, indices), OP(*case.positional()) + 1)
    assert torch.equal(indices, OP(*case.positional()))


def test_leaks_nothing():
    import resource

    case = Case(query_lengths=(1,), key_lengths=(3,), heads=1)  # work for one thread
    indices, values = buffers(case)
    word = torch.zeros(1, dtype=torch.int32)

    def calls(n):
        for i in range(n):
            OUT(*case.tensors, indices, values, **keywords(case), error_word=word)
            if i % 20 == 0:  # a refusal takes torch as long as many calls
                refused(OUT, *case.tensors, indices[..., :4], values, **keywords(case), error_word=word)

    calls(1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(5000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB
