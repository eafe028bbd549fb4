#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fuzz_torch.py SECONDS: the torch operator's argument path on arguments that are nearly right.

A call either raises a RuntimeError whose sentence says what was wrong (or the TypeError of a schema
that does not take such a value), or returns indices of the right shape and range without
repeats, and -1 only at the end. Whatever is passed, the process survives and the inputs stay as
they were, and after a refusal the caller's outputs too. Hypothesis picks the arguments, so a failure comes with a small example.
"""
import sys
import time

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_indexer

OP = torch.ops.lightning_indexer.lightning_indexer
NPU_OP = torch.ops.lightning_indexer.npu_lightning_indexer
OUT = torch.ops.lightning_indexer.lightning_indexer_out
PAIRS = [("BSND", "BSND"), ("TND", "TND"), ("BSND", "PA_BSND"), ("TND", "PA_BSND")]
NAMES = ("query", "key", "weights", "actual_seq_lengths_query", "actual_seq_lengths_key",
         "block_table")
OUTPUTS = ("sparse_indices", "sparse_values", "error_word")
TENSOR_BREAKS = ("none", "drop", "transpose", "squeeze", "unsqueeze", "slice", "dtype", "expand",
                 "empty", "meta", "requires_grad", "sparse", "storage", "values", "negative")
OPTION_BREAKS = {
    "layout_query": st.sampled_from(["BSND", "TND", "PA_BSND", "", "bsnd", "BSND\0", "x" * 500]),
    "layout_key": st.sampled_from(["BSND", "TND", "PA_BSND", "", "PA", "\u00e9"]),
    "sparse_count": st.sampled_from([0, -1, 1, 8192, 8193, 2**31, 2**32 + 5, -(2**63), 2**63 - 1]),
    "sparse_mode": st.sampled_from([0, 1, 2, 3, 4, -1, 2**32, 2**32 + 3]),
}
tried = {"accepted": 0, "refused": 0}


def build(draw):
    """A valid call: {name: tensor or option}."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    layout_query, layout_key = draw(st.sampled_from(PAIRS))
    batch, heads, dim = number(0, 3), draw(st.sampled_from([1, 3, 8, 64])), draw(st.sampled_from([64, 128]))
    query_lengths = [number(0, 4) for _ in range(batch)]
    key_lengths = [number(0, 50) for _ in range(batch)]
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    weights_dtype = draw(st.sampled_from([dtype, torch.float32]))
    generator = torch.Generator().manual_seed(number(0, 99))
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    int32 = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    prefix = lambda values: int32(values).cumsum(0).to(torch.int32)  # noqa: E731
    call = {"layout_query": layout_query, "layout_key": layout_key,
            "sparse_count": draw(st.sampled_from([1, 2, 7, 64, 2048])),
            "sparse_mode": draw(st.sampled_from([0, 3])), "block_table": None}
    if layout_query == "TND":
        tokens = sum(query_lengths) + number(0, 2)
        shape, lengths = (tokens,), prefix(query_lengths)
    else:
        shape, lengths = (batch, max(query_lengths, default=0)), int32(query_lengths)
    call["query"] = random(*shape, heads, dim).to(dtype)
    call["weights"] = random(*shape, heads).to(weights_dtype)
    call["actual_seq_lengths_query"] = lengths
    call["actual_seq_lengths_key"] = int32(key_lengths)
    if layout_key == "TND":
        call["key"] = random(sum(key_lengths), 1, dim).to(dtype)
        call["actual_seq_lengths_key"] = prefix(key_lengths)
    elif layout_key == "BSND":
        call["key"] = random(batch, max(key_lengths, default=0), 1, dim).to(dtype)
    else:
        columns = (max(key_lengths, default=0) + 15) // 16
        call["key"] = random(6, 16, 1, dim).to(dtype)
        call["block_table"] = torch.randint(0, 6, (batch, columns), generator=generator,
                                            dtype=torch.int32)
    return call


def build_outputs(draw, call):
    """What the operator that fills the caller's tensors takes besides."""
    shape = (*call["query"].shape[:-2], 1, call["sparse_count"])
    values = draw(st.sampled_from([None, torch.float32, call["query"].dtype]))
    return {"sparse_indices": torch.full(shape, 77, dtype=torch.int32),
            "sparse_values": None if values is None else torch.full(shape, 77, dtype=values),
            "error_word": draw(st.sampled_from([None, torch.zeros(1, dtype=torch.int32)]))}


