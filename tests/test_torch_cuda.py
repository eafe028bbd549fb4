# SPDX-License-Identifier: Apache-2.0
"""The torch operator on a CUDA device: agreement, streams, capture, compile, no synchronisation,
devices that are not the current one, and arrays that come in through DLPack."""

import ctypes
import os
import random

import pytest

try:
    import torch
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("torch is not installed", allow_module_level=True)

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

import lightning_indexer
from lightning_indexer import _arrays, _library
from torch._dynamo.testing import CompileCounterWithBackend

if not any(k["backend"] == "cuda" and k["available"] for k in lightning_indexer.kernels()):
    pytest.skip("the library has no kernel for this CUDA device", allow_module_level=True)

from torch_cases import NPU_OP, OP, PAIRS, Case, make_cases, special_numbers

OUT = torch.ops.lightning_indexer.lightning_indexer_out

needs_two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices; here is one"
)
DEVICES = ["cuda:0", pytest.param("cuda:1", marks=needs_two_devices)]


def random_case(seed, **more):
    choose = random.Random(seed)
    batch = choose.randint(1, 3)
    longest_query, longest_key = choose.choice([1, 2, 5, 40]), choose.choice([1, 16, 65, 700, 5000])
    dtype = choose.choice([torch.bfloat16, torch.float16])
    fields = dict(
        layouts=PAIRS[seed % 4],
        query_lengths=[longest_query, *(choose.randint(0, longest_query) for _ in range(batch - 1))],
        key_lengths=[*(choose.randint(0, longest_key) for _ in range(batch - 1)), longest_key],
        heads=choose.choice([1, 3, 8, 16, 32, 64, 128]),
        dim=choose.choice([64, 128]),
        dtype=dtype,
        weights_dtype=choose.choice([dtype, torch.float32]),
        sparse_count=choose.choice([1, 7, 64, 300, 2048, 4096]),
        sparse_mode=choose.choice([0, 3]),
        block_size=choose.choice([16, 48, 64, 1024]),
        seed=seed,
        device="cuda",
    )
    return Case(**{**fields, **more})


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_reference(seed):
    case = random_case(seed)
    args, kwargs = case.keywords(return_value=True)
    indices, values = NPU_OP(*args, **kwargs)
    assert indices.is_cuda and values.is_cuda
    case.check(indices, values)


@pytest.mark.parametrize("seed", range(40))
def test_ties_zeros_infinities_and_nans_are_exact(seed):
    case = random_case(seed, fill=special_numbers(seed))
    case.check_exactly(OP(*case.positional()))


@pytest.mark.parametrize("layouts, lists", list(make_cases()))
def test_opcheck(layouts, lists):
    lengths = {} if lists else {"query_lengths": (4, 4), "key_lengths": (40, 40)}
    case = Case(layouts, lists=lists, device="cuda", **lengths)
    assert set(torch.library.opcheck(OP.default, case.positional()).values()) == {"SUCCESS"}
    args, kwargs = case.keywords(return_value=True)
    assert set(torch.library.opcheck(NPU_OP.default, args, kwargs).values()) == {"SUCCESS"}


def test_repeats_bit_for_bit():
    case = random_case(3, heads=64, sparse_count=2048)
    args, kwargs = case.keywords(return_value=True)
    indices, values = NPU_OP(*args, **kwargs)
    for _ in range(5):
        again = NPU_OP(*args, **kwargs)
        assert torch.equal(again[0], indices)
        assert torch.equal(again[1].view(torch.int16), values.view(torch.int16))


def test_errors_are_the_librarys():
    case = Case(device="cuda")
    query, key, weights = case.tensors
    with pytest.raises(RuntimeError, match="key has dtype"):
        OP(query, key.half(), weights)
    with pytest.raises(RuntimeError, match="key is on device .* all tensors should be on one device"):
        OP(query, key.cpu(), weights)
    with pytest.raises(RuntimeError, match="sparse_count is 0"):
        OP(query, key, weights, sparse_count=0)
    OP(query, key, weights)


def test_values_out_of_range_are_clamped():
    case = Case(("BSND", "PA_BSND"), key_lengths=(40, 33), device="cuda")
    expected = OP(*case.positional())
    case.lists[0] = torch.tensor([99, 99], dtype=torch.int32, device="cuda")
    got = OP(*case.positional())  # 4 query tokens, as the tensor has
    case.lists[0] = torch.tensor([4, 4], dtype=torch.int32, device="cuda")
    assert torch.equal(got, OP(*case.positional()))
    case.table = torch.full_like(case.table, 12345)
    assert (OP(*case.positional()) == -1).all()
    assert (expected != -1).any()


def test_neither_synchronises_nor_waits():
    case = random_case(1, heads=64)
    OP(*case.positional())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a call that waits for it shows below
        done = torch.cuda.Event()
        OP(*case.positional())
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_uses_the_current_stream():
    case = random_case(2, heads=16)
    expected = OP(*case.positional())
    late = [torch.zeros_like(t) for t in case.tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late, case.tensors):
            target.copy_(source)
        got = OP(*late, *case.positional()[3:])
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layouts", PAIRS)
def test_captures_and_replays_with_other_data(layouts, device):
    def case(seed):
        # The same shapes, other lengths and data.
        lengths = [[9, 3], [200, 333]] if seed % 2 else [[9, 3], [333, 20]]
        if layouts[0] == "TND":
            lengths[0] = [9, 3] if seed % 2 else [3, 9]
        if layouts[1] == "TND":
            lengths[1] = [200, 333] if seed % 2 else [333, 200]
        return Case(layouts, *lengths, heads=64, dim=128, sparse_count=64, seed=seed, device=device)

    static = case(0)
    args, kwargs = static.keywords(return_value=True)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        NPU_OP(*args, **kwargs)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        with torch.cuda.device(0):  # capturing made `device` the current one
            indices, values = NPU_OP(*args, **kwargs)
    for seed in (1, 2, 3):
        other = case(seed)
        for target, source in zip(
            (*static.tensors, *static.lists, static.table), (*other.tensors, *other.lists, other.table)
        ):
            if target is not None:
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize(device)
        expected = OP(*other.positional())
        assert torch.equal(indices, expected)
        other.check(indices, values)
    assert torch.cuda.current_device() == 0


