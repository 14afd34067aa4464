"""The options of a metaseq training as a description of its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from zero.errors import UserError
from zero.models.metaseq_pickle import fields_of, scalar_of
from zero.models.sizes import MAX_POSITIONS
from zero.models.unified import NORM_EPS, POSITION_OFFSETS, UnifiedConfig

logger = logging.getLogger("zero")

_NEEDED = {
    "decoder_layers": "num_layers",
    "decoder_embed_dim": "hidden_size",
    "decoder_ffn_embed_dim": "ffn_size",
    "decoder_attention_heads": "num_heads",
}
_OPTIONAL = {
    "decoder_input_dim": "projection_size",
    "decoder_output_dim": "projection_size",
    "share_decoder_input_output_embed": "tied_head",
    "activation_fn": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "decoder_layerdrop": "layerdrop",
    "megatron_init_sigma": "init_std",
}
_ACTIVATIONS = ("relu", "gelu")
# Options that change what the model computes, with the only values that OPT's class can follow.
_FIXED: dict[str, bool] = {
    "decoder_learned_pos": True,
    "no_scale_embedding": True,
    **dict.fromkeys(
        (
            "decoder_learned_sinusoidal", "no_token_positional_embeddings", "alibi", "layernorm_embedding",
            "use_stable_embedding", "character_embeddings", "adaptive_input", "scale_fc", "scale_attn", "scale_heads",
        ),
        False,
    ),
}  # fmt: skip
_TOKEN_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
"""Of metaseq's dictionary; OPT begins texts with the token that ends them."""
_EMBEDDING_WIDTHS = ("decoder_input_dim", "decoder_output_dim")


def options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The training's options, of which old checkpoints have one list (``args``) and new ones several (``cfg``)."""
    config = fields_of(checkpoint.get("cfg"))
    options: dict[str, Any] = {}
    for section in (checkpoint.get("args"), config.get("task"), config.get("model")):
        options |= {name: scalar_of(value) for name, value in fields_of(section).items()}
    return {name: value for name, value in options.items() if value is not None}


def describe(options: Mapping[str, Any], vocab_size: int) -> UnifiedConfig:
    """The model that these options make.

    Args:
        options: of :func:`options_of`.
        vocab_size: rows of the token table, which no option says.

    Raises:
        UserError: an option is missing, or OPT's class cannot follow it; names it.
    """
    missing = [name for name in _NEEDED if name not in options]
    if missing:
        raise UserError(
            f"the checkpoint does not say its {', '.join(missing)}; say which published size it is: --size opt-125m"
        )
    check_options(options)
    values = _defaults(options, vocab_size)
    values |= {ours: options[theirs] for theirs, ours in _NEEDED.items()}
    values["projection_size"] = values["hidden_size"]
    values |= {ours: options[theirs] for theirs, ours in _OPTIONAL.items() if theirs in options}
    return UnifiedConfig(**values)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses what OPT's class would compute differently, and warns of what it would train differently.

    Raises:
        UserError: names the option.
    """
    for name, needed in _FIXED.items():
        if name in options and bool(options[name]) is not needed:
            raise UserError(
                f"the model was trained with {name} = {options[name]!r}; OPT's class can only have {needed}"
            )
    activation = options.get("activation_fn", "relu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation_fn is {activation!r}; possible are {' and '.join(_ACTIVATIONS)}")
    if len({options[name] for name in _EMBEDDING_WIDTHS if name in options}) > 1:
        raise UserError("decoder_input_dim and decoder_output_dim differ; OPT's class has one width for both")
    lost = [name for name in ("activation_dropout", "relu_dropout") if options.get(name)]
    if options.get("dropout") and not options.get("no_emb_dropout", True):
        lost.append("dropout of the embeddings (no_emb_dropout)")
    if lost:
        logger.warning("OPT's class has no %s: logits are the same, further training is not", ", ".join(lost))


def contradictions(options: Mapping[str, Any], model: UnifiedConfig) -> list[str]:
    """Where options say otherwise than a model that the user named, a line each."""
    return [
        f"{theirs} is {options[theirs]!r}, not {getattr(model, ours)!r}"
        for theirs, ours in _NEEDED.items()
        if theirs in options and options[theirs] != getattr(model, ours)
    ]


def _defaults(options: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    before = bool(options.get("decoder_normalize_before", True))
    positions = options.get("max_target_positions", options.get("tokens_per_sample", MAX_POSITIONS))
    return {
        "vocab_size": vocab_size,
        "max_positions": positions,
        "position_offset": POSITION_OFFSETS["opt"],
        "norm_placement": "before" if before else "after",
        "final_norm": before and not options.get("no_decoder_final_norm", False),
        "norm_affine": not options.get("disable_affine_ln", False),
        "norm_eps": NORM_EPS,
        "bias": not options.get("disable_bias", False),
        "tied_head": True,
        "activation": "relu",
        "scale_by_head_size": True,
        "scale_by_layer": False,
        "upcast_attention": False,
        "dropout": 0.0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": 0.006,
        **_TOKEN_IDS,
    }