def break_tensor(draw, tensor, how):
    if tensor is None or how == "none" or tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    if how == "drop":
        return None
    if how == "transpose" and tensor.dim() > 1:
        return tensor.transpose(0, tensor.dim() - 1)
    if how == "squeeze":
        return tensor[0] if tensor.dim() and tensor.shape[0] else tensor.reshape(-1)
    if how == "unsqueeze":
        return tensor.unsqueeze(draw(st.integers(0, tensor.dim())))
    if how == "slice" and tensor.dim():
        axis = draw(st.integers(0, tensor.dim() - 1))
        return tensor.narrow(axis, 0, max(tensor.shape[axis] - 1, 0))
    if how == "dtype":
        return tensor.to(draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int8,
                                               torch.int32, torch.bool, torch.float16,
                                               torch.bfloat16, torch.float8_e4m3fn,
                                               torch.complex64])))
    if how == "expand" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    if how == "empty":
        return tensor.new_empty(draw(st.sampled_from([(0,), (), (0, 0), (0, 0, 0), (0, 0, 0, 0)])))
    if how == "meta":
        return tensor.to("meta")
    if how == "requires_grad" and tensor.is_floating_point():
        return tensor.clone().requires_grad_()
    if how == "sparse" and tensor.dim():
        return tensor.to_sparse()
    if how == "storage" and tensor.dim() and tensor.shape[-1] > 1:
        wide = tensor.new_empty((*tensor.shape[:-1], tensor.shape[-1] + 3))
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    if how in ("values", "negative") and tensor.dtype == torch.int32 and tensor.numel():
        broken = tensor.clone(memory_format=torch.contiguous_format)
        at = draw(st.integers(0, tensor.numel() - 1))
        bad = [-1, -(2**31)] if how == "negative" else [99, 2**31 - 1, 7, 0]
        broken.view(-1)[at] = draw(st.sampled_from(bad))
        return broken
    return tensor


def same_bits(a, b):
    if a.layout != torch.strided or a.device.type == "meta" or not a.numel():
        return True
    # A fresh copy: a dimension of size 1 may keep a stride that view() refuses.
    bits = [x.new_empty(x.numel()).copy_(x.flatten()).view(torch.uint8) for x in (a, b)]
    return torch.equal(*bits)


def check_answer(call, indices):
    count = call["sparse_count"]
    assert indices.dtype == torch.int32
    assert tuple(indices.shape) == (*call["query"].shape[:-2], 1, count)
    row = indices.reshape(-1, count)
    assert bool((row >= -1).all())
    empty = row == -1
    assert bool((empty[:, 1:] | ~empty[:, :-1]).all()), "a key behind a -1"
    sorted_row = row.sort(dim=-1).values
    twice = (sorted_row[:, 1:] == sorted_row[:, :-1]) & (sorted_row[:, 1:] >= 0)
    assert not bool(twice.any()), "a key twice"


@st.composite
def calls(draw):
    call = build(draw)
    through = draw(st.sampled_from(["op", "npu_op", "function", "out"]))
    names = NAMES + tuple(OPTION_BREAKS)
    if through == "out":
        call.update(build_outputs(draw, call))
        names += OUTPUTS
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(names))
        if name in OPTION_BREAKS:
            call[name] = draw(OPTION_BREAKS[name])
        else:
            call[name] = break_tensor(draw, call[name], draw(st.sampled_from(TENSOR_BREAKS)))
    return call, through


def run(call, through):
    """The indices; where they are the caller's own, sparse_count is what these say."""
    if through == "op":
        return OP(*(call[name] for name in NAMES), call["layout_query"], call["layout_key"],
                    call["sparse_count"], call["sparse_mode"])
    if through == "npu_op":
        return NPU_OP(call["query"], call["key"], call["weights"],
                   **{name: value for name, value in call.items()
                      if name not in ("query", "key", "weights")})[0]
    if through == "function":
        return lightning_indexer.lightning_indexer(**call)
    OUT(**{name: value for name, value in call.items() if name != "sparse_count"})
    call["sparse_count"] = call["sparse_indices"].shape[-1]
    return call["sparse_indices"]


def copies(call, names):
    return {name: call[name].detach().clone() for name in names
            if call.get(name) is not None and call[name].layout == torch.strided}


def check(case):
    call, through = case
    inputs, outputs = copies(call, NAMES), copies(call, OUTPUTS)
    try:
        indices = run(call, through)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        assert len(str(error)) > 15, f"no sentence: {error!r}"
        tried["refused"] += 1
        inputs.update(outputs)
    else:
        tried["accepted"] += 1
        if indices.device.type == "cpu":
            check_answer(call, indices)
    for name, tensor in inputs.items():
        assert same_bits(call[name].detach(), tensor), f"{name} was written to"


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    end = time.monotonic() + seconds
    torch.set_num_threads(2)
    one_round = settings(max_examples=1000, deadline=None, database=None, print_blob=True,
                         suppress_health_check=list(HealthCheck))(given(calls())(check))
    while time.monotonic() < end:
        one_round()
    print(f"{sum(tried.values())} calls tried: {tried['accepted']} accepted, {tried['refused']} refused")
    assert tried["accepted"] and tried["refused"], "the calls are all of one kind"


if __name__ == "__main__":
    main()
