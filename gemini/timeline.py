"""Replays a plan over a trace without running anything: peak bytes, fetches, bytes over the link, seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemini.clock import Clock
from gemini.plan import ChunkFacts, Plan, persistent_bytes
from gemini.profile import HardwareProfile
from gemini.schedule import Run, Schedule, moment_costs
from gemini.segment import Placement
from gemini.streamed import streamed_bytes
from gemini.trace import NextUse, Trace
from gemini.walk import Walk


@dataclass(frozen=True)
class Prediction:
    """What a replay found.

    Attributes:
        peak_bytes: highest device bytes of a step.
        num_fetches: chunk fetches of the first micro-batch.
        num_evictions: likewise.
        h2d_bytes: bytes to the device, likewise.
        step_s: from one ``step()`` to the next, all micro-batches.
        fits: whether the device is large enough.
        busy_s: of a step, by :attr:`gemini.clock.Clock.busy_s`.
        clock: what happened when, in the passes that were walked through.
    """

    peak_bytes: int
    num_fetches: int
    num_evictions: int
    h2d_bytes: int
    step_s: float
    fits: bool
    busy_s: dict[str, float]
    clock: Clock


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
    staying_bytes = sum(persistent_bytes(facts, placements)) + lane_bytes(placements, trace)
    return staying_bytes + transient_bytes(facts, placements, trace, with_margin)


def lane_bytes(placements: list[Placement], trace: Trace) -> int:
    """Bytes that stay on the device for updates that are streamed to it."""
    return streamed_bytes(trace.streamed_piece_numel) if any(p.streams_update for p in placements) else 0


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


@dataclass(frozen=True)
class TimedStep:
    """What :meth:`Replay.time` found; fetches, evictions and gathered bytes (per moment) of the first micro-batch."""

    step_s: float
    busy_s: dict[str, float]
    num_fetches: list[int]
    num_evictions: int
    gathered_bytes: list[int]
    clock: Clock


class Replay:
    """Walks through a step as the manager would: the update of the step before, then the passes over the trace.

    Args:
        facts: of all chunks, by index.
        trace: of one pass.
        capacity_bytes: of the device.
        profile: rates for the seconds.
        run: what a step does; by default one pass.

    Attributes:
        run: likewise, in as many passes as the trace is of.
        costs: of each moment.
    """

    def __init__(
        self,
        facts: list[ChunkFacts],
        trace: Trace,
        capacity_bytes: int,
        profile: HardwareProfile,
        run: Run | None = None,
    ) -> None:
        self._facts = facts
        self._trace = trace
        self._capacity_bytes = capacity_bytes
        self._profile = profile
        self.run = replace(run or Run(), in_one_pass=trace.is_window)
        self.costs = moment_costs(facts, trace, profile)
        self._next_use = NextUse(trace)

    def predict(self, placements: list[Placement], prefetch_depth: int = 0, draws: bool = False) -> Prediction:
        """Bytes and seconds.

        Args:
            placements: the plan's, by chunk index.
            prefetch_depth: the plan's.
            draws: keep what happened when, for a picture.
        """
        facts, trace, capacity_bytes = self._facts, self._trace, self._capacity_bytes
        persistent = sum(persistent_bytes(facts, placements)) + lane_bytes(placements, trace)
        timed = self.time(placements, prefetch_depth, draws)
        peak = persistent
        needs = needed_bytes(facts, placements, trace)
        for need, beside, moment in zip(needs, timed.gathered_bytes, trace.moments, strict=True):
            room = capacity_bytes - persistent - moment.reserve_bytes
            # Where not even what the moment reads fits beside the reserve, it is held in turn.
            peak = max(peak, persistent + max(need, min(beside, max(0, room)) + moment.non_model_peak_bytes))
        if any(placement.companion_numel for placement in placements):
            peak = max(peak, persistent + trace.step_peak_bytes)
        h2d_bytes = sum(
            times * (fact.numel - placement.resident_numel) * fact.value_itemsize
            for times, fact, placement in zip(timed.num_fetches, facts, placements, strict=True)
        )
        return Prediction(
            peak_bytes=peak,
            num_fetches=sum(timed.num_fetches),
            num_evictions=timed.num_evictions,
            h2d_bytes=h2d_bytes,
            step_s=timed.step_s,
            fits=required_bytes(facts, placements, trace) <= capacity_bytes,
            busy_s=timed.busy_s,
            clock=timed.clock,
        )

    def time(self, placements: list[Placement], prefetch_depth: int = 0, draws: bool = False) -> TimedStep:
        """The part of :meth:`predict` that is about time."""
        facts, trace, run = self._facts, self._trace, self.run
        free_bytes = self._capacity_bytes - sum(persistent_bytes(facts, placements)) - lane_bytes(placements, trace)
        held_bytes = [0 if used_in_place(f, p) else f.gathered_bytes for f, p in zip(facts, placements, strict=True)]
        rooms = [free_bytes - moment.reserve_bytes for moment in trace.moments]
        on_disk = [f.values_on_disk for f in facts]
        walk = Walk(held_bytes, trace, self._next_use, rooms, prefetch_depth, on_disk if any(on_disk) else None)
        schedule = Schedule(facts, placements, self.costs, self._profile, run, draws, trace.streamed_piece_numel)
        schedule.begin()
        gathered_bytes = walk.run_pass(schedule)
        num_fetches, num_evictions = list(walk.num_fetches), walk.num_evictions
        if run.has_early_updates:
            step_s, busy_s = _another_step(walk, schedule)
        else:
            step_s, busy_s = _rest_of_step(walk, schedule, run)
        return TimedStep(step_s, busy_s, num_fetches, num_evictions, gathered_bytes, schedule.clock)


def replay(
    facts: list[ChunkFacts],
    placements: list[Placement],
    trace: Trace,
    capacity_bytes: int,
    profile: HardwareProfile,
    prefetch_depth: int = 0,
    run: Run | None = None,
    draws: bool = False,
) -> Prediction:
    """One plan alone; see :class:`Replay` and :meth:`Replay.predict`."""
    return Replay(facts, trace, capacity_bytes, profile, run).predict(placements, prefetch_depth, draws)


def _another_step(walk: Walk, schedule: Schedule) -> tuple[float, dict[str, float]]:
    """Of the step after one whose pass is over, and which has begun some of its updates."""
    clock = schedule.clock
    schedule.end()
    before_s, before_busy_s = clock.host_s, dict(clock.busy_s)
    schedule.begin()
    walk.run_pass(schedule)
    schedule.end()
    return clock.host_s - before_s, {lane: s - before_busy_s[lane] for lane, s in clock.busy_s.items()}


_MOST_PASSES = 3


def _rest_of_step(walk: Walk, schedule: Schedule, run: Run) -> tuple[float, dict[str, float]]:
    """Seconds of a step of which the first pass is over, in all and per lane. From the third on, passes are alike."""
    clock = schedule.clock
    before_s, before_busy_s = clock.now_s, dict(clock.busy_s)
    for _ in range(min(run.num_passes, _MOST_PASSES) - 1):
        before_s, before_busy_s = clock.now_s, dict(clock.busy_s)
        walk.run_pass(schedule)
    after_s, after_busy_s = clock.now_s, dict(clock.busy_s)
    schedule.end()
    num_more = max(0, run.num_passes - _MOST_PASSES)
    busy_s = {lane: s + num_more * (after_busy_s[lane] - before_busy_s[lane]) for lane, s in clock.busy_s.items()}
    return clock.host_s + num_more * (after_s - before_s), busy_s


def with_prediction(plan: Plan, prediction: Prediction, trace: Trace) -> Plan:
    """The plan with what a replay found written into it."""
    plan.reserve_bytes = [moment.reserve_bytes for moment in trace.moments]
    plan.predicted_device_peak_bytes = prediction.peak_bytes
    plan.predicted_fetches = prediction.num_fetches
    plan.predicted_h2d_bytes = prediction.h2d_bytes
    plan.predicted_step_s = prediction.step_s
    plan.predicted_busy_s = prediction.busy_s
    plan.streamed_bytes = lane_bytes(plan.placements, trace)
    return plan
