"""When things happen, by a profile: the program, the device's computation, the link both ways, updates on the host, the
disk, and the exchange with other ranks.

One rule for two users. The schedule of a plan (:mod:`gemini.schedule`) asks it to predict; the simulated device asks it
while a run really queues copies, jobs and operators. Each of them is a queue: what is put into it begins when the
queue is free and what it waits for has happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemini.profile import HardwareProfile, HostUpdate


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        lane: one of :data:`LANES`.
        label: what it was.
        start_s: since the clock began.
        stop_s: likewise.
        num_bytes: that were moved; 0 where none were.
    """

    lane: str
    label: str
    start_s: float
    stop_s: float
    num_bytes: int = 0


@dataclass(frozen=True)
class Booking:
    """An update in the queue of the host.

    Attributes:
        before_s: when the queue is done with what was there before.
        before_start_s: when the last of that begins.
        start_s: when it begins.
        stop_s: when it is done.
        span: of the picture; None where there is none.
    """

    before_s: float
    before_start_s: float
    start_s: float
    stop_s: float
    span: Span | None


COMPUTE, IN, OUT, UPDATE, WAIT = "device", "host to device", "device to host", "host update", "program waits"
DISK, EXCHANGE = "disk", "between ranks"
LANES = (COMPUTE, IN, OUT, UPDATE, DISK, EXCHANGE, WAIT)
ISSUE = "program issues"
"""What the program takes to issue operators, copies and updates; in :attr:`Clock.busy_s` only."""


class _Link:
    """One direction of the link.

    Attributes:
        start_s: when the copies that end at ``stop_s`` without a gap began.
        stop_s: when it is free.
    """

    def __init__(self, alone_bytes_per_s: float, both_bytes_per_s: float) -> None:
        self.alone_bytes_per_s = alone_bytes_per_s
        self.both_bytes_per_s = min(both_bytes_per_s, alone_bytes_per_s)
        self.start_s = self.stop_s = 0.0

    def carry(self, num_bytes: int, earliest_s: float, other: _Link) -> tuple[float, float]:
        """Books a copy; returns when it starts and stops. While the other direction is busy both are slower."""
        start_s = max(self.stop_s, earliest_s)
        stop_s = start_s + num_bytes / self.alone_bytes_per_s
        if other.stop_s > start_s and other.start_s < stop_s:
            from_s = max(start_s, other.start_s)
            left_bytes = num_bytes - (from_s - start_s) * self.alone_bytes_per_s
            together_bytes = (other.stop_s - from_s) * self.both_bytes_per_s
            if left_bytes <= together_bytes:
                stop_s = from_s + left_bytes / self.both_bytes_per_s
            else:
                stop_s = other.stop_s + (left_bytes - together_bytes) / self.alone_bytes_per_s
        if start_s > self.stop_s:
            self.start_s = start_s
        self.stop_s = stop_s
        return start_s, stop_s


