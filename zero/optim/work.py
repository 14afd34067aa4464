"""What the update of one chunk works on, as it was when ``step()`` was called, and how it is cut into pieces.

Between ``step()`` and the moment at which the update runs, a scheduler may change the learning rate and ``zero_grad()``
may forget that there were gradients: none of that concerns this update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gemini.chunk import Chunk
from gemini.disk import DiskArena
from gemini.profile import HostUpdate
from gemini.segment import Segment
from gemini.tensor import ChunkTensor
from zero.optim.straddle import whole_blocks

Group = dict[str, Any]
Scalars = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter inside one segment, in segment elements."""

    tensor: ChunkTensor
    start: int
    stop: int


@dataclass(frozen=True)
class NativeRun:
    """Neighbouring parameters of one group and one step count: elements ``[start, stop)`` of a segment."""

    start: int
    stop: int
    group: Group
    step: int
    first: bool
    """Whether they have no states yet."""


@dataclass(frozen=True)
class ChunkWork:
    """One optimizer step of one chunk.

    Attributes:
        chunk: whose parameters are updated.
        segments: where its elements are.
        groups: of every parameter with a gradient, with the hyperparameters of this step.
        before: scalar states of each, None where it has none yet.
        factor: gradients are multiplied by it first (1 / loss scale x clip coefficient).
    """

    chunk: Chunk
    segments: list[Segment]
    groups: dict[ChunkTensor, Group]
    before: dict[ChunkTensor, Scalars | None]
    factor: float

    def read_ahead(self, disk: DiskArena) -> None:
        """Starts to read what lies on disk."""
        for segment in self.segments:
            for buffer in segment.on_disk():
                disk.will_need(buffer)

    def let_go(self, disk: DiskArena) -> None:
        """Starts to write what lies on disk, which is not needed before the next pass."""
        for segment in self.segments:
            for buffer in segment.on_disk():
                disk.let_go(buffer)

    def host_update(self, kept_bytes: int = 0) -> HostUpdate:
        """What of it is done on the host.

        Args:
            kept_bytes: of what it overwrites, copied first.
        """
        segments = [segment for segment in self.segments if not segment.updates_on_device]
        numel = sum(segment.numel for segment in segments)
        num_bytes = 2 * kept_bytes + sum(segment.update_bytes for segment in segments)
        disk_bytes = sum(buffer.nbytes for segment in segments for buffer in segment.on_disk())
        speed = 1.0 if self.chunk.codec is None else self.chunk.codec.speed
        return HostUpdate(numel, num_bytes / max(1, numel), speed, disk_bytes)

    def needs_only_host_memory(self, keys: Iterable[str]) -> bool:
        """Whether nothing has to be allocated, and nothing lies on the device, so that it may run beside the program.

        Args:
            keys: names of the states that the optimizer keeps.
        """
        on_host = not any(segment.updates_on_device for segment in self.segments)
        known = all(scalars is not None for scalars in self.before.values())
        return on_host and known and all(key in s.companions for s in self.segments for key in keys)

    def rounds_by_position(self, tensor: ChunkTensor) -> bool:
        """Whether torch's arithmetic for it depends on where in a vector an element stands."""
        return bool(self.groups[tensor].get("fused"))

    def is_owned(self, tensor: ChunkTensor) -> bool:
        """Whether this process owns some element of it."""
        return any(max(tensor.entry.offset, s.start) < min(tensor.entry.stop, s.stop) for s in self.segments)

    def pieces(self, segment: Segment, in_blocks: bool) -> Iterator[Piece]:
        """What of the segment is updated.

        Args:
            segment: one of :attr:`segments`.
            in_blocks: leave out what a border cuts of a parameter whose arithmetic goes by position.
        """
        for tensor in self.groups:
            left = max(tensor.entry.offset, segment.start)
            right = min(tensor.entry.stop, segment.stop)
            if in_blocks and self.rounds_by_position(tensor):
                left, right = whole_blocks(tensor.entry, self.chunk.shard, left, right)
            if left < right:
                yield Piece(tensor, left - segment.start, right - segment.start)

    def batches(self, segment: Segment, most_numel: int, in_blocks: bool = True) -> Iterator[list[Piece]]:
        """Pieces in groups of at most ``most_numel`` elements; a larger parameter is cut.

        Cutting changes no bit: elementwise kernels give the same result for an element wherever it stands.
        """
        batch: list[Piece] = []
        filled = 0
        for piece in self.pieces(segment, in_blocks):
            for start in range(piece.start, piece.stop, most_numel):
                part = Piece(piece.tensor, start, min(start + most_numel, piece.stop))
                if batch and filled + part.stop - part.start > most_numel:
                    yield batch
                    batch, filled = [], 0
                batch.append(part)
                filled += part.stop - part.start
        if batch:
            yield batch

    def native_runs(self, segment: Segment) -> Iterator[NativeRun]:
        """Neighbouring parameters, merged: one kernel call each."""
        run: NativeRun | None = None
        for piece in self.pieces(segment, in_blocks=False):
            group, step = self.groups[piece.tensor], self.native_step(piece.tensor)
            first = self.before[piece.tensor] is None
            same = run is not None and run.group is group and (run.step, run.first) == (step, first)
            if run is not None and same and run.stop == piece.start:
                run = NativeRun(run.start, piece.stop, group, step, first)
                continue
            if run is not None:
                yield run
            run = NativeRun(piece.start, piece.stop, group, step, first)
        if run is not None:
            yield run

    def native_step(self, tensor: ChunkTensor) -> int:
        """Number of this update of a parameter, from 1; always 1 for optimizers that do not count."""
        return int((self.before[tensor] or {}).get("step", 0)) + 1


def captured(group: Group) -> Group:
    """A group's hyperparameters as they are now, without its parameters."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }
