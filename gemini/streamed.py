"""Streamed updates: what lies on the host is updated on the device, to which it goes piece by piece, and back.

Master, states and gradient of a piece are copied to a buffer on the device, updated there, and copied back, with the new
values. Two lanes take turns, each a stream with a buffer of its own: what a lane is given runs in order, so a buffer is
not written before what was in it has left, while the other lane keeps the other direction of the link busy. Whoever asks
for a chunk waits for the events of both lanes, as for an update on the host (:mod:`gemini.holdings`).

Chunks are begun in the order in which they were queued, one ahead of the one that is asked for: what is queued on the
link must not keep the fetches waiting that come between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from gemini.device import Event, Stream
from gemini.jobs import Job
from gemini.plan import ChunkFacts
from gemini.segment import GRADIENT, MASTER, Segment
from gemini.store import Kind, Store, Tier
from gemini.transfer import Transfer

BYTES_PER_NUMEL = 20
"""Of a lane's buffer: master, two states and a gradient in fp32, and 16 bits each for a gradient and for new values."""
NUM_LANES = 2
_SLOTS = BYTES_PER_NUMEL // 4
_MOST_NUMEL = 1 << 22  # a copy of 16 MiB runs at the link's full rate

Update = Callable[[Segment, torch.Tensor], None]
"""Updates a segment on the device, of one piece; writes its values as well. The tensor is fp32, for a gradient that is
not: as many elements, undefined."""


