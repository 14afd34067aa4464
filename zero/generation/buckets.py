"""Rows that go through the model together, and what they will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zero.generation.cache import STEP, CacheAccount, KeyValues, rounded
from zero.generation.rows import Row

MOST_PADDING = 8
"""One part in so many of a padded row may be padding."""


def may_prefill_together(longest: int, shortest: int) -> bool:
    """Whether prompts of these lengths may share a forward: padding is computed like everything else."""
    return (longest - shortest) * MOST_PADDING <= longest


def may_run_together(longest: int, shortest: int) -> bool:
    """Whether rows with so many cached positions may share a bucket.

    Here padding costs memory alone, which is taken in steps anyway: within one step it is free.
    """
    return longest - shortest <= max(longest // MOST_PADDING, STEP - 1)


@dataclass(frozen=True)
class Need:
    """What a row will need: positions in the cache once it has run, and passes after that."""

    num_positions: int
    num_passes_left: int

    @classmethod
    def of(cls, row: Row) -> Need:
        """A row that is to read all its tokens, or its last one."""
        return cls(len(row.tokens), row.num_passes_left)


def most_positions(needs: Sequence[Need]) -> int:
    """Positions, over all rows and with padding, that a bucket of these takes memory for at its worst moment.

    Rows leave as they end, and the padding that all others have goes with them.
    """
    most = longest = 0
    for num, need in enumerate(sorted(needs, key=lambda need: -need.num_passes_left), start=1):
        longest = max(longest, need.num_positions)
        most = max(most, num * rounded(longest + need.num_passes_left))
    return most


class Bucket:
    """Rows that go through the model together.

    Args:
        rows: none of which is in a cache yet.
        num_layers: of the model.
        account: of the generator.
    """

    def __init__(self, rows: list[Row], num_layers: int, account: CacheAccount) -> None:
        self.rows = rows
        self.cache = KeyValues(num_layers, account)

    @property
    def is_new(self) -> bool:
        """Whether its rows have not been through the model."""
        return self.cache.length == 0

    @property
    def num_positions(self) -> int:
        """Of each row in the next pass, padding counted."""
        return max(len(row.tokens) for row in self.rows) if self.is_new else 1

    @property
    def needs(self) -> list[Need]:
        """Of its rows."""
        return [Need.of(row) for row in self.rows]

    def inputs(self, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token numbers [rows, positions], mask [rows, all positions], and numbers of the positions [rows, positions].

        Args:
            pad: token number of padding.
        """
        num = self.num_positions
        total = self.cache.length + num
        padding = torch.tensor([total - len(row.tokens) for row in self.rows]).unsqueeze(-1)
        mask = (torch.arange(total) >= padding).long()
        positions = (torch.arange(total - num, total) - padding).clamp(min=0)
        ids = [[pad] * (num - len(row.tokens)) + row.tokens[-num:] for row in self.rows]
        return torch.tensor(ids), mask, positions

    def commit(self) -> None:
        """The pass was well: what it has put into the cache counts."""
        self.cache.commit(self.num_positions)
        for row in self.rows:
            row.num_cached = len(row.tokens)

    def keep(self, rows: list[Row]) -> None:
        """Only these rows, which are some of its own, stay."""
        if len(rows) == len(self.rows):
            return
        places = [self.rows.index(row) for row in rows]
        self.rows = rows
        if not rows:
            self.cache.close()
        elif not self.is_new:
            self.cache.select(places, self.cache.length - max(row.num_cached for row in rows))

    def join(self, other: Bucket) -> None:
        """Takes another bucket's rows over."""
        self.cache.join(other.cache)
        self.rows = self.rows + other.rows

    def close(self) -> list[Row]:
        """Gives the cache up; returns the rows, which would have to be read again."""
        rows, self.rows = self.rows, []
        self.cache.close()
        for row in rows:
            row.num_cached = 0
        return rows
