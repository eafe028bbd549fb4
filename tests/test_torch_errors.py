# SPDX-License-Identifier: Apache-2.0
"""What the operator refuses, and the sentences that it refuses with."""

import pytest
from torch_cases import NPU_OP, OP, Case, refused, torch

import lightning_indexer


def numpy_of(tensor):
    """The same memory as a NumPy array; bfloat16 as ml_dtypes has it."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def swap(case, position, tensor):
    case.tensors[position] = tensor
    return case


def cast(position, dtype):
    return swap(Case(), position, Case().tensors[position].to(dtype))


def listed(case, position, tensor):
    case.lists[position] = tensor
    return case


def optioned(**options):
    case = Case()
    case.options.update(options)
    return case


def paged(table):
    case = Case(("BSND", "PA_BSND"))
    case.table = table(case.table)
    return case


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "query has 3 dimensions; it should have 4": lambda: swap(Case(), 0, Case().tensors[0][0]),
    "query has dtype float64; it should be bfloat16 or float16": lambda: cast(0, torch.float64),
    "query has 129 heads": lambda: Case(heads=129),
    "query has head dimension 96": lambda: Case(dim=96),
    "query has stride": lambda: swap(Case(), 0, Case(heads=8).tensors[0][:, :, ::2]),
    "key has dtype float16; it should be bfloat16, as query": lambda: cast(1, torch.float16),
    "key has shape": lambda: swap(Case(), 1, Case().tensors[1][:1]),
    "key has stride": lambda: swap(Case(), 1, Case(dim=128).tensors[1][..., ::2]),
    "weights has dtype float64; it should be bfloat16, as query, or float32": lambda: cast(2, torch.float64),
    "weights has shape": lambda: swap(Case(), 2, Case().tensors[2][:, :2]),
    "actual_seq_lengths_query is missing": lambda: listed(Case(("TND", "TND")), 0, None),
    "actual_seq_lengths_key is missing": lambda: listed(Case(("TND", "PA_BSND")), 1, None),
    r"actual_seq_lengths_query\[0\] is -1": lambda: listed(Case(), 0, int32(-1, 2)),
    r"actual_seq_lengths_key\[1\] is 41": lambda: listed(Case(), 1, int32(40, 41)),
    r"actual_seq_lengths_key\[1\] is 9": lambda: listed(Case(("TND", "TND")), 1, int32(40, 9)),
    "actual_seq_lengths_key has dtype int64; it should be int32": lambda: listed(
        Case(), 1, torch.tensor([40, 33])
    ),
    "block_table is missing; it is required with layout_key PA_BSND": lambda: paged(lambda table: None),
    r"block_table\[0\]\[0\] is 999": lambda: paged(lambda table: table * 0 + 999),
    "block_table has shape": lambda: paged(lambda table: table[:1]),
    'layout_query is "BNSD"; it should be "BSND" or "TND"': lambda: optioned(layout_query="BNSD"),
    'layout_key is "pa"; it should be "BSND", "TND" or "PA_BSND"': lambda: optioned(layout_key="pa"),
    "layout_key is TND with layout_query BSND": lambda: optioned(layout_key="TND"),
    "layout_query is PA_BSND; it should be BSND": lambda: optioned(layout_query="PA_BSND"),
    "sparse_count is 0": lambda: optioned(sparse_count=0),
    "sparse_count is 8193": lambda: optioned(sparse_count=8193),
    "sparse_count is 4294967304": lambda: optioned(sparse_count=2**32 + 8),
    "sparse_mode is 1": lambda: optioned(sparse_mode=1),
    "sparse_mode is 4294967299": lambda: optioned(sparse_mode=2**32 + 3),
    "block_size 24": lambda: Case(("BSND", "PA_BSND"), block_size=24),
}


@pytest.mark.parametrize("sentence", BAD)
def test_each_error_is_a_runtime_error_with_the_librarys_sentence(sentence):
    case = BAD[sentence]()
    with pytest.raises(RuntimeError, match=sentence) as by_torch:
        OP(*case.positional())
    args, kwargs = case.keywords(return_value=True)
    with pytest.raises(RuntimeError, match=sentence):
        NPU_OP(*args, **kwargs)
    # NumPy arrays go to the library without torch; it must say the very same.
    arrays = [numpy_of(tensor) for tensor in (*case.tensors, *case.lists, case.table)]
    with pytest.raises(RuntimeError) as by_library:
        lightning_indexer.lightning_indexer(*arrays, **case.options)
    assert str(by_torch.value) == str(by_library.value)


TENSOR_NAMES = (
    "query",
    "key",
    "weights",
    "actual_seq_lengths_query",
    "actual_seq_lengths_key",
    "block_table",
)


def call_both(tensors, options):
    """Calls each operator with the six tensors by name; yields the refusals."""
    for call in (OP, NPU_OP):
        required, optional = tensors[:3], dict(zip(TENSOR_NAMES[3:], tensors[3:]))
        with pytest.raises(RuntimeError) as refusal:
            call(*required, **optional, **options)
        yield str(refusal.value)


@pytest.mark.parametrize("position", range(6), ids=TENSOR_NAMES)
@pytest.mark.parametrize("stray", ["one on meta", "all but one on meta"])
def test_a_meta_tensor_among_real_ones_is_refused(position, stray):
    """Torch brings such a call to the fake operator, whose answer would be memory nobody wrote."""
    case = Case(("TND", "PA_BSND"))
    tensors = [*case.tensors, *case.lists, case.table]
    is_stray = lambda i: (i == position) == (stray == "one on meta")
    tensors = [t.to("meta") if is_stray(i) else t for i, t in enumerate(tensors)]
    for refusal in call_both(tensors, case.options):
        assert "all tensors should be on one device" in refusal
        assert "meta" in refusal and "cpu" in refusal


@pytest.mark.parametrize("missing", range(3), ids=TENSOR_NAMES[:3])
@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")])
def test_a_missing_tensor_is_named(missing, devices):
    case = Case(lists=False)
    rest = iter(devices)
    tensors = [None if i == missing else t.to(next(rest)) for i, t in enumerate(case.tensors)]
    sentence = f"{TENSOR_NAMES[missing]} is missing; it is a required argument"
    for refusal in call_both([*tensors, None, None, None], case.options):
        assert refusal.startswith(sentence)
    for return_values in (False, True):
        with pytest.raises(RuntimeError, match=sentence):
            lightning_indexer.lightning_indexer(*tensors, return_values=return_values)


@pytest.mark.parametrize(
    "dtype, name",
    [(getattr(torch, name), name) for name in ("int8", "int16", "uint8", "bool")]
    + [(getattr(torch, name), name) for name in ("float8_e4m3fn", "float8_e5m2")]
    + [(torch.complex64, r"\(code 255, 64 bits\)")],
)
def test_a_type_that_is_not_taken_is_named(dtype, name):
    for position, tensor in enumerate(("query", "key", "weights")):
        args, kwargs = cast(position, dtype).keywords()
        for call in (OP, NPU_OP):
            with pytest.raises(RuntimeError, match=f"{tensor} has dtype {name}; it should be bfloat16"):
                call(*args, **kwargs)


def test_a_layout_does_not_end_at_a_nul():
    for name in ("layout_query", "layout_key"):
        case = optioned(**{name: "BSND\0more"})
        args, kwargs = case.keywords()
        for call in (OP, NPU_OP, lightning_indexer.lightning_indexer):
            with pytest.raises(RuntimeError, match=f'{name} is "BSND" and more, behind a NUL'):
                call(*args, **kwargs)


def test_windows_are_refused():
    args, kwargs = Case().keywords()
    for name in ("pre_tokens", "next_tokens"):
        with pytest.raises(RuntimeError, match=f"{name} is 4; it should be 9223372036854775807"):
            NPU_OP(*args, **kwargs, **{name: 4})


def test_a_refusal_leaves_the_operator_usable():
    case = Case()
    expected = OP(*case.positional())
    refused(OP, *case.positional()[:8], -5, 3)
    assert torch.equal(OP(*case.positional()), expected)


def test_a_sparse_tensor_is_refused():
    query, key, weights = Case(dtype=torch.float16).tensors
    with pytest.raises((RuntimeError, NotImplementedError)):
        OP(query, key.squeeze(2).to_sparse(), weights)
