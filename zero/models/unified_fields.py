"""What the fields of OPT's and GPT-2's configs are called, and which of them say nothing about the model."""

from __future__ import annotations

from functools import cache
from typing import Any

_SAME = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")

OPT_FIELDS: dict[str, str] = {name: name for name in _SAME} | {
    "max_positions": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
    "ffn_size": "ffn_dim",
    "projection_size": "word_embed_proj_dim",
    "norm_affine": "layer_norm_elementwise_affine",
    "bias": "enable_bias",
    "tied_head": "tie_word_embeddings",
    "activation": "activation_function",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "layerdrop": "layerdrop",
    "init_std": "init_std",
}
"""Fields of the description that OPT's config says in its own words."""

GPT2_FIELDS: dict[str, str] = {name: name for name in _SAME} | {
    "max_positions": "n_positions",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "norm_eps": "layer_norm_epsilon",
    "tied_head": "tie_word_embeddings",
    "activation": "activation_function",
    "scale_by_head_size": "scale_attn_weights",
    "scale_by_layer": "scale_attn_by_inverse_layer_idx",
    "upcast_attention": "reorder_and_upcast_attn",
    "dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "init_std": "initializer_range",
}
"""Fields of the description that GPT-2's config says in its own words."""

GPT2_FIXED: dict[str, Any] = {
    "add_cross_attention": False,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
}
"""Fields of GPT-2's config for what a plain language model has not, with the only values taken."""

CARRIED = frozenset(
    {
        "use_cache",
        "prefix",
        "task_specific_params",
        "n_ctx",  # the published GPT-2's second word for n_positions
        "torch_dtype",
        "gradient_checkpointing",
        "finetuning_task",
        "activation_dropout",  # read besides: the classes ignore it
        "transformers_version",
    }
)
"""Fields that are carried from one config to the other because neither class computes by them."""


@cache
def shared_defaults() -> dict[str, Any]:
    """Fields that any transformers config may have, and what they are unless somebody says otherwise.

    Among them are those of generation, which older configs hold.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    defaults: dict[str, Any] = GenerationConfig().to_dict() | PreTrainedConfig().to_dict()
    return defaults
