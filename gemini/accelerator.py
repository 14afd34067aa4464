"""A real accelerator, through ``torch.accelerator``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gemini.device import Device, DeviceMemory, Event, Pending, Stream
from gemini.work import CountingMode


class _AcceleratorEvent(Event):
    def __init__(self, event: torch.Event) -> None:
        self.event = event

    def synchronize(self) -> None:
        """Blocks the host until the event has happened."""
        self.event.synchronize()

    @property
    def is_done(self) -> bool:
        """Whether it has happened."""
        return bool(self.event.query())


class AcceleratorStream(Stream):
    """A side stream of a real accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues an asynchronous copy; host memory should be pinned for it to be one."""
        with self._stream, torch.no_grad():
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.device == self._device:
                # The caching allocator must not hand the block to the compute stream before this copy has run.
                tensor.record_stream(self._stream)

    def run(self, work: Callable[[], None], numel: int) -> None:
        """Issues the computation on this stream; what it allocates is this stream's."""
        del numel
        with self._stream:
            work()

    def exchange(self, begin: Callable[[], Sequence[Pending]], num_bytes: int, after: Event) -> None:
        """Begins now, as far as the program goes: collectives order themselves behind the stream they are called on."""
        del num_bytes
        if isinstance(after, _AcceleratorEvent):
            self._stream.wait_event(after.event)
        with self._stream:
            for pending in begin():
                pending.wait()

    def record(self) -> Event:
        """An event after everything queued so far."""
        event = torch.Event(self._device)
        event.record(self._stream)
        return _AcceleratorEvent(event)

    def wait_compute(self) -> None:
        """Orders later copies behind the current compute stream."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))


class AcceleratorDevice(Device):
    """A real accelerator through ``torch.accelerator`` (CUDA, ROCm, XPU).

    Args:
        cap_bytes: emulate a smaller card: the allocator refuses more than this (CUDA and ROCm only).

    Raises:
        ValueError: if there is no accelerator, or a cap was asked for on one that cannot be capped.
    """

    def __init__(self, cap_bytes: int | None = None) -> None:
        super().__init__()
        if not torch.accelerator.is_available():
            raise ValueError("no accelerator was found; use device.type = cpu or simulated")
        index = torch.accelerator.current_device_index()
        accelerator = torch.accelerator.current_accelerator()
        self.torch_device = torch.device(accelerator.type if accelerator is not None else "cuda", index)
        self.name = str(self.torch_device)
        free_bytes, total_bytes = torch.accelerator.get_memory_info(self.torch_device)
        # What others hold on the card is not ours to plan with; what this process already holds is.
        held_bytes = torch.accelerator.memory_reserved(self.torch_device)
        self.capacity_bytes = free_bytes + held_bytes
        self._window_peak_bytes = 0
        self._window_non_model_bytes = 0
        if cap_bytes is not None:
            self._cap(cap_bytes, total_bytes)

    def _cap(self, cap_bytes: int, total_bytes: int) -> None:
        if self.torch_device.type != "cuda":
            raise ValueError(f"device.memory cannot cap a {self.torch_device.type} device; remove it")
        self.capacity_bytes = min(cap_bytes, self.capacity_bytes)
        torch.cuda.set_per_process_memory_fraction(self.capacity_bytes / total_bytes, self.torch_device)

    def taken_bytes(self) -> int:
        """What is neither free nor this process's."""
        free_bytes, _ = torch.accelerator.get_memory_info(self.torch_device)
        held_bytes = torch.accelerator.memory_reserved(self.torch_device)
        return max(0, self.capacity_bytes - free_bytes - held_bytes)

    def _before_change(self) -> None:
        """Splits the window: the allocator tells the peak of model and non-model data together, and while model data
        is constant the difference is exact."""
        peak_bytes = torch.accelerator.max_memory_allocated(self.torch_device)
        self._window_peak_bytes = max(self._window_peak_bytes, peak_bytes)
        self._window_non_model_bytes = max(self._window_non_model_bytes, peak_bytes - self.model_data_bytes)

    def _after_change(self) -> None:
        """What has just gone is in the allocator's peak and no longer in the model data."""
        torch.accelerator.reset_peak_memory_stats(self.torch_device)

    def memory(self) -> DeviceMemory:
        """Figures of torch's caching allocator; non-model is what is not ours."""
        self._before_change()
        allocated_bytes = torch.accelerator.memory_allocated(self.torch_device)
        return DeviceMemory(
            model_data_bytes=self.model_data_bytes,
            non_model_bytes=max(0, allocated_bytes - self.model_data_bytes),
            peak_bytes=self._window_peak_bytes,
            non_model_peak_bytes=self._window_non_model_bytes,
        )

    def _start_window(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.torch_device)
        self._window_peak_bytes = self._window_non_model_bytes = 0

    def stream(self, name: str) -> Stream:
        """A new side stream."""
        del name
        return AcceleratorStream(self.torch_device)

    def wait(self, event: Event) -> None:
        """Makes the current stream wait."""
        if isinstance(event, _AcceleratorEvent):
            torch.accelerator.current_stream(self.torch_device).wait_event(event.event)

    def synchronize(self) -> None:
        """Blocks until the device is idle."""
        torch.accelerator.synchronize(self.torch_device)

    def activity(self) -> contextlib.AbstractContextManager[Any]:
        """Operators inside are counted where that was asked for; memory is the allocator's to count."""
        return CountingMode(self.work) if self.counts_work else contextlib.nullcontext()

    def bookkeeping(self) -> contextlib.AbstractContextManager[Any]:
        """Operators inside are no work of the model: the time model has copies of its own."""
        return _disable_current_modes() if self.counts_work else contextlib.nullcontext()

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """Pins with cudaHostRegister: exact bytes, where torch's pinned allocator rounds up to a power of two."""
        if self.torch_device.type != "cuda":
            return False
        return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)) == 0

    def unregister_host_memory(self, address: int) -> None:
        """Undoes :meth:`register_host_memory`."""
        torch.cuda.cudart().cudaHostUnregister(address)
