"""Gradients of ranks, summed straight into their owners' shards, in pieces.

Terms are added in fp32 and in the order of ranks, so sums are the same from run to run, and fp16 gradients cannot
overflow in them. Each element crosses the wire once, in its own dtype.

Between processes on one host the last pieces of a chunk are still on their way when :meth:`Reducer.together` returns:
backward goes on meanwhile. Whoever asks for the chunk's segments waits for them. Between accelerators the collectives
take their turn among the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gemini.chunk import Chunk
from gemini.device import Device, Pending
from gemini.exchange import Run
from zero.collectives import begin_all_to_all
from zero.division import ALIGN_NUMEL, Division
from zero.world import World

_MOST_STAGING_BYTES = 16 << 20
_MOST_STAGING_BYTES_ON_HOST = 2 << 20
"""So little that even the sums in fp32, and what gloo copies to inside, need no mapping of their own: a fresh one for each
piece was measured to double a step's seconds in the kernel (see :func:`gemini.heap.begin_tidy`)."""
_MOST_ON_WAY_ON_HOST = 2
"""Pieces. What is sent of them is a copy, since the slot that it comes from goes: a few MiB a rank. More were no faster."""


def staging_numel(device: Device, dtype: torch.dtype, num_ranks: int) -> int:
    """Elements of a shard that are exchanged at a time: what is received lies beside the gathered copy."""
    staging_bytes = _MOST_STAGING_BYTES_ON_HOST if device.is_host else _MOST_STAGING_BYTES
    most_bytes = min(staging_bytes, max(1 << 14, device.capacity_bytes // 64))
    most_numel = most_bytes // (dtype.itemsize * num_ranks)
    return max(ALIGN_NUMEL, most_numel - most_numel % ALIGN_NUMEL)


@dataclass(eq=False)
class _Piece:
    """A part of every rank's shard of a chunk.

    Attributes:
        chunk: which.
        start: first element of each shard.
        first: nothing has come to the owners before.
        received: what comes, by sender.
        work: the collective.
    """

    chunk: Chunk
    start: int
    first: bool
    received: list[torch.Tensor]
    work: Pending


@dataclass(frozen=True)
class _Sums(Pending):
    """The sums of a chunk, as far as one pass has brought them; see :class:`gemini.device.Pending`."""

    reducer: Reducer
    last: _Piece

    def wait(self) -> None:
        """They are with their owner afterwards."""
        self.reducer.finish(self.last)


class Reducer:
    """Adds up what ranks send.

    Args:
        world: the ranks.
        division: how chunks are divided.
        reduce_dtype: of gradients on their way and of their sums; None: they travel as they are, sums are fp32.
        device: the gradients are on.
        guarded: around whatever waits for others, given words for it.
    """

    def __init__(
        self,
        world: World,
        division: Division,
        reduce_dtype: torch.dtype | None,
        device: Device,
        guarded: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._world = world
        self._division = division
        self._reduce_dtype = reduce_dtype
        self._sums_dtype = reduce_dtype or torch.float32
        self._device = device
        self._guarded = guarded
        self._on_way: deque[_Piece] = deque()
        self._most_on_way = _MOST_ON_WAY_ON_HOST if device.is_host else 0

    def together(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """The mean over all ranks of what all send, added to the owners' sums: all ranks call it."""
        first, wire_dtype = self._reserve(chunk), self._wire_dtype(chunk)
        step = staging_numel(self._device, wire_dtype, self._world.size)
        starts = range(0, chunk.shard.numel, step)
        for number, start in enumerate(starts):
            numel = min(step, chunk.shard.numel - start)
            parts = self._parts(chunk, runs, start, numel, wire_dtype, self._device.torch_device)
            if len(starts) - number <= self._most_on_way:  # still on their way when what they are read from goes
                parts = [part.clone() for part in parts]
            self._begin(chunk, start, first, parts)
        if self._on_way:
            chunk.expect_sums(_Sums(self, self._on_way[-1]))
        chunk.has_sums = True

    def apart(self, chunk: Chunk, ranks: Sequence[int], runs: Sequence[Run]) -> None:
        """The same where only some ranks send, through host memory; nothing counts from the others.

        Args:
            chunk: held in parts.
            ranks: those that send.
            runs: what this one sends.
        """
        first, wire_dtype = self._reserve(chunk), self._wire_dtype(chunk)
        step = staging_numel(self._device, wire_dtype, self._world.size)
        for start in range(0, chunk.shard.numel, step):
            numel = min(step, chunk.shard.numel - start)
            parts = self._parts(chunk, runs, start, numel, wire_dtype, torch.device("cpu"))
            self._add(chunk, start, self._sum_apart(parts, ranks), first)
        chunk.has_sums = True

    def finish(self, piece: _Piece) -> None:
        """Adds up the pieces on their way up to this one, oldest first; nothing where they have been."""
        while piece in self._on_way:
            self._finish_oldest()

    def forget(self) -> None:
        """Nobody waits for what is on its way: an exchange has failed."""
        self._on_way.clear()

    # -- together ----------------------------------------------------------------------------------------------------

    def _begin(self, chunk: Chunk, start: int, first: bool, parts: list[torch.Tensor]) -> None:
        received = [torch.empty_like(part) for part in parts]
        self._device.exchanges(sum(part.nbytes for part in received[1:]))
        work = begin_all_to_all(received, parts, self._world.bulk)
        self._on_way.append(_Piece(chunk, start, first, received, work))
        while len(self._on_way) > self._most_on_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        piece = self._on_way.popleft()
        with self._guarded(f"reducing gradients of chunk {piece.chunk.index} ({piece.chunk.layout.unit_name})"):
            piece.work.wait()
        total = piece.received[0].float()
        for part in piece.received[1:]:
            total += part
        self._add(piece.chunk, piece.start, total, piece.first)

    # -- apart -------------------------------------------------------------------------------------------------------

    def _sum_apart(self, parts: list[torch.Tensor], ranks: Sequence[int]) -> torch.Tensor:
        """This rank's sum, on the host: senders take their turns."""
        world = self._world
        total = torch.zeros(parts[0].numel(), dtype=torch.float32)
        landing = torch.empty_like(parts[0])
        for sender in ranks:
            if world.rank != sender:
                dist.recv(landing, sender, world.control)
                total += landing
                continue
            for owner in range(world.size):
                if owner != sender:
                    dist.send(parts[owner], owner, world.control)
            total += parts[sender]
        return total

    # -- both --------------------------------------------------------------------------------------------------------

    def _wire_dtype(self, chunk: Chunk) -> torch.dtype:
        return self._reduce_dtype or chunk.layout.dtype

    def _reserve(self, chunk: Chunk) -> bool:
        """Makes room with the owner; returns whether nothing has come before."""
        chunk.reserve_sums(self._sums_dtype)
        return not chunk.has_sums

    def _add(self, chunk: Chunk, start: int, total: torch.Tensor, first: bool) -> None:
        mean = total.div_(self._world.size).to(self._sums_dtype)
        chunk.add_sums(chunk.shard.start + start, mean.to(self._device.torch_device), first)

    def _parts(
        self, chunk: Chunk, runs: Sequence[Run], start: int, numel: int, dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """What this rank sends to each owner: ``numel`` elements of its shard from ``start`` on; zero where it has none.

        Where all of them lie side by side they are sent from where they are.
        """
        parts = []
        for owner in range(self._world.size):
            first = self._division.shard_of(chunk.layout, owner).start + start
            whole = [v[first - at : first - at + numel] for at, v in runs if at <= first <= at + v.numel() - numel]
            if whole and whole[0].dtype == dtype and whole[0].device == device:
                parts.append(whole[0])
                continue
            part = torch.zeros(numel, dtype=dtype, device=device)
            for at, values in runs:
                left, right = max(at, first), min(at + values.numel(), first + numel)
                if left < right:
                    part[left - first : right - first].copy_(values[left - at : right - at])
            parts.append(part)
        return parts
