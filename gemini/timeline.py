"""Replays a plan over a trace without running anything: peak bytes, fetches, bytes over the link, seconds.

The eviction rule is the manager's own, so that a prediction and a run of the same trace agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemini.plan import ChunkFacts, Plan, persistent_bytes
from gemini.segment import Placement
from gemini.trace import Moment, NextUse, Trace


@dataclass(frozen=True)
class HardwareProfile:
    """Rates that turn bytes and elements into seconds. Defaults: a PCIe 4 card in a desktop."""

    link_bytes_per_s: float = 22e9
    host_update_numel_per_s: float = 1.5e9
    device_update_numel_per_s: float = 25e9


@dataclass(frozen=True)
class Prediction:
    """What a replay found, for one micro-batch and one step."""

    peak_bytes: int
    num_fetches: int
    num_evictions: int
    h2d_bytes: int
    step_s: float
    fits: bool


def choose_victim(candidates: list[int], next_use: NextUse, position: int) -> int:
    """The chunk read furthest in the future (lowest index among equals); what this moment reads goes last of all."""
    return max(candidates, key=lambda chunk: (next_use.after(chunk, position - 1), -chunk))


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
    wanted_at = next_use.after(chunk, position)
    later = [other for other in candidates if next_use.after(other, position - 1) > wanted_at]
    victims: list[int] = []
    while num_bytes > room_bytes:
        if not later:
            return None
        victim = choose_victim(later, next_use, position)
        later.remove(victim)
        victims.append(victim)
        room_bytes += candidates[victim]
    return victims


def required_bytes(
    facts: list[ChunkFacts], placements: list[Placement], trace: Trace, with_margin: bool = False
) -> int:
    """The smallest device on which a pass like the trace's, and a step, run with these placements.

    Args:
        facts: of all chunks, by index.
        placements: by chunk index.
        trace: of one pass.
        with_margin: leave room for activations to grow from pass to pass (:attr:`Moment.reserve_bytes`).
    """
    return sum(persistent_bytes(facts, placements)) + transient_bytes(facts, placements, trace, with_margin)


def transient_bytes(
    facts: list[ChunkFacts], placements: list[Placement], trace: Trace, with_margin: bool = False
) -> int:
    """The part of :func:`required_bytes` that comes and goes: activations, gathered copies, temporaries of a step.

    It depends on which chunks are resident as a whole, and on whether any companions are on the device.
    """
    needs = needed_bytes(facts, placements, trace)
    if with_margin:
        needs = [n + m.reserve_bytes - m.non_model_peak_bytes for n, m in zip(needs, trace.moments, strict=True)]
    need_bytes = max(*needs, 0, largest_gathered_bytes(facts, placements))
    if any(placement.companion_numel for placement in placements):
        need_bytes = max(need_bytes, trace.step_peak_bytes)
    return need_bytes


def largest_gathered_bytes(facts: list[ChunkFacts], placements: list[Placement]) -> int:
    """Bytes of the largest chunk that must be gathered to be read."""
    return max((f.gathered_bytes for f, p in zip(facts, placements, strict=True) if not used_in_place(f, p)), default=0)


def used_in_place(fact: ChunkFacts, placement: Placement) -> bool:
    """Whether the chunk is used where it lies. Companions cut in two cut the values too: they must then be gathered.

    So must values of which others own a part.
    """
    return (
        not fact.others_numel
        and placement.resident_numel >= fact.numel
        and placement.companion_numel in (0, fact.numel)
    )


def needed_bytes(facts: list[ChunkFacts], placements: list[Placement], trace: Trace) -> list[int]:
    """Bytes beside what stays that each moment cannot do without."""
    gathered_bytes = [0 if used_in_place(f, p) else f.gathered_bytes for f, p in zip(facts, placements, strict=True)]
    were_resident = set(trace.resident)
    needs = []
    for moment in trace.moments:
        wanted_bytes = sum(gathered_bytes[chunk] for chunk in moment.reads)
        # Chunks that were resident when the trace was made took no gathered bytes then.
        more_bytes = sum(gathered_bytes[chunk] for chunk in moment.reads if chunk in were_resident)
        seen_bytes = moment.gathered_peak_bytes + more_bytes
        # A moment never holds more at once than it reads, or than it was seen to (0: nobody looked).
        need_bytes = min(wanted_bytes, seen_bytes or wanted_bytes) + moment.non_model_peak_bytes
        if moment.both_peak_bytes:
            need_bytes = min(need_bytes, moment.both_peak_bytes + more_bytes)
        needs.append(need_bytes)
    return needs


def replay(
    facts: list[ChunkFacts],
    placements: list[Placement],
    trace: Trace,
    capacity_bytes: int,
    profile: HardwareProfile,
    next_use: NextUse | None = None,
    prefetch_depth: int = 0,
) -> Prediction:
    """Walks through the trace as the manager would.

    Args:
        facts: of all chunks, by index.
        placements: the plan's, by chunk index.
        trace: of one pass.
        capacity_bytes: of the device.
        profile: rates for the seconds.
        next_use: of the trace, if the caller has it already.
        prefetch_depth: the plan's.
    """
    next_use = next_use or NextUse(trace)
    persistent = sum(persistent_bytes(facts, placements))
    needs = needed_bytes(facts, placements, trace)
    held_bytes = [0 if used_in_place(f, p) else f.gathered_bytes for f, p in zip(facts, placements, strict=True)]
    gathered = _Gathered(held_bytes, next_use)
    peak = persistent
    for position, moment in enumerate(trace.moments):
        room_bytes = capacity_bytes - persistent - moment.reserve_bytes
        gathered.enter(position, moment, room_bytes)
        reserves = [later.reserve_bytes for later in trace.moments[position : position + 1 + prefetch_depth]]
        gathered.prefetch(position, [capacity_bytes - persistent - reserve for reserve in reserves])
        # Where not even what the moment reads fits beside the reserve, it is held in turn.
        beside_bytes = min(gathered.num_bytes, max(0, room_bytes))
        peak = max(peak, persistent + max(needs[position], beside_bytes + moment.non_model_peak_bytes))
        gathered.leave(moment)
    if any(placement.companion_numel for placement in placements):
        peak = max(peak, persistent + trace.step_peak_bytes)
    h2d_bytes = sum(
        times * (fact.numel - placement.resident_numel) * fact.value_itemsize
        for times, fact, placement in zip(gathered.num_fetches, facts, placements, strict=True)
    )
    return Prediction(
        peak_bytes=peak,
        num_fetches=sum(gathered.num_fetches),
        num_evictions=gathered.num_evictions,
        h2d_bytes=h2d_bytes,
        step_s=_step_s(facts, placements, h2d_bytes, profile),
        fits=required_bytes(facts, placements, trace) <= capacity_bytes,
    )


class _Gathered:
    """The gathered copies of a replay.

    Args:
        chunk_bytes: of each chunk's copy; 0 where none is needed.
        next_use: of the trace.
    """

    def __init__(self, chunk_bytes: list[int], next_use: NextUse) -> None:
        self._chunk_bytes = chunk_bytes
        self._next_use = next_use
        self._held: set[int] = set()
        self.num_bytes = 0
        self.num_fetches = [0] * len(chunk_bytes)
        self.num_evictions = 0

    def enter(self, position: int, moment: Moment, room_bytes: int) -> None:
        """Fetches what the moment reads, after evicting what must go for it and for its activations."""
        wanted = [chunk for chunk in moment.reads if self._chunk_bytes[chunk]]
        missing = [chunk for chunk in wanted if chunk not in self._held]
        more_bytes = sum(self._chunk_bytes[chunk] for chunk in missing)
        candidates = [chunk for chunk in self._held if chunk not in wanted]
        while candidates and self.num_bytes + more_bytes > room_bytes:
            victim = choose_victim(candidates, self._next_use, position)
            candidates.remove(victim)
            self._drop(victim)
            self.num_evictions += 1
        for chunk in missing:
            self._held.add(chunk)
            self.num_fetches[chunk] += 1
        self.num_bytes += more_bytes

    def prefetch(self, position: int, room_bytes: list[int]) -> None:
        """Fetches what the coming moments read, if there is room for it from now on.

        Args:
            position: of the running moment.
            room_bytes: for gathered copies in this moment and in each of those that are looked at.
        """
        if any(self._chunk_bytes[c] and c not in self._held for c in self._next_use.reads(position)):
            return
        for chunk in self._next_use.coming(position, len(room_bytes) - 1):
            if not self._chunk_bytes[chunk] or chunk in self._held:
                continue
            least_bytes = min(room_bytes[: self._next_use.after(chunk, position) - position + 1])
            victims = room_for_prefetch(
                chunk,
                self._chunk_bytes[chunk],
                least_bytes - self.num_bytes,
                {held: self._chunk_bytes[held] for held in self._held},
                self._next_use,
                position,
            )
            if victims is None:
                return
            for victim in victims:
                self._drop(victim)
                self.num_evictions += 1
            self._held.add(chunk)
            self.num_fetches[chunk] += 1
            self.num_bytes += self._chunk_bytes[chunk]

    def leave(self, moment: Moment) -> None:
        """Copies whose gradients are complete went out with them."""
        for chunk in moment.gradients:
            if chunk in self._held:
                self._drop(chunk)

    def _drop(self, chunk: int) -> None:
        self._held.remove(chunk)
        self.num_bytes -= self._chunk_bytes[chunk]


def _step_s(facts: list[ChunkFacts], placements: list[Placement], h2d_bytes: int, profile: HardwareProfile) -> float:
    host_numel = device_numel = crossing_bytes = 0
    for fact, placement in zip(facts, placements, strict=True):
        if not fact.companion_bytes_per_numel:
            continue
        host_numel += fact.numel - placement.companion_numel
        device_numel += placement.companion_numel
        # Gradients of host-updated elements go out; new values of elements whose tiers differ cross once.
        crossing_bytes += (fact.numel - placement.companion_numel) * fact.value_itemsize
        crossing_bytes += abs(placement.companion_numel - placement.resident_numel) * fact.value_itemsize
    return (
        (h2d_bytes + crossing_bytes) / profile.link_bytes_per_s
        + host_numel / profile.host_update_numel_per_s
        + device_numel / profile.device_update_numel_per_s
    )


def with_prediction(plan: Plan, prediction: Prediction, trace: Trace) -> Plan:
    """The plan with what a replay found written into it."""
    plan.reserve_bytes = [moment.reserve_bytes for moment in trace.moments]
    plan.predicted_device_peak_bytes = prediction.peak_bytes
    plan.predicted_fetches = prediction.num_fetches
    plan.predicted_h2d_bytes = prediction.h2d_bytes
    plan.predicted_step_s = prediction.step_s
    return plan
