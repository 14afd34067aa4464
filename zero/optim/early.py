"""Updates that begin inside backward, where gradients are not clipped: as soon as a chunk has all its gradients.

Whether the step will be taken is known only when backward has ended: a later gradient may not be finite, the user may
change the learning rate or look at what there is. So an early update keeps what it overwrites (:class:`Snapshot`) until
``step()`` confirms it; whoever asks for the chunk before gets the old values back, and the update is made anew. Results
are those of an update after backward, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from gemini.arena import HostMemoryError
from gemini.chunk import Chunk
from gemini.segment import GRADIENT, Segment
from gemini.store import Kind, Store, Tier
from gemini.tensor import ChunkTensor
from zero.optim.work import ChunkWork, Group, Scalars, captured

if TYPE_CHECKING:
    from zero.optim.update import ChunkUpdater


class Snapshots:
    """Host buffers for what early updates overwrite, used again from step to step.

    Args:
        store: gives them.
        budget_bytes: for all together.
    """

    def __init__(self, store: Store, budget_bytes: int) -> None:
        self._store = store
        self._budget_bytes = budget_bytes
        self._num_bytes = 0
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def take(self, like: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Buffers of these lengths and dtypes; None if the budget, or the host, has no room."""
        taken: list[torch.Tensor] = []
        for tensor in like:
            buffer = self._one(tensor)
            if buffer is None:
                self.give_back(taken)
                return None
            taken.append(buffer)
        return taken

    def _one(self, like: torch.Tensor) -> torch.Tensor | None:
        known = self._free.get((like.numel(), like.dtype))
        if known:
            return known.pop()
        if self._num_bytes + like.nbytes > self._budget_bytes:
            self.clear()  # of lengths that no chunk has any more, since a plan has cut it elsewhere
        if self._num_bytes + like.nbytes > self._budget_bytes:
            return None
        try:
            buffer = self._store.allocate(Tier.HOST, Kind.SNAPSHOTS, like.numel(), like.dtype)
        except HostMemoryError:
            return None
        self._num_bytes += like.nbytes
        return buffer

    def give_back(self, buffers: list[torch.Tensor]) -> None:
        """They may be overwritten."""
        for buffer in buffers:
            self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def clear(self) -> None:
        """Gives the memory back that nobody uses."""
        for buffers in self._free.values():
            for buffer in buffers:
                self._num_bytes -= buffer.nbytes
                self._store.free(Tier.HOST, Kind.SNAPSHOTS, buffer)
        self._free.clear()


class EarlyUpdates:
    """Begins updates inside backward.

    Args:
        updater: makes them.
        snapshots: keeps what they overwrite.
    """

    def __init__(self, updater: ChunkUpdater, snapshots: Snapshots) -> None:
        self._updater = updater
        self._snapshots = snapshots
        self._factor: float | None = None
        self._works: dict[Chunk, tuple[ChunkWork, list[torch.Tensor]]] = {}

    @contextlib.contextmanager
    def allowed(self, factor: float | None) -> Iterator[None]:
        """While the last backward of a step runs.

        Args:
            factor: gradients will be multiplied by it; None: nobody knows yet.
        """
        self._works.clear()
        self._factor = factor
        try:
            yield
        finally:
            self._factor = None

    def discard(self) -> None:
        """The step is not taken."""
        for chunk in self._works:
            chunk.undo_update()
        self._works.clear()

    def make_way(self) -> None:
        """The step is taken: what has not begun is withdrawn, for gradients came in the wrong order.

        The next forward pass reads first what backward came to last. What has begun is only known once the gradients have
        arrived: the program may have come here long before the device, with nothing begun at all.
        """
        for chunk in self._works:
            chunk.settle_arrivals()
        for chunk, (_, kept) in reversed(list(self._works.items())):
            if chunk.withdraw_update():
                self._snapshots.give_back(kept)
                del self._works[chunk]

    def close(self) -> None:
        """Gives the memory back; all updates have been waited for."""
        self._works.clear()
        self._snapshots.clear()

    def gradients_are_there(self, chunk: Chunk) -> None:
        """All gradients of a chunk have come in this pass, and are on their way to the host at least."""
        work = self._work(chunk)
        if work is None:
            return
        overwritten = [buffer for segment in work.segments for buffer in _overwritten(segment)]
        kept = self._snapshots.take(overwritten)
        if kept is None:
            return
        arrivals = chunk.arrivals

        def prepare() -> None:
            for arrival in arrivals:
                arrival.wait()
            for target, source in zip(kept, overwritten, strict=True):
                target.copy_(source)

        def undo() -> None:
            for target, source in zip(overwritten, kept, strict=True):
                target.copy_(source)
            for tensor, scalars in work.before.items():
                if scalars is not None:
                    self._updater.scalars[tensor] = scalars
            self._snapshots.give_back(kept)

        self._works[chunk] = work, kept
        kept_bytes = sum(buffer.nbytes for buffer in kept)
        events = [arrival.event for arrival in arrivals]
        self._updater.begin(work, prepare, lambda: self._snapshots.give_back(kept), undo, kept_bytes, events)

    def _work(self, chunk: Chunk) -> ChunkWork | None:
        """What there is to do, if all of it is known."""
        if self._factor is None or chunk.is_updating or chunk.placement.streams_update:
            return None
        if not all(arrival.is_direct for arrival in chunk.arrivals):
            return None
        updater = self._updater
        groups: dict[int, Group] = {}
        for tensor in chunk.tensors:
            known = tensor.has_gradient and tensor.gradient_norm is not None and tensor in updater.groups
            if not known or tensor not in updater.scalars:
                return None
            group = updater.groups[tensor]
            if any(isinstance(value, torch.Tensor) for key, value in group.items() if key != "params"):
                return None
            groups.setdefault(id(group), captured(group))
        before: dict[ChunkTensor, Scalars | None] = {tensor: updater.scalars[tensor] for tensor in chunk.tensors}
        of_tensor = {tensor: groups[id(updater.groups[tensor])] for tensor in chunk.tensors}
        work = ChunkWork(chunk, chunk.segments_to_come, of_tensor, before, self._factor)
        return work if work.needs_only_host_memory(updater.keys) else None

    def confirm(self, chunk: Chunk, groups: dict[ChunkTensor, Group], factor: float) -> bool:
        """The step is taken: whether the chunk's update has begun already, just as it is to be made now."""
        work, _ = self._works.pop(chunk, (None, None))
        if work is None or not chunk.is_tentative:
            return False
        if work.factor != factor or work.groups != groups or any(t.gradient_norm is None for t in groups):
            return False
        chunk.confirm_update()
        return True


def _overwritten(segment: Segment) -> list[torch.Tensor]:
    """Host buffers that an update writes."""
    buffers = [buffer for key, buffer in segment.companions.items() if key != GRADIENT]
    if not segment.master_is_values and segment.value_tier is not Tier.DEVICE:
        buffers.append(segment.values)
    return buffers
