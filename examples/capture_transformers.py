# SPDX-License-Identifier: Apache-2.0
r"""Capture what a DeepSeek-V3.2 model hands to its indexer, as a file for `lidx run`.

    pip install torch transformers safetensors
    python examples/capture_transformers.py TEXT.txt capture.safetensors \
        --model-result model.safetensors
    lidx run capture.safetensors -o result.safetensors
    lidx check capture.safetensors result.safetensors
    lidx check capture.safetensors model.safetensors

The model is a tiny Hugging Face Transformers DeepSeek-V3.2 with random weights, so nothing is
downloaded; the indexer keeps the real shapes (64 heads x 128). The text is any file of yours; a
BPE tokenizer is trained on it. The last tokens are the queries, and all tokens are keys.
"""
import argparse
import pathlib
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DeepseekV32Config, DeepseekV32Model
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb


def tokenize(path, vocab_size):
    """Token ids of a text file, by a BPE tokenizer trained on that very file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [path.read_text(encoding="utf-8", errors="replace")],
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")).ids


def tiny_model(vocab_size, top_k, seed):
    torch.manual_seed(seed)
    config = DeepseekV32Config(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=64,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, first_k_dense_replace=2,
        n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=64, index_n_heads=64, index_head_dim=128, index_topk=top_k,
        initializer_range=0.1, use_cache=False,
    )
    return DeepseekV32Model(config).to(torch.bfloat16).eval()


class Capture:
    """Hooks on one indexer: its projections, the rotary angles it was given and its answer."""

    def __init__(self, indexer):
        self.indexer = indexer
        self.seen = {}
        for name in ("wq_b", "k_norm", "weights_proj"):
            getattr(indexer, name).register_forward_hook(self.keep(name))
        indexer.register_forward_pre_hook(self.keep_angles, with_kwargs=True)
        indexer.register_forward_hook(self.keep("answer"))

    def keep(self, name):
        def hook(_module, _inputs, output):
            self.seen[name] = output.detach()
        return hook

    def keep_angles(self, _module, args, kwargs):
        self.seen["angles"] = kwargs.get("position_embeddings", args[2] if len(args) > 2 else None)

    def tensors(self):
        """query [S, heads, dim], key [S, 1, dim] after the rotary embedding; weights [S, heads]."""
        indexer, rotary = self.indexer, self.indexer.qk_rope_head_dim
        cos, sin = self.seen["angles"]
        query = self.seen["wq_b"].unflatten(-1, (indexer.n_heads, indexer.head_dim))
        key = self.seen["k_norm"].unsqueeze(2)
        turned = apply_rotary_pos_emb(query[..., :rotary], key[..., :rotary], cos, sin,
                                      unsqueeze_dim=2)
        query = torch.cat([turned[0], query[..., rotary:]], dim=-1)
        key = torch.cat([turned[1], key[..., rotary:]], dim=-1)
        # Both factors are positive, so they pass through the ReLU and may stand in the weights.
        scale = indexer.n_heads ** -0.5 * indexer.softmax_scale
        return query[0], key[0], self.seen["weights_proj"][0].float() * scale


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--model-result", type=pathlib.Path,
                        help="also write the indices that the model's own indexer chose")
    parser.add_argument("--keys", type=int, default=1024, help="tokens of context")
    parser.add_argument("--queries", type=int, default=24, help="how many of the last are queries")
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    ids = tokenize(options.text, 1024)[: options.keys]
    if len(ids) < options.queries:
        sys.exit(f"{options.text} has {len(ids)} tokens; it should have at least {options.queries}")
    model = tiny_model(1024, options.top_k, options.seed)
    capture = Capture(model.layers[options.layer].self_attn.indexer)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))

    query, key, weights = capture.tensors()
    n, last = len(ids), slice(len(ids) - options.queries, len(ids))
    meta = {"layout_query": "TND", "layout_key": "TND", "sparse_count": str(options.top_k),
            "sparse_mode": "3"}
    save_file(
        {
            "query": query[last].contiguous(),
            "key": key.contiguous(),
            "weights": weights[last].contiguous(),
            "actual_seq_lengths_query": torch.tensor([options.queries], dtype=torch.int32),
            "actual_seq_lengths_key": torch.tensor([n], dtype=torch.int32),
        },
        options.output, metadata=meta)
    print(f"{options.output}: {options.queries} query tokens, {n} keys, "
          f"{query.shape[1]} heads x {query.shape[2]}, {query.dtype}")

    if options.model_result:
        chosen = capture.seen["answer"][0, last].to(torch.int32)
        position = torch.arange(n - options.queries, n).unsqueeze(1)
        chosen[chosen > position] = -1  # the model leaves masked tokens at the end of a row
        padded = torch.full((options.queries, 1, options.top_k), -1, dtype=torch.int32)
        padded[:, 0, : chosen.shape[1]] = chosen
        save_file({"sparse_indices": padded}, options.model_result, metadata=meta)
        print(f"{options.model_result}: the model's own choice")


if __name__ == "__main__":
    main()
