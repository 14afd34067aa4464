"""Copies between tiers, with the waits that make them safe, and the count of bytes that crossed the link."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gemini.device import Device, Event, Pending
from gemini.store import Tier


class Arrival:
    """A gradient on its way to the host.

    Until :meth:`settle` nobody may read, write or give back where it is wanted.

    Args:
        event: recorded by the stream that carries it.
        landing: where it comes to; the target itself where it can.
        target: the owner's buffer.
        add: to what is there.
        settled: told once it is there.
    """

    def __init__(
        self,
        event: Event,
        landing: torch.Tensor,
        target: torch.Tensor,
        add: bool,
        settled: Callable[[Arrival], None],
    ) -> None:
        self._event = event
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = (landing, target)
        self._add = add
        self._settled = settled
        self.num_bytes = landing.nbytes

    @property
    def is_settled(self) -> bool:
        """Whether it is there."""
        return self._buffers is None

    @property
    def is_direct(self) -> bool:
        """Whether it comes straight to where it is wanted, so that it is there once it has arrived."""
        return self._buffers is None or (self._buffers[0] is self._buffers[1] and not self._add)

    @property
    def event(self) -> Event:
        """Of its arrival."""
        return self._event

    def wait(self) -> None:
        """Waits until it has arrived, on a thread beside the program; :meth:`settle` is still to be called."""
        self._event.wait_beside()

    def settle(self) -> None:
        """Waits until it is there; may be called again."""
        if self._buffers is None:
            return
        self._event.synchronize()
        # Both are let go first: whoever still has this object does not keep their memory.
        (landing, target), self._buffers = self._buffers, None
        try:
            if self._add:
                target.add_(landing)
            elif landing is not target:
                target.copy_(landing)
        finally:
            self._settled(self)  # after an interrupt, too: it is on its way no more


class Transfer:
    """Side streams: parameters in, gradients out, what comes from other processes; and both ways what forward saves.

    Attributes:
        h2d_bytes: host to device since :meth:`reset_counters`.
        d2h_bytes: device to host.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        # Carries values to the device. Its events are recorded after each chunk; computation waits on them.
        self._in = device.stream("in")
        # Carries gradients to the host. Who reads them waits on its events (:class:`Arrival`); the memory that they
        # come from may be given back before: the allocator keeps it until the copy has run.
        self._out = device.stream("out")
        # Completes gathered copies with what other processes own. Behind the copies of what this one owns, not among
        # them: the next chunk's own values cross the link meanwhile. Computation waits on its events.
        self._between = device.stream("between")
        self._on_way: dict[Arrival, None] = {}  # oldest first
        self._on_way_bytes = 0
        self.h2d_bytes = 0
        self.d2h_bytes = 0

    def reset_counters(self) -> None:
        """Starts counting anew (once per optimizer step)."""
        self.h2d_bytes = 0
        self.d2h_bytes = 0

    def to_gathered(self, target: torch.Tensor, source: torch.Tensor, tier: Tier) -> None:
        """Queues values on their way into a gathered buffer."""
        if tier is Tier.DISK:
            self.device.reads(source)
        # The memory under the target may have just been given back by computation that is still running.
        self._in.wait_compute()
        self._in.copy(target, source)
        if tier is not Tier.DEVICE:
            self.h2d_bytes += source.nbytes

    def fetched_event(self) -> Event:
        """An event after all values queued so far."""
        return self._in.record()

    def gather(self, begin: Callable[[], Sequence[Pending]], num_bytes: int, after: Event) -> Event:
        """Queues an exchange that completes a gathered buffer; returns an event after it.

        Args:
            begin: begins it.
            num_bytes: that come from others.
            after: this process's own values are in the buffer.
        """
        self._between.exchange(begin, num_bytes, after)
        return self._between.record()

    def gradient_out(self, target: torch.Tensor, source: torch.Tensor, tier: Tier, add: bool) -> Arrival | None:
        """Copies or adds a gradient on the device to its owner's buffer; None where it is there when this returns."""
        if tier is Tier.DEVICE:
            with torch.no_grad():
                target.add_(source) if add else target.copy_(source)
            return None
        landing = target if target.dtype == source.dtype and not add else torch.empty(source.shape, dtype=source.dtype)
        self._out.wait_compute()
        self._out.copy(landing, source)
        self.d2h_bytes += source.nbytes
        arrival = Arrival(self._out.record(), landing, target, add, self._arrived)
        self._on_way[arrival] = None
        self._on_way_bytes += arrival.num_bytes
        # They hold memory at both ends: beyond some bytes the oldest are waited for.
        while self._on_way_bytes > self.device.most_bytes_on_way:
            next(iter(self._on_way)).settle()
        return arrival

    def let_go(self, source: torch.Tensor) -> None:
        """Memory that queued gradients are read from is the program's no more; nobody has written to it."""
        self._out.part_with(source)

    def _arrived(self, arrival: Arrival) -> None:
        del self._on_way[arrival]
        self._on_way_bytes -= arrival.num_bytes

    def activation_out(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Queues what forward has saved on its way to the host."""
        with self.device.bookkeeping():
            self._out.wait_compute()
            self._out.copy(target, source)
            self.d2h_bytes += source.nbytes
            return self._out.record()

    def activation_in(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Queues it on its way back."""
        with self.device.bookkeeping():
            self._in.wait_compute()
            self._in.copy(target, source)
            self.h2d_bytes += source.nbytes
            return self._in.record()

    def values_in(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """New values to the device after an update on the host; done when this returns."""
        self._in.wait_compute()
        self._in.copy(target, source)
        self._in.record().synchronize()
        self.h2d_bytes += source.nbytes

    def values_out(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """New values to the host after an update on the device; done when this returns."""
        self._out.wait_compute()
        self._out.copy(target, source)
        self._out.record().synchronize()
        self.d2h_bytes += source.nbytes
