# SPDX-License-Identifier: Apache-2.0
"""The operator's answers on the CPU: by the agreement rule against the reference, and exactly where
sums are exact, with ties, plateaus, -0, NaN and infinities."""

from torch_cases import NPU_OP, OP, PAIRS, Case, special_numbers, torch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_indexer

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@st.composite
def random_cases(draw, exact=False):
    layouts = draw(st.sampled_from(PAIRS))
    batch = draw(st.integers(1, 3))
    longest_query = draw(st.sampled_from([1, 2, 5, 17]))
    longest_key = draw(st.sampled_from([1, 15, 16, 17, 64, 200, 520]))
    query_lengths = [draw(st.integers(0, longest_query)) for _ in range(batch)]
    key_lengths = [draw(st.integers(0, longest_key)) for _ in range(batch)]
    query_lengths[draw(st.integers(0, batch - 1))] = longest_query
    key_lengths[draw(st.integers(0, batch - 1))] = longest_key
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**31))
    case = Case(
        layouts,
        query_lengths,
        key_lengths,
        heads=draw(st.sampled_from([1, 2, 3, 8, 16, 33, 64])),
        dim=draw(st.sampled_from([64, 128])),
        dtype=dtype,
        weights_dtype=draw(st.sampled_from([dtype, torch.float32])),
        sparse_count=draw(st.sampled_from([1, 2, 7, 16, 64, 300, 2048])),
        sparse_mode=draw(st.sampled_from([0, 3])),
        block_size=draw(st.sampled_from([16, 48, 64])),
        lists=True,
        seed=seed,
        fill=special_numbers(seed) if exact else None,
    )
    if layouts[0] == "BSND" and draw(st.booleans()):
        # A stride along the first axis that is not the size of a batch.
        query = case.tensors[0]
        wide = torch.zeros(query.shape[0], query.shape[1] + 2, *query.shape[2:], dtype=dtype)
        wide[:, : query.shape[1]] = query
        case.tensors[0] = wide[:, : query.shape[1]]
    return case


@settings(max_examples=120, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(random_cases())
def test_agrees_with_the_reference(case):
    args, kwargs = case.keywords(return_value=True)
    case.check(*NPU_OP(*args, **kwargs))


@settings(max_examples=120, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(random_cases(exact=True))
def test_ties_zeros_infinities_and_nans_are_exact(case):
    case.check_exactly(OP(*case.positional()))


def test_a_plateau_is_decided_by_position():
    query = torch.ones(1, 1, 4, 64, dtype=torch.bfloat16)
    key = torch.zeros(1, 5000, 1, 64, dtype=torch.bfloat16)
    key[0, ::2] = -1  # ReLU makes these exact zeros too, and -0 of the products counts as +0
    key[0, 4321] = 1
    indices = OP(query, key, torch.ones(1, 1, 4), sparse_count=1000)
    assert indices.flatten().tolist() == [4321, *range(999)]


def test_a_nan_key_is_visible_and_last():
    query = torch.ones(1, 1, 2, 64, dtype=torch.float16)
    key = torch.ones(1, 40, 1, 64, dtype=torch.float16)
    key[0, [3, 30]] = torch.nan
    key[0, 7] = torch.inf
    weights = -torch.ones(1, 1, 2)
    indices, values = NPU_OP(query, key, weights, sparse_count=64, return_value=True)
    rest = [j for j in range(40) if j not in (3, 7, 30)]
    assert indices.flatten().tolist() == rest + [7, 3, 30] + [-1] * 24
    assert values.flatten()[37] == -torch.inf and values.flatten()[38:40].isnan().all()


def test_python_function_is_the_operator():
    case = Case(("TND", "PA_BSND"))
    arguments = (*case.tensors, *case.lists, case.table)
    indices = lightning_indexer.lightning_indexer(*arguments, **case.options)
    assert torch.equal(indices, OP(*case.positional()))
    again, values = lightning_indexer.lightning_indexer(*arguments, **case.options, return_values=True)
    assert torch.equal(again, indices)
    case.check(again, values)
    options = dict.fromkeys(case.options)
    case = Case(lists=False, query_lengths=(4, 4), key_lengths=(40, 40), sparse_count=2048)
    indices, values = lightning_indexer.lightning_indexer(*case.tensors, **options, return_values=True)
    assert torch.equal(indices, OP(*case.positional()))
    case.check(indices, values)


def test_empty_tensors():
    for query_lengths, key_lengths in (((), ()), ((0, 0), (5, 6)), ((2, 1), (0, 0))):
        for layouts in PAIRS:
            if layouts[1] == "PA_BSND" and not sum(key_lengths):
                continue
            case = Case(layouts, query_lengths, key_lengths)
            indices = OP(*case.positional())
            assert (indices == -1).all() or sum(query_lengths)
            case.check(indices)
