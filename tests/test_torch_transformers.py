# SPDX-License-Identifier: Apache-2.0
"""Transformers models, patched and not: the same tokens and, bit for bit, the same logits.

The models are tiny and randomly initialised. Two layers of comparison: in all tests the logits
must be equal bit for bit, which implies that each selection was, as a set (an attention mask is
made of it, so its order does not matter). Where torch's own choice is undefined, because scores
are equal, the selections themselves are compared: by the scores of what was chosen.
"""

import inspect
import os

import pytest

try:
    import torch
    import transformers
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("torch or transformers is not installed", allow_module_level=True)

from lightning_indexer.transformers import patch

TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    v_head_dim=16,
    qk_nope_head_dim=16,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    max_position_embeddings=256,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=16,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def make_model(dtype, kind="deepseek_v32", attention="sdpa", **config):
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(kind, **{**TINY, **config})
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def make_prompt(padding=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 128, (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :7] = 0
    elif padding == "right":
        mask[0, -7:] = 0
    return ids * mask, mask


def logits_of(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()].float()


def tokens_of(model, ids, mask, **options):
    options = dict(do_sample=False, max_new_tokens=8, output_logits=True, **options)
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits)


def assert_same(model, ids, mask, **options):
    """Prefill and decode, unpatched against patched against undone."""
    logits = logits_of(model, ids, mask)
    tokens, steps = tokens_of(model, ids, mask, **options)
    with patch(model) as patched:
        assert torch.equal(logits_of(model, ids, mask), logits)
        again, steps_again = tokens_of(model, ids, mask, **options)
    assert torch.equal(again, tokens)
    assert torch.equal(steps_again, steps)
    # Every selection was the operator's: the layers of one prefill and of eight tokens.
    layers = sum(type(m).__name__.endswith("Indexer") for m in model.modules())
    assert patched.selections == layers * 9 and patched.fallbacks == {}
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(logits_of(model, ids, mask), logits)
    assert patched.selections == layers * 9


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_tokens_and_logits(dtype, attention, padding):
    if padding == "right":  # generate() wants prompts padded on the left
        model, (ids, mask) = make_model(dtype, attention=attention), make_prompt(padding)
        logits = logits_of(model, ids, mask)
        with patch(model) as patched:
            assert torch.equal(logits_of(model, ids, mask), logits)
        assert patched.selections == 3 and patched.fallbacks == {}
        return
    assert_same(make_model(dtype, attention=attention), *make_prompt(padding))


def test_same_with_a_static_cache():
    assert_same(make_model(torch.float32), *make_prompt("left"), cache_implementation="static")


def test_same_where_fewer_keys_than_index_topk_exist():
    assert_same(make_model(torch.float32, index_topk=2048), *make_prompt("left"))


@pytest.mark.parametrize("dim", [32, 128])
def test_same_with_other_index_dimensions(dim):
    assert_same(make_model(torch.float32, index_head_dim=dim), *make_prompt("left"))


@pytest.mark.parametrize("kind", ["glm_moe_dsa", "hy_v4"])
def test_same_for_other_models_with_this_indexer(kind):
    model = make_model(torch.float32, kind, attention="eager")
    assert_same(model, *make_prompt("left"))


def test_prefill_in_chunks_with_a_cache():
    model, (ids, _) = make_model(torch.float32), make_prompt()
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"

    def run():
        cache, pieces = None, []
        with torch.no_grad():
            for begin, end in ((0, 13), (13, 14), (14, 40)):
                out = model(ids[:, begin:end], use_cache=True, **{name: cache})
                cache = out[name]
                pieces.append(out.logits)
        return torch.cat(pieces, 1)

    expected = run()
    with patch(model) as patched:
        assert torch.equal(run(), expected)
    assert patched.selections == 9 and patched.fallbacks == {}


def record(model):
    """The selections of each indexer's next calls, in order."""
    chosen = []
    for module in model.modules():
        if type(module).__name__.endswith("Indexer"):
            module.register_forward_hook(lambda *call: chosen.append(call[2].clone()))
    return chosen


def test_ties_are_compared_by_score():
    """One head and integer-valued projections: plateaus of equal scores, of zeros above all, of
    which torch.topk takes any and the operator the first. The chosen scores are equal."""
    model = make_model(torch.float32, num_hidden_layers=1, index_n_heads=1)
    indexer = model.model.layers[0].self_attn.indexer
    with torch.no_grad():
        indexer.weights_proj.weight.fill_(1.0)
        indexer.wk.weight.zero_()  # all keys alike, but for their rotation
        indexer.k_norm.bias.copy_((torch.arange(64) >= 16).float())
    ids, mask = make_prompt()
    chosen = record(model)
    logits_of(model, ids, mask)
    with patch(model) as patched:
        logits_of(model, ids, mask)
    assert patched.selections == 1
    torchs, ours = chosen
    n_visible = torch.arange(1, 41)[None, :, None]
    for row in range(40):
        k = min(16, row + 1)
        best = ours[:, row][ours[:, row] <= row]
        # All visible keys score the same, so the operator takes the first ones.
        assert best.reshape(2, -1).sort().values.tolist() == [list(range(k))] * 2
        assert ((torchs[:, row] <= row).sum(-1) == k).all()
    assert (ours < torch.maximum(n_visible, torch.tensor(16))).all()


def test_a_mask_that_the_operator_cannot_express_is_left_to_the_model():
    model, (ids, _) = make_model(torch.float32), make_prompt()
    # Two sequences packed into one row: block-diagonal and causal.
    block = torch.ones(40, 40, dtype=torch.bool).tril()
    block[20:, :20] = False
    mask = block.expand(2, 1, 40, 40)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with patch(model) as patched:
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert patched.selections == 0 and patched.fallbacks == {"topk": 3}


def test_patched_model_compiles_around_the_indexer():
    model, (ids, mask) = make_model(torch.float32, num_hidden_layers=1), make_prompt()
    expected = logits_of(model, ids, mask)
    with patch(model) as patched:
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(logits_of(compiled, ids, mask), expected, atol=1e-5)
    assert patched.selections == 1


def test_patch_says_what_it_does_not_take():
    with pytest.raises(ValueError, match="Linear has no indexer"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype is torch.float32"):
        patch(make_model(torch.float32, num_hidden_layers=1), dtype=torch.float32)
