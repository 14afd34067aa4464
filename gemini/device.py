"""The device contract: memory figures, buffers, streams, events. And the host as a device.

Manager, hooks and optimizer speak only to :class:`Device`; the simulated device (:mod:`gemini.simulated`) implements
the same contract, so that a green run there exercises the same code as a run on an accelerator.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gemini.heap import begin_tidy, end_tidy, own_mapping, prefer_huge_pages
from gemini.hostinfo import host_memory
from gemini.jobs import HostQueue, InlineQueue, ThreadQueue
from gemini.profile import HostUpdate
from gemini.work import Work


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device now and at the highest since the last :meth:`Device.reset_peaks`."""

    model_data_bytes: int
    """Buffers given out by :meth:`Device.allocate`: parameters, gradients, optimizer states."""
    non_model_bytes: int
    """Everything else: activations, temporaries, inputs."""
    peak_bytes: int
    """Highest sum of both."""
    non_model_peak_bytes: int
    """Highest non-model bytes alone."""


@dataclass(frozen=True)
class Peaks:
    """Highest bytes since the device was made."""

    device_bytes: int = 0
    model_data_bytes: int = 0
    non_model_bytes: int = 0


class Event(ABC):
    """A point in a stream's queue."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks the host until everything queued before the event has run."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether waiting for it would take no time."""

    def wait_beside(self) -> None:
        """The same on a thread that is not the program's: the program goes on."""
        self.synchronize()


class Pending(Protocol):
    """Something that goes on beside the program."""

    def wait(self) -> object:
        """Returns once it has ended; may be called again."""


class Stream(ABC):
    """A queue of copies that runs beside the computation."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues ``target.copy_(source)``. Both stay untouched until an event recorded later has been waited on."""

    @abstractmethod
    def run(self, work: Callable[[], None], numel: int) -> None:
        """Queues computation behind the copies so far, and before those to come.

        Args:
            work: may be called in this call or later; it touches nothing but what the copies of this stream bring and take.
            numel: elements that it updates with the optimizer.
        """

    @abstractmethod
    def exchange(self, begin: Callable[[], Sequence[Pending]], num_bytes: int, after: Event) -> None:
        """Queues an exchange with other processes, which all queue the same ones in the same order.

        Args:
            begin: begins it, in this call or later; returns what is to be waited for, where it goes on by itself.
            num_bytes: that come from the others.
            after: it reads what is there by then.
        """

    @abstractmethod
    def record(self) -> Event:
        """An event after everything queued so far."""

    @abstractmethod
    def wait_compute(self) -> None:
        """Later copies wait for all computation issued so far (they read what it wrote)."""

    def part_with(self, buffer: torch.Tensor) -> None:  # noqa: B027 - most allocators know which streams use a block
        """Memory goes while copies of it may be queued; they still read what it holds now."""