def streamed_piece_numel(facts: Sequence[ChunkFacts], capacity_bytes: int, multiple: int) -> int:
    """Elements of a piece on a device of this capacity: whole blocks of so many; 0 where no chunk may be streamed."""
    largest = max((fact.numel for fact in facts if fact.may_stream), default=0)
    most_numel = min(_MOST_NUMEL, max(1 << 10, capacity_bytes // 1024), largest + multiple - 1)
    return most_numel // multiple * multiple


def streamed_bytes(piece_numel: int) -> int:
    """Device bytes of all lanes, for pieces of so many elements."""
    return NUM_LANES * BYTES_PER_NUMEL * piece_numel


class _Lane:
    """A stream, and a buffer on the device that only it touches."""

    def __init__(self, store: Store, stream: Stream, piece_numel: int) -> None:
        self.stream = stream
        self._piece_numel = piece_numel
        self.buffer = store.allocate(Tier.DEVICE, Kind.PIECES, _SLOTS * piece_numel, torch.float32)

    def _slot(self, index: int, numel: int) -> torch.Tensor:
        return self.buffer[index * self._piece_numel :][:numel]

    def _half(self, second: bool, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """16 bits an element, of the last slot."""
        return self.buffer[(_SLOTS - 1) * self._piece_numel :].view(dtype)[second * self._piece_numel :][:numel]

    def piece(self, segment: Segment, start: int, stop: int) -> tuple[Segment, torch.Tensor]:
        """Room for elements ``[start, stop)`` of the chunk, as a segment on the device; and that of an fp32 gradient."""
        numel = stop - start
        states = [key for key in segment.companions if key not in (MASTER, GRADIENT)]
        companions = {key: self._slot(index, numel) for index, key in enumerate((MASTER, *states))}
        wide, dtype = self._slot(_SLOTS - 2, numel), segment.companions[GRADIENT].dtype
        companions[GRADIENT] = wide if dtype == torch.float32 else self._half(False, numel, dtype)
        narrow = segment.values.dtype.itemsize < 4
        values = self._half(True, numel, segment.values.dtype) if narrow else companions[MASTER]
        return Segment(start, stop, Tier.DEVICE, Tier.DEVICE, values, companions), wide


class StreamedJob(Job):
    """The update of one chunk; not begun before its turn, or before somebody waits for it."""

    def __init__(self, owner: StreamedUpdates, begin: Callable[[], None]) -> None:
        self._owner = owner
        self._begin = begin
        self._events: list[Event] | None = None

    def begin(self) -> None:
        """Queues everything on the lanes."""
        self._begin()
        self._events = self._owner.events()

    @property
    def is_done(self) -> bool:
        """Whether everything has come back."""
        return self._events is not None and all(event.is_done for event in self._events)

    def wait(self) -> None:
        """Begins it if need be, and the one after it, and waits until everything has come back.

        Raises:
            RuntimeError: it broke off when it was begun.
        """
        self._owner.begin_until(self)
        if self._events is None:
            raise RuntimeError("a streamed update broke off before all of it was queued")
        for event in self._events:
            event.synchronize()


class StreamedUpdates:
    """The lanes, and what waits for them.

    Args:
        store: gives the buffers, and knows the device.
        transfer: counts what crosses the link.

    Attributes:
        piece_numel: elements of a piece; 0: nothing is updated so.
    """

    def __init__(self, store: Store, transfer: Transfer) -> None:
        self._store = store
        self._transfer = transfer
        self.piece_numel = 0
        self._lanes: list[_Lane] = []
        self._streams: list[Stream] = []
        self._next_lane = 0
        self._waiting: list[StreamedJob] = []

    @property
    def is_open(self) -> bool:
        """Whether there are buffers."""
        return bool(self._lanes)

    def open(self) -> None:
        """Takes device memory for the lanes; nothing if they have it.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        if self.is_open or not self.piece_numel:
            return
        if not self._streams:
            self._streams = [self._store.device.stream(f"update {number}") for number in range(NUM_LANES)]
        try:
            for stream in self._streams:
                self._lanes.append(_Lane(self._store, stream, self.piece_numel))
        except torch.OutOfMemoryError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the device memory back; everything has been waited for."""
        for lane in self._lanes:
            self._store.free(Tier.DEVICE, Kind.PIECES, lane.buffer)
        self._lanes.clear()

    # -- chunks ------------------------------------------------------------------------------------------------------

    def submit(self, begin: Callable[[], None]) -> StreamedJob:
        """Queues an update behind those that wait.

        Args:
            begin: calls :meth:`carry` for each piece; on the program's thread, in this call or later.
        """
        job = StreamedJob(self, begin)
        self._waiting.append(job)
        return job

    def start(self) -> None:
        """A step's updates have been queued: the first begins. What computation has written by now is there for all."""
        for lane in self._lanes:
            lane.stream.wait_compute()
        self._begin_first(1)

    def begin_until(self, job: StreamedJob) -> None:
        """This one, all before it, and one more have begun when this returns."""
        if job in self._waiting:
            self._begin_first(self._waiting.index(job) + 1)
        self._begin_first(1)

    def _begin_first(self, number: int) -> None:
        for _ in range(min(number, len(self._waiting))):
            with self._store.device.bookkeeping():
                self._waiting.pop(0).begin()

    def events(self) -> list[Event]:
        """After all that the lanes have been given so far."""
        return [lane.stream.record() for lane in self._lanes]

    # -- pieces ------------------------------------------------------------------------------------------------------

    def carry(self, segment: Segment, start: int, stop: int, update: Update) -> None:
        """Queues the update of elements ``[start, stop)`` of the chunk on the next lane.

        Args:
            segment: on the host, with a gradient, and with at most two states beside the master, all of them fp32.
            start: first element of the chunk.
            stop: first element after; at most :attr:`piece_numel` of them.
            update: of the piece; called when it is there.
        """
        lane = self._lanes[self._next_lane]
        self._next_lane = (self._next_lane + 1) % len(self._lanes)
        piece, wide = lane.piece(segment, start, stop)
        inside = slice(start - segment.start, stop - segment.start)
        for key, there in piece.companions.items():
            lane.stream.copy(there, segment.companions[key][inside])
            self._transfer.h2d_bytes += there.nbytes
        lane.stream.run(lambda: update(piece, wide), piece.numel)
        for there, here in self._ways_back(segment, piece):
            lane.stream.copy(here[inside], there)
            stays = here is segment.values and segment.value_tier is Tier.DEVICE
            self._transfer.d2h_bytes += 0 if stays else there.nbytes

    @staticmethod
    def _ways_back(segment: Segment, piece: Segment) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for key, there in piece.companions.items():
            if key != GRADIENT:
                yield there, segment.companions[key]
        if not segment.master_is_values:
            yield piece.values, segment.values
