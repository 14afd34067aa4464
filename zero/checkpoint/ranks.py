"""What the ranks of a run do together when they save or load: each its part, and all fail if one does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from zero.checkpoint.codec import JSON
from zero.checkpoint.problems import CheckpointError
from zero.ranks import Ranks
from zero.sharding import RankExchange
from zero.world import World

if TYPE_CHECKING:
    from zero.engine import Engine

_MOST_BEAT_S = 5.0


class SavingRanks(Ranks):
    """The ranks of an engine that saves or loads; one for a process on its own.

    Args:
        joined: None for a process on its own.
        in_background: messages go over a group that training does not use, so they may be sent beside it.
    """

    def __init__(self, joined: World | None, in_background: bool = False) -> None:
        super().__init__(joined)
        self._in_background = in_background

    @classmethod
    def of(cls, engine: Engine, in_background: bool = False) -> SavingRanks:
        """Those that the engine trains with."""
        exchange = engine.exchange
        return cls(exchange.world if isinstance(exchange, RankExchange) else None, in_background)

    def gather(self, value: JSON, what: str = "saving or loading a checkpoint") -> list[Any]:
        """What every rank has given, in the order of ranks.

        Raises:
            zero.world.PeerLostError: a rank does not take part.
        """
        if self._world is None or not self._in_background:
            return super().gather(value, what)
        try:
            return self._world.all_gather_object(value, self._world.background)
        except (dist.DistError, RuntimeError) as error:
            # Not world.operation(): what this rank is doing for the others to see is the training's to say.
            raise self._world._lost("writing a checkpoint in the background", error) from error

    def together(self, work: Callable[[], JSON], may_last: bool = False) -> list[Any]:
        """Each rank does its part; returns what each one's came to, in the order of ranks.

        Args:
            work: this rank's part. It must not wait for another rank.
            may_last: the part may take longer than ranks wait for each other. It is then done in another thread,
                while this one tells the others from time to time that the rank is alive.

        Raises:
            CheckpointError: a part failed, on whichever rank; said on all of them.
        """
        if self._world is None:
            return [work()]
        part = _Part(work)
        if may_last:
            self._do_with_signs_of_life(part, self._world.timeout_s)
        else:
            part.run()
        said = self.gather({"result": part.result, "problem": part.problem})
        problems = {rank: word["problem"] for rank, word in enumerate(said) if word["problem"] is not None}
        if problems:
            raise CheckpointError(_in_words(problems, self.size)) from part.error
        return [word["result"] for word in said]

    def _do_with_signs_of_life(self, part: _Part, timeout_s: float) -> None:
        worker = threading.Thread(target=part.run, name="zero-save-part")
        worker.start()
        try:
            while True:
                part.done.wait(min(_MOST_BEAT_S, timeout_s / 4))
                if all(self.gather(part.done.is_set())):
                    return
        finally:
            worker.join()


class _Part:
    """One rank's part of something: done once, its outcome kept."""

    def __init__(self, work: Callable[[], JSON]) -> None:
        self._work = work
        self.result: JSON = None
        self.problem: str | None = None
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """Does it."""
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error
            self.problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        except BaseException as error:
            self.problem = type(error).__name__
            raise
        finally:
            self.done.set()


def _in_words(problems: dict[int, str], size: int) -> str:
    texts = set(problems.values())
    if len(problems) == size and len(texts) == 1:
        return texts.pop()
    return "; ".join(f"rank {rank}: {text}" for rank, text in problems.items())
