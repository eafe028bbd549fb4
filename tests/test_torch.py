# SPDX-License-Identifier: Apache-2.0
"""The torch operator on the CPU: registration, opcheck, compile, export, threads, leaks, errors,
and agreement with the reference by the contract's rule."""

import concurrent.futures
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import textwrap

import numpy
import pytest

try:
    import torch
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("torch is not installed", allow_module_level=True)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_indexer
from lightning_indexer import _torch, reference

PAGE = torch.ops.lightning_indexer.lightning_indexer
NPU = torch.ops.lightning_indexer.npu_lightning_indexer
PAIRS = [("BSND", "BSND"), ("TND", "TND"), ("BSND", "PA_BSND"), ("TND", "PA_BSND")]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
DEVICE = "cpu"


class Case:
    """Arguments of one call; query_lengths and key_lengths are per batch, not prefix sums."""

    def __init__(
        self,
        layouts=("BSND", "BSND"),
        query_lengths=(3, 4),
        key_lengths=(40, 33),
        heads=4,
        dim=64,
        dtype=torch.bfloat16,
        weights_dtype=torch.float32,
        sparse_count=8,
        sparse_mode=3,
        block_size=16,
        lists=True,
        seed=0,
        fill=None,
        device=None,
    ):
        generator = torch.Generator().manual_seed(seed)
        fill = fill or (lambda *shape: torch.randn(shape, generator=generator))
        self.layouts = layouts
        self.options = dict(
            layout_query=layouts[0],
            layout_key=layouts[1],
            sparse_count=sparse_count,
            sparse_mode=sparse_mode,
        )
        batch = len(query_lengths)
        query = fill(batch, max(query_lengths, default=0), heads, dim).to(dtype)
        weights = fill(batch, max(query_lengths, default=0), heads).to(weights_dtype)
        key = fill(batch, max(key_lengths, default=0), 1, dim).to(dtype)
        lengths_query = torch.tensor(query_lengths, dtype=torch.int32)
        lengths_key = torch.tensor(key_lengths, dtype=torch.int32)
        self.table = None
        if layouts[0] == "TND":
            query, weights = _pack(query, query_lengths), _pack(weights, query_lengths)
            lengths_query = lengths_query.cumsum(0, dtype=torch.int32)
        if layouts[1] == "TND":
            key = _pack(key, key_lengths)
            lengths_key = lengths_key.cumsum(0, dtype=torch.int32)
        elif layouts[1] == "PA_BSND":
            key, self.table = _page(key, block_size, generator)
        if not lists and layouts == ("BSND", "BSND"):
            lengths_query = lengths_key = None
        elif not lists and layouts[0] == "BSND":
            lengths_query = None
        self.lists = [lengths_query, lengths_key]
        self.tensors = [query, key, weights]
        if device:
            self.to(device)

    def to(self, device):
        move = lambda tensor: None if tensor is None else tensor.to(device)
        self.tensors, self.lists = [*map(move, self.tensors)], [*map(move, self.lists)]
        self.table = move(self.table)
        return self

    def page_args(self):
        return (*self.tensors, *self.lists, self.table, *self.options.values())

    def npu_args(self, **more):
        lists = dict(
            actual_seq_lengths_query=self.lists[0],
            actual_seq_lengths_key=self.lists[1],
            block_table=self.table,
        )
        return tuple(self.tensors), {**lists, **self.options, **more}

    def rows(self):
        options = {name: v for name, v in self.options.items() if name != "sparse_count"}
        return reference.rows(*self.tensors, *self.lists, self.table, **options)

    def check(self, indices, values=None):
        """The contract's agreement rule for every row, and -1 wherever no row is."""
        indices = indices.cpu().numpy()
        count = self.options["sparse_count"]
        rest = numpy.ones(indices.shape[:-2], bool)
        for row, score in self.rows():
            rest[row] = False
            wrong = reference.agrees(indices[row][0], score)
            assert wrong is None, f"row {row}: {wrong}"
            if values is not None:
                n = min(count, len(score))
                true = score[indices[row][0, :n]]
                got = values[row][0].float().cpu().numpy()
                bound = 2.0**-7 if values.dtype == torch.bfloat16 else 2.0**-9
                assert numpy.allclose(got[:n], true, rtol=bound, atol=1e-5 * numpy.abs(true).max(initial=0))
                assert (got[n:] == -numpy.inf).all()
        assert (indices[rest] == -1).all()

    def check_exactly(self, indices):
        options = {**self.options}
        expected, _ = reference.lightning_indexer(*self.tensors, *self.lists, self.table, **options)
        assert (indices.cpu().numpy() == expected).all()


