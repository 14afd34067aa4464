"""Held-out loss over a whole evaluation set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from zero.engine import Engine


def num_loss_tokens(labels: torch.Tensor) -> int:
    """Tokens of ``labels`` [batch, tokens] that a causal LM's loss counts; the model shifts labels by one."""
    return int((labels[..., 1:] != -100).sum())


def evaluate(engine: Engine, batches: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """Mean loss per token over every batch, each weighted by the tokens that count.

    Returns:
        The loss, and the number of tokens it is the mean of.
    """
    was_training = engine.module.training
    engine.eval()
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            count = num_loss_tokens(batch["labels"])
            if count:
                total += float(engine(**batch).loss) * count
                num_tokens += count
    engine.train(was_training)
    return (total / num_tokens if num_tokens else math.nan), num_tokens


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
