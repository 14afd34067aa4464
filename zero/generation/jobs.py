"""A request under way."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zero.generation.pieces import Choice, Piece
from zero.generation.sampling import Sampling


class Job:
    """A request under way; made by :meth:`zero.generation.Generator.submit`.

    Attributes:
        num_prompt_tokens: that the model reads first.
        sampling: its settings.
        choices: filled as it goes.
        done: set after the last piece, or on failure.
        error: what it failed with.
    """

    def __init__(
        self, prompt: tuple[int, ...], sampling: Sampling, n: int, on_piece: Callable[[Piece], None] | None = None
    ) -> None:
        self.prompt = prompt
        self.num_prompt_tokens = len(prompt)
        self.sampling = sampling
        self.choices = [Choice(index) for index in range(n)]
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._on_piece = on_piece

    def result(self, timeout_s: float | None = None) -> list[Choice]:
        """Waits until it is done.

        Raises:
            TimeoutError: it is not within ``timeout_s``.
            BaseException: what it failed with.
        """
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"the request is not done after {timeout_s} s")
        if self.error is not None:
            raise self.error
        return self.choices

    def add(self, piece: Piece) -> None:
        """A pass has added something to a choice; in the passes' thread.

        Raises:
            Exception: what the request's own function raised.
        """
        self.choices[piece.index].add(piece)
        if self._on_piece is not None:
            self._on_piece(piece)

    def settle(self) -> None:
        """Says that it is done, once every choice is."""
        if self.error is not None or all(choice.finish_reason is not None for choice in self.choices):
            self.done.set()
