"""When things happen, by a profile: the program, the device's computation, the link both ways, and updates on the host.

One rule for two users. The schedule of a plan (:mod:`gemini.schedule`) asks it to predict; the simulated device asks it
while a run really queues copies, jobs and operators. Each of the five is a queue: what is put into it begins when the
queue is free and what it waits for has happened.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemini.profile import HardwareProfile


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


COMPUTE, IN, OUT, UPDATE, WAIT = "device", "host to device", "device to host", "host update", "program waits"
LANES = (COMPUTE, IN, OUT, UPDATE, WAIT)
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
    """Five queues.

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
        self.spans: list[Span] | None = [] if draws else None
        self.busy_s = dict.fromkeys((*LANES, ISSUE), 0.0)

    @property
    def now_s(self) -> float:
        """When the program has come here and the device has computed all that it was given; updates may still run."""
        return max(self.host_s, self.compute_s)

    def _note(self, lane: str, label: str, start_s: float, stop_s: float, num_bytes: int = 0) -> None:
        self.busy_s[lane] += stop_s - start_s
        if self.spans is not None and stop_s > start_s:
            self.spans.append(Span(lane, label, start_s, stop_s, num_bytes))

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

    def update(self, numel: int, label: str = "") -> float:
        """The program queues an update on the host; returns when it is done."""
        self._issue(1)
        start_s = max(self.update_s, self.host_s)
        self.update_s = start_s + self.profile.host_update_s(numel)
        self._note(UPDATE, label, start_s, self.update_s)
        return self.update_s

    def update_now(self, numel: int, label: str = "") -> None:
        """The program itself updates on the host: with the cores and the memory that updates beside it would need."""
        start_s = max(self.update_s, self.host_s)
        self.wait(start_s, label)
        self.host_s = self.update_s = start_s + self.profile.host_update_s(numel)
        self._note(UPDATE, label, start_s, self.host_s)

    def touch_host_memory(self, num_bytes: float, label: str = "") -> None:
        """The program itself reads or writes host memory."""
        start_s = self.host_s
        self.host_s += num_bytes / self.profile.host_dram_bytes_per_s
        self._note(UPDATE, label, start_s, self.host_s)
