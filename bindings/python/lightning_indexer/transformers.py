# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Transformers models that select through the operator.

    patched = lightning_indexer.transformers.patch(model)
    ...
    patched.undo()

A model of the DeepSeek-V3.2 kind (`deepseek_v32`, `glm_moe_dsa`, `hy_v4`, ...) has modules whose
`forward` projects query, key and weights, each in its own way, and then computes, all alike,

    relu(query.float() @ key.float() * scale), weighted and summed over heads, masked, topk

`patch` keeps each module's own forward and only watches it: `.float()` gives a stand-in, the steps
above extend the stand-in instead of computing, and `topk` on it runs the operator. So nothing of
a model's projections or caches is repeated here, and the [batch, tokens, heads, keys] scores never
exist. Whatever a stand-in does not know makes it compute for real, with the module's very own
operations, from there on: a model that is not of this kind gives its own answer, at its own speed.

What to know:

* The operator takes bfloat16 and float16. Where a model's query and key are neither, it finds
  more than twice the wanted keys with them rounded to `dtype`, and these are scored again as the
  model would, in float32.
* Scores that are equal, or that differ by less than float32 rounding, may be chosen differently
  than by torch.topk, whose choice among equal scores is undefined; the operator's is not.
* Slots beyond a row's visible keys are filled with positions that the mask hides, as torch.topk
  does.
* The attention mask is looked at once a forward pass. Only "causal, some keys hidden" and, for one
  query token, any mask, is what the operator can express; for others the model computes itself.
  On a GPU this look is a synchronisation. Inside torch.compile the indexer is a graph break.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode

MAX_HEADS, MAX_TOP_K = 128, 8192
RESCORE_ELEMENTS = 1 << 25  # of the keys that are gathered at once
HIDDEN = -1e30  # a mask that adds or writes less than this hides a key


class _Widened:
    """What a stand-in knows: it is `tensor.float()`."""

    def __init__(self, tensor):
        self.tensor = tensor


class _Inverted:
    """It is `~tensor`."""

    def __init__(self, tensor):
        self.tensor = tensor


class _Scores:
    """It is the score of each key: so far the fields that are set have been applied."""

    def __init__(self, query, key):
        self.query = query  # [batch, tokens, heads, dim]
        self.key = key  # [batch, keys, dim]
        self.scale = 1.0
        self.relu = False
        self.weights = None  # [batch, tokens, heads]
        self.summed = False
        self.mask = None  # as the model has it: bool, True is visible, or added to the score

    def but(self, **fields):
        other = object.__new__(_Scores)
        other.__dict__ = {**self.__dict__, **fields}
        return other


class _StandIn:
    """A tensor that is not computed until something needs it."""

    def __init__(self, replay, shape, known, state):
        self._replay = replay
        self._value = None
        self._known = known
        self._state = state
        self.shape = torch.Size(shape)
        self.dtype = torch.bool if isinstance(known, _Inverted) else torch.float32

    def compute(self):
        if self._value is None:
            with torch._C.DisableTorchFunction():
                self._value = self._replay()
        return self._value

    def dim(self):
        return len(self.shape)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _apply(function, args, kwargs or {})

    def __getattr__(self, name):
        method = getattr(torch.Tensor, name)
        if not callable(method):
            return getattr(self.compute(), name)
        return lambda *args, **kwargs: _apply(method, (self, *args), kwargs)


def _operator(name):
    method = getattr(torch.Tensor, name)
    return lambda self, *args: _apply(method, (self, *args), {})


for _name in (
    "__mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ __truediv__ __neg__ __invert__ __and__ "
    "__or__ __lt__ __le__ __gt__ __ge__ __matmul__ __getitem__"
).split():
    setattr(_StandIn, _name, _operator(_name))


def _known(value):
    return value._known if isinstance(value, _StandIn) else None


def _real(value):
    return value.compute() if isinstance(value, _StandIn) else value


