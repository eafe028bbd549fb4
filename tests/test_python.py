# SPDX-License-Identifier: Apache-2.0
"""The package without torch: NumPy, ml_dtypes and JAX arrays, the reference, the command line, the
wheel, and an empty environment."""

import inspect
import json
import os
import subprocess
import sys
import threading
import venv
import zipfile

import numpy
import pytest

import lightning_indexer
from lightning_indexer import _arrays, reference


def needs(module):
    """Imports it, or skips where it is not there; in CI its absence is a failure."""
    return __import__(module) if os.environ.get("CI") == "true" else pytest.importorskip(module)


def arguments(dtype="float16", batch=2, n_query=3, n_key=50, heads=4, dim=64, seed=0):
    random = numpy.random.default_rng(seed)
    query = random.standard_normal((batch, n_query, heads, dim)).astype(dtype)
    key = random.standard_normal((batch, n_key, 1, dim)).astype(dtype)
    weights = random.standard_normal((batch, n_query, heads)).astype("float32")
    return query, key, weights


def check(arrays, indices, **options):
    for row, score in reference.rows(*arrays, **options):
        assert reference.agrees(numpy.asarray(indices)[row][0], score) is None


def test_numpy_arrays():
    arrays = arguments()
    indices, values = lightning_indexer.lightning_indexer(
        *arrays, sparse_count=16, return_values=True
    )
    assert indices.shape == (2, 3, 1, 16) and indices.dtype == numpy.int32
    assert values.dtype == numpy.float32
    check(arrays, indices)
    _, true = reference.lightning_indexer(*arrays, sparse_count=16)
    assert numpy.allclose(values, true, rtol=1e-4, atol=1e-4)


def test_none_is_the_default_of_every_option():
    arrays = arguments(n_query=1)
    shortest = lightning_indexer.lightning_indexer(*arrays)
    assert shortest.shape == (2, 1, 1, 2048)
    options = dict(layout_query="BSND", layout_key="BSND", sparse_count=2048, sparse_mode=3)
    spelled = lightning_indexer.lightning_indexer(*arrays, **options)
    nothing = lightning_indexer.lightning_indexer(*arrays, **dict.fromkeys(options))
    assert (shortest == spelled).all() and (shortest == nothing).all()


def test_bfloat16_through_ml_dtypes():
    arrays = arguments(needs("ml_dtypes").bfloat16)
    check(arrays, lightning_indexer.lightning_indexer(*arrays, sparse_count=16))


def test_packed_and_paged_layouts():
    query, key, weights = arguments()
    whole = lightning_indexer.lightning_indexer(query, key, weights, sparse_count=16)
    packed = lightning_indexer.lightning_indexer(
        query.reshape(6, 4, 64),
        key.reshape(100, 1, 64),
        weights.reshape(6, 4),
        numpy.array([3, 6], "int32"),
        numpy.array([50, 100], "int32"),
        layout_query="TND",
        layout_key="TND",
        sparse_count=16,
    )
    assert (packed.reshape(whole.shape) == whole).all()
    pages = numpy.zeros((8, 16, 1, 64), "float16")
    table = numpy.array([[5, 0, 7, 2], [1, 6, 3, 4]], "int32")
    for b in range(2):
        rows = numpy.zeros((64, 1, 64), "float16")
        rows[:50] = key[b]
        pages[table[b]] = rows.reshape(4, 16, 1, 64)
    paged = lightning_indexer.lightning_indexer(
        query,
        pages,
        weights,
        actual_seq_lengths_key=numpy.array([50, 50], "int32"),
        block_table=table,
        layout_key="PA_BSND",
        sparse_count=16,
    )
    assert (paged == whole).all()


def test_jax_arrays():
    jax = needs("jax")
    cpu = jax.devices("cpu")[0]
    for dtype in ("float16", "bfloat16"):
        arrays = [jax.device_put(a, cpu) for a in arguments()]
        arrays[:2] = [a.astype(dtype) for a in arrays[:2]]
        indices, values = lightning_indexer.lightning_indexer(
            *arrays, sparse_count=16, return_values=True
        )
        assert isinstance(indices, jax.Array) and isinstance(values, jax.Array)
        check([numpy.asarray(a) for a in arrays], indices)


def test_under_jax_jit():
    jax = needs("jax")
    call = lambda *arrays: lightning_indexer.lightning_indexer(*arrays, sparse_count=16)
    arrays = [jax.device_put(a, jax.devices("cpu")[0]) for a in arguments()]
    with pytest.raises(TypeError, match="query is a .*Tracer; it should be a torch.Tensor"):
        jax.jit(call)(*arrays)
    expected = call(*arrays)
    back = jax.ShapeDtypeStruct(expected.shape, expected.dtype)
    jitted = jax.jit(lambda *arrays: jax.pure_callback(call, back, *arrays))
    assert (numpy.asarray(jitted(*arrays)) == numpy.asarray(expected)).all()


