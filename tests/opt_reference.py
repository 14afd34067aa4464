"""OPT in float64 by plain functions of torch, written from the paper and metaseq's shapes: no transformers in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-5
_OFFSET = 2  # position 0 is in row 2; padding reads row 1
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}


@dataclass(frozen=True)
class Shape:
    """What the weights do not say themselves.

    Attributes:
        num_layers: layers.
        num_heads: heads.
        norms_first: layers normalise what they read, else what they wrote.
        final_norm: a norm follows the last layer.
        activation: of the feed-forward part.
    """

    num_layers: int
    num_heads: int
    norms_first: bool = True
    final_norm: bool = True
    activation: str = "relu"


def opt_logits(weights: Mapping[str, Tensor], shape: Shape, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [rows, length, vocabulary] in float64.

    Args:
        weights: a state dict with transformers' names, of any dtype.
        shape: the rest.
        tokens: [rows, length].
        mask: [rows, length], 1 for tokens and 0 for padding; None: no padding.
    """
    w = {name.removeprefix("model.decoder."): value.double() for name, value in weights.items()}
    mask = torch.ones_like(tokens) if mask is None else mask
    # The n-th token that is no padding is at position n, wherever it stands.
    positions = torch.where(mask == 1, mask.cumsum(1) - 1 + _OFFSET, _OFFSET - 1)
    x = w["embed_tokens.weight"][tokens]
    if "project_in.weight" in w:
        x = x @ w["project_in.weight"].T
    x = x + w["embed_positions.weight"][positions]
    length = tokens.shape[1]
    causal = torch.ones(length, length).tril().bool()
    visible = causal[None, None] & (mask == 1)[:, None, None, :]
    for index in range(shape.num_layers):
        x = _layer(w, f"layers.{index}.", shape, x, visible)
    if shape.final_norm:
        x = _norm(w, "final_layer_norm", x)
    if "project_out.weight" in w:
        x = x @ w["project_out.weight"].T
    return x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def _layer(w: Mapping[str, Tensor], name: str, shape: Shape, x: Tensor, visible: Tensor) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = [
            _linear(w, f"{name}self_attn.{letter}_proj", x).view(rows, length, shape.num_heads, -1).transpose(1, 2)
            for letter in "qkv"
        ]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(width // shape.num_heads)
        # A row of padding sees nothing: whatever it computes, nobody reads it.
        shares = torch.nan_to_num(scores.masked_fill(~visible, -math.inf).softmax(-1))
        return _linear(w, f"{name}self_attn.out_proj", (shares @ heads[2]).transpose(1, 2).reshape(rows, length, width))

    def feed_forward(x: Tensor) -> Tensor:
        return _linear(w, f"{name}fc2", _ACTIVATIONS[shape.activation](_linear(w, f"{name}fc1", x)))

    for part, norm in ((attention, "self_attn_layer_norm"), (feed_forward, "final_layer_norm")):
        x = x + part(_norm(w, name + norm, x)) if shape.norms_first else _norm(w, name + norm, x + part(x))
    return x


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))


def _norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + _EPS)
    return x if f"{name}.weight" not in w else x * w[f"{name}.weight"] + w[f"{name}.bias"]