def _pack(tensor, lengths):
    rows = [tensor[b, :n] for b, n in enumerate(lengths)]
    return torch.cat(rows) if rows else tensor.flatten(0, 1)


def _page(key, block_size, generator):
    """Pages in random order, with one that nobody uses."""
    batch, n_key, _, dim = key.shape
    width = -(-n_key // block_size)
    order = torch.randperm(batch * width + 1, generator=generator)[: batch * width]
    pages = torch.full((batch * width + 1, block_size, 1, dim), 7.0).to(key.dtype)
    padded = torch.nn.functional.pad(key, (0, 0, 0, 0, 0, width * block_size - n_key))
    pages[order] = padded.reshape(batch * width, block_size, 1, dim)
    return pages, order.reshape(batch, width).to(torch.int32)


def make_cases():
    for layouts in PAIRS:
        for lists in (True, False):
            if lists or layouts[0] == "BSND":
                yield pytest.param(layouts, lists, id=f"{'-'.join(layouts)}-{lists}")


# --- registration ------------------------------------------------------------------------------


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
    needed = [name for name, library in symbols if library == "libtorch_cpu"]
    source = tmp_path / "stub.c"
    source.write_text(
        "\n".join(f"#ifndef no_{name}\nvoid {name}(void) {{}}\n#endif" for name in needed)
    )
    for name in needed:
        stub = tmp_path / f"stub_{name}.so"
        subprocess.run(["cc", "-shared", "-fPIC", f"-Dno_{name}", "-o", stub, source], check=True)
        alive = ctypes.CDLL(str(stub))
        sentence = op.lidx_torch_load(str(stub).encode(), None).decode()
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


def run_python(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_alias_adds_cpu_to_an_operator_that_exists():
    schema = _torch._load_op().lidx_torch_schema(b"lightning_indexer").decode()
    run_python(
        f"""
import torch
npu = torch.library.Library("npu", "DEF")
npu.define({schema!r})
npu.define("npu_lightning_indexer(Tensor query, int selected_count) -> Tensor")
import lightning_indexer
"""
        + CALL
        + """
assert torch.ops.npu.lightning_indexer(q, k, w, sparse_count=4).tolist() == [expected]
state = lightning_indexer._torch.state
assert state["npu::lightning_indexer"].startswith("implemented")
assert state["npu::npu_lightning_indexer"] == "left alone: it exists with another schema"
"""
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


# --- torch's own checks ------------------------------------------------------------------------


@pytest.mark.parametrize("layouts, lists", list(make_cases()))
def test_opcheck(layouts, lists):
    # Without the lists every batch is full.
    lengths = {} if lists else {"query_lengths": (4, 4), "key_lengths": (40, 40)}
    case = Case(layouts, lists=lists, **lengths)
    assert set(torch.library.opcheck(PAGE.default, case.page_args()).values()) == {"SUCCESS"}
    for return_value in (False, True):
        args, kwargs = case.npu_args(return_value=return_value)
        assert set(torch.library.opcheck(NPU.default, args, kwargs).values()) == {"SUCCESS"}


def test_defaults_are_the_pages():
    case = Case(query_lengths=(2,), key_lengths=(3000,), lists=False, sparse_count=2048)
    shortest = PAGE(*case.tensors)
    assert shortest.shape == (1, 2, 1, 2048)
    assert torch.equal(shortest, PAGE(*case.page_args()))
    assert torch.equal(shortest, NPU(*case.tensors)[0])
    case.check(shortest)


def test_npu_spelling_returns_values_only_when_asked():
    args, kwargs = Case().npu_args()
    indices, values = NPU(*args, **kwargs)
    assert values.shape == (0,) and values.dtype == torch.bfloat16
    again, values = NPU(*args, **kwargs, return_value=True)
    assert values.shape == indices.shape and values.dtype == torch.bfloat16
    assert torch.equal(indices, again)


@pytest.mark.parametrize("layouts", PAIRS)
def test_compiles_once_for_many_shapes(layouts):
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, weights, lengths_query, lengths_key, table):
        # Something to fuse before and after.
        indices = PAGE(
            query * 2, key, weights, lengths_query, lengths_key, table, *layouts, 8, 3
        )
        return indices.clamp(min=0).sum(-1), NPU(
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
    call = lambda q, k, w: PAGE(q + 0, k + 0, w * 2, sparse_count=8) + 1
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*case.tensors), call(*case.tensors))


def test_exports_with_dynamic_shapes():
    class Module(torch.nn.Module):
        def forward(self, query, key, weights):
            return PAGE(query, key, weights, sparse_count=8)

    n, m = torch.export.Dim("n", min=2, max=64), torch.export.Dim("m", min=2, max=512)
    case = Case(query_lengths=(4, 4), key_lengths=(40, 40), lists=False)
    shapes = ({1: n}, {1: m}, {1: n})
    program = torch.export.export(Module(), tuple(case.tensors), dynamic_shapes=shapes)
    assert "lightning_indexer" in str(program.graph)
    other = Case(query_lengths=(6, 6), key_lengths=(77, 77), lists=False)
    assert torch.equal(program.module()(*other.tensors), PAGE(*other.page_args()))


def test_fake_refuses_what_the_operator_refuses():
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(2, 3, 4, 64, dtype=torch.float16)
        with pytest.raises(RuntimeError, match="sparse_count is 9000"):
            PAGE(query, query[:, :, :1], query[..., 0], sparse_count=9000)
        with pytest.raises(RuntimeError, match="query has 4 dimensions; it should have 3"):
            PAGE(query, query, query, layout_query="TND")


def test_works_under_inference_mode_and_autograd():
    case = Case()
    expected = PAGE(*case.page_args())
    with torch.inference_mode():
        assert torch.equal(PAGE(*case.page_args()), expected)
    case.tensors[0].requires_grad_()
    indices = PAGE(*case.page_args())
    assert torch.equal(indices, expected) and not indices.requires_grad


# --- threads and processes ---------------------------------------------------------------------


def test_threads_share_nothing():
    cases = [Case(seed=seed, query_lengths=(5, 9), key_lengths=(300, 211)) for seed in range(4)]
    expected = [PAGE(*case.page_args()) for case in cases]

    def work(index):
        case = cases[index % 4]
        return all(torch.equal(PAGE(*case.page_args()), expected[index % 4]) for _ in range(20))

    for _ in range(3):  # threads come and go, with their contexts
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(32)))


