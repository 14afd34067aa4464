"""What a chunk holds, on the device or not: its segments, and reads and writes of one parameter in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from gemini.device import Pending
from gemini.exchange import Shard
from gemini.gradients import drop, reserve, send
from gemini.jobs import Job
from gemini.layout import Entry
from gemini.segment import GRADIENT, Placement, Segment, device_bytes_at, overlaps, placement_of
from gemini.store import Store, Tier
from gemini.transfer import Arrival, Transfer


class Holdings:
    """The segments of a chunk: the elements of it that this process owns.

    Args:
        store: gives memory for companions that appear later.
        transfer: carries gradients.
        shard: which elements these are.

    Attributes:
        has_sums: gradients have reached the owners since they were last forgotten; only where others own a part, too.
        before_change: called before values or companions change or move, gradients apart: somebody may still be
            reading them, such as a checkpoint that is written in the background.
    """

    def __init__(self, store: Store, transfer: Transfer, shard: Shard) -> None:
        self._store = store
        self._transfer = transfer
        self.shard = shard
        self._segments: list[Segment] = []
        self._update: tuple[Job, Callable[[], None]] | None = None
        self._undo: Callable[[], None] | None = None
        self._forgets_gradients = False
        self._arrivals: list[Arrival] = []
        self._sums_on_way: list[Pending] = []
        self.has_sums = False
        self._streams_update = False
        self.was_written = False
        self.before_change: Callable[[], None] = nothing

    @property
    def segments(self) -> list[Segment]:
        """In order, without gap or overlap; an update that runs, and gradients on their way, are waited for."""
        self.settle_update()
        self.settle_arrivals()
        return self._segments

    @property
    def segments_to_come(self) -> list[Segment]:
        """The same for an update that waits for gradients by itself."""
        self.settle_update()
        return self._segments

    # -- gradients on their way --------------------------------------------------------------------------------------

    def expect(self, arrivals: Sequence[Arrival]) -> None:
        """Gradients that will be there when somebody asks for the segments."""
        self._arrivals += arrivals

    def expect_sums(self, pending: Pending) -> None:
        """Gradients that come from other processes will have been added when somebody asks for the segments."""
        self._sums_on_way.append(pending)

    @property
    def arrivals(self) -> list[Arrival]:
        """Gradients that are on their way."""
        return list(self._arrivals)

    def settle_arrivals(self) -> None:
        """Waits for gradients that are on their way, in the order in which they were sent."""
        while self._sums_on_way:
            self._sums_on_way.pop(0).wait()  # where that fails, training has ended: the exchange knows
        while self._arrivals:
            self._arrivals[0].settle()
            del self._arrivals[0]

    def reserve_sums(self, dtype: torch.dtype) -> None:
        """Makes room for gradients of the owned part, so that adding to them cannot fail."""
        reserve(self.segments, self._store, self.shard.start, self.shard.stop, dtype, first=not self.has_sums)

    def add_sums(self, start: int, values: torch.Tensor, first: bool) -> None:
        """Adds gradients that came from all owners to those that :meth:`reserve_sums` has made room for.

        Args:
            start: first element of the chunk.
            values: 1-D, on the device.
            first: they are taken as they are: nothing has come before.
        """
        for arrival in send(self._segments, self._store, self._transfer, start, values, first):
            arrival.settle()

    @property
    def placement(self) -> Placement:
        """Where the elements live now."""
        return replace(placement_of(self._segments), streams_update=self._streams_update)

    # -- an update beside the program --------------------------------------------------------------------------------

    def begin_update(self, job: Job, finish: Callable[[], None], undo: Callable[[], None] | None = None) -> None:
        """``job`` changes values and companions from now on: whoever asks for them waits for it.

        Args:
            job: has been queued.
            finish: what is left to do for the program itself once the job is done.
            undo: the update is tentative: it is undone by this, once the job is done, unless it is confirmed before
                somebody asks for values or companions.
        """
        self.settle_update()
        self._update = (job, finish)
        self._undo = undo

    @property
    def is_tentative(self) -> bool:
        """Whether an update has begun that nobody has confirmed."""
        return self._undo is not None

    def confirm_update(self) -> None:
        """The update that has begun is wanted."""
        self._undo = None

    def withdraw_update(self) -> bool:
        """Takes a tentative update back that has not begun; False if there is none. It has changed nothing."""
        if self._update is None or self._undo is None or not self._update[0].withdraw():
            return False
        self._undo = self._update = None
        return True

    def undo_update(self) -> None:
        """Takes a tentative update back; nothing if there is none."""
        if self._undo is not None:
            self.settle_update()

    @property
    def is_updating(self) -> bool:
        """Whether an update has begun and not been waited for."""
        return self._update is not None

    @property
    def must_wait(self) -> bool:
        """Whether whoever asks for values now would wait for an update."""
        return self._update is not None and not self._update[0].is_done

    def settle_update(self) -> None:
        """Waits for an update that still runs.

        Raises:
            Exception: what the update raised; also the next time, since nobody knows how far it came.
        """
        if self._update is None:
            return
        job, finish = self._update
        if self._undo is not None:
            with contextlib.suppress(Exception):  # however far it came
                job.wait()
            self._undo()
            self._undo = self._update = None
            return
        job.wait()
        finish()
        self._update = None  # last: after an interrupt it is all to be done still
        if self._forgets_gradients:
            self.forget_gradients()

    def abandon_update(self) -> None:
        """Waits for an update whose result, or error, nobody will ask for."""
        with contextlib.suppress(Exception):
            self.settle_update()
        self._update = self._undo = None

    def forget_gradients(self) -> None:
        """Gives the host memory of gradients back, as soon as an update that reads them has run."""
        self.undo_update()
        self.settle_arrivals()
        self._forgets_gradients = self.is_updating
        if not self._forgets_gradients:
            drop(self._segments, self._store)

    def read_ahead(self) -> None:
        """Starts to read values that lie on disk, unless an update is about to write them."""
        if self._update is None:
            for segment in self._segments:
                if segment.value_tier is Tier.DISK:
                    self._store.disk.will_need(segment.values)
                    self._store.device.will_read(segment.values)

    def growth_bytes(self, placement: Placement) -> int:
        """Device bytes that a placement would add; negative where it frees some."""
        return device_bytes_at(self.segments, placement) - device_bytes_at(self.segments, self.placement)

    def pieces(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """Segments that hold elements ``[start, stop)``, each with the overlap in chunk elements."""
        return list(overlaps(self.segments, start, stop))

    def pieces_before_update(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """The same for somebody whom an update waits for, by :attr:`before_change`."""
        return list(overlaps(self._segments, start, stop))

    def own_part(self, entry: Entry, key: str | None) -> torch.Tensor:
        """A host copy of what is owned of one parameter's values (``key`` None) or companion, 1-D, in memory order.

        Raises:
            KeyError: a segment of the parameter has no such companion.
        """
        parts = [s.read(key, left, right).cpu() for s, left, right in self.pieces(entry.offset, entry.stop)]
        if not parts:
            return torch.empty(0, dtype=entry.spec.dtype if key is None else torch.float32)
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def put_companion(self, entry: Entry, key: str, data: torch.Tensor) -> None:
        """Writes one parameter's share of a companion, as far as it is owned, allocating the companion if need be."""
        if key != GRADIENT:
            self.before_change()
        flat = _flat(entry, data, data.dtype)
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            segment.write(self._store, {key: flat[left - entry.offset : right - entry.offset]}, left)

    def put_values(self, entry: Entry, data: torch.Tensor) -> None:
        """Writes what is owned of one parameter's values, and of its master where there is one, from any float dtype."""
        self.before_change()
        self.was_written = True
        flat = _flat(entry, data, torch.promote_types(data.dtype, entry.spec.dtype))
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            segment.write_values(self._store, flat[left - entry.offset : right - entry.offset], left)

    def check_cover(self, index: int) -> None:
        """Raises RuntimeError if the segments of chunk ``index`` do not cover what is owned of it, each element once."""
        at = self.shard.start
        for segment in self._segments:
            if segment.start != at or segment.values.numel() != segment.numel:
                raise RuntimeError(f"chunk {index}: segments do not cover it: gap or overlap at element {at}")
            at = segment.stop
        if at != self.shard.stop:
            raise RuntimeError(f"chunk {index}: segments end at element {at}, not at {self.shard.stop}")


def nothing() -> None:
    """Nobody is reading."""


def _flat(entry: Entry, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a tensor of the parameter's shape, in the order in which they lie in the chunk."""
    flat = torch.empty(entry.spec.numel, dtype=dtype)
    flat.as_strided(entry.spec.shape, entry.spec.stride).copy_(data)
    return flat