def _apply(function, args, kwargs):
    """A new stand-in when the step is understood, else the computed result."""
    state = next(a._state for a in (*args, *kwargs.values()) if isinstance(a, _StandIn))

    def replay():
        return function(*map(_real, args), **{name: _real(a) for name, a in kwargs.items()})

    rule = _RULES.get(function.__name__)
    with torch._C.DisableTorchFunction():
        result = rule(state, *args, **kwargs) if rule else None
    if result is None:
        if any(isinstance(_known(a), _Scores) for a in args):
            state.computed(function.__name__)
        with torch._C.DisableTorchFunction():
            return replay()
    if isinstance(result, _TopK):
        return result
    shape, known = result
    return _StandIn(replay, shape, known, state)


# --- the steps that are understood -------------------------------------------------------------
# Each takes the arguments of the torch function and returns (shape, what is known), or None.


def _view(name):
    def rule(state, x, *dims):
        if isinstance(_known(x), _Widened):
            tensor = getattr(_known(x).tensor, name)(*dims)
            return tensor.shape, _Widened(tensor)
        return None

    return rule


def _matmul(state, a, b):
    left, right = _known(a), _known(b)
    if isinstance(left, _Widened) and isinstance(right, _Widened):
        query, key = left.tensor, right.tensor
        if query.dim() == 4 and key.dim() == 4 and key.shape[1] == 1:
            if query.shape[0] == key.shape[0] and query.shape[3] == key.shape[2]:
                shape = (*query.shape[:3], key.shape[3])
                return shape, _Scores(query, key.squeeze(1).transpose(1, 2))
    if isinstance(a, torch.Tensor) and isinstance(right, _Scores) and right.relu:
        batch, tokens, heads, keys = b.shape
        if right.weights is None and a.shape == (batch, tokens, 1, heads):
            return (batch, tokens, 1, keys), right.but(weights=a.squeeze(2))
    return None


def _multiply(state, x, factor):
    scores = _known(x)
    if not isinstance(scores, _Scores) or scores.weights is not None:
        return None
    # A positive factor passes through ReLU and the sum over heads.
    if isinstance(factor, (int, float)) and factor > 0:
        return x.shape, scores.but(scale=scores.scale * factor)
    if isinstance(factor, torch.Tensor) and scores.relu and factor.shape == (*x.shape[:3], 1):
        return x.shape, scores.but(weights=factor.squeeze(3))
    return None


def _relu(state, x, inplace=False):
    scores = _known(x)
    if isinstance(scores, _Scores) and not scores.relu and scores.weights is None:
        return x.shape, scores.but(relu=True)
    return None


def _sum(state, x, dim=None):
    scores = _known(x)
    if isinstance(scores, _Scores) and scores.weights is not None and not scores.summed:
        if dim in (2, -2) and x.dim() == 4 and x.shape[2] == scores.query.shape[2]:
            return (*x.shape[:2], x.shape[3]), scores.but(summed=True)
    return None


def _squeeze(state, x, dim=None):
    scores = _known(x)
    if isinstance(scores, _Scores) and scores.weights is not None and not scores.summed:
        if dim in (2, -2) and x.dim() == 4 and x.shape[2] == 1:
            return (*x.shape[:2], x.shape[3]), scores.but(summed=True)
    return None


def _is_mask_for(mask, shape):
    return isinstance(mask, torch.Tensor) and mask.dim() == 3 and mask.shape == shape


def _masked_fill(state, x, mask, value):
    scores = _known(x)
    if not isinstance(scores, _Scores) or not scores.summed or scores.mask is not None:
        return None
    if not isinstance(value, (int, float)) or value > HIDDEN:
        return None
    visible = _known(mask).tensor if isinstance(_known(mask), _Inverted) else ~_real(mask)
    if not _is_mask_for(visible, x.shape):
        return None
    return x.shape, scores.but(mask=visible)


def _add(state, x, mask):
    scores = _known(x)
    if not isinstance(scores, _Scores) or not scores.summed or scores.mask is not None:
        return None
    if not _is_mask_for(mask, x.shape) or not mask.is_floating_point():
        return None
    return x.shape, scores.but(mask=mask)


def _topk(state, x, k, dim=-1, largest=True, sorted=True):
    scores = _known(x)
    if not isinstance(scores, _Scores) or not scores.summed or not largest:
        return None
    if dim not in (-1, 2):
        return None
    indices = _select(state, scores, k)
    return None if indices is None else _TopK(x, indices)


