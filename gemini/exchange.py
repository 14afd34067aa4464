"""What several processes do together for one chunk, as far as the chunk needs to know.

A chunk may be held in parts, one by each of several processes that compute with the same model. Who they are, and how
bytes get from one to another, stands behind :class:`Exchange`; this folder only knows which elements are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemini.layout import ChunkLayout, Entry

if TYPE_CHECKING:
    from gemini.chunk import Chunk

Run = tuple[int, torch.Tensor]
"""A first element of a chunk, and a 1-D tensor of the values from there on."""


@dataclass(frozen=True)
class Shard:
    """The elements of a chunk that this process owns.

    Attributes:
        start: first element.
        stop: first element after; may lie beyond the chunk's last: shards are equal, so the last ones are padded.
        gathered_numel: elements of a gathered copy, which is all shards side by side.
    """

    start: int
    stop: int
    gathered_numel: int

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the process owns the whole chunk: nobody else is needed to gather it."""
        return self.numel == self.gathered_numel


class Exchange:
    """Of a process on its own, which owns everything.

    Attributes:
        num_local: processes that share this machine's memory.
    """

    num_local = 1

    def shard(self, layout: ChunkLayout) -> Shard:
        """What this process owns of a chunk."""
        return Shard(0, layout.numel, layout.numel)

    def complete(self, chunk: Chunk) -> None:
        """Fills the gathered copy with what others own; this process's own part has been queued already."""

    def reduce(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """Brings gradients on the device to their owners, each being added to what the owner has.

        Args:
            chunk: held in parts.
            runs: this process's gradients; what they leave out is zero.
        """
        raise RuntimeError(f"chunk {chunk.index} is not held in parts")

    def rehearsal(self) -> Exchange:
        """What stands for this one in a dry run, where nobody else is there."""
        return self

    def settle_gradients(self) -> None:
        """Sees to it that all processes know the same of every gradient."""

    def before_forgetting(self) -> None:
        """Sees to it that no process drops gradients which another has sent for the next update already."""

    def read(self, chunk: Chunk, entry: Entry, key: str | None) -> torch.Tensor:
        """A host copy of one parameter's values (``key`` None) or companion, 1-D, in memory order.

        Raises:
            KeyError: there is no such companion.
        """
        return chunk.own_part(entry, key)


ALONE = Exchange()
"""The one of every process that shares nothing."""
