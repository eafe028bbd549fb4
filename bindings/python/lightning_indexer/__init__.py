# SPDX-License-Identifier: Apache-2.0
"""For each query token, the positions of the k best keys: exact, deterministic, in plain C.

    score[i, j] = sum over heads h of  weights[i, h] * max(0, dot(query[i, h, :], key[j, :]))
    out[i]      = the sparse_count best visible j: score descending, equal scores by ascending j

Importing the package registers `torch.ops.lightning_indexer.lightning_indexer`,
`torch.ops.lightning_indexer.npu_lightning_indexer` and, where no other package owns the
namespace, the same two in `torch.ops.npu`; and `torch.ops.lightning_indexer.lightning_indexer_out`,
which fills tensors of the caller's. Without torch, `lightning_indexer()` takes NumPy, CuPy
and JAX arrays. Environment variables:

    LIDX_TORCH=0      do not import torch nor register anything
    LIDX_NPU_ALIAS=0  register nothing in torch.ops.npu
    LIDX_KERNEL=NAME  force a kernel (`python -m lightning_indexer info` lists them)
    LIDX_LIBRARY, LIDX_TORCH_LIBRARY   paths of other builds of the library and the operator
"""

import os as _os
import sys as _sys
import warnings as _warnings
from typing import Any as _Any

from ._library import cpu_features, kernels, version
from ._library import with_defaults as _with_defaults

__version__ = version()
__all__ = ["cpu_features", "kernels", "lightning_indexer", "version"]

# torch.Tensor once the operators are registered, and once more where the short way of
# lightning_indexer() exists; what says that torch looks at the call, which must not go that way.
_TorchTensor = ()
_ShortTensor = ()
_is_dynamo_compiling = _count_dispatch_modes = _is_tracing = None
_torch_error = None


def _register() -> None:
    """Registers with torch if there is one; what went wrong is kept and told at a call too."""
    global _torch, _torch_error, _TorchTensor, _ShortTensor
    global _is_dynamo_compiling, _count_dispatch_modes, _is_tracing
    if _os.environ.get("LIDX_TORCH", "1") == "0":
        _torch_error = "LIDX_TORCH is 0"
        return
    try:
        import torch
    except ImportError as error:
        _torch_error = str(error)
        return
    try:
        from . import _torch

        _torch.register()
        _TorchTensor = torch.Tensor
        if _torch.dense:
            _is_dynamo_compiling, _count_dispatch_modes, _is_tracing = _torch.watchers
            _ShortTensor = torch.Tensor
    except (RuntimeError, OSError, AttributeError) as error:
        _torch_error = str(error)
        _warnings.warn(f"lightning_indexer is not registered with torch: {error}", stacklevel=3)


_register()


def lightning_indexer(
    query: _Any,
    key: _Any,
    weights: _Any,
    actual_seq_lengths_query: _Any = None,
    actual_seq_lengths_key: _Any = None,
    block_table: _Any = None,
    layout_query: "str | None" = None,
    layout_key: "str | None" = None,
    sparse_count: "int | None" = None,
    sparse_mode: "int | None" = None,
    *,
    return_values: bool = False,
) -> _Any:
    """The positions of the `sparse_count` best keys of each query token.

    Sizes: B batches, S1 / S2 query tokens / keys of a batch, T1 / T2 those of all batches,
    N1 heads (1..128), D head dimension (64 or 128), k = `sparse_count`.

    =================  ==================  =============  =============================  ===========
    argument           BSND                TND            PA_BSND                        dtype
    =================  ==================  =============  =============================  ===========
    query              [B, S1, N1, D]      [T1, N1, D]                                   bf16 | fp16
    key                [B, S2, 1, D]       [T2, 1, D]     [pages, block_size, 1, D]      query's
    weights            [B, S1, N1]         [T1, N1]                                      query's | f32
    result: indices    [B, S1, 1, k]       [T1, 1, k]                                    int32
    result: values     as the indices                                                    see below
    =================  ==================  =============  =============================  ===========

    Parameters
    ----------
    query, key, weights
        torch tensors on the CPU or a CUDA device, NumPy arrays (bfloat16 through ml_dtypes), CuPy
        arrays on CuPy's current device, JAX arrays on the CPU, or anything else in CPU memory with
        `__dlpack__`. All of one kind and on one device. All dimensions but the first are
        contiguous.
    actual_seq_lengths_query, actual_seq_lengths_key : int32 [B], optional
        The real lengths. Layout TND: required, prefix sums without the leading 0. Layout BSND:
        one length a batch; None means S1 / S2. Layout PA_BSND: the key's list is required and is
        one length a batch, also with a TND query.
    block_table : int32 [B, blocks of the longest batch], layout_key PA_BSND only
        Key j of batch b is row `j % block_size` of page `block_table[b][j // block_size]`.
        block_size is a multiple of 16 in 16..1024.
    layout_query, layout_key : str, "BSND" where None
        "BSND" / "BSND", "TND" / "TND", "BSND" / "PA_BSND" or "TND" / "PA_BSND".
    sparse_count : int, 2048 where None
        k, 1..8192.
    sparse_mode : int, 3 where None
        0: a query sees every key of its batch. 3: right-bottom causal, query i of L1 sees the
        first L2 - L1 + i + 1 of L2 keys.
    return_values : bool
        Also return the scores: float32 for arrays, query's dtype for torch tensors.

    Returns
    -------
    indices, or (indices, values)
        Score descending, equal scores by ascending position; -1 (and -inf) where fewer than k
        keys are visible. For torch tensors and CuPy arrays on a CUDA device the work is enqueued
        on the current stream.

    Raises
    ------
    RuntimeError
        With a sentence that names the argument, what it was and what it should be. On a CUDA
        device the values of lengths and tables are not read on the host: they are clamped there.
    TypeError
        When an argument is no array at all, or an option no whole number (with torch tensors,
        torch itself raises a RuntimeError).

    Threads: any may call; each has a context of its own, up to 4 MiB for each CPU thread that
    works for it. For torch tensors that is `torch.get_num_threads()`, else OpenMP's default.
    """
    if (
        type(query) is type(key) is type(weights) is _ShortTensor
        and actual_seq_lengths_query is None
        and actual_seq_lengths_key is None
        and block_table is None
        and layout_query is None
        and layout_key is None
        and sparse_mode is None
        and not return_values
        and not _is_dynamo_compiling()  # the first, as torch.compile cannot trace the others
        and not _count_dispatch_modes()
        and not _is_tracing()
    ):
        if sparse_count is None:
            return _torch.dense(query, key, weights)
        return _torch.dense(query, key, weights, sparse_count)

    is_torch = isinstance(query, _TorchTensor)
    if is_torch and not return_values:
        return _torch.overload(
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
        )

    lists = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    options = _with_defaults(layout_query, layout_key, sparse_count, sparse_mode)
    if is_torch:
        return _torch.with_values(query, key, weights, lists, options)

    torch = _sys.modules.get("torch")
    if torch is not None and isinstance(query, torch.Tensor):
        raise RuntimeError(f"lightning_indexer is not registered with torch: {_torch_error}")

    from . import _arrays

    return _arrays.lightning_indexer(query, key, weights, *lists, *options, return_values)
