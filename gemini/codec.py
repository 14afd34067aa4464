"""How a chunk's master and optimizer states may lie in memory other than each in fp32.

Such a chunk's values are the upper part of its master, and companions (:class:`Part`) hold the rest of it and the
states. What they mean stands behind :class:`Codec`; this folder only knows how many bytes they take, where they may be
cut, and that master and states come out of them, and go in, as fp32 under keys of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch

PIECE_NUMEL = 1 << 18
"""Most elements decoded at a time: a multiple of every block, and temporaries of a few MB."""


class Part(NamedTuple):
    """A companion: its key, its dtype, and how many elements of the chunk share an entry of it."""

    key: str
    dtype: torch.dtype
    block_numel: int = 1

    def numel(self, numel: int) -> int:
        """Entries for so many elements."""
        return -(-numel // self.block_numel)


class Codec(ABC):
    """Of one chunk.

    Attributes:
        parts: the companions, all there from the beginning, zero: states are zero then, and the master is the values.
            Beside them, where companions and values part, the key of the master names a copy of the values.
        states: keys under which master and states are read and written.
        speed: of an update on the host, where the cores and not the memory set it, as a multiple of that with fp32 states.
        device_cost: of an update on the device, as a multiple of the seconds with fp32 states: there states are taken
            apart and put together by operators of their own.
    """

    parts: tuple[Part, ...]
    states: tuple[str, ...]
    speed: float = 1.0
    device_cost: float = 1.0

    @property
    def block_numel(self) -> int:
        """Chunks may be cut at multiples of so many elements."""
        return max(part.block_numel for part in self.parts)

    @property
    def bytes_per_numel(self) -> float:
        """Bytes of all parts per element; exact for whole blocks."""
        return sum(part.dtype.itemsize / part.block_numel for part in self.parts)

    def part(self, key: str) -> Part | None:
        """The part of that name."""
        return next((part for part in self.parts if part.key == key), None)

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Master and states in fp32, as new tensors.

        Args:
            parts: by key, of whole blocks.
            values: of the same elements.
        """

    @abstractmethod
    def encode(
        self,
        states: Mapping[str, torch.Tensor],
        parts: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        first: int,
        step: int | None,
    ) -> None:
        """Writes parts and values.

        Args:
            states: all that :meth:`decode` returns.
            parts: by key, of whole blocks.
            values: of the same elements.
            first: which of the chunk is the first of them.
            step: of the update that these states come from; None: from anywhere else. What was decoded before then
                stays what it was.
        """
