"""Many requests at a time on one engine: they join and leave between passes through the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zero.generation.jobs import Job
from zero.generation.limits import GenerationStatistics, Limits
from zero.generation.pieces import Piece
from zero.generation.sampling import Sampling

if TYPE_CHECKING:
    from zero.engine import Engine


class Generator:
    """Generation on an engine; passes run in whichever one thread calls :meth:`run_pass`."""

    def __init__(self, engine: Engine, tokenizer: Any, limits: Limits = Limits()) -> None:  # noqa: B008
        self.limits = limits

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token numbers of a prompt; in any thread."""
        raise NotImplementedError

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        n: int = 1,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Job:
        """Queues a request; in any thread."""
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """Its rows are freed at the next pass border; in any thread."""
        raise NotImplementedError

    def run_pass(self) -> bool:
        """Joins, one pass through the model, leaves; False: there was nothing to do."""
        raise NotImplementedError

    def run(self) -> None:
        """Passes until nothing is left."""
        while self.run_pass():
            pass

    @property
    def statistics(self) -> GenerationStatistics:
        """A snapshot; in any thread."""
        raise NotImplementedError
