"""Tiny OPTs of every kind that transformers' class can be told to be, all parameters random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "ffn_dim": 40, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "350m_untied": {"do_layer_norm_before": False, "word_embed_proj_dim": 12, "tie_word_embeddings": False},
    "post_norm": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 12},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
}


def opt_model(seed: int = 5, **changes: Any) -> OPTForCausalLM:
    """A tiny OPT in evaluation: biases, norms and unread position rows are random, too."""
    torch.manual_seed(seed)
    return randomized(OPTForCausalLM(OPTConfig(**(SHAPE | changes))).eval())


def randomized(model: Any) -> Any:
    """The model, with something added to all of its parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(model: Any) -> dict[str, Tensor]:
    """The weights as a folder holds them: without the head, if it is tied."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
