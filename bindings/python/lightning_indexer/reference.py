# SPDX-License-Identifier: Apache-2.0
"""The formula, to be checked by eye: float64, one loop over query tokens, no tricks.

`lightning_indexer` here takes the same arguments as the fast one, as NumPy arrays or torch
tensors on the CPU, and returns NumPy arrays (indices, values). `agrees` is the rule by which two
answers count as the same.
"""

from typing import Any, Iterator, Optional

import numpy


def as_float64(array: Any) -> numpy.ndarray:
    """A NumPy float64 array of a NumPy array (also ml_dtypes' bfloat16) or a torch tensor."""
    if hasattr(array, "detach"):
        array = array.detach().float().cpu().numpy()
    return numpy.asarray(array).astype(numpy.float64)


def scores(query: numpy.ndarray, key: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """score[j] of one query token: query [N1, D], key [S2, D], weights [N1]."""
    with numpy.errstate(all="ignore"):
        dot = query @ key.T
        relu = numpy.where(dot <= 0, 0.0, dot)  # keeps a NaN
        return (weights[:, None] * relu).sum(axis=0)


def order(score: numpy.ndarray) -> numpy.ndarray:
    """Positions, best first: score descending, NaN last, equal ones by ascending position."""
    is_nan = numpy.isnan(score)
    descending = -numpy.where(is_nan, 0.0, score)
    return numpy.lexsort((numpy.arange(len(score)), descending, is_nan))


def rows(
    query: Any,
    key: Any,
    weights: Any,
    actual_seq_lengths_query: Any = None,
    actual_seq_lengths_key: Any = None,
    block_table: Any = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_mode: int = 3,
) -> "Iterator[tuple[Any, numpy.ndarray]]":
    """Yields (index of the row in the output, its score for each visible key)."""
    query, key, weights = as_float64(query), as_float64(key), as_float64(weights)
    query_length = _list(actual_seq_lengths_query)
    key_length = _list(actual_seq_lengths_key)
    packed = layout_query == "TND"
    n_batch = len(query_length) if packed else query.shape[0]
    for b in range(n_batch):
        if packed:
            first = query_length[b - 1] if b else 0
            n_query = query_length[b] - first
        else:
            n_query = query_length[b] if query_length is not None else query.shape[1]
        keys = _keys_of_batch(b, key, key_length, block_table, layout_key)
        for i in range(n_query):
            row = first + i if packed else (b, i)
            visible = len(keys)
            if sparse_mode == 3:
                visible = min(max(len(keys) - n_query + i + 1, 0), len(keys))
            yield row, scores(query[row], keys[:visible], weights[row])


def _list(lengths):
    return None if lengths is None else [int(n) for n in lengths]


def _keys_of_batch(b, key, length, block_table, layout):
    if layout == "TND":
        return key[length[b - 1] if b else 0 : length[b], 0]
    if layout == "BSND":
        return key[b, : length[b] if length is not None else None, 0]
    block_size = key.shape[1]
    pages = [int(page) for page in block_table[b][: -(-length[b] // block_size)]]
    return key[pages].reshape(-1, key.shape[-1])[: length[b]]


def lightning_indexer(
    query: Any, key: Any, weights: Any, *lists: Any, sparse_count: int = 2048, **options: Any
) -> "tuple[numpy.ndarray, numpy.ndarray]":
    """(indices, values) of the operator, from the definition."""
    shape = (*query.shape[:-2], 1, sparse_count)
    indices = numpy.full(shape, -1, numpy.int32)
    values = numpy.full(shape, -numpy.inf)
    for row, score in rows(query, key, weights, *lists, **options):
        best = order(score)[:sparse_count]
        indices[row][0, : len(best)] = best
        values[row][0, : len(best)] = score[best]
    return indices, values


def agrees(indices: Any, score: numpy.ndarray) -> Optional[str]:
    """None, or what is wrong with one row of indices whose true scores are `score`.

    Every index in which the row differs from the true answer must have a score within 1e-4
    relative, or 1e-6 of the row's largest, of the true k-th one.
    """
    indices = numpy.asarray(indices)
    n = min(len(indices), len(score))
    chosen = indices[:n]
    if (indices[n:] != -1).any():
        return f"{n} keys are visible, yet slot {n} or a later one is not -1"
    if n and (chosen.min() < 0 or chosen.max() >= len(score) or len(set(chosen.tolist())) != n):
        return f"indices are out of range or repeated: {chosen}"
    if not n:
        return None
    best = order(score)[:n]
    kth = score[best[-1]]
    bound = max(1e-4 * abs(kth), 1e-6 * numpy.abs(score).max())
    for j in set(chosen.tolist()) ^ set(best.tolist()):
        if not abs(score[j] - kth) <= bound:
            return f"key {j} has score {score[j]}, the {n}-th best has {kth}: beyond {bound}"
    drop = numpy.diff(score[chosen]).max() if n > 1 else 0.0
    if drop > max(1e-4 * numpy.abs(score[chosen]).max(), 1e-6 * numpy.abs(score).max()):
        return f"the row is not in descending order: a score rises by {drop}"
    return None
