"""Tiny models on disk for the tests of ``ZeroInitContext``, and how to compare what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import zero
from zero.pending import is_pending

_OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

MODELS: dict[str, tuple[type, Any]] = {
    "opt, tied": (OPTForCausalLM, OPTConfig(**_OPT, word_embed_proj_dim=32)),
    "opt, post-norm, projected": (
        OPTForCausalLM,
        OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**_LLAMA)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**_LLAMA, num_local_experts=4)),
}
"""Class and config by a name for the test."""

NUM_CONVERTED = {"mixtral": 4}
"""Parameters that transformers computes from several stored ones (fused experts); all others are streamed."""


def save(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, model: nn.Module | None = None
) -> Path:
    """Writes a model of :data:`MODELS` with random weights, in one file or in several."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    whole = kind(config) if model is None else model
    whole.to(dtype).save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder


def load_both(kind: Any, folder: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What ``from_pretrained`` gives, without and inside the context, from the same random state."""
    torch.manual_seed(1)
    plain = kind.from_pretrained(folder, *args, **kwargs)
    torch.manual_seed(1)
    with zero.ZeroInitContext():
        streamed = kind.from_pretrained(folder, *args, **kwargs)
    return plain, streamed


def num_pending(model: nn.Module) -> int:
    return sum(is_pending(parameter) for parameter in model.parameters())


def config(dtype: str = "fp32", policy: str = "cpu", **memory: Any) -> dict[str, Any]:
    return {
        "device": {"type": "simulated", "memory": "64MiB"},
        "memory": {"policy": policy, **memory},
        "precision": {"dtype": dtype},
        "optimizer": {"kernel": "torch"},
    }


def short_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def through_an_engine(model: nn.Module, **options: Any) -> None:
    """Takes a model over and gives it back, which fills what is pending."""
    dtype = next(p.dtype for p in model.parameters())
    engine, *_ = zero.initialize(model, config=config(short_name(dtype), **options))
    engine.check_integrity()
    assert num_pending(model) == 0
    engine.close()


def assert_same(plain: nn.Module, other: nn.Module) -> None:
    """Names, ties, dtypes, values, what trains, what is computed: all equal."""
    mine, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (plain, other))
    assert list(mine) == list(theirs)
    assert _ties(mine) == _ties(theirs)
    for name, parameter in mine.items():
        assert type(theirs[name]) is nn.Parameter, name
        assert theirs[name].requires_grad == parameter.requires_grad, name
    _assert_equal_values(mine, theirs)
    _assert_equal_values(
        *(dict(m.named_buffers(remove_duplicate=False)) for m in (plain, other))  # computed ones too
    )
    assert plain.training == other.training
    ids = torch.arange(4, 12).reshape(2, 4)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, other(ids).logits)


def _ties(parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    return [[name for name, other in parameters.items() if other is parameter] for parameter in parameters.values()]


def _assert_equal_values(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert theirs[name].dtype == value.dtype, name
        assert theirs[name].device == value.device, name
        assert torch.equal(theirs[name], value), name