def test_result_does_not_depend_on_the_number_of_threads():
    case = Case(query_lengths=(70, 3), key_lengths=(900, 2000), heads=8, sparse_count=64)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(NPU(*case.tensors, **case.npu_args(return_value=True)[1]))
    finally:
        torch.set_num_threads(before)
    for indices, values in results:
        assert torch.equal(indices, results[0][0]) and torch.equal(values, results[0][1])


class OperatorDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, seed):
        case = Case(seed=seed, query_lengths=(40, 3), key_lengths=(300, 211))
        return PAGE(*case.page_args())


def test_works_in_data_loader_workers():
    dataset = OperatorDataset()
    expected = torch.stack([dataset[seed] for seed in range(8)])  # the parent has run it too
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_works_in_a_forked_child():
    run_python(
        """
        import os, torch, lightning_indexer
        torch.set_num_threads(2)
        q, k, w = torch.randn(1, 64, 4, 64).half(), torch.randn(1, 999, 1, 64).half(), torch.ones(1, 64, 4)
        # Only the operator runs in the child: torch's own parallel loops hang there.
        run = lambda: torch.ops.lightning_indexer.lightning_indexer(q, k, w).numpy().tobytes()
        expected = run()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if run() == expected else 1)
            assert os.waitpid(child, 0)[1] == 0
        assert run() == expected
        """
    )


