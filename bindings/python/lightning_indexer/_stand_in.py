# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the tensors of an indexer's scores, which are not computed until something needs
them, and the steps of torch that extend a stand-in instead of computing. See transformers.py."""

import torch

from ._selection import HIDDEN, select


class Widened:
    """What a stand-in knows: it is `tensor.float()`."""

    def __init__(self, tensor):
        self.tensor = tensor


class Inverted:
    """It is `~tensor`."""

    def __init__(self, tensor):
        self.tensor = tensor


class Scores:
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
        other = object.__new__(Scores)
        other.__dict__ = {**self.__dict__, **fields}
        return other


class StandIn:
    """A tensor that is not computed until something needs it."""

    def __init__(self, replay, shape, known, state):
        self._replay = replay
        self._value = None
        self._known = known
        self._state = state
        self.shape = torch.Size(shape)
        self.dtype = torch.bool if isinstance(known, Inverted) else torch.float32

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
    setattr(StandIn, _name, _operator(_name))


def _known(value):
    return value._known if isinstance(value, StandIn) else None


def real(value):
    return value.compute() if isinstance(value, StandIn) else value


def _apply(function, args, kwargs):
    """A new stand-in when the step is understood, else the computed result."""
    state = next(a._state for a in (*args, *kwargs.values()) if isinstance(a, StandIn))

    def replay():
        return function(*map(real, args), **{name: real(a) for name, a in kwargs.items()})

    rule = _RULES.get(function.__name__)
    with torch._C.DisableTorchFunction():
        result = rule(state, *args, **kwargs) if rule else None
    if result is None:
        if any(isinstance(_known(a), Scores) for a in args):
            state.computed(function.__name__)
        with torch._C.DisableTorchFunction():
            return replay()
    if isinstance(result, TopK):
        return result
    shape, known = result
    return StandIn(replay, shape, known, state)


# --- the steps that are understood -------------------------------------------------------------
# Each takes the arguments of the torch function and returns (shape, what is known), or None.


def _view(name):
    def rule(state, x, *dims):
        if isinstance(_known(x), Widened):
            tensor = getattr(_known(x).tensor, name)(*dims)
            return tensor.shape, Widened(tensor)
        return None

    return rule


def _matmul(state, a, b):
    left, right = _known(a), _known(b)
    if isinstance(left, Widened) and isinstance(right, Widened):
        query, key = left.tensor, right.tensor
        if query.dim() == 4 and key.dim() == 4 and key.shape[1] == 1:
            if query.shape[0] == key.shape[0] and query.shape[3] == key.shape[2]:
                shape = (*query.shape[:3], key.shape[3])
                return shape, Scores(query, key.squeeze(1).transpose(1, 2))
    if isinstance(a, torch.Tensor) and isinstance(right, Scores) and right.relu:
        batch, tokens, heads, keys = b.shape
        if right.weights is None and a.shape == (batch, tokens, 1, heads):
            return (batch, tokens, 1, keys), right.but(weights=a.squeeze(2))
    return None


def _multiply(state, x, factor):
    scores = _known(x)
    if not isinstance(scores, Scores) or scores.weights is not None:
        return None
    # A positive factor passes through ReLU and the sum over heads.
    if isinstance(factor, (int, float)) and factor > 0:
        return x.shape, scores.but(scale=scores.scale * factor)
    if isinstance(factor, torch.Tensor) and scores.relu and factor.shape == (*x.shape[:3], 1):
        return x.shape, scores.but(weights=factor.squeeze(3))
    return None


def _relu(state, x, inplace=False):
    scores = _known(x)
    if isinstance(scores, Scores) and not scores.relu and scores.weights is None:
        return x.shape, scores.but(relu=True)
    return None


def _sum(state, x, dim=None):
    scores = _known(x)
    if isinstance(scores, Scores) and scores.weights is not None and not scores.summed:
        if dim in (2, -2) and x.dim() == 4 and x.shape[2] == scores.query.shape[2]:
            return (*x.shape[:2], x.shape[3]), scores.but(summed=True)
    return None


def _squeeze(state, x, dim=None):
    scores = _known(x)
    if isinstance(scores, Scores) and scores.weights is not None and not scores.summed:
        if dim in (2, -2) and x.dim() == 4 and x.shape[2] == 1:
            return (*x.shape[:2], x.shape[3]), scores.but(summed=True)
    return None


def _is_mask_for(mask, shape):
    return isinstance(mask, torch.Tensor) and mask.dim() == 3 and mask.shape == shape


def _masked_fill(state, x, mask, value):
    scores = _known(x)
    if not isinstance(scores, Scores) or not scores.summed or scores.mask is not None:
        return None
    if not isinstance(value, (int, float)) or value > HIDDEN:
        return None
    visible = _known(mask).tensor if isinstance(_known(mask), Inverted) else ~real(mask)
    if not _is_mask_for(visible, x.shape):
        return None
    return x.shape, scores.but(mask=visible)


def _add(state, x, mask):
    scores = _known(x)
    if not isinstance(scores, Scores) or not scores.summed or scores.mask is not None:
        return None
    if not _is_mask_for(mask, x.shape) or not mask.is_floating_point():
        return None
    return x.shape, scores.but(mask=mask)


def _topk(state, x, k, dim=-1, largest=True, sorted=True):
    scores = _known(x)
    if not isinstance(scores, Scores) or not scores.summed or not largest:
        return None
    if dim not in (-1, 2):
        return None
    indices = select(state, scores, k)
    return None if indices is None else TopK(x, indices)


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


class TopK:
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
