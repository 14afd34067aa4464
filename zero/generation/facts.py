"""What generation must know of a model: what it takes, what ends a text, what a position of it costs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zero.errors import UserError
from zero.models.build import max_positions

_ATTENDS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "dummy", "moe", "mlp"})

_OPTIONS: dict[str, Any] = {
    "use_cache": True,
    "logits_to_keep": 1,  # the last ones
    "num_logits_to_keep": 1,
    "output_router_logits": False,  # else a loss is made of them, also without labels
}


@dataclass(frozen=True)
class ModelFacts:
    """Of a causal language model of transformers.

    Attributes:
        num_layers: that may have keys and values.
        max_positions: it reads at most; None: without a limit.
        num_tokens: of its vocabulary.
        ends: token numbers that end a text.
        takes_positions: its forward is told them; else it finds them from the mask.
        options: further arguments of every forward.
        position_bytes: of keys and values per position, as its config has it; what a pass has made counts later.
    """

    num_layers: int
    max_positions: int | None
    num_tokens: int
    ends: frozenset[int]
    takes_positions: bool
    options: dict[str, Any]
    position_bytes: int


def facts_of(model: nn.Module, tokenizer: Any) -> ModelFacts:
    """What a model says about itself.

    Raises:
        UserError: it does not generate text from keys and values of the past.
    """
    wrapped: Any = model
    base: Any = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    config: Any = getattr(base, "config", None)
    parameters = inspect.signature(base.forward).parameters
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    _require_causal(base, config, parameters)
    return ModelFacts(
        num_layers=int(config.num_hidden_layers),
        max_positions=max_positions(config),
        num_tokens=int(config.vocab_size),
        ends=_ends(base, tokenizer),
        takes_positions="position_ids" in parameters,
        options={name: value for name, value in _OPTIONS.items() if name in parameters},
        position_bytes=_position_bytes(base, config),
    )


def _require_causal(base: Any, config: Any, parameters: Any) -> None:
    name = type(base).__name__
    if config is None or not {"input_ids", "past_key_values", "attention_mask"} <= set(parameters):
        raise UserError(
            f"{name} cannot generate here: it needs input_ids, attention_mask and past_key_values, as causal language "
            "models of transformers have"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENDS)
    if others or getattr(base, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False):
        what = f"layers of type {others[0]!r}" if others else "a state that is not keys and values"
        raise UserError(f"{name} cannot generate here: it has {what}; only attention's keys and values are kept")


def _ends(base: Any, tokenizer: Any) -> frozenset[int]:
    for owner in (getattr(base, "generation_config", None), base.config, tokenizer):
        ends = getattr(owner, "eos_token_id", None)
        if ends is not None:
            return frozenset(int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends]))
    return frozenset()


def _position_bytes(base: Any, config: Any) -> int:
    num_heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or int(config.hidden_size) // num_heads
    num_kept = getattr(config, "num_key_value_heads", None) or num_heads
    dtype: torch.dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    return int(2 * config.num_hidden_layers * num_kept * width * dtype.itemsize)
