# SPDX-License-Identifier: Apache-2.0
"""Registers the operators with torch: in C for CPU and CUDA, here for fake tensors.

`lightning_indexer::` is always ours. `npu::` may belong to torch_npu or sgl_kernel_npu, whose own
operators must win, so the alias

* is off when LIDX_NPU_ALIAS is 0;
* adds CPU and CUDA implementations when the operator exists with the same schema;
* is otherwise left to those packages when one of them can be imported;
* else defines the operator.
"""

import ctypes
import importlib.util
import os
import sys

import torch

from . import _library
from ._library import MAX_SPARSE_COUNT

OPS = ("lightning_indexer", "npu_lightning_indexer")
NAMESPACE = "lightning_indexer"
OWNERS_OF_NPU = ("torch_npu", "sgl_kernel_npu")

# Once they are registered: torch.ops.lightning_indexer.lightning_indexer.default, and the function in
# torch's C++ that stands behind ._dense.default, which torch.compile cannot trace; None where this
# torch has none, or lacks one of the watchers, the functions that say whether torch looks at calls.
overload = dense = None
watchers = ()
_libraries = []  # a registration made in Python lives as long as its library
state = {}  # "npu::lightning_indexer" -> what was done about it, for `info`


def _load_op():
    op = ctypes.CDLL(os.environ.get("LIDX_TORCH_LIBRARY") or _default_path())
    for name in ("load", "define", "implement", "schema", "symbol"):
        getattr(op, f"lidx_torch_{name}").restype = ctypes.c_char_p
    op.lidx_torch_load.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    op.lidx_torch_define.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    op.lidx_torch_implement.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    op.lidx_torch_schema.argtypes = [ctypes.c_char_p]
    op.lidx_torch_symbol.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return op


def _default_path():
    return os.path.join(_library.PACKAGE, "lightning_indexer_torch.so")


def _check(sentence):
    if sentence:
        raise RuntimeError(f"{sentence.decode()} (this is torch {torch.__version__})")


def symbols(op=None):
    """[(symbol, library)] that the operator looks up in torch; 'libtorch_cpu?' needs not be there."""
    op = op or _load_op()
    found = []
    library = ctypes.c_char_p()
    while name := op.lidx_torch_symbol(len(found), ctypes.byref(library)):
        found.append((name.decode(), library.value.decode()))
    return found


def schema(name):
    """The schema of one of OPS as text, without a namespace."""
    return _load_op().lidx_torch_schema(name.encode()).decode()


def _schema_text(qualified):
    schemas = torch._C._jit_get_schemas_for_operator(qualified)
    return [str(schema) for schema in schemas]


def _same_schema(op, namespace, name):
    """Whether the operator that exists takes its arguments as ours does."""
    ours = torch._C.parse_schema(f"{namespace}::{op.lidx_torch_schema(name.encode()).decode()}")
    return str(ours) in _schema_text(f"{namespace}::{name}")


def _check_tensors(**tensors):
    """One meta tensor among real ones brings a real call here, which must not pass for a fake."""
    for name in ("query", "key", "weights"):
        torch._check(
            tensors[name] is not None, lambda: f"{name} is missing; it is a required argument"
        )
    device = tensors["query"].device
    for name, tensor in tensors.items():
        torch._check(
            tensor is None or tensor.device == device,
            lambda: f"{name} is on {tensor.device} and query on {device}; all tensors should be on "
            "one device",
        )


def _fake_indices(
    query,
    key,
    weights,
    actual_seq_lengths_query,
    actual_seq_lengths_key,
    block_table,
    layout_query,
    sparse_count,
):
    """What both operators return first, or the refusal of what needs no data to be refused."""
    _check_tensors(
        query=query,
        key=key,
        weights=weights,
        actual_seq_lengths_query=actual_seq_lengths_query,
        actual_seq_lengths_key=actual_seq_lengths_key,
        block_table=block_table,
    )
    rank = 3 if layout_query == "TND" else 4
    torch._check(
        layout_query in ("BSND", "TND"),
        lambda: f'layout_query is "{layout_query}"; it should be "BSND" or "TND"',
    )
    torch._check(
        query.dim() == rank,
        lambda: f"query has {query.dim()} dimensions; it should have {rank}",
    )
    torch._check(
        1 <= sparse_count <= MAX_SPARSE_COUNT,
        lambda: f"sparse_count is {sparse_count}; it should be 1 to {MAX_SPARSE_COUNT}",
    )
    return query.new_empty((*query.shape[:-2], 1, sparse_count), dtype=torch.int32)


def _fake_op(
    query,
    key,
    weights,
    actual_seq_lengths_query=None,
    actual_seq_lengths_key=None,
    block_table=None,
    layout_query=None,
    layout_key=None,
    sparse_count=None,
    sparse_mode=None,
):
    lists = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    options = _library.with_defaults(layout_query, layout_key, sparse_count, sparse_mode)
    return _fake_indices(query, key, weights, *lists, options[0], options[2])


def _fake_npu(
    query,
    key,
    weights,
    *,
    actual_seq_lengths_query=None,
    actual_seq_lengths_key=None,
    block_table=None,
    layout_query="BSND",
    layout_key="BSND",
    sparse_count=2048,
    sparse_mode=3,
    pre_tokens=2**63 - 1,
    next_tokens=2**63 - 1,
    return_value=False,
):
    lists = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    indices = _fake_indices(query, key, weights, *lists, layout_query, sparse_count)
    return indices, query.new_empty(indices.shape if return_value else (0,))


