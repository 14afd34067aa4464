"""How chunks are divided among ranks, and an exchange that only knows that: for plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemini.chunk import Chunk
from gemini.exchange import Exchange, Run, Shard
from gemini.layout import ChunkLayout, Entry

ALIGN_NUMEL = 64
"""Shards begin at a whole number of so many elements, the unit in which optimizer kernels work."""


@dataclass(frozen=True)
class Division:
    """How chunks are divided.

    Attributes:
        rank: this process.
        num_ranks: all of them.
        replicate_bytes: chunks of no more than so many bytes of values are owned by every rank: fetching them from
            each other would take longer than their memory is worth.
    """

    rank: int
    num_ranks: int
    replicate_bytes: int

    def is_shared(self, layout: ChunkLayout) -> bool:
        """Whether each rank owns a part, and not everything."""
        return self.num_ranks > 1 and layout.num_bytes > self.replicate_bytes

    def shard_of(self, layout: ChunkLayout, rank: int) -> Shard:
        """What a rank owns of a chunk."""
        if not self.is_shared(layout):
            return Shard(0, layout.numel, layout.numel)
        per_rank = -(-layout.numel // self.num_ranks)
        per_rank += -per_rank % max(ALIGN_NUMEL, layout.align_numel)
        return Shard(rank * per_rank, (rank + 1) * per_rank, self.num_ranks * per_rank)


class DryExchange(Exchange):
    """Of one rank of many in a dry run: nobody else is there, and no values are needed.

    Args:
        division: how the run will divide.
    """

    def __init__(self, division: Division) -> None:
        self.division = division

    def shard(self, layout: ChunkLayout) -> Shard:
        """What the first rank owns."""
        return self.division.shard_of(layout, 0)

    def reduce(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """The gradients' place with their owner is taken; nothing is sent."""
        chunk.reserve_sums(torch.float32)
        chunk.has_sums = True

    def read(self, chunk: Chunk, entry: Entry, key: str | None) -> torch.Tensor:
        """Something of the right form."""
        return torch.empty(entry.spec.numel, dtype=wire_dtype(chunk, key))


def wire_dtype(chunk: Chunk, key: str | None) -> torch.dtype:
    """Of a value (``key`` None) or companion between ranks; fp32 holds every companion exactly."""
    return chunk.layout.dtype if key is None else torch.float32
