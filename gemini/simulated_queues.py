"""Copies and jobs that the simulated device has been given and has not carried out yet."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from gemini.clock import Booking, Clock
from gemini.device import Event, Pending, Stream
from gemini.jobs import HostQueue, Job
from gemini.profile import HostUpdate

if TYPE_CHECKING:
    from gemini.simulated import SimulatedDevice


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Work of the device itself, which no mode of the program sees."""
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        yield


class SimulatedEvent(Event):
    """After so many entries of a stream's queue.

    Attributes:
        at_s: when that is, in virtual time.
    """

    def __init__(self, stream: SimulatedStream, position: int, at_s: float) -> None:
        self._stream = stream
        self._position = position
        self.at_s = at_s

    def synchronize(self) -> None:
        """Runs the stream's queue up to the event."""
        self.run()
        self._stream.program_waits(self.at_s)

    def run(self) -> None:
        """The same, while the program does not wait."""
        self._stream.run_until(self._position)
        self._stream.require_whole(self._position)

    def wait_beside(self) -> None:
        """Runs the queue; the program's clock stands still."""
        self.run()

    @property
    def is_done(self) -> bool:
        """Whether it has happened; where there is virtual time, whether it would have."""
        clock = self._stream.clock
        return self._stream.has_run(self._position) if clock is None else self.at_s <= clock.host_s


class SimulatedStream(Stream):
    """A queue of copies that have not happened yet."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        # In virtual time: when what was queued last is done, and when what comes next may begin.
        self._done_s = self._earliest_s = 0.0
        self._queue: deque[tuple[torch.Tensor, torch.Tensor] | Callable[[], None] | None] = deque()
        self._num_queued = 0
        self._num_run = 0
        self._last_exchange = 0  # its place in the queue
        # The first computation that broke off: the position after it, and why.
        self._broken: tuple[int, BaseException] | None = None
        # Updates on threads wait for gradients that the program queued.
        self._lock = threading.RLock()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy; whether it runs now is up to the device's stream order."""
        self._queue.append((target, source))
        self._num_queued += 1
        self._done_s = max(self._done_s, self._device.copy_done_s(target, source, max(self._earliest_s, self._done_s)))
        self._device.something_was_queued()

    def run(self, work: Callable[[], None], numel: int) -> None:
        """Queues computation; it runs when the queue comes to it."""
        self._queue.append(work)
        self._num_queued += 1
        if self.clock is not None:
            duration_s = self.clock.profile.device_update_s(numel)
            self.clock.compute(duration_s)  # which it keeps waiting
            self._done_s = max(self._done_s, self._earliest_s) + duration_s
        self._device.something_was_queued()

    def exchange(self, begin: Callable[[], Sequence[Pending]], num_bytes: int, after: Event) -> None:
        """Queues it; it begins, and ends, when the queue comes to it."""

        def run() -> None:
            after.wait_beside()
            for pending in begin():
                pending.wait()

        self._queue.append(run)
        self._num_queued += 1
        self._last_exchange = self._num_queued
        if self.clock is not None:
            there_s = after.at_s if isinstance(after, SimulatedEvent) else 0.0
            self._done_s = self.clock.exchange_beside(num_bytes, max(self._done_s, self._earliest_s, there_s))
        self._device.something_was_queued()

    def begin_exchanges(self) -> None:
        """Runs the queue as far as there are exchanges in it."""
        self.run_until(self._last_exchange)

    @property
    def clock(self) -> Clock | None:
        """The device's."""
        return self._device.clock

    def has_run(self, position: int) -> bool:
        """Whether the queue has come to ``position``."""
        return self._num_run >= position

    def record(self) -> Event:
        """An event after everything queued so far."""
        return SimulatedEvent(self, self._num_queued, max(self._done_s, self._earliest_s))

    def wait_compute(self) -> None:
        """Computation runs as it is issued: whatever a copy must wait for has happened, but for virtual time."""
        if self._device.clock is not None:
            self._earliest_s = max(self._earliest_s, self._device.clock.compute_s)

    def program_waits(self, until_s: float) -> None:
        """The program has waited for an event of this stream."""
        if self._device.clock is not None:
            self._device.clock.wait(until_s)

    @property
    def done_s(self) -> float:
        """When all that was queued so far is done, in virtual time."""
        return self._done_s

    def run_until(self, position: int) -> None:
        """Runs what is queued, oldest first, up to ``position``."""
        with self._lock:
            while self._num_run < position:
                self._run_first()

    def _run_first(self) -> None:
        """Runs the oldest. A copy that is interrupted stays to be made; computation is not repeated, for nobody knows how
        far it came."""
        queued = self._queue[0]
        if callable(queued):
            self._pass_first()
            try:
                with unwatched():
                    queued()
            except BaseException as error:
                self._broken = self._broken or (self._num_run, error)
                raise
            return
        if queued is not None:
            with unwatched():
                queued[0].copy_(queued[1])
        self._pass_first()

    def _pass_first(self) -> None:
        self._queue.popleft()
        self._num_run += 1

    def require_whole(self, position: int) -> None:
        """Refuses to go on from what was queued before ``position`` as though all of it had run.

        Raises:
            RuntimeError: some of it broke off.
        """
        if self._broken is not None and self._broken[0] <= position:
            raise RuntimeError("computation on a stream of the simulated device broke off") from self._broken[1]

    @property
    def num_pending(self) -> int:
        """Copies not yet run."""
        return len(self._queue)

    def run_one(self) -> None:
        """Runs the oldest pending copy, unless another thread has run the last one meanwhile."""
        with self._lock:
            if self._queue:
                self._run_first()

    def part_with(self, buffer: torch.Tensor) -> None:
        """Memory goes while copies of it are queued.

        As with an allocator that knows which streams use a block: a copy that reads it still gets what it holds now,
        *when the copy runs*; one that writes it does no harm, so it is dropped.
        """
        address = buffer.untyped_storage().data_ptr()
        with self._lock:
            for index, pair in enumerate(self._queue):
                if pair is None or callable(pair):
                    continue
                target, source = pair
                if target.untyped_storage().data_ptr() == address:
                    self._queue[index] = None
                elif source.untyped_storage().data_ptr() == address:
                    with unwatched():
                        self._queue[index] = target, source.clone()


