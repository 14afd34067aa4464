"""The update of a chunk that is streamed to the device and back: torch's fused kernel on pieces of it.

The same arithmetic as where the states stay on the device, to the bit: see :mod:`gemini.streamed` for the ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gemini.segment import GRADIENT, MASTER, Segment
from gemini.store import Tier
from gemini.streamed import StreamedUpdates
from zero.optim.fused import MOMENTS, FusedPiece, fused_step, is_fused, scaled
from zero.optim.work import ChunkWork, Piece


@dataclass(frozen=True)
class StreamedWork:
    """One optimizer step of one chunk.

    Attributes:
        work: what is to be done.
        kind: the optimizer's class.
        streamed: carries the pieces.
    """

    work: ChunkWork
    kind: type[torch.optim.Optimizer]
    streamed: StreamedUpdates

    @property
    def segment(self) -> Segment:
        """All that this process owns of the chunk."""
        return self.work.segments[0]

    def is_possible(self, fuses: bool) -> bool:
        """Whether the chunk is as a streamed update needs it: in one segment, on the host, for the fused kernel.

        Args:
            fuses: take the fused kernel where the optimizer leaves the choice.
        """
        if not self.streamed.is_open or len(self.work.segments) != 1 or self.segment.codec is not None:
            return False
        on_host = self.segment.companion_tier is Tier.HOST and self.segment.value_tier is not Tier.DISK
        known = set(self.segment.companions) <= {MASTER, GRADIENT, *MOMENTS}
        return on_host and known and all(is_fused(self.kind, group, fuses) for group in self.work.groups.values())

    def begin(self) -> None:
        """Queues all pieces."""
        self.work.chunk.before_change()
        segment = self.segment
        for pieces in self._spans():
            first, last = segment.start + pieces[0].start, segment.start + pieces[-1].stop
            self.streamed.carry(segment, first, last, _Update(self, pieces))

    def _spans(self) -> Iterator[list[Piece]]:
        """Neighbouring pieces that fit into a lane together; a larger parameter is cut."""
        most_numel = self.streamed.piece_numel
        span: list[Piece] = []
        for piece in self.work.pieces(self.segment, in_blocks=False):
            for start in range(piece.start, piece.stop, most_numel):
                part = Piece(piece.tensor, start, min(start + most_numel, piece.stop))
                if span and part.stop - span[0].start > most_numel:
                    yield span
                    span = []
                span.append(part)
        if span:
            yield span


@dataclass(frozen=True)
class _Update:
    """What is computed once pieces are on the device."""

    streamed: StreamedWork
    pieces: list[Piece]

    def __call__(self, there: Segment, wide: torch.Tensor) -> None:
        work, before = self.streamed.work, there.start - self.streamed.segment.start
        parts = []
        for piece in self.pieces:
            inside = slice(piece.start - before, piece.stop - before)
            states = {key: there.companions[key][inside] for key in (MASTER, *MOMENTS)}
            gradient = scaled(there.companions[GRADIENT][inside], work.factor, wide[inside])
            parts.append(FusedPiece(states, gradient, work.groups[piece.tensor], work.native_step(piece.tensor)))
        fused_step(self.streamed.kind, parts)
        if not there.master_is_values:
            there.values.copy_(there.companions[MASTER])
