"""Replays a plan over a trace without running anything: peak bytes, fetches, bytes over the link, seconds.

The eviction rule is the manager's own, so that a prediction and a run of the same trace agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemini.plan import ChunkFacts, Plan, persistent_bytes
from gemini.segment import Placement
from gemini.trace import NextUse, Trace


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
    """The chunk read furthest in the future (lowest index among equals)."""
    return max(candidates, key=lambda chunk: (next_use.after(chunk, position), -chunk))


def replay(
    facts: list[ChunkFacts],
    placements: list[Placement],
    trace: Trace,
    capacity_bytes: int,
    profile: HardwareProfile,
    next_use: NextUse | None = None,
) -> Prediction:
    """Walks through the trace as the manager would.

    Args:
        facts: of all chunks, by index.
        placements: the plan's, by chunk index.
        trace: of one pass.
        capacity_bytes: of the device.
        profile: rates for the seconds.
        next_use: of the trace, if the caller has it already.
    """
    next_use = next_use or NextUse(trace)
    values, companions = persistent_bytes(facts, placements)
    persistent = values + companions
    gathered: dict[int, int] = {}
    peak, fits = persistent + trace.step_peak_bytes, persistent + trace.step_peak_bytes <= capacity_bytes
    num_fetches = num_evictions = h2d_bytes = 0
    for position, moment in enumerate(trace.moments):
        room = capacity_bytes - persistent - moment.non_model_peak_bytes
        wanted = [c for c in moment.reads if placements[c].resident_numel < facts[c].numel]
        missing = [c for c in wanted if c not in gathered]
        while sum(gathered.values()) + sum(facts[c].value_bytes for c in missing) > room:
            candidates = [c for c in gathered if c not in wanted]
            if not candidates:
                break
            gathered.pop(choose_victim(candidates, next_use, position))
            num_evictions += 1
        for chunk in missing:
            gathered[chunk] = facts[chunk].value_bytes
            num_fetches += 1
            h2d_bytes += (facts[chunk].numel - placements[chunk].resident_numel) * facts[chunk].value_itemsize
        # A moment never holds more at once than it was seen to, or than it reads.
        in_use = min(sum(gathered.values()), max(moment.gathered_peak_bytes, 0) or sum(gathered.values()))
        fits = fits and persistent + in_use + moment.non_model_peak_bytes <= capacity_bytes
        peak = max(peak, persistent + min(sum(gathered.values()), max(room, in_use)) + moment.non_model_peak_bytes)
        if moment.phase == "backward":
            for chunk in [
                c for c in gathered if facts[c].companion_bytes and next_use.after(c, position) > len(trace.moments)
            ]:
                gathered.pop(chunk)  # its gradient took the slot and went out
    step_s = _step_s(facts, placements, h2d_bytes, profile)
    return Prediction(peak, num_fetches, num_evictions, h2d_bytes, step_s, fits)


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
    plan.reserve_bytes = [moment.non_model_peak_bytes for moment in trace.moments]
    plan.predicted_device_peak_bytes = prediction.peak_bytes
    plan.predicted_fetches = prediction.num_fetches
    plan.predicted_h2d_bytes = prediction.h2d_bytes
    plan.predicted_step_s = prediction.step_s
    return plan
