# SPDX-License-Identifier: Apache-2.0
"""From what is known of an indexer's scores and mask to the operator's arguments, and from its
answer to what topk gives. See transformers.py."""

import torch

from ._library import MAX_HEADS, MAX_SPARSE_COUNT

RESCORE_ELEMENTS = 1 << 25  # of the keys that are gathered at once
HIDDEN = -1e30  # a mask that adds or writes less than this hides a key


class Visible:
    """A mask in the operator's terms; `expressible` is False when it has none."""

    def __init__(self, mask):
        n_query, n_key = mask.shape[1:]
        if mask.dtype == torch.bool:
            visible, clean = mask, torch.ones((), dtype=torch.bool, device=mask.device)
        else:
            visible = mask == 0
            clean = (visible | (mask < HIDDEN)).all()
        self.valid = visible.any(1)  # [batch, keys]: some query sees the key
        position = torch.arange(n_key, device=mask.device)
        if n_query == 1:
            lengths = mask.new_full((mask.shape[0],), n_key, dtype=torch.int32)
        else:
            # Key j of query i lies on the last diagonal that is seen: j - i = length - n_query.
            row = torch.arange(n_query, device=mask.device)
            last = torch.where(visible, position, -1).amax(-1)
            diagonal = torch.where(last >= 0, last - row, -n_query).amax(-1)
            lengths = (n_query + diagonal).to(torch.int32)
            reach = (lengths[:, None] - n_query + row)[:, :, None]
            clean = clean & (((position <= reach) & self.valid[:, None]) == visible).all()
        holes = (~self.valid & (position < lengths[:, None])).any()
        full = (lengths == n_key).all()
        self.expressible, self.holes, is_full = torch.stack([clean, holes, full]).tolist()
        self.lengths = None if is_full else lengths


def _is_sixteen_bit(scores):
    return scores.query.dtype == scores.key.dtype and scores.key.dtype.itemsize == 2


def select(state, scores, k):
    """Indices as topk gives them, or None when the operator does not take this."""
    n_heads, dim = scores.query.shape[2:]
    n_key = scores.key.shape[1]
    if n_heads > MAX_HEADS or dim > 128 or not 1 <= k <= min(MAX_SPARSE_COUNT, n_key):
        return None
    visible = None if scores.mask is None else state.visible(scores.mask)
    if visible is not None and not visible.expressible:
        return None
    state.selections += 1
    if _is_sixteen_bit(scores):
        return _run(scores, visible, k, scores.key.dtype)
    candidates = _run(scores, visible, min(2 * k + 64, MAX_SPARSE_COUNT, n_key), state.dtype)
    return _rescore(scores, candidates, k)


def _run(scores, visible, k, dtype):
    query, key = scores.query.to(dtype), scores.key.to(dtype)
    if visible is not None and visible.holes:
        # A NaN key ranks below every other: hidden keys are chosen last, as topk does.
        key = key.masked_fill(~visible.valid[:, :, None], float("nan"))
    dim = query.shape[3]
    if dim not in (64, 128):
        pad = (64 if dim < 64 else 128) - dim
        query, key = (torch.nn.functional.pad(x, (0, pad)) for x in (query, key))
    indices = torch.ops.lightning_indexer.lightning_indexer(
        query.contiguous(),
        key.contiguous().unsqueeze(2),
        (scores.weights.float() * scores.scale).contiguous(),
        None,
        visible.lengths if visible is not None else None,
        None,
        "BSND",
        "BSND",
        k,
        0 if visible is None else 3,
    )
    indices = indices.squeeze(2).long()
    return torch.where(indices < 0, torch.arange(k, device=indices.device), indices)


def _rescore(scores, candidates, k):
    """The k best of the candidates by float32 scores of what was not rounded."""
    candidates = candidates.sort(dim=-1).values  # so that equal scores go by position
    batch, n_query, n_candidates = candidates.shape
    which = torch.arange(batch, device=candidates.device)[:, None, None]
    step = max(1, RESCORE_ELEMENTS // max(1, batch * n_candidates * scores.key.shape[2]))
    chosen = []
    for begin in range(0, n_query, step):
        rows = slice(begin, begin + step)
        position = candidates[:, rows]
        keys = scores.key[which, position].float()
        dot = torch.matmul(scores.query[:, rows].float(), keys.transpose(-1, -2)) * scores.scale
        weights = scores.weights[:, rows].float().unsqueeze(2)
        score = torch.matmul(weights, torch.relu(dot)).squeeze(2)
        if scores.mask is not None:
            mask = scores.mask[:, rows].gather(-1, position)
            hidden = ~mask if mask.dtype == torch.bool else mask < HIDDEN
            score = score.masked_fill(hidden, float("-inf"))
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        chosen.append(position.gather(-1, best))
    return torch.cat(chosen, 1)