def _fake_dense(query, key, weights, sparse_count=None):
    return _fake_op(query, key, weights, sparse_count=sparse_count)


def _fake_out(
    query,
    key,
    weights,
    sparse_indices,
    sparse_values=None,
    *,
    actual_seq_lengths_query=None,
    actual_seq_lengths_key=None,
    block_table=None,
    layout_query="BSND",
    layout_key="BSND",
    sparse_mode=3,
    error_word=None,
):
    torch._check(
        sparse_indices is not None, lambda: "sparse_indices is missing; it is a required argument"
    )
    lists = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    count = sparse_indices.shape[-1] if sparse_indices.dim() else 2048
    made = _fake_indices(query, key, weights, *lists, layout_query, count)
    _check_tensors(
        query=query, key=key, weights=weights, sparse_indices=sparse_indices,
        sparse_values=sparse_values, error_word=error_word,
    )
    for name, given in (("sparse_indices", sparse_indices), ("sparse_values", sparse_values)):
        torch._check(
            given is None or given.shape == made.shape,
            lambda: f"{name} has shape {[*given.shape]}; it should be {[*made.shape]}, query's "
            "tokens, one key head and sparse_count",
        )


_FAKES = {
    "lightning_indexer": _fake_op,
    "npu_lightning_indexer": _fake_npu,
    "lightning_indexer_out": _fake_out,
    "_dense": _fake_dense,
}


def _count_writes(keyset, *args, **kwargs):
    """Before `lightning_indexer_out`, outside of inference mode: autograd has to see that a tensor
    which it keeps is overwritten, and nothing that has a gradient may be."""
    op = torch.ops.lightning_indexer.lightning_indexer_out.default
    outputs = dict(zip(("sparse_indices", "sparse_values"), args[3:]))
    for name in ("sparse_indices", "sparse_values", "error_word"):
        tensor = outputs.get(name, kwargs.get(name))
        if tensor is None:
            continue
        torch._check(
            not (tensor.requires_grad and torch.is_grad_enabled()),
            lambda: f"{name} requires grad; it should not, or the call be under torch.no_grad()",
        )
        torch.autograd.graph.increment_version(tensor)
    op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)


def _define(op, namespace, name, owns_namespace):
    _check(op.lidx_torch_define(namespace.encode(), name.encode(), owns_namespace))
    torch.library.register_fake(f"{namespace}::{name}", _FAKES[name])
    if name == "npu_lightning_indexer":
        return
    # Integers and tensors that are filled have no gradient, so autograd has nothing to look at.
    library = torch.library.Library(namespace, "IMPL")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    if name == "lightning_indexer_out":
        library.impl(name, _count_writes, "ADInplaceOrView", with_keyset=True)
    _libraries.append(library)


def _alias(op, name):
    """What was done about npu::name, in words."""
    if os.environ.get("LIDX_NPU_ALIAS", "1") == "0":
        return "off: LIDX_NPU_ALIAS is 0"
    qualified = f"npu::{name}"
    if _schema_text(qualified):
        if not _same_schema(op, "npu", name):
            return "left alone: it exists with another schema"
        for key in ("CPU", "CUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
                return f"left alone: it exists and serves {key}"
        _check(op.lidx_torch_implement(b"npu", name.encode()))
        return "implemented: the operator existed, CPU and CUDA were added"
    for owner in OWNERS_OF_NPU:
        if owner in sys.modules or importlib.util.find_spec(owner):
            return f"left alone: {owner} is installed"
    _define(op, "npu", name, 0)
    return "defined"


def _register_all():
    op = _load_op()
    has_cuda = torch.version.cuda is not None
    _check(op.lidx_torch_load(b"libtorch_cpu.so", b"libtorch_cuda.so" if has_cuda else None))
    for position, name in enumerate(OPS):
        _define(op, NAMESPACE, name, position == 0)
    for name in OPS:
        state[f"npu::{name}"] = _alias(op, name)
    for name in ("lightning_indexer_out", "_dense"):
        _define(op, NAMESPACE, name, 0)


def _find_dense():
    """Sets `dense` and `watchers`, all of them private to torch: each may be gone from the next."""
    global dense, watchers
    try:
        watchers = (
            torch.compiler.is_dynamo_compiling,
            torch._C._len_torch_dispatch_stack,
            torch._C._is_tracing,
        )
        dense = torch.ops.lightning_indexer._dense.default._op
    except AttributeError:
        dense = None


def register():
    """Registers all; once a process."""
    global overload
    if not _schema_text(f"{NAMESPACE}::{OPS[0]}"):
        _register_all()
    overload = torch.ops.lightning_indexer.lightning_indexer.default
    _find_dense()


def with_values(query, key, weights, lists, options):
    """(indices, values) of the two lists of lengths and the table, and the four options."""
    names = ("actual_seq_lengths_query", "actual_seq_lengths_key", "block_table")
    names += ("layout_query", "layout_key", "sparse_count", "sparse_mode")
    return torch.ops.lightning_indexer.npu_lightning_indexer(
        query, key, weights, **dict(zip(names, (*lists, *options))), return_value=True
    )
