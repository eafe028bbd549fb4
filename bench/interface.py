# SPDX-License-Identifier: Apache-2.0
"""The C library for the benchmarks, through ctypes: arguments are made once and only lidx_run() is
timed, as in an engine that calls it from C. Torch gives the memory; it is imported behind the library,
so that a benchmark may choose which of the two is loaded first."""

import ctypes
import os
import sys


def load(path=None):
    """The Python package's view of the library at `path`: its structs and functions. None: what
    LIDX_LIBRARY names. Torch's operators are left alone."""
    os.environ["LIDX_TORCH"] = "0"
    if path:
        os.environ["LIDX_LIBRARY"] = os.path.abspath(path)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.join(here, "..", "bindings", "python"))
    from lightning_indexer import _library

    return _library


def describe(lib, tensor):
    """A struct lidx_tensor that keeps what it points at alive."""
    import torch

    code, bits = {
        torch.bfloat16: (lib.BFLOAT, 16),
        torch.float16: (lib.FLOAT, 16),
        torch.float32: (lib.FLOAT, 32),
        torch.int32: (lib.INT, 32),
    }[tensor.dtype]
    device = lib.Device(lib.CUDA if tensor.is_cuda else lib.CPU, tensor.device.index or 0)
    shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
    described = lib.Tensor(
        tensor.data_ptr(), device, tensor.dim(), lib.Dtype(code, bits, 1), shape, None, 0
    )
    described.owner = (tensor, shape)
    return described


def arguments(lib, tensors, **options):
    """A struct lidx_args of contiguous tensors by name; keeps them alive."""
    args = lib.Args(size=ctypes.sizeof(lib.Args), **options)
    args.owner = {name: describe(lib, tensor) for name, tensor in tensors.items()}
    for name, described in args.owner.items():
        setattr(args, name, ctypes.pointer(described))
    return args