@needs_two_devices
@pytest.mark.parametrize("seed", range(8))
def test_runs_where_the_tensors_are_and_leaves_the_current_device(seed):
    case, same = random_case(seed, device="cuda:1"), random_case(seed, device="cuda:0")
    args, kwargs = case.keywords(return_value=True)
    indices, values = NPU_OP(*args, **kwargs)
    assert indices.device == values.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    case.check(indices, values)
    assert torch.equal(indices.cpu(), OP(*same.positional()).cpu())
    with pytest.raises(RuntimeError, match="sparse_count is 0"):
        OP(*case.positional()[:8], 0, 3)
    with pytest.raises(RuntimeError, match="key is on device .* all tensors should be on one device"):
        OP(case.tensors[0], same.tensors[1], *case.positional()[2:])
    assert torch.cuda.current_device() == 0


@needs_two_devices
def test_uses_the_current_stream_of_the_tensors_device():
    case = random_case(2, heads=16, device="cuda:1")
    expected = OP(*case.positional())
    late = [torch.zeros_like(t) for t in case.tensors]
    torch.cuda.synchronize(1)
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late, case.tensors):
            target.copy_(source)
        with torch.cuda.device(0):
            got = OP(*late, *case.positional()[3:])
    stream.synchronize()
    assert torch.equal(got, expected)


@needs_two_devices
def test_the_library_itself_switches_to_the_tensors_device():
    """Through the C interface, where no guard of torch's has switched before."""
    case = Case(("BSND", "PA_BSND"), heads=64, dim=128, sparse_count=20, device="cuda:1")
    expected = OP(*case.positional())
    got = torch.full_like(expected, -7)
    names = ("query", "key", "weights", "actual_seq_lengths_query", "actual_seq_lengths_key")
    names += ("block_table", "sparse_indices")
    tensors = (*case.tensors, *case.lists, case.table, got)
    with torch.cuda.device(1):  # torch exports from the current device only
        held = {name: _arrays._from_dlpack(t, -1) for name, t in zip(names, tensors)}
    args = _library.Args(size=ctypes.sizeof(_library.Args), layout_key=2, sparse_count=20, sparse_mode=3)
    for name, one in held.items():
        setattr(args, name, ctypes.pointer(one.tensor))
    context, size = _library.context(), ctypes.c_size_t()
    _library.check(
        _library.library.lidx_workspace_size(context, ctypes.byref(args), ctypes.byref(size))
    )
    workspace = torch.empty(size.value, dtype=torch.uint8, device="cuda:1")
    args.workspace, args.workspace_size = workspace.data_ptr(), size.value
    _library.check(_library.library.lidx_run(context, ctypes.byref(args)))
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert torch.equal(got, expected)


def test_compiles_once_for_many_shapes_and_into_a_graph():
    def call(query, key, weights):
        return OP(query * 2, key, weights, sparse_count=8) + 1

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 6, 9):
        tensors = Case(query_lengths=(n, n), key_lengths=(40 * n, 40 * n), device="cuda").tensors
        assert torch.equal(compiled(*tensors), call(*tensors))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    graphed = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(graphed(*tensors).clone(), call(*tensors))


def test_writes_into_a_graphs_buffers_and_counts_bad_pages():
    case = Case(("BSND", "PA_BSND"), device="cuda")
    expected = OP(*case.positional())
    _, named = case.keywords()
    del named["sparse_count"]
    indices = torch.empty_like(expected)
    values = torch.empty(expected.shape, device="cuda")
    word = torch.zeros(1, dtype=torch.int32, device="cuda")
    call = lambda: OUT(*case.tensors, indices, values, **named, error_word=word)
    call()  # what a kernel's first launch sets up must not fall into the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    indices.fill_(77)
    graph.replay()
    assert torch.equal(indices, expected) and word.item() == 0
    case.table[0, 0] = 999  # of the first batch, whose pages are seen
    graph.replay()
    assert word.item() == 1 and not torch.equal(indices, expected)
    with pytest.raises(RuntimeError, match="on query's device"):
        OUT(*case.tensors, indices, **named, error_word=word.cpu())


def test_leaks_no_memory():
    case = Case(("TND", "PA_BSND"), device="cuda")
    args, kwargs = case.keywords(return_value=True)

    def calls(n):
        for _ in range(n):
            OP(*case.positional())
            NPU_OP(*args, **kwargs)
            with pytest.raises(RuntimeError):
                OP(*case.positional()[:8], 0, 3)

    calls(20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    calls(1000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    case = Case(("TND", "PA_BSND"), dtype=torch.float16, device="cuda")
    arrays = [None if t is None else cupy.from_dlpack(t) for t in (*case.tensors, *case.lists, case.table)]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        indices, values = lightning_indexer.lightning_indexer(
            *arrays, **case.options, return_values=True
        )
        stream.synchronize()
    assert isinstance(indices, cupy.ndarray) and values.dtype == cupy.float32
    assert torch.equal(torch.from_dlpack(indices), OP(*case.positional()))
    assert torch.equal(
        torch.from_dlpack(lightning_indexer.lightning_indexer(*arrays, **case.options)),
        OP(*case.positional()),
    )
