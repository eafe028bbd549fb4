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

from ._selection import Visible
from ._stand_in import Inverted, StandIn, Widened, real


class _Watch(TorchFunctionMode):
    """Makes the stand-ins at which the scores begin, and for a mask on its way into them."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "float" and type(args[0]) is torch.Tensor:
            tensor = args[0]
            return StandIn(tensor.float, tensor.shape, Widened(tensor), self.state)
        if name == "__invert__" and type(args[0]) is torch.Tensor:
            tensor = args[0]
            return StandIn(lambda: ~tensor, tensor.shape, Inverted(tensor), self.state)
        return function(*args, **(kwargs or {}))


class Patch:
    """What `patch` returns. Also a context manager that undoes at its end."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.selections = 0  # made by the operator
        self.fallbacks: "dict[str, int]" = {}  # steps at which a model went on by itself -> how often
        self._modules = []
        self._seen = (None, None)

    def undo(self) -> None:
        """Gives every module its own forward back."""
        for module, previous in self._modules:
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.forward = previous
        self._modules = []
        self._seen = (None, None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def computed(self, step):
        self.fallbacks[step] = self.fallbacks.get(step, 0) + 1

    def visible(self, mask):
        """The mask's meaning. All layers of a pass share a mask, so the last one is kept: while it
        is, no other can have its address."""
        if mask.is_inference():
            return Visible(mask)
        seen, meaning = self._seen
        same = (
            seen is not None
            and seen[0].data_ptr() == mask.data_ptr()
            and (seen[0].shape, seen[0].stride(), seen[0].dtype, seen[1])
            == (mask.shape, mask.stride(), mask.dtype, mask._version)
        )
        if not same:
            meaning = Visible(mask)
            self._seen = ((mask, mask._version), meaning)
        return meaning

    def _wrap(self, module):
        forward = module.forward

        @torch.compiler.disable
        @functools.wraps(forward)
        def watched(*args, **kwargs):
            with _Watch(self):
                return real(forward(*args, **kwargs))

        self._modules.append((module, module.__dict__.get("forward")))
        module.forward = watched


def is_indexer(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("Indexer") and hasattr(module, "index_topk")


def patch(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> Patch:
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
