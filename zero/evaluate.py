"""Held-out loss over a whole evaluation set, on all ranks together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from zero import world
from zero.engine import Engine


def num_loss_tokens(labels: torch.Tensor) -> int:
    """Tokens of ``labels`` [batch, tokens] that a causal LM's loss counts; the model shifts labels by one."""
    return int((labels[..., 1:] != -100).sum())


def evaluate(engine: Engine, batches: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """Mean loss per token over every batch, each weighted by the tokens that count.

    With several ranks, over the batches of all of them; they may have different numbers of batches. All must call it.

    Returns:
        The loss, and the number of tokens it is the mean of: the same on all ranks.
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
    total, num_tokens = _over_ranks(engine, total, num_tokens)
    engine.train(was_training)
    return (total / num_tokens if num_tokens else math.nan), num_tokens


def _over_ranks(engine: Engine, total: float, num_tokens: int) -> tuple[float, int]:
    """Sums over ranks, added up in the order of ranks, so that all get the same number to the bit."""
    ranks = world.current()
    if ranks is None:
        return total, num_tokens
    # A rank that is through with its batches still serves its shards to those that are not, until all are here.
    engine.meet("evaluation")
    with ranks.operation("evaluation"):
        parts = ranks.all_gather_object([total, num_tokens])
    return sum(float(part) for part, _ in parts), sum(int(count) for _, count in parts)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
