"""The five models of the engine's tests, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from tests.reference import Batch, Recipe

VOCAB = 96


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return build().train()

    return seeded


@_seeded
def opt_pre_norm() -> nn.Module:
    """OPT as most of its checkpoints are: norm before each block, tied head, dropout."""
    return transformers.OPTForCausalLM(_opt_config(do_layer_norm_before=True, word_embed_proj_dim=32))


@_seeded
def opt_post_norm() -> nn.Module:
    """OPT as its 350M checkpoint is: norm after each block, projections between embedding and hidden width."""
    return transformers.OPTForCausalLM(_opt_config(do_layer_norm_before=False, word_embed_proj_dim=16))


def _opt_config(**fields: object) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.1, **fields,
    )  # fmt: skip


@_seeded
def gpt2() -> nn.Module:
    """GPT-2: transposed linear layers, learnt positions, tied head, dropout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    )


@_seeded
def llama() -> nn.Module:
    """Llama: rotary positions, grouped keys, a head of its own."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


@_seeded
def mixtral() -> nn.Module:
    """A mixture of experts."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
            output_router_logits=True,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt-pre-norm": opt_pre_norm,
    "opt-post-norm": opt_post_norm,
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
}


def batches(num: int = 3, rows: int = 2, tokens: int = 12, seed: int = 0) -> list[Batch]:
    """Random token ids with labels."""
    generator = torch.Generator().manual_seed(seed)
    return [_batch(torch.randint(4, VOCAB, (rows, tokens), generator=generator)) for _ in range(num)]


def _batch(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def recipe(name: str, **changes: object) -> Recipe:
    """Three steps of one of :data:`MODELS`."""
    return Recipe(MODELS[name], batches()).but(**changes)
