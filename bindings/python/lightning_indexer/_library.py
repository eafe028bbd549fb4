# SPDX-License-Identifier: Apache-2.0
"""The C library through ctypes: its structs, its functions, one context for each thread."""

import ctypes
import glob
import os
import threading
from typing import Any

PACKAGE = os.path.dirname(os.path.abspath(__file__))

# enum lidx_device_type, lidx_type_code (the same numbers as DLPack's), lidx_layout and lidx_limit.
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
INT, UINT, FLOAT, BFLOAT = 0, 1, 2, 4
LAYOUTS = {"BSND": 0, "TND": 1, "PA_BSND": 2}
MAX_HEADS, MAX_SPARSE_COUNT = 128, 8192


def with_defaults(layout_query, layout_key, sparse_count, sparse_mode):
    """The options, with the operator's defaults for those that are None."""
    return (
        "BSND" if layout_query is None else layout_query,
        "BSND" if layout_key is None else layout_key,
        2048 if sparse_count is None else sparse_count,
        3 if sparse_mode is None else sparse_mode,
    )


class Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class Dtype(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    """struct lidx_tensor, which is DLPack's DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Args(ctypes.Structure):
    """struct lidx_args."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("query", ctypes.POINTER(Tensor)),
        ("key", ctypes.POINTER(Tensor)),
        ("weights", ctypes.POINTER(Tensor)),
        ("actual_seq_lengths_query", ctypes.POINTER(Tensor)),
        ("actual_seq_lengths_key", ctypes.POINTER(Tensor)),
        ("block_table", ctypes.POINTER(Tensor)),
        ("layout_query", ctypes.c_int32),
        ("layout_key", ctypes.c_int32),
        ("sparse_count", ctypes.c_int32),
        ("sparse_mode", ctypes.c_int32),
        ("sparse_indices", ctypes.POINTER(Tensor)),
        ("sparse_values", ctypes.POINTER(Tensor)),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("error_word", ctypes.POINTER(ctypes.c_uint32)),
    ]


class Options(ctypes.Structure):
    """struct lidx_options."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("n_threads", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
    ]


class KernelInfo(ctypes.Structure):
    """struct lidx_kernel_info."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("backend", ctypes.c_char_p),
        ("available", ctypes.c_int32),
        ("chosen_bf16", ctypes.c_int32),
        ("chosen_fp16", ctypes.c_int32),
        ("reason", ctypes.c_char_p),
    ]


def _path():
    """Where the library is: what LIDX_LIBRARY says, or beside this file."""
    forced = os.environ.get("LIDX_LIBRARY")
    if forced:
        return forced
    found = sorted(glob.glob(os.path.join(PACKAGE, "liblightning_indexer.so*")))
    if not found:
        raise ImportError(
            f"liblightning_indexer.so is not in {PACKAGE}: install the package with pip, or set "
            "LIDX_LIBRARY to the library's path"
        )
    return found[0]


def _load():
    # Global, so that the operator for torch binds to this very copy wherever it came from.
    library = ctypes.CDLL(_path(), mode=ctypes.RTLD_GLOBAL)
    for name in ("lidx_version", "lidx_last_error", "lidx_cpu_features"):
        getattr(library, name).restype = ctypes.c_char_p
    library.lidx_destroy.argtypes = [ctypes.c_void_p]
    library.lidx_destroy.restype = None
    library.lidx_create.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
    library.lidx_run.argtypes = [ctypes.c_void_p, ctypes.POINTER(Args)]
    library.lidx_workspace_size.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(Args),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    library.lidx_kernel_info.argtypes = [ctypes.c_int, ctypes.POINTER(KernelInfo)]
    return library


library = _load()


def check(status):
    """Raises RuntimeError with the library's sentence when a call was refused."""
    if status:
        raise RuntimeError(library.lidx_last_error().decode())


def create(n_threads=0, kernel=None):
    """A new lidx_context; lidx_destroy frees it."""
    handle = ctypes.c_void_p()
    name = kernel.encode() if kernel else None
    options = Options(size=ctypes.sizeof(Options), n_threads=n_threads, kernel=name)
    check(library.lidx_create(ctypes.byref(handle), ctypes.byref(options)))
    return handle


_first_process = os.getpid()


class _Context:
    """A lidx_context; it is freed with the thread that owns it."""

    handle = None

    def __init__(self):
        self.process = os.getpid()
        # OpenMP's threads do not survive a fork, so a forked child works on one.
        self.handle = create(0 if self.process == _first_process else 1)

    def __del__(self):
        if self.handle and self.process == os.getpid():
            library.lidx_destroy(self.handle)


_of_thread = threading.local()


def context():
    """This thread's context, made at its first call, and made anew in a forked child."""
    own = getattr(_of_thread, "context", None)
    if own is None or own.process != os.getpid():
        own = _of_thread.context = _Context()
    return own.handle


def version() -> str:
    """The library's, such as "0.1.0"."""
    return library.lidx_version().decode()


def cpu_features() -> str:
    """What the library reads of this CPU: "avx2 fma f16c ..."."""
    return library.lidx_cpu_features().decode()


def kernels() -> "list[dict[str, Any]]":
    """One dictionary for each kernel of this build, best first within its backend: name, backend,
    available, chosen_bf16, chosen_fp16, and reason, a sentence."""
    rows = []
    for index in range(library.lidx_kernel_count()):
        info = KernelInfo(size=ctypes.sizeof(KernelInfo))
        check(library.lidx_kernel_info(index, ctypes.byref(info)))
        rows.append(
            {
                "name": info.name.decode(),
                "backend": info.backend.decode(),
                "available": bool(info.available),
                "chosen_bf16": bool(info.chosen_bf16),
                "chosen_fp16": bool(info.chosen_fp16),
                "reason": info.reason.decode(),
            }
        )
    return rows