class Other:
    """An array of a library that we have never heard of."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_anything_with_dlpack():
    arrays = arguments()
    expected = lightning_indexer.lightning_indexer(*arrays, sparse_count=9)
    before = [sys.getrefcount(a) for a in arrays]
    got = lightning_indexer.lightning_indexer(*map(Other, arrays), sparse_count=9)
    assert isinstance(got, numpy.ndarray) and (got == expected).all()
    assert [sys.getrefcount(a) for a in arrays] == before  # what was borrowed was given back


def test_pinned_memory_is_the_cpus():
    class Pinned(Other):
        def __dlpack__(self):
            capsule = super().__dlpack__()
            device = _arrays.Tensor.from_address(_arrays._get_pointer(capsule, b"dltensor")).device
            device.device_type, device.device_id = self.__dlpack_device__()
            return capsule

        def __dlpack_device__(self):
            return 3, 0  # kDLCUDAHost

    query, key, weights = arguments()
    expected = lightning_indexer.lightning_indexer(query, key, weights, sparse_count=9)
    for arrays in ((Pinned(query), Pinned(key), Pinned(weights)), (query, Pinned(key), weights)):
        assert (lightning_indexer.lightning_indexer(*arrays, sparse_count=9) == expected).all()


def test_nothing_is_copied_and_strides_are_seen():
    query, key, weights = arguments()
    wide = numpy.zeros((4, *query.shape[1:]), "float16")
    wide[::2] = query
    expected = lightning_indexer.lightning_indexer(query, key, weights, sparse_count=9)
    got = lightning_indexer.lightning_indexer(wide[::2], key, weights, sparse_count=9)
    assert (got == expected).all()
    with pytest.raises(RuntimeError, match="query has stride"):
        lightning_indexer.lightning_indexer(query[:, ::2], key, weights[:, ::2])
    # Batches at a distance that is no whole number of elements.
    odd = numpy.lib.stride_tricks.as_strided(
        wide, query.shape, (query[0].nbytes + 1, *query.strides[1:])
    )
    with pytest.raises(RuntimeError, match="query has strides .* in bytes; .* multiples"):
        lightning_indexer.lightning_indexer(odd, key, weights)


def test_errors():
    query, key, weights = arguments()
    call = lightning_indexer.lightning_indexer
    with pytest.raises(RuntimeError, match="query has dtype .* bfloat16 or float16"):
        call(query.astype("float32"), key, weights)
    with pytest.raises(RuntimeError, match="sparse_count is 0; it should be 1 to 8192"):
        call(query, key, weights, sparse_count=0)
    with pytest.raises(RuntimeError, match="sparse_count is 4294967297"):
        call(query, key, weights, sparse_count=2**32 + 1)
    with pytest.raises(RuntimeError, match='layout_key is "NSD"'):
        call(query, key, weights, layout_key="NSD")
    for name, arrays in {
        "query": (None, key, weights),
        "key": (query, None, weights),
        "weights": (query, key, None),
    }.items():
        with pytest.raises(RuntimeError, match=f"^{name} is missing; it is a required argument"):
            call(*arrays)
    for name, value in (("sparse_count", 2.7), ("sparse_mode", "3")):
        with pytest.raises(TypeError, match=f"{name} is {value!r}; it should be a whole number"):
            call(query, key, weights, **{name: value})
    with pytest.raises(TypeError, match="key is a list; it should be a torch.Tensor"):
        call(query, [1, 2], weights)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_of_the_other_byte_order_are_refused(dtype):
    """Their memory is not what it says in this machine's order: the answer would be wrong."""
    if dtype == "bfloat16":
        dtype = needs("ml_dtypes").bfloat16
    arrays = dict(zip(("query", "key", "weights"), arguments(dtype)))
    arrays["actual_seq_lengths_key"] = numpy.array([1, 50], "int32")
    for name, array in arrays.items():
        swapped = array.view(array.dtype.newbyteorder())
        with pytest.raises(RuntimeError, match=f"^{name} has dtype .* bytes in the other order"):
            lightning_indexer.lightning_indexer(**{**arrays, name: swapped})