# --- leaks -------------------------------------------------------------------------------------


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def bytes_in_use():
    """What malloc has given out, exactly; None where the C library cannot say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except RuntimeError:
        return
    raise AssertionError("the call was not refused")


@pytest.mark.parametrize("layouts", [("TND", "PA_BSND"), ("BSND", "BSND")])
def test_calls_and_refused_calls_leak_nothing(layouts):
    case = Case(layouts, query_lengths=(1, 1), key_lengths=(3, 2), heads=1, sparse_count=2)
    page = case.page_args()
    args, kwargs = case.npu_args(return_value=True)
    wrong_layout = page[:6] + ("layout with a name too long for a short string", "BSND", 2, 3)
    wrong_count = page[:8] + (0, 3)
    wrong_key = (page[0], page[1].float(), *page[2:])

    def calls(n):
        for _ in range(n):
            PAGE(*page)
            NPU(*args, **kwargs)

    def refusals(n):
        for _ in range(n):
            refused(PAGE, *wrong_layout)
            refused(PAGE, *wrong_count)
            refused(PAGE, *wrong_key)
            refused(NPU, *args, **{**kwargs, "pre_tokens": 1})

    for work, n in ((calls, 5000), (refusals, 2500)):
        work(300)
        holders = [t._use_count() for t in page if isinstance(t, torch.Tensor)]
        tensors, used, resident = live_tensors(), bytes_in_use(), resident_bytes()
        work(n)  # 10,000 calls of the operators
        assert live_tensors() == tensors
        assert [t._use_count() for t in page if isinstance(t, torch.Tensor)] == holders
        # One forgotten cell of 8 bytes a call would be 160 KB or more.
        assert used is None or bytes_in_use() - used < 80_000
        assert resident_bytes() - resident < 4 << 20


# --- errors ------------------------------------------------------------------------------------


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
    "query has dtype": lambda: swap(Case(), 0, Case().tensors[0].double()),
    "query has 129 heads": lambda: Case(heads=129),
    "query has head dimension 96": lambda: Case(dim=96),
    "query has stride": lambda: swap(Case(), 0, Case(heads=8).tensors[0][:, :, ::2]),
    "key has dtype": lambda: swap(Case(), 1, Case().tensors[1].half()),
    "key has shape": lambda: swap(Case(), 1, Case().tensors[1][:1]),
    "key has stride": lambda: swap(Case(), 1, Case(dim=128).tensors[1][..., ::2]),
    "weights has dtype": lambda: swap(Case(), 2, Case().tensors[2].double()),
    "weights has shape": lambda: swap(Case(), 2, Case().tensors[2][:, :2]),
    "actual_seq_lengths_query is missing": lambda: listed(Case(("TND", "TND")), 0, None),
    "actual_seq_lengths_key is missing": lambda: listed(Case(("TND", "PA_BSND")), 1, None),
    r"actual_seq_lengths_query\[0\] is -1": lambda: listed(Case(), 0, int32(-1, 2)),
    r"actual_seq_lengths_key\[1\] is 41": lambda: listed(Case(), 1, int32(40, 41)),
    r"actual_seq_lengths_key\[1\] is 9": lambda: listed(Case(("TND", "TND")), 1, int32(40, 9)),
    "actual_seq_lengths_key has dtype": lambda: listed(Case(), 1, torch.tensor([40, 33])),
    "block_table is missing": lambda: paged(lambda table: None),
    r"block_table\[0\]\[0\] is 999": lambda: paged(lambda table: table * 0 + 999),
    "block_table has shape": lambda: paged(lambda table: table[:1]),
    'layout_query is "BNSD"': lambda: optioned(layout_query="BNSD"),
    'layout_key is "pa"': lambda: optioned(layout_key="pa"),
    "layout_key is TND with layout_query BSND": lambda: optioned(layout_key="TND"),
    "layout_query is 2": lambda: optioned(layout_query="PA_BSND"),
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
        PAGE(*case.page_args())
    args, kwargs = case.npu_args(return_value=True)
    with pytest.raises(RuntimeError, match=sentence):
        NPU(*args, **kwargs)
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
    for call in (PAGE, NPU):
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


def test_windows_are_refused():
    args, kwargs = Case().npu_args()
    for name in ("pre_tokens", "next_tokens"):
        with pytest.raises(RuntimeError, match=f"{name} is 4; it should be 9223372036854775807"):
            NPU(*args, **kwargs, **{name: 4})


def test_a_refusal_leaves_the_operator_usable():
    case = Case()
    expected = PAGE(*case.page_args())
    refused(PAGE, *case.page_args()[:8], -5, 3)
    assert torch.equal(PAGE(*case.page_args()), expected)


def test_a_sparse_tensor_is_refused():
    query, key, weights = Case(dtype=torch.float16).tensors
    with pytest.raises((RuntimeError, NotImplementedError)):
        PAGE(query, key.squeeze(2).to_sparse(), weights)


# --- agreement with the reference --------------------------------------------------------------


@st.composite
def random_cases(draw, exact=False):
    layouts = draw(st.sampled_from(PAIRS))
    batch = draw(st.integers(1, 3))
    longest_query = draw(st.sampled_from([1, 2, 5, 17]))
    longest_key = draw(st.sampled_from([1, 15, 16, 17, 64, 200, 520]))
    query_lengths = [draw(st.integers(0, longest_query)) for _ in range(batch)]
    key_lengths = [draw(st.integers(0, longest_key)) for _ in range(batch)]
    query_lengths[draw(st.integers(0, batch - 1))] = longest_query
    key_lengths[draw(st.integers(0, batch - 1))] = longest_key
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**31))
    case = Case(
        layouts,
        query_lengths,
        key_lengths,
        heads=draw(st.sampled_from([1, 2, 3, 8, 16, 33, 64])),
        dim=draw(st.sampled_from([64, 128])),
        dtype=dtype,
        weights_dtype=draw(st.sampled_from([dtype, torch.float32])),
        sparse_count=draw(st.sampled_from([1, 2, 7, 16, 64, 300, 2048])),
        sparse_mode=draw(st.sampled_from([0, 3])),
        block_size=draw(st.sampled_from([16, 48, 64])),
        lists=True,
        seed=seed,
        fill=_special(seed) if exact else None,
    )
    if layouts[0] == "BSND" and draw(st.booleans()):
        # A stride along the first axis that is not the size of a batch.
        query = case.tensors[0]
        wide = torch.zeros(query.shape[0], query.shape[1] + 2, *query.shape[2:], dtype=dtype)
        wide[:, : query.shape[1]] = query
        case.tensors[0] = wide[:, : query.shape[1]]
    return case


def _special(seed):
    """Small integers, so that sums are exact whatever their order and ties are many; now and then
    -0, an infinity or a NaN."""
    random = numpy.random.default_rng(seed)

    def fill(*shape):
        numbers = random.integers(-2, 3, shape).astype("float32")
        numbers[random.random(shape) < 0.3] = -0.0
        if random.random() < 0.5:
            for special in (numpy.inf, -numpy.inf, numpy.nan):
                numbers[random.random(shape) < 2e-4] = special
        return torch.from_numpy(numbers)

    return fill


@settings(max_examples=120, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(random_cases())
def test_agrees_with_the_reference(case):
    args, kwargs = case.npu_args(return_value=True)
    case.check(*NPU(*args, **kwargs))


@settings(max_examples=120, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(random_cases(exact=True))
def test_ties_zeros_infinities_and_nans_are_exact(case):
    case.check_exactly(PAGE(*case.page_args()))


def test_a_plateau_is_decided_by_position():
    query = torch.ones(1, 1, 4, 64, dtype=torch.bfloat16)
    key = torch.zeros(1, 5000, 1, 64, dtype=torch.bfloat16)
    key[0, ::2] = -1  # ReLU makes these exact zeros too, and -0 of the products counts as +0
    key[0, 4321] = 1
    indices = PAGE(query, key, torch.ones(1, 1, 4), sparse_count=1000)
    assert indices.flatten().tolist() == [4321, *range(999)]


def test_a_nan_key_is_visible_and_last():
    query = torch.ones(1, 1, 2, 64, dtype=torch.float16)
    key = torch.ones(1, 40, 1, 64, dtype=torch.float16)
    key[0, [3, 30]] = torch.nan
    key[0, 7] = torch.inf
    weights = -torch.ones(1, 1, 2)
    indices, values = NPU(query, key, weights, sparse_count=64, return_value=True)
    rest = [j for j in range(40) if j not in (3, 7, 30)]
    assert indices.flatten().tolist() == rest + [7, 3, 30] + [-1] * 24
    assert values.flatten()[37] == -torch.inf and values.flatten()[38:40].isnan().all()


def test_python_function_is_the_operator():
    case = Case(("TND", "PA_BSND"))
    arguments = (*case.tensors, *case.lists, case.table)
    indices = lightning_indexer.lightning_indexer(*arguments, **case.options)
    assert torch.equal(indices, PAGE(*case.page_args()))
    again, values = lightning_indexer.lightning_indexer(*arguments, **case.options, return_values=True)
    assert torch.equal(again, indices)
    case.check(again, values)


def test_empty_tensors():
    for query_lengths, key_lengths in (((), ()), ((0, 0), (5, 6)), ((2, 1), (0, 0))):
        for layouts in PAIRS:
            if layouts[1] == "PA_BSND" and not sum(key_lengths):
                continue
            case = Case(layouts, query_lengths, key_lengths)
            indices = PAGE(*case.page_args())
            assert (indices == -1).all() or sum(query_lengths)
            case.check(indices)