class _SimulatedJob(Job):
    def __init__(self, queue: SimulatedQueue, work: Callable[[], None], booking: Booking | None) -> None:
        self._queue = queue
        self._work: Callable[[], None] | None = work
        self._error: Exception | None = None
        self._booking = booking
        self._done_s = 0.0 if booking is None else booking.stop_s

    @property
    def is_done(self) -> bool:
        """Whether it has run; where there is virtual time, whether it would have."""
        clock = self._queue.clock
        return self._work is None if clock is None else self._done_s <= clock.host_s

    def run(self) -> None:
        """Runs the work; its error is for those who wait, an interrupt for whoever runs it as well."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            with unwatched():
                work()
        except Exception as error:
            self._error = error
        except BaseException:
            self._error = RuntimeError("a job on the host was interrupted: nobody knows how far it came")
            raise

    def wait(self) -> None:
        """Runs this job, if it has not run, and no other: who waits for one must not rely on those before it."""
        self._queue.forget(self)
        self.run()
        if self._queue.clock is not None:
            self._queue.clock.wait(self._done_s)
        if self._error is not None:
            raise self._error

    def withdraw(self) -> bool:
        """Where there is virtual time, if its time has not come; without, everything counts as begun."""
        clock = self._queue.clock
        if self._work is None or clock is None or self._booking is None or not clock.withdraw(self._booking):
            return False
        self._queue.forget(self)
        return True


class SimulatedQueue(HostQueue):
    """Jobs that have not run yet."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._jobs: dict[_SimulatedJob, None] = {}

    @property
    def clock(self) -> Clock | None:
        """The device's."""
        return self._device.clock

    def submit(self, work: Callable[[], None], update: HostUpdate | None = None, after: Sequence[Event] = ()) -> Job:
        """Queues ``work``; whether it runs now is up to the device's stream order."""
        booking = None
        if self.clock is not None:
            arrived_s = max((event.at_s for event in after if isinstance(event, SimulatedEvent)), default=0.0)
            booking = self.clock.update(update or HostUpdate(0), earliest_s=arrived_s)
        job = _SimulatedJob(self, work, booking)
        self._jobs[job] = None
        self._device.something_was_queued()
        return job

    @property
    def num_pending(self) -> int:
        """Jobs not yet run."""
        return len(self._jobs)

    def run_one(self) -> None:
        """Runs the oldest pending job."""
        job = next(iter(self._jobs))
        self.forget(job)
        job.run()

    def forget(self, job: _SimulatedJob) -> None:
        """The job runs now."""
        self._jobs.pop(job, None)