class Device(ABC):
    """One accelerator as the manager sees it.

    Attributes:
        name: for messages.
        torch_device: where buffers live.
        capacity_bytes: model and non-model data together must stay within it.
        most_bytes_on_way: gradients that may be on their way to the host at a time.
        expects_backward: a training forward has ended and its backward has not; the simulated device watches for it.
        counts_work: note what operators ask for, in :attr:`work`; set it before an :meth:`activity`.
        work: of all operators that were counted.
    """

    name: str
    torch_device: torch.device
    capacity_bytes: int
    most_bytes_on_way = 256 << 20
    is_host = False
    """Whether the device is the host itself: code for the host reaches what lies on it."""

    def __init__(self) -> None:
        self.model_data_bytes = 0
        self.model_data_peak_bytes = 0
        self.expects_backward = False
        self.counts_work = False
        self.work = Work()
        self._lifetime = Peaks()
        self._step_peak_bytes = 0

    def _count_model_data(self, delta_bytes: int) -> None:
        self.model_data_bytes += delta_bytes
        self.model_data_peak_bytes = max(self.model_data_peak_bytes, self.model_data_bytes)
        self._after_change()

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer for model data, uninitialised.

        Raises:
            torch.OutOfMemoryError: if it does not fit.
        """
        self._before_change()
        buffer = torch.empty(numel, dtype=dtype, device=self.torch_device)
        self._count_model_data(buffer.nbytes)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Frees the memory of a buffer from :meth:`allocate`; views of it stay objects but have no bytes.

        The storage keeps its identity: :meth:`take_again` puts memory under every saved view at once.
        """
        self._before_change()
        storage = buffer.untyped_storage()
        num_bytes = storage.nbytes()
        storage.resize_(0)
        self._count_model_data(-num_bytes)  # once it is gone: else the next window would hold it as non-model data

    def forget(self, buffer: torch.Tensor) -> None:
        """Counts a buffer as gone; its memory goes with the last reference to it.

        For buffers whose views the user may keep (resident values, gradients): reading such a view later is stale, but
        never a read of memory that is not there.
        """
        self._before_change()
        self._count_model_data(-buffer.untyped_storage().nbytes())

    def take_again(self, buffer: torch.Tensor, numel: int) -> None:
        """Gives memory back to a buffer that :meth:`give_back` emptied; contents are undefined.

        Raises:
            torch.OutOfMemoryError: if it does not fit.
        """
        self._before_change()
        num_bytes = numel * buffer.dtype.itemsize
        buffer.untyped_storage().resize_(num_bytes)
        self._count_model_data(num_bytes)

    def _before_change(self) -> None:  # noqa: B027 - most devices count non-model bytes by themselves
        """Model data is about to grow or shrink: until now its bytes were constant since the last change."""

    def _after_change(self) -> None:  # noqa: B027 - likewise
        """Model data has grown or shrunk, and is counted."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Figures of this process on the device."""

    @property
    def refused_bytes(self) -> int:
        """Non-model bytes there would have been, had no request of this window been refused; 0 where nobody knows."""
        return 0

    def reset_peaks(self) -> None:
        """Starts a new window for the peaks of :meth:`memory`."""
        self.lifetime_peaks()
        self.model_data_peak_bytes = self.model_data_bytes
        self._start_window()

    def lifetime_peaks(self) -> Peaks:
        """Highest figures since the device was made, over all windows."""
        window, past = self.memory(), self._lifetime
        self._lifetime = Peaks(
            max(past.device_bytes, window.peak_bytes),
            max(past.model_data_bytes, self.model_data_peak_bytes),
            max(past.non_model_bytes, window.non_model_peak_bytes),
        )
        self._step_peak_bytes = max(self._step_peak_bytes, window.peak_bytes)
        return self._lifetime

    def take_step_peak_bytes(self) -> int:
        """Highest bytes since this was last asked."""
        self.lifetime_peaks()
        peak_bytes, self._step_peak_bytes = self._step_peak_bytes, 0
        return peak_bytes

    @abstractmethod
    def _start_window(self) -> None:
        """Forgets the window's peaks."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new side stream."""

    def taken_bytes(self) -> int:
        """Of the capacity, what other processes have taken since."""
        return 0

    def host_queue(self, num_workers: int | None) -> HostQueue:
        """A queue of work on the host beside the device's computation.

        Args:
            num_workers: threads; 0 runs each job when it is queued; None: as suits the device.
        """
        workers = 1 if num_workers is None else num_workers
        return ThreadQueue(workers) if workers else InlineQueue()

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Computation issued from now on waits for ``event``; the host does not block on a real accelerator."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until all streams and all computation are done."""

    def activity(self) -> contextlib.AbstractContextManager[Any]:
        """A context inside which tensors made by computation count as being on this device."""
        return contextlib.nullcontext()

    def update_activity(self, numel: int, cost: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """An :meth:`activity` that updates so many elements with the optimizer (:attr:`gemini.codec.Codec.device_cost`)."""
        del numel, cost
        return self.activity()

    def host_updates(self, update: HostUpdate) -> None:
        """The program itself updates on the host."""
        del update

    def will_read(self, buffer: torch.Tensor) -> None:
        """The disk begins to read a buffer there."""
        del buffer

    def reads(self, buffer: torch.Tensor) -> None:
        """The program needs a buffer on disk now."""
        del buffer

    def exchanges(self, num_bytes: int) -> None:
        """So many bytes come from other processes, in the device's own computation."""
        del num_bytes

    def begin_exchanges(self) -> None:  # noqa: B027 - most streams begin them by themselves
        """The program is about to wait for other processes, which may wait for exchanges that are queued here."""

    def bookkeeping(self) -> contextlib.AbstractContextManager[Any]:
        """A context for the manager's own work: what it makes inside is counted by itself, or lies on the host."""
        return contextlib.nullcontext()

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """Pins host memory in place, at its exact size. False where the device has no such thing."""
        del address, num_bytes
        return False

    def unregister_host_memory(self, address: int) -> None:
        """Undoes :meth:`register_host_memory`."""
        del address

    def close(self) -> None:  # noqa: B027 - most devices change nothing outside themselves
        """Undoes what the device changed outside itself."""


class _DoneEvent(Event):
    is_done = True

    def synchronize(self) -> None:
        """Nothing to wait for: copies ran when they were queued."""


class _EventOfPending(Event):
    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = list(pending)

    def synchronize(self) -> None:
        """Waits for what was pending when the event was recorded."""
        while self._pending:
            self._pending[0].wait()
            del self._pending[0]

    @property
    def is_done(self) -> bool:
        """Whether it has been waited for."""
        return not self._pending


class InlineStream(Stream):
    """Runs each copy at once; for devices without asynchronous copies. Exchanges go on beside the program."""

    def __init__(self) -> None:
        self._pending: list[Pending] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies now."""
        with torch.no_grad():
            target.copy_(source)

    def run(self, work: Callable[[], None], numel: int) -> None:
        """Computes now."""
        del numel
        work()

    def exchange(self, begin: Callable[[], Sequence[Pending]], num_bytes: int, after: Event) -> None:
        """Begins now."""
        del num_bytes
        after.synchronize()
        self._pending += begin()

    def record(self) -> Event:
        """An event that has already happened, but for exchanges since the last one."""
        if not self._pending:
            return _DoneEvent()
        pending, self._pending = self._pending, []
        return _EventOfPending(pending)

    def wait_compute(self) -> None:
        """Computation on the host is never ahead of the program."""


class HostDevice(Device):
    """``device.type = "cpu"``: computes where the host memory is. No cap, no transfers to hide."""

    is_host = True

    def __init__(self) -> None:
        super().__init__()
        self.name = "cpu"
        self.torch_device = torch.device("cpu")
        self.capacity_bytes = host_memory().total_bytes
        self._is_tidy = False

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer in huge pages, where the machine has them, which goes back to it when it is freed.

        From the first one on computation's own large blocks go back, too: they lie in the same memory.
        """
        if not self._is_tidy:
            self._is_tidy = True
            begin_tidy()
        num_bytes = numel * dtype.itemsize
        with own_mapping(num_bytes):
            buffer = super().allocate(numel, dtype)
        prefer_huge_pages(buffer.data_ptr(), num_bytes)
        return buffer

    def take_again(self, buffer: torch.Tensor, numel: int) -> None:
        """Likewise; in ordinary pages, which were not slower for what lives as short as a gathered copy."""
        with own_mapping(numel * buffer.dtype.itemsize):
            super().take_again(buffer, numel)

    def close(self) -> None:
        """Computation's own large blocks are the heap's again."""
        if self._is_tidy:
            self._is_tidy = False
            end_tidy()

    def memory(self) -> DeviceMemory:
        """Model data only: on the host nobody counts the rest for us."""
        return DeviceMemory(self.model_data_bytes, 0, self.model_data_peak_bytes, 0)

    def _start_window(self) -> None:
        """Nothing beside the model data is counted."""

    def stream(self, name: str) -> Stream:
        """Copies run at once."""
        del name
        return InlineStream()

    def host_queue(self, num_workers: int | None) -> HostQueue:
        """Unless asked otherwise without threads: computation needs the same cores."""
        return super().host_queue(num_workers or 0)

    def wait(self, event: Event) -> None:
        """Nothing is ever pending."""
        event.synchronize()

    def synchronize(self) -> None:
        """Nothing is ever pending."""