_RULES = {
    "unsqueeze": _view("unsqueeze"),
    "transpose": _view("transpose"),
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mul": _multiply,
    "__mul__": _multiply,
    "__rmul__": _multiply,
    "relu": _relu,
    "sum": _sum,
    "squeeze": _squeeze,
    "masked_fill": _masked_fill,
    "add": _add,
    "__add__": _add,
    "topk": _topk,
}


class _TopK:
    """What topk returns; the values are computed only when asked for."""

    def __init__(self, scores, indices):
        self.indices = indices
        self._scores = scores

    @property
    def values(self):
        return self._scores.compute().gather(-1, self.indices)

    def __iter__(self):
        return iter((self.values, self.indices))

    def __getitem__(self, index):
        return (self.values, self.indices)[index]


# --- from what is known to the operator's arguments --------------------------------------------


class _Visible:
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


def _select(state, scores, k):
    """Indices as topk gives them, or None when the operator does not take this."""
    n_heads, dim = scores.query.shape[2:]
    n_key = scores.key.shape[1]
    if n_heads > MAX_HEADS or dim > 128 or not 1 <= k <= min(MAX_TOP_K, n_key):
        return None
    visible = None if scores.mask is None else state.visible(scores.mask)
    if visible is not None and not visible.expressible:
        return None
    state.selections += 1
    if _is_sixteen_bit(scores):
        return _run(scores, visible, k, scores.key.dtype)
    candidates = _run(scores, visible, min(2 * k + 64, MAX_TOP_K, n_key), state.dtype)
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


class _Watch(TorchFunctionMode):
    """Makes the stand-ins at which the scores begin, and for a mask on its way into them."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "float" and type(args[0]) is torch.Tensor:
            tensor = args[0]
            return _StandIn(tensor.float, tensor.shape, _Widened(tensor), self.state)
        if name == "__invert__" and type(args[0]) is torch.Tensor:
            tensor = args[0]
            return _StandIn(lambda: ~tensor, tensor.shape, _Inverted(tensor), self.state)
        return function(*args, **(kwargs or {}))


class Patch:
    """What `patch` returns. Also a context manager that undoes at its end."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.selections = 0  # made by the operator
        self.fallbacks = {}  # steps at which a model went on by itself -> how often
        self._modules = []
        self._seen = (None, None)

    def undo(self):
        """Gives every module its own forward back."""
        for module, previous in self._modules:
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.forward = previous
        self._modules = []
        self._seen = (None, None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()

    def computed(self, step):
        self.fallbacks[step] = self.fallbacks.get(step, 0) + 1

    def visible(self, mask):
        """The mask's meaning. All layers of a pass share a mask, so the last one is kept: while it
        is, no other can have its address."""
        if mask.is_inference():
            return _Visible(mask)
        seen, meaning = self._seen
        same = (
            seen is not None
            and seen[0].data_ptr() == mask.data_ptr()
            and (seen[0].shape, seen[0].stride(), seen[0].dtype, seen[1])
            == (mask.shape, mask.stride(), mask.dtype, mask._version)
        )
        if not same:
            meaning = _Visible(mask)
            self._seen = ((mask, mask._version), meaning)
        return meaning

    def _wrap(self, module):
        forward = module.forward

        @torch.compiler.disable
        @functools.wraps(forward)
        def watched(*args, **kwargs):
            with _Watch(self):
                return _real(forward(*args, **kwargs))

        self._modules.append((module, module.__dict__.get("forward")))
        module.forward = watched


def is_indexer(module):
    return type(module).__name__.endswith("Indexer") and hasattr(module, "index_topk")


def patch(model, dtype=torch.bfloat16):
    """Makes each indexer inside `model` select through the operator, until `.undo()`.

    `dtype` is what query and key are rounded to when they are not 16 bits wide already:
    torch.bfloat16, or torch.float16 (finer, but it overflows beyond 65504).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; it should be torch.bfloat16 or torch.float16")
    indexers = [module for module in model.modules() if is_indexer(module)]
    if not indexers:
        raise ValueError(
            f"{type(model).__name__} has no indexer: no module whose class is named ...Indexer and "
            "that has index_topk"
        )
    result = Patch(dtype)
    for module in indexers:
        result._wrap(module)
    return result
