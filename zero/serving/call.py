"""One request under way, seen from both threads: the passes' thread writes it, asyncio's thread reads it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zero.generation import Job, Piece, Sampling


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the model.

    Attributes:
        prompts: texts, or token numbers.
        sampling: the same for all of them.
        n: choices of each.
        streams: whether pieces are wanted as they come, or the whole at the end.
    """

    prompts: list[str | list[int]]
    sampling: Sampling
    n: int = 1
    streams: bool = False

    @property
    def num_choices(self) -> int:
        """Rows that it takes."""
        return len(self.prompts) * self.n


class TooSlow(Exception):
    """The client reads slower than the model writes, and the buffer between them is full."""


class Call:
    """One request from its admission until its rows are free.

    Made and read in asyncio's thread; ``feed`` and ``end`` are the only methods that another thread may call.

    Attributes:
        wanted: what was asked.
        jobs: one per prompt, once submitted.
        error: why it ended without an answer.
        is_abandoned: nobody waits for it any more.
        is_too_slow: set when the client has left more unread than is kept for it.
        started_s: of the monotonic clock, when it was admitted.
        first_token_s: from then to the first token; None before it.
    """

    def __init__(self, wanted: Wanted, max_pieces: int, on_end: Callable[[Call], None]) -> None:
        self.wanted = wanted
        self.jobs: list[Job] = []
        self.error: BaseException | None = None
        self.is_abandoned = False
        self.is_too_slow = asyncio.Event()
        self.started_s = time.monotonic()
        self.first_token_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._max_pieces = max_pieces
        self._on_end = on_end
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self._ended.is_set()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all its prompts."""
        return sum(job.num_prompt_tokens for job in self.jobs)

    def feed(self, prompt: int, piece: Piece) -> None:
        """Hands a piece of the given prompt's answer over; from the passes' thread, returns at once."""
        self._tell(lambda: self._take(prompt, piece))

    def end(self, error: BaseException | None = None) -> None:
        """Says that the rows are free, after the last piece; from any thread."""
        self._tell(lambda: self._finish(error))

    def fail(self, error: BaseException) -> None:
        """Ends the wait for an answer; the rows are freed later. From asyncio's thread."""
        self.error = self.error or error
        self._changed.set()

    async def pieces(self, timeout_s: float) -> list[tuple[int, Piece]]:
        """What has come since the last time, with the prompt that it belongs to; waits for something to come.

        Returns:
            Nothing if the time has passed, or if all is said.

        Raises:
            BaseException: what the request failed with, once the pieces before it are read.
        """
        if not self._pieces and not self.has_ended and self.error is None:
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return []
        self._changed.clear()
        taken = list(self._pieces)
        self._pieces.clear()
        if not taken and self.error is not None:
            raise self.error
        return taken

    async def result(self) -> None:
        """Waits for the whole answer, which is then in ``jobs``.

        Raises:
            BaseException: what the request failed with.
        """
        while not self.has_ended and self.error is None:
            await self._changed.wait()
            self._changed.clear()
        if self.error is not None:
            raise self.error

    def _tell(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _take(self, prompt: int, piece: Piece) -> None:
        if self.first_token_s is None and piece.tokens:
            self.first_token_s = time.monotonic() - self.started_s
        if not self.wanted.streams or self.is_abandoned:
            return  # the jobs hold the whole of it
        if len(self._pieces) >= self._max_pieces:
            self.is_too_slow.set()
            return
        self._pieces.append((prompt, piece))
        self._changed.set()

    def _finish(self, error: BaseException | None) -> None:
        if self.has_ended:
            return
        self.error = self.error or error
        self._ended.set()
        self._changed.set()
        self._on_end(self)
