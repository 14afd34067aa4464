"""Walks through a trace as the manager would: what is fetched, what is fetched ahead, what gives way, and when.

The eviction rule is the manager's own, so that a prediction and a run of the same trace agree.
"""

from __future__ import annotations

from gemini.schedule import Schedule
from gemini.trace import Moment, NextUse, Trace


def choose_victim(candidates: list[int], next_use: NextUse, position: int) -> int:
    """The chunk read furthest in the future (lowest index among equals); what this moment reads goes last of all."""
    return next_use.furthest_first(candidates, position - 1)[0]


def room_for_prefetch(
    chunk: int,
    num_bytes: int,
    room_bytes: int,
    candidates: dict[int, int],
    next_use: NextUse,
    position: int,
) -> list[int] | None:
    """Which chunks give way for one that is fetched before it is read: only those that are read after it.

    Args:
        chunk: to be fetched.
        num_bytes: of its gathered copy.
        room_bytes: that are free for it; negative where more is held than should be.
        candidates: bytes of the gathered copies that could be dropped, by chunk.
        next_use: of the trace.
        position: of the running moment.

    Returns:
        The chunks to evict; None if there is no room.
    """
    if num_bytes <= room_bytes:
        return []
    wanted_at = next_use.after(chunk, position)
    victims: list[int] = []
    for victim in next_use.furthest_first(candidates, position - 1):
        if next_use.after(victim, position - 1) <= wanted_at:
            return None
        victims.append(victim)
        room_bytes += candidates[victim]
        if num_bytes <= room_bytes:
            return victims
    return None


class Walk:
    """The gathered copies of a replay.

    Args:
        chunk_bytes: of each chunk's copy; 0 where none is needed.
        trace: of a pass.
        next_use: of the trace.
        room_bytes: for gathered copies in each moment.
        prefetch_depth: the plan's.
        on_disk: by chunk, whether its values are read from disk; None: nowhere.

    Attributes:
        num_fetches: of each chunk in all passes.
        num_evictions: in all passes.
    """

    def __init__(
        self,
        chunk_bytes: list[int],
        trace: Trace,
        next_use: NextUse,
        room_bytes: list[int],
        prefetch_depth: int,
        on_disk: list[bool] | None = None,
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._moments = trace.moments
        self._next_use = next_use
        self._room_bytes = room_bytes
        self._depth = prefetch_depth
        self._on_disk = on_disk
        self._held: dict[int, int] = {}
        self._num_bytes = 0
        self.num_fetches = [0] * len(chunk_bytes)
        self.num_evictions = 0

    def run_pass(self, schedule: Schedule) -> list[int]:
        """One pass.

        Args:
            schedule: is told what happens in which order, and says which updates are not done yet.

        Returns:
            Gathered bytes at the end of each moment.
        """
        held_bytes = []
        for position, moment in enumerate(self._moments):
            self._enter(position, moment, schedule)
            self._prefetch(position, schedule)
            self._read_ahead(position, schedule)
            held_bytes.append(self._num_bytes)
            schedule.compute(position, moment)
            self._leave(moment, schedule)
        schedule.end_pass()
        return held_bytes

    def _enter(self, position: int, moment: Moment, schedule: Schedule) -> None:
        """Fetches what the moment reads, after evicting what must go for it and for its activations."""
        wanted = [chunk for chunk in moment.reads if self._chunk_bytes[chunk]]
        missing = [chunk for chunk in wanted if chunk not in self._held]
        more_bytes = sum(self._chunk_bytes[chunk] for chunk in missing)
        room_bytes = self._room_bytes[position]
        if self._num_bytes + more_bytes > room_bytes:
            candidates = [chunk for chunk in self._held if chunk not in wanted]
            for victim in self._next_use.furthest_first(candidates, position - 1):
                if self._num_bytes + more_bytes <= room_bytes:
                    break
                self._evict(victim)
        for chunk in missing:
            self._fetch(chunk, schedule)

    def _prefetch(self, position: int, schedule: Schedule) -> None:
        """Fetches what the coming moments read, if there is room for it from now on."""
        if not self._depth:
            return
        for chunk in self._next_use.coming(position, self._depth):
            num_bytes = self._chunk_bytes[chunk]
            if not num_bytes or chunk in self._held:
                continue
            if schedule.must_wait(chunk):
                return
            wanted_at = self._next_use.after(chunk, position)
            least_bytes = min(self._room_bytes[position : wanted_at + 1]) - self._num_bytes
            victims = room_for_prefetch(chunk, num_bytes, least_bytes, self._held, self._next_use, position)
            if victims is None:
                return
            for victim in victims:
                self._evict(victim)
            self._fetch(chunk, schedule)

    def _read_ahead(self, position: int, schedule: Schedule) -> None:
        """What could not be fetched ahead is at least read ahead, where it is on disk."""
        if self._on_disk is not None:
            for chunk in self._next_use.coming(position, self._depth + 1):
                if self._on_disk[chunk] and chunk not in self._held:
                    schedule.read_ahead(chunk)

    def _leave(self, moment: Moment, schedule: Schedule) -> None:
        """Copies whose gradients are complete go out with them."""
        schedule.send(moment)
        for chunk in moment.gradients:
            if chunk in self._held:
                self._drop(chunk)

    def _fetch(self, chunk: int, schedule: Schedule) -> None:
        self._held[chunk] = self._chunk_bytes[chunk]
        self._num_bytes += self._chunk_bytes[chunk]
        self.num_fetches[chunk] += 1
        schedule.fetch(chunk)

    def _evict(self, chunk: int) -> None:
        self._drop(chunk)
        self.num_evictions += 1

    def _drop(self, chunk: int) -> None:
        del self._held[chunk]
        self._num_bytes -= self._chunk_bytes[chunk]
