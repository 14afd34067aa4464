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
    loss_sum = 0.0
    engine.zero_grad()
    for position, (batch, count) in enumerate(zip(window, counts, strict=True)):
        if count:
            loss = engine(**batch).loss
            loss_sum += float(loss.detach()) * count
            # Gradients are averaged over ranks: times their number, so that each token counts once.
            engine.backward(loss * (count / total * ranks.size), scale_by_accumulation=False)
        if position < len(window) - 1:
            engine.step()
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
