"""The simulated device: an accelerator made of host memory, stricter than any real one.

- Capacity: chunks, activations and temporaries all count; going over raises ``torch.OutOfMemoryError``.
- Procrastination: a queued copy runs only when an event or a synchronise forces it (or in a random legal order), so a
  missing wait is a wrong number every time.
- Poison: memory that is given out or given back is filled with NaN.
- Virtual time: with a profile, every queued copy, update and operator takes the time that it would take on that machine
  (:mod:`gemini.clock`); ``virtual_time_s`` tells how late it is there.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch

from gemini.clock import Clock
from gemini.device import Device, DeviceMemory, Event, Stream
from gemini.heap import LARGE_BYTES, give_back_free_memory, own_mapping, prefer_huge_pages
from gemini.jobs import HostQueue
from gemini.profile import HardwareProfile, HostUpdate
from gemini.simulated_queues import SimulatedEvent, SimulatedQueue, SimulatedStream, unwatched
from gemini.tracker import StorageTracker
from gemini.units import format_bytes
from gemini.work import Work


class StreamOrder(Enum):
    """When a simulated stream runs what is queued."""

    PROCRASTINATING = "procrastinating"
    """Only when somebody waits for it."""
    RANDOM = "random"
    """At random moments, from a seed; in order within a stream."""
    IMMEDIATE = "immediate"
    """At once."""


class SimulatedDevice(Device):
    """Host memory that behaves like a small accelerator.

    Args:
        capacity_bytes: model data plus non-model data may never exceed this.
        order: when queued copies run.
        seed: for ``StreamOrder.RANDOM``.
        poison: fill memory with NaN when it is given out and when it is given back.
        profile: of the machine whose time is reckoned; None: time is not.

    Attributes:
        clock: of that machine; None without a profile.
        others_bytes: that another process holds.
    """

    most_bytes_on_way = 1 << 20
    """What its queues hold is host memory, which a real device's would not be."""

    def __init__(
        self,
        capacity_bytes: int,
        order: StreamOrder = StreamOrder.PROCRASTINATING,
        seed: int = 0,
        poison: bool = True,
        profile: HardwareProfile | None = None,
    ) -> None:
        super().__init__()
        self.clock = None if profile is None else Clock(profile)
        if capacity_bytes <= 0:
            raise ValueError(f"the simulated device needs a positive capacity, got {capacity_bytes}")
        self.name = "simulated"
        self.torch_device = torch.device("cpu")
        self.capacity_bytes = capacity_bytes
        self.others_bytes = 0
        self._order = order
        self._random = random.Random(seed)
        self._poison = poison
        self._streams: list[SimulatedStream] = []
        self._queues: list[SimulatedQueue] = []
        self._tracker = StorageTracker(self._admit, guard_reads=True)
        self._updates = False
        self._peak_bytes = 0
        self._read_s: dict[int, float] = {}  # by address: when what the disk reads ahead is there
        _BackwardWatch.add(self)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _admit(self, num_bytes: int) -> None:
        """Refuses or counts ``num_bytes`` more, whatever they are for."""
        in_use_bytes = self.model_data_bytes + self._tracker.live_bytes
        if in_use_bytes + num_bytes > self.capacity_bytes - self.others_bytes:
            raise torch.OutOfMemoryError(
                f"simulated device out of memory: tried to allocate {format_bytes(num_bytes)}; "
                f"capacity {format_bytes(self.capacity_bytes)}, model data {format_bytes(self.model_data_bytes)}, "
                f"non-model data {format_bytes(self._tracker.live_bytes)}"
            )
        self._peak_bytes = max(self._peak_bytes, in_use_bytes + num_bytes)

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A poisoned buffer that counts against the capacity."""
        self._admit(numel * dtype.itemsize)
        with unwatched(), own_mapping(numel * dtype.itemsize):
            buffer = super().allocate(numel, dtype)
            prefer_huge_pages(buffer.data_ptr(), buffer.nbytes)
            self._fill(buffer)
        self._tracker.exempt(buffer)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Poisons and empties the buffer; see :meth:`SimulatedStream.part_with` for copies still queued on it."""
        for stream in self._streams:
            stream.part_with(buffer)
        num_bytes = buffer.nbytes
        with unwatched():
            self._fill(buffer)
            super().give_back(buffer)
        if num_bytes >= LARGE_BYTES:
            give_back_free_memory()  # a real device's memory would not have been taken from the host at all

    def forget(self, buffer: torch.Tensor) -> None:
        """Counts the buffer as non-model data for as long as somebody still holds it: a graph, a view of the user's."""
        super().forget(buffer)
        self._tracker.adopt(buffer)

    def take_again(self, buffer: torch.Tensor, numel: int) -> None:
        """Puts poisoned memory back under the buffer."""
        self._admit(numel * buffer.dtype.itemsize)
        with unwatched(), own_mapping(numel * buffer.dtype.itemsize):
            super().take_again(buffer, numel)
            # A chunk's page faults cost half its copy.
            prefer_huge_pages(buffer.data_ptr(), numel * buffer.dtype.itemsize)
            self._fill(buffer)

    def _fill(self, buffer: torch.Tensor) -> None:
        if self._poison and buffer.dtype.is_floating_point:
            buffer.fill_(float("nan"))

    def taken_bytes(self) -> int:
        """As somebody has said."""
        return self.others_bytes

    def memory(self) -> DeviceMemory:
        """Exact figures: every storage is followed."""
        return DeviceMemory(self.model_data_bytes, self._tracker.live_bytes, self._peak_bytes, self._tracker.peak_bytes)

    @property
    def refused_bytes(self) -> int:
        """What the refused request would have made of the non-model bytes."""
        return self._tracker.refused_bytes

    def _start_window(self) -> None:
        self._tracker.reset_peak()
        self._peak_bytes = self.model_data_bytes + self._tracker.live_bytes

    # -- streams -----------------------------------------------------------------------------------------------------

    def stream(self, name: str) -> Stream:
        """A new queue."""
        del name
        stream = SimulatedStream(self)
        self._streams.append(stream)
        return stream

    def something_was_queued(self) -> None:
        """Lets queued copies run, as the order has it."""
        if self._order is StreamOrder.IMMEDIATE:
            self._run_all([*self._streams, *self._queues])
        elif self._order is StreamOrder.RANDOM:
            while self._random.random() < 0.5:
                queues: list[SimulatedStream | SimulatedQueue] = [*self._streams, *self._queues]
                pending = [queue for queue in queues if queue.num_pending]
                if not pending:
                    return
                self._random.choice(pending).run_one()

    @staticmethod
    def _run_all(queues: Sequence[SimulatedStream | SimulatedQueue]) -> None:
        """In real time; the program's own clock stands still."""
        for queue in queues:
            while queue.num_pending:
                queue.run_one()

    def host_queue(self, num_workers: int | None) -> HostQueue:
        """Jobs run like copies: when the stream order says so, unless a number of threads was asked for."""
        if num_workers is not None:
            return super().host_queue(num_workers)
        queue = SimulatedQueue(self)
        self._queues.append(queue)
        return queue

    def wait(self, event: Event) -> None:
        """Computation is issued and run at once, so waiting means running the queue."""
        if self.clock is None or not isinstance(event, SimulatedEvent):
            event.synchronize()
            return
        event.run()
        self.clock.compute_waits(event.at_s)

    def synchronize(self) -> None:
        """Runs everything queued."""
        self._run_all(self._streams)
        if self.clock is not None:
            self.clock.wait(max([self.clock.compute_s, *(stream.done_s for stream in self._streams)]))

    # -- virtual time ------------------------------------------------------------------------------------------------

    @property
    def virtual_time_s(self) -> float:
        """When the program is here and the device has computed all it was given; 0 without a profile."""
        return 0.0 if self.clock is None else self.clock.now_s

    def copy_done_s(self, target: torch.Tensor, source: torch.Tensor, earliest_s: float) -> float:
        """When a copy that is queued now will be done."""
        if self.clock is None:
            return 0.0
        to_device, from_device = self._tracker.knows(target), self._tracker.knows(source)
        if to_device == from_device:  # on the device, or on the host: nothing crosses the link
            return max(earliest_s, self.clock.host_s)
        carry = self.clock.copy_in if to_device else self.clock.copy_out
        return carry(source.nbytes, earliest_s)

    def _reckon(self, work: Work) -> None:
        """An operator has been issued."""
        self.work.add(work)
        if self.clock is not None and not self._updates:
            profile = self.clock.profile
            self.clock.compute(profile.compute_s(work.flops, work.fp32_flops, work.traffic_bytes), work.num_ops)

    @contextlib.contextmanager
    def update_activity(self, numel: int, cost: float = 1.0) -> Iterator[None]:
        """Operators inside count, but take the time of an update as a whole."""
        if self.clock is not None:
            self.clock.compute(self.clock.profile.device_update_s(numel, cost))
        updated, self._updates = self._updates, True
        try:
            with self.activity():
                yield
        finally:
            self._updates = updated

    def host_updates(self, update: HostUpdate) -> None:
        """Takes the program's time, once the host is done with what was queued before."""
        if self.clock is not None and update.numel:
            self.clock.update_now(update)

    def will_read(self, buffer: torch.Tensor) -> None:
        """Once, until it is read."""
        if self.clock is not None and buffer.data_ptr() not in self._read_s:
            self._read_s[buffer.data_ptr()] = self.clock.read_disk(buffer.nbytes, self.clock.host_s)

    def reads(self, buffer: torch.Tensor) -> None:
        """The program waits until it is in memory."""
        if self.clock is not None:
            self.will_read(buffer)
            self.clock.wait(self._read_s.pop(buffer.data_ptr()))

    def exchanges(self, num_bytes: int) -> None:
        """Takes its turn among the computation."""
        if self.clock is not None:
            self.clock.exchange(num_bytes)

    def begin_exchanges(self) -> None:
        """Runs what is queued before them, and them: else two ranks could each wait for what the other has queued."""
        for stream in self._streams:
            stream.begin_exchanges()

    # -- which computation is on the device --------------------------------------------------------------------------

    def activity(self) -> contextlib.AbstractContextManager[None]:
        """Tensors made inside count against the capacity. May be nested."""
        self._tracker.on_work = self._reckon if self.counts_work or self.clock is not None else None
        return self._tracker.watching()

    def bookkeeping(self) -> contextlib.AbstractContextManager[None]:
        """Nothing made inside counts as activations."""
        return unwatched()

    def close(self) -> None:
        """Stops watching backward passes."""
        _BackwardWatch.remove(self)


class _BackwardWatch:
    """Puts a user's own ``loss.backward()`` into the activity of the simulated device whose forward it belongs to.

    A real device sees every allocation whoever starts the backward pass. Dispatch modes are captured when the backward
    pass starts, so the simulated device must be entered around the public entry point.
    """

    _devices: weakref.WeakSet[SimulatedDevice] = weakref.WeakSet()
    _original: Callable[..., Any] | None = None

    @classmethod
    def add(cls, device: SimulatedDevice) -> None:
        cls._devices.add(device)
        if cls._original is None:
            cls._original = torch.autograd.backward
            torch.autograd.backward = cls._backward

    @classmethod
    def remove(cls, device: SimulatedDevice) -> None:
        cls._devices.discard(device)
        if not cls._devices and cls._original is not None:
            torch.autograd.backward = cls._original
            cls._original = None

    @classmethod
    def _backward(cls, *args: Any, **kwargs: Any) -> None:
        if cls._original is None:
            raise RuntimeError("the backward watch was removed while a backward pass started")
        with contextlib.ExitStack() as stack:
            for device in list(cls._devices):
                if device.expects_backward:
                    stack.enter_context(device.activity())
            cls._original(*args, **kwargs)