class Clock:
    """The queues.

    Args:
        profile: of the machine.
        draws: keep what happened in ``spans``.

    Attributes:
        host_s: how far the program has come. It runs ahead of the device, except where it waits.
        compute_s: when the device is done with all computation issued so far.
        update_s: when the host is done with all updates queued so far.
        spans: everything that took time, for a picture; None where nobody wants one.
        busy_s: seconds in which each queue worked, and those that the program spent issuing.
    """

    def __init__(self, profile: HardwareProfile, draws: bool = False) -> None:
        self.profile = profile
        self.host_s = self.compute_s = self.update_s = 0.0
        self._in = _Link(profile.h2d_bytes_per_s, profile.both_bytes_per_s)
        self._out = _Link(profile.d2h_bytes_per_s, profile.both_bytes_per_s)
        # When the disk is free; when the update queued last begins; its bytes that the disk has not written yet, and from
        # when on it may.
        self._disk_s = self._update_start_s = 0.0
        self._exchange_s = 0.0  # when the way to the other ranks is free
        self._unwritten: tuple[int, float] | None = None
        self.spans: list[Span] | None = [] if draws else None
        self.busy_s = dict.fromkeys((*LANES, ISSUE), 0.0)

    @property
    def now_s(self) -> float:
        """When the program has come here and the device has computed all that it was given; updates may still run."""
        return max(self.host_s, self.compute_s)

    def _note(self, lane: str, label: str, start_s: float, stop_s: float, num_bytes: int = 0) -> Span | None:
        self.busy_s[lane] += stop_s - start_s
        if self.spans is None or stop_s <= start_s:
            return None
        span = Span(lane, label, start_s, stop_s, num_bytes)
        self.spans.append(span)
        return span

    def _issue(self, num_times: int) -> None:
        duration_s = num_times * self.profile.launch_s
        self.host_s += duration_s
        self.busy_s[ISSUE] += duration_s

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, until_s: float, label: str = "") -> None:
        """The program waits."""
        if until_s > self.host_s:
            self._note(WAIT, label, self.host_s, until_s)
            self.host_s = until_s

    def compute_waits(self, until_s: float) -> None:
        """Computation issued from now on waits; the program does not."""
        self.compute_s = max(self.compute_s, until_s)

    # -- working -----------------------------------------------------------------------------------------------------

    def compute(self, duration_s: float, num_ops: int = 1, label: str = "") -> None:
        """The program issues computation."""
        start_s = max(self.compute_s, self.host_s)
        self._issue(num_ops)
        # Where operators are shorter than it takes to issue them, the device waits for the program.
        self.compute_s = max(start_s + duration_s, self.host_s)
        self._note(COMPUTE, label, start_s, start_s + duration_s)

    def copy_in(self, num_bytes: int, earliest_s: float = 0.0, label: str = "") -> float:
        """The program queues a copy to the device; returns when it is there."""
        return self._copy(IN, self._in, self._out, num_bytes, earliest_s, label)

    def copy_out(self, num_bytes: int, earliest_s: float = 0.0, label: str = "") -> float:
        """The program queues a copy to the host; returns when it is there."""
        return self._copy(OUT, self._out, self._in, num_bytes, earliest_s, label)

    def _copy(self, lane: str, link: _Link, other: _Link, num_bytes: int, earliest_s: float, label: str) -> float:
        self._issue(1)
        start_s, stop_s = link.carry(num_bytes, max(earliest_s, self.host_s), other)
        self._note(lane, label, start_s, stop_s, num_bytes)
        return stop_s

    def exchange(self, num_bytes: float, label: str = "") -> None:
        """The program issues an exchange between ranks, which takes its turn among the device's computation.

        Args:
            num_bytes: that this rank receives.
            label: what it was.
        """
        self.compute_s = self.exchange_beside(num_bytes, self.compute_s, label)

    def exchange_beside(self, num_bytes: float, earliest_s: float = 0.0, label: str = "") -> float:
        """The program queues an exchange between ranks beside the computation; returns when it has ended."""
        self._issue(1)
        start_s = max(earliest_s, self.host_s, self._exchange_s)
        self._exchange_s = start_s + num_bytes / self.profile.rank_link_bytes_per_s
        self._note(EXCHANGE, label, start_s, self._exchange_s, int(num_bytes))
        return self._exchange_s

    def update(self, what: HostUpdate, label: str = "", earliest_s: float = 0.0) -> Booking:
        """The program queues an update on the host."""
        self._issue(1)
        before_s, before_start_s = self.update_s, self._update_start_s
        span = self._update(what, max(before_s, self.host_s, earliest_s), label)
        return Booking(before_s, before_start_s, self._update_start_s, self.update_s, span)

    def withdraw(self, last: Booking) -> bool:
        """Takes the last update out of the queue; False if it has begun, or the disk has begun to read for it."""
        if last.start_s <= self.host_s or last.stop_s != self.update_s or self._unwritten is not None:
            return False
        self.update_s, self._update_start_s = last.before_s, last.before_start_s
        self.busy_s[UPDATE] -= last.stop_s - last.start_s
        if self.spans is not None and last.span in self.spans:
            self.spans.remove(last.span)
        return True

    def update_now(self, what: HostUpdate, label: str = "") -> None:
        """The program itself updates on the host: with the cores and the memory that updates beside it would need."""
        self.wait(max(self.update_s, self.host_s), label)
        self._update(what, self.host_s, label)
        self.wait(self.update_s, label)

    def _update(self, what: HostUpdate, start_s: float, label: str) -> Span | None:
        if what.disk_bytes:
            # What is on disk is read while the update before it runs, and written while the one after it does.
            start_s = max(start_s, self.read_disk(what.disk_bytes, max(self.host_s, self._update_start_s), label))
            self.write_disk(label)
        self._update_start_s = start_s
        self.update_s = start_s + self.profile.host_update_s(what.numel, what.bytes_per_numel, what.speed)
        if what.disk_bytes:
            self._unwritten = what.disk_bytes, self.update_s
        return self._note(UPDATE, label, start_s, self.update_s)

    def read_disk(self, num_bytes: int, earliest_s: float = 0.0, label: str = "") -> float:
        """Something is read from disk; returns when it is there. What is to be written and can be comes first."""
        if self._unwritten is not None and self._unwritten[1] <= max(self._disk_s, earliest_s):
            self.write_disk(label)
        return self._use_disk(num_bytes / self.profile.disk_read_bytes_per_s, earliest_s, label, num_bytes)

    def write_disk(self, label: str = "") -> None:
        """The disk writes what an update has left for it."""
        if self._unwritten is not None:
            (num_bytes, earliest_s), self._unwritten = self._unwritten, None
            self._use_disk(num_bytes / self.profile.disk_write_bytes_per_s, earliest_s, label, num_bytes)

    def _use_disk(self, duration_s: float, earliest_s: float, label: str, num_bytes: int) -> float:
        start_s = max(self._disk_s, earliest_s)
        self._disk_s = start_s + duration_s
        self._note(DISK, label, start_s, self._disk_s, num_bytes)
        return self._disk_s

    def touch_host_memory(self, num_bytes: float, label: str = "") -> None:
        """The program itself reads or writes host memory."""
        start_s = self.host_s
        self.host_s += num_bytes / self.profile.host_dram_bytes_per_s
        self._note(UPDATE, label, start_s, self.host_s)
