"""Log-likelihoods in place of logits: while a pass runs, the head's output is made and looked at piece by piece.

The logits of 8,192 tokens over a vocabulary of 50,000 are 1.6 GB in fp32, often more than all else that a pass needs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gemini.device import Device
from zero.lazy_logits import LazyHead, LazyLogits

_MOST_LOGITS = 1 << 22
"""At a time: 32 MiB in float64, and twice as much again while they are added up."""
_CAPACITY_SHARE = 512
"""Bytes of the device for each logit that may be there: the pieces then take about a twentieth of it."""


@dataclass
class Likelihoods:
    """What a pass inside :func:`scoring` returns.

    Attributes:
        values: Log-likelihoods of the targets in nats, float64 [targets].
        are_likeliest: Whether no other token was likelier, bool [targets].
    """

    values: torch.Tensor
    are_likeliest: torch.Tensor


def most_logits_on(device: Device) -> int:
    """Logits that may be there at a time."""
    return min(_MOST_LOGITS, device.capacity_bytes // _CAPACITY_SHARE)


def scoring_inputs(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Arguments of a pass that keeps no keys and values.

    Args:
        model: a causal language model.
        tokens: [rows, tokens].
        mask: likewise; 0 where there is only padding.
    """
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


@contextlib.contextmanager
def scoring(model: Any, positions: torch.Tensor, targets: torch.Tensor, most_logits: int) -> Iterator[None]:
    """Inside, a pass through the model returns :class:`Likelihoods`.

    What the head reads is held until the last piece has been looked at, since the model is still running then.

    Args:
        model: a causal language model; one whose head is no ``nn.Linear`` makes all its logits at once.
        positions: [targets], int64: where in the flattened batch the token before each target stands.
        targets: [targets], int64, on the same device as the inputs.
        most_logits: that may be there at a time; of one position at least.
    """
    head = LazyHead(model, most_logits, lambda: None)
    head.active = True
    before, forward = model.__dict__.get("forward"), model.forward

    def scored(*args: Any, **kwargs: Any) -> Likelihoods:
        logits = forward(*args, **kwargs).logits
        num_positions = max(1, most_logits // logits.shape[-1])
        return _score(logits.reshape(-1, logits.shape[-1]), positions, targets, num_positions)

    model.forward = scored
    try:
        yield
    finally:
        head.remove()
        if before is None:
            del model.forward
        else:
            model.forward = before


def _score(logits: Any, positions: torch.Tensor, targets: torch.Tensor, num_positions: int) -> Likelihoods:
    """Of [all positions, vocabulary], a few positions at a time; logits become float64 before the softmax."""
    values, are_likeliest = [], []
    for some, wanted in zip(positions.split(num_positions), targets.split(num_positions), strict=True):
        piece = logits[some]
        rows = piece.real() if isinstance(piece, LazyLogits) else piece
        are_likeliest.append(rows.argmax(1) == wanted)
        exact = rows.double()
        del piece, rows
        values.append(exact.gather(1, wanted[:, None])[:, 0] - exact.logsumexp(1))
    return Likelihoods(torch.cat(values), torch.cat(are_likeliest))
