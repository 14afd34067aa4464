"""Work that the ranks of an engine divide among them, each with passes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from zero import world
from zero.engine import Engine
from zero.errors import UserError
from zero.ranks import Ranks

_Work = TypeVar("_Work")
_Found = TypeVar("_Found")


class Shares:
    """Who does what. All ranks must come here with the same work.

    Args:
        engine: whose passes do it; in a process by itself all work is its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ranks = Ranks(world.current())
        self.num_ranks = self._ranks.size

    def mine(self, work: Sequence[_Work]) -> Sequence[_Work]:
        """What this rank is to do: dealt like cards, so that each has about as much."""
        return work[self._ranks.rank :: self.num_ranks]

    def least(self, number: int) -> int:
        """The lowest of what the ranks have."""
        return min(int(found) for found in self._ranks.gather(number, "evaluation"))

    def put_together(self, found: Mapping[int, _Found], num_wanted: int) -> list[_Found]:
        """What all ranks have found, in order. Until the last is done the others serve what it fetches.

        Args:
            found: by number, of what JSON can hold.
            num_wanted: numbers there are.

        Raises:
            UserError: the ranks had different work.
        """
        self._engine.meet("evaluation")
        parts: list[Any] = self._ranks.gather([num_wanted, list(found.items())], "evaluation")
        numbers = [number for number, _ in parts]
        if len(set(numbers)) > 1:
            raise UserError(
                f"the ranks evaluate different things: they have {numbers} of them; give each the same files"
            )
        every = {number: value for _, items in parts for number, value in items}
        return [every[number] for number in range(num_wanted)]
