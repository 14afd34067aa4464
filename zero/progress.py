"""How far a run of ``zero train`` has come."""

from __future__ import annotations

from dataclasses import dataclass, field


class TrainingStopped(RuntimeError):
    """The run cannot go on; says why and what to do."""


@dataclass
class Progress:
    """Of a run.

    Attributes:
        step: optimizer steps, skipped ones among them.
        seen_tokens: since this process began, over all ranks.
        training_s: likewise, evaluation and saving left out.
        losses: of each step since then.
        num_rollbacks: times the run has gone back to a checkpoint.
        lr_factor: what going back has made of the learning rate.
        stopped_by: the signal that has asked the run to stop.
        eval_perplexity_before: before the first step; None until it is known.
    """

    step: int = 0
    seen_tokens: int = 0
    training_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    num_rollbacks: int = 0
    lr_factor: float = 1.0
    stopped_by: str | None = None
    eval_perplexity_before: float | None = None
