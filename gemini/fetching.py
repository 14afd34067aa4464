"""Which chunks are gathered on the device, what is fetched ahead, and what gives way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gemini.chunk import Chunk
from gemini.device import Device
from gemini.plan import Plan
from gemini.recorder import Recorder
from gemini.tensor import ChunkTensor
from gemini.trace import NextUse, Trace
from gemini.walk import choose_victim, room_for_prefetch


@dataclass
class Counters:
    """What has happened since they were made."""

    num_fetches: int = 0
    num_evictions: int = 0


class GatheredChunks:
    """The gathered copies of all chunks.

    Args:
        chunks: all, by index.
        device: they are on.
        recorder: knows where the present pass stands.

    Attributes:
        eager: no plan knows this pass: what nobody reads goes as soon as it may.
        counters: of the step that runs.
    """

    def __init__(self, chunks: list[Chunk], device: Device, recorder: Recorder) -> None:
        self._chunks = chunks
        self._device = device
        self._recorder = recorder
        self._by_index: dict[int, Chunk] = {}
        # PyTorch keeps one Python object per storage while the storage lives, so its id names a buffer.
        self._by_storage: dict[int, Chunk] = {}
        self._plan: Plan | None = None
        self._next_use: NextUse | None = None
        self.eager = True
        self.counters = Counters()

    def follow(self, plan: Plan, trace: Trace | None) -> None:
        """From now on what stays is up to this plan. Nothing is gathered."""
        self._plan = plan
        self._next_use = NextUse(trace) if trace is not None else None
        self._by_storage = {id(chunk.storage): chunk for chunk in self._chunks if chunk.resident}

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks; a copy, so that they may be dropped meanwhile."""
        return iter(list(self._by_index.values()))

    def owner(self, saved: torch.Tensor) -> ChunkTensor | None:
        """The tensor of a chunk on the device that a view belongs to; None for anything else."""
        storage = saved.untyped_storage()
        chunk = self._by_storage.get(id(storage))
        # A chunk that was placed anew has given its buffer up: the old id may name another storage now.
        if chunk is None or not chunk.on_device or chunk.storage is not storage:
            return None
        return chunk.tensor_at(int(saved.storage_offset()))

    # -- fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk) -> None:
        """Gathers a chunk that is read now, whatever must go for it.

        Raises:
            torch.OutOfMemoryError: the device has no room although nothing more can go.
        """
        self.make_room(chunk.num_bytes)
        while True:
            try:
                with self._device.bookkeeping():
                    chunk.fetch()
                break
            except torch.OutOfMemoryError:
                if not self._evict_one():
                    self._recorder.note_gathered(refused_bytes=chunk.num_bytes)
                    raise
        self._note(chunk)
        self.prefetch()

    def _note(self, chunk: Chunk) -> None:
        self._by_storage[id(chunk.storage)] = chunk
        self._by_index[chunk.index] = chunk
        self.counters.num_fetches += 1

    def prefetch(self) -> None:
        """Fetches what the coming moments read, once the running one has all it needs; stops where there is no room."""
        plan, next_use, position = self._plan, self._next_use, self._recorder.position
        if self.eager or plan is None or next_use is None or position < 0:
            return
        if any(not self._chunks[index].on_device for index in next_use.reads(position)):
            return
        for index in next_use.coming(position, plan.prefetch_depth):
            chunk = self._chunks[index]
            if chunk.on_device:
                continue
            # Several processes must not decide by what their clocks say: there the fetch waits for the update.
            if (chunk.must_wait and chunk.shard.is_whole) or not self._fetch_early(chunk, position, next_use, plan):
                break
        self._read_ahead(next_use.coming(position, plan.prefetch_depth + 1))

    def _read_ahead(self, coming: list[int]) -> None:
        """Whatever could not be fetched ahead is at least read ahead, where it is on disk."""
        for index in coming:
            if not self._chunks[index].on_device:
                self._chunks[index].read_ahead()

    def _fetch_early(self, chunk: Chunk, position: int, next_use: NextUse, plan: Plan) -> bool:
        """Fetches a chunk before it is read, unless what is read sooner would have to go; returns whether it could."""
        reserves = plan.reserve_bytes[position : next_use.after(chunk.index, position) + 1]
        capacity_bytes = self._device.capacity_bytes - plan.spared_bytes
        room_bytes = capacity_bytes - self._device.model_data_bytes - max(reserves)
        droppable = {index: held.num_bytes for index, held in self._by_index.items() if held.droppable}
        victims = room_for_prefetch(chunk.index, chunk.num_bytes, room_bytes, droppable, next_use, position)
        if victims is None:
            return False
        for victim in victims:
            self.drop(self._by_index[victim])
            self.counters.num_evictions += 1
        try:
            with self._device.bookkeeping():
                chunk.fetch()
        except torch.OutOfMemoryError:
            return False  # it is fetched when it is read, with everything in its way gone
        self._note(chunk)
        return True

    # -- giving way --------------------------------------------------------------------------------------------------

    def _reserve_bytes(self) -> int:
        """Device bytes to keep free of model data: for activations that the moment will need, or that are there."""
        if self.eager or self._plan is None or not self._plan.reserve_bytes:
            return self._device.memory().non_model_bytes
        last = len(self._plan.reserve_bytes) - 1
        return self._plan.spared_bytes + self._plan.reserve_bytes[min(max(0, self._recorder.position), last)]

    def make_room(self, num_bytes: int) -> None:
        """Evicts, furthest next use first, until ``num_bytes`` more and the reserve fit, or nothing more can go."""
        room_bytes = self._device.capacity_bytes - self._reserve_bytes()
        while self._device.model_data_bytes + num_bytes > room_bytes:
            if not self._evict_one():
                return  # the allocation will say whether it fits after all

    def give_way(self) -> None:
        """Where holders end: without a plan everything that nobody reads goes, with one what the reserve asks for.

        Both in the same places, so that what a warm-up could do with, a planned pass can. Not after every module: a
        chunk that the next module of the same unit reads would go and come back.
        """
        if self.eager:
            self.release_all()
        else:
            self.make_room(0)

    def _evict_one(self) -> bool:
        """Gives up the gathered chunk that is read furthest in the future; False if all are in use."""
        candidates = [index for index, chunk in self._by_index.items() if chunk.droppable]
        if not candidates:
            return False
        next_use = self._next_use
        victim = choose_victim(candidates, next_use, self._recorder.position) if next_use else candidates[0]
        self.drop(self._by_index[victim])
        self.counters.num_evictions += 1
        return True

    def drop(self, chunk: Chunk) -> None:
        """Gives up one chunk's copy; gradients in it go to their owners first."""
        with self._device.bookkeeping():
            chunk.reduce()
        self.forget(chunk)

    def forget(self, chunk: Chunk) -> None:
        """The chunk has given its copy up by itself, if it has."""
        if not chunk.on_device:
            self._by_index.pop(chunk.index, None)

    def release_all(self) -> None:
        """Gives up all that nobody reads."""
        for chunk in self:
            if chunk.droppable:
                self.drop(chunk)

    def release_stale(self) -> None:
        """Gives up copies of trained chunks that nobody reads."""
        for chunk in self:
            if chunk.layout.trainable and chunk.droppable:
                self.drop(chunk)

    # -- figures -----------------------------------------------------------------------------------------------------

    def bytes_by_state(self) -> dict[str, int]:
        """Device bytes per tensor state."""
        by_state: dict[str, int] = {}
        for chunk in self:
            for tensor in chunk.tensors:
                num_bytes = tensor.entry.spec.numel * chunk.layout.dtype.itemsize
                by_state[tensor.state.value] = by_state.get(tensor.state.value, 0) + num_bytes
        return by_state

    def check_integrity(self) -> None:
        """Raises RuntimeError unless exactly the chunks with a copy are known here."""
        for chunk in self._chunks:
            if (chunk.on_device and not chunk.resident) != (chunk.index in self._by_index):
                raise RuntimeError(f"chunk {chunk.index}: gathered list and memory disagree")
