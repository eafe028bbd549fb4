# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Transformers DeepSeek-V3.2 model that selects through the operator.

    pip install .[transformers]
    python examples/transformers_patch.py

The model is tiny and has random weights, so nothing is downloaded: a real one is patched by the
same line. The prompts have different lengths, so that padding, prefill and decoding with a cache
all take part.
"""

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from lightning_indexer.transformers import patch


def tiny_model():
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=512, hidden_size=128, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
        max_position_embeddings=1024, index_n_heads=16, index_head_dim=128, index_topk=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
    return DeepseekV32ForCausalLM(config).eval()


def padded_prompts(lengths, vocab_size):
    ids = torch.randint(1, vocab_size, (len(lengths), max(lengths)))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids * mask, mask


def generate(model, ids, mask):
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def main():
    model = tiny_model()
    ids, mask = padded_prompts([300, 211, 57], model.config.vocab_size)
    tokens, logits = generate(model, ids, mask)

    patched = patch(model)
    tokens_patched, logits_patched = generate(model, ids, mask)
    patched.undo()

    print("generated     ", tokens[0].tolist())
    print("patched       ", tokens_patched[0].tolist())
    print("same tokens   ", torch.equal(tokens, tokens_patched))
    print("same logits   ", torch.equal(logits, logits_patched), "(bit for bit, float32)")
    print("selections    ", patched.selections, "by the operator, fallbacks:", patched.fallbacks)
    return torch.equal(tokens, tokens_patched) and torch.equal(logits, logits_patched)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
