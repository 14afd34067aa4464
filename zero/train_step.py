"""One optimizer step of ``zero train``: every token of the global batch weighs the same, on whichever rank it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zero.engine import Engine
from zero.evaluate import num_loss_tokens
from zero.health import HealthWatch
from zero.ranks import Ranks
from zero.stopping import StopRequest

Batch = dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks.

    Attributes:
        loss: mean over the tokens that count.
        num_tokens: read, padding included.
        problem: why the step was skipped for its loss; None if it was not.
        stop_signal: name of a signal that asked some rank to stop.
    """

    loss: float
    num_tokens: int
    problem: str | None
    stop_signal: str | None


def train_step(engine: Engine, window: list[Batch], ranks: Ranks, health: HealthWatch, stop: StopRequest) -> StepResult:
    """Runs a window of micro-batches, and updates unless the loss is no good.

    Args:
        engine: of the run.
        window: this rank's micro-batches.
        ranks: that share the step.
        health: judges the loss.
        stop: whether a signal has asked this rank to stop.
    """
    counts = [num_loss_tokens(batch["labels"]) for batch in window]
    num_tokens = sum(int(batch["input_ids"].numel()) for batch in window)
    every = ranks.gather([sum(counts), num_tokens], "counting tokens")
    total = max(1, sum(count for count, _ in every))
    engine.zero_grad()
    # Gradients are averaged over ranks: times their number, so that each token counts once.
    weights = [count / total * ranks.size for count in counts]
    if engine.config.train.num_in_turn > 1:
        losses = _in_turn(engine, window, weights)
    else:
        losses = _one_by_one(engine, window, weights)
    loss_sum = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
    engine.meet("the end of a window")
    said = ranks.gather([loss_sum, stop.signal_name], "comparing losses")
    loss_value = sum(part for part, _ in said) / total
    problem = health.problem(loss_value)
    if problem is None:
        engine.end_of_loader()  # the window is complete, however many micro-batches it has
        engine.step()
    else:
        engine.skip_step()
    signals = [name for _, name in said if name is not None]
    return StepResult(loss_value, sum(tokens for _, tokens in every), problem, signals[0] if signals else None)


def _one_by_one(engine: Engine, window: list[Batch], weights: list[float]) -> list[float]:
    """Losses of the micro-batches; 0 where no token counts."""
    losses = [0.0] * len(window)
    for position, (batch, weight) in enumerate(zip(window, weights, strict=True)):
        if weight:
            loss = engine(**batch).loss
            losses[position] = float(loss.detach())
            engine.backward(loss * weight, scale_by_accumulation=False)
        if position < len(window) - 1:
            engine.step()
    return losses


def _in_turn(engine: Engine, window: list[Batch], weights: list[float]) -> list[float]:
    """The same, each layer for all micro-batches."""
    counted = [(batch, weight) for batch, weight in zip(window, weights, strict=True) if weight]
    if not counted:
        return [0.0] * len(window)
    losses = iter(engine.run_window([batch for batch, _ in counted], [weight for _, weight in counted]))
    return [float(next(losses)) if weight else 0.0 for weight in weights]
