# SPDX-License-Identifier: Apache-2.0
"""Arrays that are not torch's: NumPy directly, CuPy, JAX and the rest through DLPack.

Nothing is copied on the way in. An argument is described by a `Tensor` that points at the array's
memory; the `Borrowed` that holds it keeps the array, or its DLPack capsule, alive for the call.
"""

import ctypes
import operator

import numpy

from . import _library
from ._library import BFLOAT, CPU, CUDA, CUDA_HOST, CUDA_MANAGED, FLOAT, INT, UINT
from ._library import LAYOUTS, MAX_SPARSE_COUNT, Args, Tensor

_KINDS = {"f": FLOAT, "i": INT, "u": UINT}


class Borrowed:
    """A `Tensor` and what it needs alive."""

    def __init__(self, tensor, *alive):
        self.tensor = tensor
        self.alive = alive


def _from_numpy(name, array):
    tensor = Tensor(data=array.ctypes.data, ndim=array.ndim)
    tensor.device.device_type = CPU
    # ml_dtypes' bfloat16 has no kind of its own; its name tells it.
    is_bfloat = array.dtype.name == "bfloat16"
    tensor.dtype.code = BFLOAT if is_bfloat else _KINDS.get(array.dtype.kind, 255)
    tensor.dtype.bits = array.dtype.itemsize * 8
    tensor.dtype.lanes = 1
    item = max(array.dtype.itemsize, 1)
    if any(stride % item for stride in array.strides):
        raise RuntimeError(
            f"{name} has strides {array.strides} in bytes; they should be multiples of its "
            f"element's size, {item}"
        )
    if not array.dtype.isnative:
        raise RuntimeError(
            f"{name} has dtype {array.dtype.str}, its bytes in the other order; it should be in this "
            "machine's (array.astype(array.dtype.newbyteorder('=')))"
        )
    shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    strides = (ctypes.c_int64 * max(array.ndim, 1))(*(s // item for s in array.strides))
    tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
    return Borrowed(tensor, array, shape, strides)


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(array, stream):
    """The DLTensor inside an unconsumed capsule, which frees itself when it is dropped."""
    device_type = int(array.__dlpack_device__()[0])
    on_gpu = device_type in (CUDA, CUDA_MANAGED)
    capsule = array.__dlpack__(stream=stream) if on_gpu else array.__dlpack__()
    tensor = Tensor.from_address(_get_pointer(capsule, b"dltensor"))
    if device_type == CUDA_HOST:  # pinned memory is the CPU's, as are the outputs
        tensor = Tensor.from_buffer_copy(tensor)
        tensor.device.device_type, tensor.device.device_id = CPU, 0
    return Borrowed(tensor, array, capsule)


def _has_dlpack(array):
    """Not so for JAX's tracers, which have one method of the two."""
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _borrow(name, array, stream):
    if array is None:
        return None
    if isinstance(array, numpy.ndarray):
        return _from_numpy(name, array)
    if _has_dlpack(array):
        return _from_dlpack(array, stream)
    raise TypeError(
        f"{name} is a {type(array).__name__}; it should be a torch.Tensor, a numpy.ndarray, or "
        "have __dlpack__"
    )


class _NumpyMaker:
    """Outputs for arguments in CPU memory. JAX arrays are made from them at the end."""

    stream = None

    def __init__(self, query):
        self.wrap = lambda array: array
        if not isinstance(query, numpy.ndarray) and _package(query) in ("jax", "jaxlib"):
            import jax.numpy

            self.wrap = jax.numpy.asarray

    def empty(self, shape, dtype):
        return numpy.empty(shape, dtype)

    def borrow(self, name, array):
        return _from_numpy(name, array)


class _CupyMaker:
    """Outputs and workspace for CuPy arguments, on CuPy's current stream."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.get_current_stream().ptr or 1  # 1 is DLPack's default stream
        self.wrap = lambda array: array

    def empty(self, shape, dtype):
        return self.cupy.empty(shape, dtype)

    def borrow(self, name, array):
        return _from_dlpack(array, self.stream)


def _package(array):
    return type(array).__module__.split(".")[0]


def _maker(query):
    if query is None:
        raise RuntimeError("query is missing; it is a required argument")
    if isinstance(query, numpy.ndarray):
        return _NumpyMaker(query)
    device_type = int(query.__dlpack_device__()[0]) if _has_dlpack(query) else CPU
    if device_type not in (CUDA, CUDA_MANAGED):
        return _NumpyMaker(query)
    if _package(query) == "cupy":
        return _CupyMaker()
    raise RuntimeError(
        f"query is a {_package(query)} array on a GPU; on a GPU the arrays should be torch's or "
        "CuPy's (cupy.from_dlpack and torch.from_dlpack take any, without a copy)"
    )


def _layout(name, text):
    if not isinstance(text, str) or text not in LAYOUTS:
        allowed = '"BSND", "TND" or "PA_BSND"' if name == "layout_key" else '"BSND" or "TND"'
        raise RuntimeError(f'{name} is "{text}"; it should be {allowed}')
    return LAYOUTS[text]


def _int32(name, value, should_be):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it should be a whole number, {should_be}") from None
    if not -(2**31) <= value < 2**31:
        raise RuntimeError(f"{name} is {value}; it should be {should_be}")
    return value


def _output_shape(query, layout_query, sparse_count):
    """None where query's shape and the options do not say it; the library then says why."""
    shape = tuple(query.tensor.shape[i] for i in range(query.tensor.ndim))
    if len(shape) != (3 if layout_query == "TND" else 4) or not 1 <= sparse_count <= MAX_SPARSE_COUNT:
        return None
    return (*shape[:-2], 1, sparse_count)


def lightning_indexer(
    query,
    key,
    weights,
    actual_seq_lengths_query,
    actual_seq_lengths_key,
    block_table,
    layout_query,
    layout_key,
    sparse_count,
    sparse_mode,
    return_values,
):
    """See `lightning_indexer.lightning_indexer`, which this serves for arrays."""
    maker = _maker(query)
    arrays = {
        "query": query,
        "key": key,
        "weights": weights,
        "actual_seq_lengths_query": actual_seq_lengths_query,
        "actual_seq_lengths_key": actual_seq_lengths_key,
        "block_table": block_table,
    }
    borrowed = {name: _borrow(name, array, maker.stream) for name, array in arrays.items()}
    args = Args(size=ctypes.sizeof(Args))
    args.layout_query = _layout("layout_query", layout_query)
    args.layout_key = _layout("layout_key", layout_key)
    args.sparse_count = _int32("sparse_count", sparse_count, f"1 to {MAX_SPARSE_COUNT}")
    args.sparse_mode = _int32("sparse_mode", sparse_mode, "0 or 3")
    outputs = []
    shape = _output_shape(borrowed["query"], layout_query, args.sparse_count)
    if shape:
        outputs.append(maker.empty(shape, "int32"))
        borrowed["sparse_indices"] = maker.borrow("sparse_indices", outputs[0])
        if return_values:
            outputs.append(maker.empty(shape, "float32"))
            borrowed["sparse_values"] = maker.borrow("sparse_values", outputs[1])
    for name, holder in borrowed.items():
        if holder:
            setattr(args, name, ctypes.pointer(holder.tensor))

    context = _library.context()
    workspace = _give_workspace(args, context, maker) if maker.stream else None  # noqa: F841
    _library.check(_library.library.lidx_run(context, ctypes.byref(args)))
    outputs = [maker.wrap(array) for array in outputs]
    return tuple(outputs) if return_values else outputs[0]


def _give_workspace(args, context, maker):
    size = ctypes.c_size_t()
    _library.check(
        _library.library.lidx_workspace_size(context, ctypes.byref(args), ctypes.byref(size))
    )
    # CuPy's pool hands memory on in stream order, so dropping this after the run is safe.
    memory = maker.empty((max(size.value, 1),), "uint8")
    borrowed = maker.borrow("workspace", memory)
    args.workspace = borrowed.tensor.data
    args.workspace_size = size.value
    args.stream = None if maker.stream == 1 else maker.stream
    return borrowed
