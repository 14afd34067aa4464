"""Copies between tiers, with the waits that make them safe, and the count of bytes that crossed the link."""

from __future__ import annotations

import torch

from gemini.device import Device, Event
from gemini.store import Tier


class Transfer:
    """Two side streams: parameters in, gradients out.

    Attributes:
        h2d_bytes: host to device since :meth:`reset_counters`.
        d2h_bytes: device to host.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        # Carries values to the device. Its events are recorded after each chunk; computation waits on them.
        self._in = device.stream("in")
        # Carries gradients to the host. The host waits on its events before it reads or the source is given back.
        self._out = device.stream("out")
        self.h2d_bytes = 0
        self.d2h_bytes = 0

    def reset_counters(self) -> None:
        """Starts counting anew (once per optimizer step)."""
        self.h2d_bytes = 0
        self.d2h_bytes = 0

    def to_gathered(self, target: torch.Tensor, source: torch.Tensor, tier: Tier) -> None:
        """Queues values on their way into a gathered buffer."""
        # The memory under the target may have just been given back by computation that is still running.
        self._in.wait_compute()
        self._in.copy(target, source)
        if tier is not Tier.DEVICE:
            self.h2d_bytes += source.nbytes

    def fetched_event(self) -> Event:
        """An event after all values queued so far."""
        return self._in.record()

    def gradient_out(self, target: torch.Tensor, source: torch.Tensor, tier: Tier, add: bool) -> None:
        """Copies or adds a gradient on the device to its owner's buffer; done when this returns for the host tier."""
        if tier is Tier.DEVICE:
            with torch.no_grad():
                target.add_(source) if add else target.copy_(source)
            return
        landing = target if target.dtype == source.dtype and not add else torch.empty(source.shape, dtype=source.dtype)
        self._out.wait_compute()
        self._out.copy(landing, source)
        self._out.record().synchronize()
        self.d2h_bytes += source.nbytes
        if add:
            target.add_(landing)
        elif landing is not target:
            target.copy_(landing)

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