def test_threads_have_contexts_of_their_own():
    arrays = arguments(n_key=900)
    expected = lightning_indexer.lightning_indexer(*arrays, sparse_count=64)
    wrong = []

    def work():
        for _ in range(10):
            if (lightning_indexer.lightning_indexer(*arrays, sparse_count=64) != expected).any():
                wrong.append(1)

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_forked_child_can_call():
    code = """
import os, numpy, lightning_indexer
q = numpy.random.default_rng(0).standard_normal((2, 64, 4, 64)).astype("float16")
k = q[:, :, :1].copy()
run = lambda: lightning_indexer.lightning_indexer(q, k, q[..., 0].copy(), sparse_count=9)
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if (run() == expected).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    # By itself: forking this process would copy the threads' locks of whatever else was imported.
    environment = {**os.environ, "LIDX_TORCH": "0", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_the_reference_by_hand():
    query = numpy.array([[[[1.0, 2], [3, -1]]]])  # one token, two heads of two
    key = numpy.array([[[[1.0, 0]], [[0, 1]], [[-1, -1]], [[0, 0]]]])
    weights = numpy.array([[[10.0, -1]]])
    # Heads see 1, 2, -3, 0 and 3, -1, -2, 0; ReLU; 10 of the first minus the second.
    indices, values = reference.lightning_indexer(
        query, key, weights, sparse_count=5, sparse_mode=0
    )
    assert indices.tolist() == [[[[1, 0, 2, 3, -1]]]]
    assert values.tolist() == [[[[20, 7, 0, 0, -numpy.inf]]]]


@pytest.mark.parametrize(
    "indices, wrong",
    [
        ([2, 0], None),
        ([0, 2], "descending"),
        ([2, 1], "beyond"),
        ([2, 2], "repeated"),
        ([2, -1], "out of range"),
        ([2, 0, 1, 3], "not -1"),
    ],
)
def test_the_agreement_rule_can_fail(indices, wrong):
    score = numpy.array([3.0, 1.0, 5.0])
    answer = reference.agrees(indices, score)
    assert answer is None if wrong is None else wrong in answer


@pytest.mark.parametrize("module", [lightning_indexer, reference])
def test_public_functions_have_types(module):
    """As py.typed promises to who calls them."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    functions = [f for f in (getattr(module, n) for n in names) if inspect.isfunction(f)]
    assert functions
    for function in functions:
        named = {*inspect.signature(function).parameters, "return"}
        assert named == set(function.__annotations__), function.__name__


def run_module(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "lightning_indexer", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LIDX_TORCH": "0"},
        **options,
    )


def test_info():
    text = run_module("info")
    assert text.returncode == 0 and "scalar" in text.stdout
    facts = json.loads(run_module("info", "--json").stdout)
    assert facts["version"] == lightning_indexer.__version__
    assert any(k["name"] == "scalar" and k["available"] for k in facts["kernels"])


def test_plot(tmp_path):
    needs("matplotlib")
    done = run_module("plot", "--out", str(tmp_path), "--keys", "256", "--count", "32")
    assert done.returncode == 0, done.stderr
    for name in ("selection.png", "benchmark.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(tmp_path / "selection.png") in done.stdout


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture
def wheel():
    """The one that `make test-python` has built and installed."""
    path = os.environ.get("LIDX_WHEEL")
    if not path and os.environ.get("CI") != "true":
        pytest.skip("LIDX_WHEEL names no wheel; `make test-python` builds one")
    return os.path.abspath(path)


def test_one_wheel_serves_every_python(wheel):
    name = os.path.basename(wheel)
    assert name.startswith(f"lightning_indexer-{lightning_indexer.__version__}-py3-none-")
    names = zipfile.ZipFile(wheel).namelist()
    inside = [n.split("/", 1)[1] for n in names if n.startswith("lightning_indexer/")]
    for expected in ("__init__.py", "py.typed", "transformers.py", "lightning_indexer_torch.so"):
        assert expected in inside
    assert sum(n.startswith("liblightning_indexer.so") for n in inside) == 1
    assert any(n.endswith("/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names} == {
        "lightning_indexer",
        f"lightning_indexer-{lightning_indexer.__version__}.dist-info",
    }


def test_imports_in_an_empty_environment(wheel, tmp_path):
    """No torch, no compiler, nothing but the wheel and NumPy."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LIDX_", "PYTHON"))}
    environment["PATH"] = "/nowhere"
    for command in (
        ["-m", "pip", "install", "-q", wheel],
        ["-c", "import lightning_indexer"],
        [
            "-c",
            "import importlib.util, numpy, lightning_indexer as l\n"
            "assert importlib.util.find_spec('torch') is None\n"
            "q = numpy.ones((1, 1, 1, 64), 'float16')\n"
            "assert l.lightning_indexer(q, q, q[..., 0], sparse_count=2).tolist() == [[[[0, -1]]]]",
        ],
        ["-m", "lightning_indexer", "info"],
    ):
        done = subprocess.run(
            [python, *command], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
