"""Whether to stream some updates to the device, and which: what ``auto`` tries once it has the best placement without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gemini.plan import ChunkFacts, offload_all
from gemini.profile import HardwareProfile
from gemini.schedule import Run
from gemini.search import Search
from gemini.segment import Placement
from gemini.streamed import streamed_bytes
from gemini.timeline import required_bytes
from gemini.trace import Trace

_WORTH = 0.99
"""Streaming is taken where a step is faster by more than this; the model is no more exact."""
_SHARES = tuple(eighths / 8 for eighths in range(1, 9))


def try_streamed(
    search: Search,
    facts: list[ChunkFacts],
    trace: Trace,
    capacity_bytes: int,
    profile: HardwareProfile,
    run: Run,
    depth: int | None,
) -> None:
    """Leaves in ``search`` the best of what it has found and of the same kind of placements with streamed updates.

    Args:
        search: has run.
        facts: of all chunks; likewise the rest, as they were given to the search.
        trace: of a pass.
        capacity_bytes: of the device.
        profile: rates.
        run: what a step does.
        depth: of prefetching; None: whatever is fastest.
    """
    room_bytes = capacity_bytes - streamed_bytes(trace.streamed_piece_numel)
    if not trace.streamed_piece_numel or not profile.streams_updates or room_bytes <= 0:
        return
    most_s = _WORTH * search.step_s
    beside = Search(facts, trace, room_bytes, profile, run, depth)  # what fits beside the pieces
    beside.run()
    for base in (*beside.finalists, offload_all("auto", facts).placements):
        if required_bytes(facts, base, trace, with_margin=True) > room_bytes:
            continue
        for placements in _streamed(facts, base):
            search.consider(placements, most_s)
    if any(placement.streams_update for placement in search.placements):
        search.take(search.placements)


def _streamed(facts: list[ChunkFacts], base: list[Placement]) -> Iterator[list[Placement]]:
    """Placements with some of the updates streamed that are the host's in ``base``, evenly spread: both work at once."""
    seen = {tuple(base)}
    for share in _SHARES:
        due_numel = 0.0
        placements = []
        for fact, placement in zip(facts, base, strict=True):
            is_whole = placement.companion_numel == 0 and placement.resident_numel in (0, fact.numel)
            if fact.may_stream and is_whole:
                due_numel += share * fact.numel
                if due_numel >= fact.numel / 2:
                    due_numel -= fact.numel
                    placement = replace(placement, streams_update=True)
            placements.append(placement)
        if tuple(placements) not in seen:
            seen.add(tuple(placements))
            yield placements
