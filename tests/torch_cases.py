# SPDX-License-Identifier: Apache-2.0
"""What the tests of the torch operator share: cases, and how an answer is checked.

Importing this skips the test module where torch is not installed; in CI that is a failure.
"""

import os
import subprocess
import sys
import textwrap

import numpy
import pytest

try:
    import torch
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("torch is not installed", allow_module_level=True)

import lightning_indexer  # noqa: F401  registers the operators
from lightning_indexer import reference

OP = torch.ops.lightning_indexer.lightning_indexer
NPU_OP = torch.ops.lightning_indexer.npu_lightning_indexer
PAIRS = [("BSND", "BSND"), ("TND", "TND"), ("BSND", "PA_BSND"), ("TND", "PA_BSND")]


class Case:
    """Arguments of one call; query_lengths and key_lengths are per batch, not prefix sums."""

    def __init__(
        self,
        layouts=("BSND", "BSND"),
        query_lengths=(3, 4),
        key_lengths=(40, 33),
        heads=4,
        dim=64,
        dtype=torch.bfloat16,
        weights_dtype=torch.float32,
        sparse_count=8,
        sparse_mode=3,
        block_size=16,
        lists=True,
        seed=0,
        fill=None,
        device=None,
    ):
        generator = torch.Generator().manual_seed(seed)
        fill = fill or (lambda *shape: torch.randn(shape, generator=generator))
        self.layouts = layouts
        self.options = dict(
            layout_query=layouts[0],
            layout_key=layouts[1],
            sparse_count=sparse_count,
            sparse_mode=sparse_mode,
        )
        batch = len(query_lengths)
        query = fill(batch, max(query_lengths, default=0), heads, dim).to(dtype)
        weights = fill(batch, max(query_lengths, default=0), heads).to(weights_dtype)
        key = fill(batch, max(key_lengths, default=0), 1, dim).to(dtype)
        lengths_query = torch.tensor(query_lengths, dtype=torch.int32)
        lengths_key = torch.tensor(key_lengths, dtype=torch.int32)
        self.table = None
        if layouts[0] == "TND":
            query, weights = _pack(query, query_lengths), _pack(weights, query_lengths)
            lengths_query = lengths_query.cumsum(0, dtype=torch.int32)
        if layouts[1] == "TND":
            key = _pack(key, key_lengths)
            lengths_key = lengths_key.cumsum(0, dtype=torch.int32)
        elif layouts[1] == "PA_BSND":
            key, self.table = _page(key, block_size, generator)
        if not lists and layouts == ("BSND", "BSND"):
            lengths_query = lengths_key = None
        elif not lists and layouts[0] == "BSND":
            lengths_query = None
        self.lists = [lengths_query, lengths_key]
        self.tensors = [query, key, weights]
        if device:
            self.to(device)

    def to(self, device):
        move = lambda tensor: None if tensor is None else tensor.to(device)
        self.tensors, self.lists = [*map(move, self.tensors)], [*map(move, self.lists)]
        self.table = move(self.table)
        return self

    def positional(self):
        """All arguments of OP, in their order."""
        return (*self.tensors, *self.lists, self.table, *self.options.values())

    def keywords(self, **more):
        """Arguments of NPU_OP: the tensors that it takes by position, and the rest by name."""
        lists = dict(
            actual_seq_lengths_query=self.lists[0],
            actual_seq_lengths_key=self.lists[1],
            block_table=self.table,
        )
        return tuple(self.tensors), {**lists, **self.options, **more}

    def rows(self):
        options = {name: v for name, v in self.options.items() if name != "sparse_count"}
        return reference.rows(*self.tensors, *self.lists, self.table, **options)

    def check(self, indices, values=None):
        """The contract's agreement rule for every row, and -1 wherever no row is."""
        indices = indices.cpu().numpy()
        count = self.options["sparse_count"]
        rest = numpy.ones(indices.shape[:-2], bool)
        for row, score in self.rows():
            rest[row] = False
            wrong = reference.agrees(indices[row][0], score)
            assert wrong is None, f"row {row}: {wrong}"
            if values is not None:
                n = min(count, len(score))
                true = score[indices[row][0, :n]]
                got = values[row][0].float().cpu().numpy()
                bound = 2.0**-7 if values.dtype == torch.bfloat16 else 2.0**-9
                assert numpy.allclose(got[:n], true, rtol=bound, atol=1e-5 * numpy.abs(true).max(initial=0))
                assert (got[n:] == -numpy.inf).all()
        assert (indices[rest] == -1).all()

    def check_exactly(self, indices):
        options = {**self.options}
        expected, _ = reference.lightning_indexer(*self.tensors, *self.lists, self.table, **options)
        assert (indices.cpu().numpy() == expected).all()


def _pack(tensor, lengths):
    rows = [tensor[b, :n] for b, n in enumerate(lengths)]
    return torch.cat(rows) if rows else tensor.flatten(0, 1)


def _page(key, block_size, generator):
    """Pages in random order, with one that nobody uses."""
    batch, n_key, _, dim = key.shape
    width = -(-n_key // block_size)
    order = torch.randperm(batch * width + 1, generator=generator)[: batch * width]
    pages = torch.full((batch * width + 1, block_size, 1, dim), 7.0).to(key.dtype)
    padded = torch.nn.functional.pad(key, (0, 0, 0, 0, 0, width * block_size - n_key))
    pages[order] = padded.reshape(batch * width, block_size, 1, dim)
    return pages, order.reshape(batch, width).to(torch.int32)


def make_cases():
    for layouts in PAIRS:
        for lists in (True, False):
            if lists or layouts[0] == "BSND":
                yield pytest.param(layouts, lists, id=f"{'-'.join(layouts)}-{lists}")


def special_numbers(seed):
    """Small integers, so that sums are exact whatever their order and ties are many; now and then
    -0, an infinity or a NaN."""
    random = numpy.random.default_rng(seed)

    def fill(*shape):
        numbers = random.integers(-2, 3, shape).astype("float32")
        numbers[random.random(shape) < 0.3] = -0.0
        if random.random() < 0.5:
            for special in (numpy.inf, -numpy.inf, numpy.nan):
                numbers[random.random(shape) < 2e-4] = special
        return torch.from_numpy(numbers)

    return fill


def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except RuntimeError:
        return
    raise AssertionError("the call was not refused")


def run_python(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
