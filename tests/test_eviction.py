"""Furthest-next-use eviction: as few fetches as any order could do with, and predicted as the manager does it."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from instant import INSTANT
from memory_case import House, build, close, equal_chunks, spec, trace_of
from pass_case import Driver, Pass, Step, fill_states, passes

from gemini.plan import ChunkFacts, Plan
from gemini.policy import Policy
from gemini.segment import Placement
from gemini.timeline import replay, with_prediction
from gemini.trace import NextUse
from gemini.walk import choose_victim

PROFILE = INSTANT  # no update is under way when a pass begins: the driver makes none


def _fewest_fetches(reads: list[list[int]], num_slots: int) -> int:
    """By trying everything: each moment's chunks must be there together, anything else may stay or go."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for read in map(frozenset, reads):
        after: dict[frozenset[int], int] = {}
        for held, cost in costs.items():
            for num_kept in range(min(len(held - read), num_slots - len(read)) + 1):
                for kept in combinations(sorted(held - read), num_kept):
                    state = read | frozenset(kept)
                    after[state] = min(after.get(state, 10**9), cost + len(read - held))
        costs = after
    return min(costs.values())


_READS = st.lists(st.lists(st.integers(0, 4), max_size=2, unique=True), min_size=1, max_size=10)


@given(reads=_READS, num_slots=st.integers(2, 4))
@settings(max_examples=300, deadline=None)
def test_the_replay_fetches_as_little_as_any_order_could(reads: list[list[int]], num_slots: int) -> None:
    facts = [ChunkFacts(i, 4, 4, 0, f"unit{i}") for i in range(5)]
    found = replay(facts, [Placement()] * 5, trace_of(reads), num_slots * 16, PROFILE)
    assert found.num_fetches == _fewest_fetches(reads, num_slots)
    assert found.h2d_bytes == 16 * found.num_fetches
    assert found.fits


@given(reads=_READS, num_slots=st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_the_manager_fetches_as_little_as_any_order_could(reads: list[list[int]], num_slots: int) -> None:
    house = equal_chunks(5, numel=4, capacity_bytes=num_slots * 16)
    steps = [Step(f"m{i}", "forward", read) for i, read in enumerate(reads)]
    driver = _warmed_up(house, steps)
    driver.run(steps)
    assert house.manager.counters.num_fetches == _fewest_fetches(reads, num_slots)
    close(house)


def test_among_equals_the_lowest_index_goes() -> None:
    next_use = NextUse(trace_of([[0], [1], [2, 3], [0]]))
    assert choose_victim([2, 3], next_use, 0) == 2
    assert choose_victim([3, 2, 1], next_use, 1) == 2, "the chunk that this moment reads went"
    assert choose_victim([1], next_use, 1) == 1
    assert choose_victim([0, 2], next_use, 0) == 2
    assert choose_victim([4, 0], next_use, 3) == 4, "a chunk that no moment reads stayed"


@given(reads=_READS, chunk=st.integers(0, 5), position=st.integers(-1, 10))
def test_next_use_is_the_first_later_moment_that_reads(reads: list[list[int]], chunk: int, position: int) -> None:
    cycle = reads + reads + [[chunk]]
    assume(position < len(reads))
    later = next(i for i in range(position + 1, len(cycle)) if chunk in cycle[i])
    expected = later if later < 2 * len(reads) else 2 * len(reads) + 1
    assert NextUse(trace_of(reads)).after(chunk, position) == expected


# -- what is predicted is what happens -------------------------------------------------------------------------------


def _warmed_up(house: House, steps: Pass, placements: list[Placement] | None = None) -> Driver:
    """A driver after one recorded pass, with a plan from it."""
    capacity_bytes, house.device.capacity_bytes = house.device.capacity_bytes, 1 << 30
    driver = Driver(house)
    offloaded = [Placement() for _ in house.chunks]
    driver.apply(Plan("warm-up", offloaded))
    driver.run(steps)
    driver.zero_grad()
    house.device.capacity_bytes = capacity_bytes
    trace = house.manager.trace
    assert trace is not None
    plan = Plan("test", placements or offloaded)
    prediction = replay(house.facts, plan.placements, trace, capacity_bytes, PROFILE)
    driver.apply(with_prediction(plan, prediction, trace))
    return driver


def _units(sizes: list[tuple[int, int]]) -> list[list[object]]:
    return [[spec(f"p{i}.{j}", numel) for j in range(count)] for i, (numel, count) in enumerate(sizes)]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_predicted_fetches_evictions_and_peaks_are_the_managers(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=5))
    house = build(_units(sizes))  # type: ignore[arg-type]
    fill_states(house)
    steps = data.draw(passes(len(house.chunks)))
    placements = [
        Placement(*(data.draw(st.sampled_from([0, 0, chunk.numel, chunk.numel // 2])) for _ in range(2)))
        for chunk in house.chunks
    ]
    driver = _warmed_up(house, steps, placements)
    trace, plan, facts = house.manager.trace, house.manager.plan, house.facts
    assert trace is not None
    assert plan is not None
    # Room for each moment's own chunks beside its reserve; what else stays is up to the eviction.
    persistent_bytes = house.device.model_data_bytes
    copies = [0 if chunk.resident else chunk.num_bytes for chunk in house.chunks]
    needs = [moment.reserve_bytes + sum(copies[index] for index in moment.reads) for moment in trace.moments]
    least_bytes = persistent_bytes + max(*needs, *copies)
    capacity_bytes = least_bytes + data.draw(st.integers(0, 20)) * 4
    house.device.capacity_bytes = capacity_bytes
    depth = data.draw(st.integers(0, 4))
    predicted = replay(facts, placements, trace, capacity_bytes, PROFILE, prefetch_depth=depth)
    driver.apply(with_prediction(Plan("test", placements, prefetch_depth=depth), predicted, trace))
    house.device.lifetime_peaks()
    peak_bytes = persistent_bytes
    for step_number in range(2):  # the second pass finds nothing left over from the first
        house.manager.reset_counters()
        listener = _Peaks(house)
        house.manager.listener = listener
        driver.run(steps)
        peak_bytes = max(peak_bytes, listener.peak_bytes)
        counters = house.manager.counters
        assert counters.num_evictions == predicted.num_evictions
        assert counters.num_fetches == predicted.num_fetches
        assert house.transfer.h2d_bytes == predicted.h2d_bytes
        driver.check_sums()
        driver.zero_grad()
        house.manager.release_stale()
        assert step_number == 0 or house.manager.trace is trace
    assert predicted.fits
    assert peak_bytes == predicted.peak_bytes
    close(house)


class _Peaks:
    """The highest device bytes of the moments."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.peak_bytes = 0

    def moment_ended(self, moment: object) -> None:
        del moment
        self.peak_bytes = max(self.peak_bytes, self._house.device.memory().peak_bytes)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_a_warm_up_could_do_with_is_enough_for_a_plan(data: st.DataObject) -> None:
    """A pass that ran on a small device must not be refused there afterwards, nor fail under the plan made for it."""
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=4))
    house = build(_units(sizes))  # type: ignore[arg-type]
    steps = data.draw(passes(len(house.chunks)))
    roomy = Driver(house)
    roomy.apply(Plan("auto", [Placement() for _ in house.chunks]))
    roomy.run(steps)
    house.device.lifetime_peaks()
    trace = house.manager.trace
    assert trace is not None
    most_bytes = max(moment.both_peak_bytes for moment in trace.moments)
    house.device.capacity_bytes = max(most_bytes, *(chunk.num_bytes for chunk in house.chunks), 1)
    plan = Policy().decide(house.facts, trace, house.device.capacity_bytes)
    assert plan.predicted_device_peak_bytes <= house.device.capacity_bytes
    roomy.zero_grad()
    roomy.apply(plan)
    for _ in range(2):
        roomy.run(steps)
        roomy.check_sums()
    close(house)


def test_a_chunk_that_the_moment_still_reads_is_not_evicted_for_its_neighbour() -> None:
    """Units of three chunks, room for four: what the unit before left must go, not what is about to be read."""
    house = equal_chunks(6, numel=4, capacity_bytes=4 * 16)
    steps = [Step("a", "forward", [0, 1, 2]), Step("b", "forward", [3, 4, 5]), Step("c", "forward", [0, 1, 2])]
    driver = _warmed_up(house, steps)
    driver.run(steps)
    assert house.manager.counters.num_fetches == 3 + 3 + 2  # one of the first three stayed beside the other unit
    close(house)


class _OnDevice:
    """Which chunks are on the device when each moment ends."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.seen: list[list[int]] = []

    def moment_ended(self, moment: object) -> None:
        del moment
        self.seen.append([chunk.index for chunk in self._house.chunks if chunk.on_device])


@pytest.mark.parametrize(
    ("depth", "seen", "num_fetches"),
    [
        (0, [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3]], 4),
        (1, [[0, 1], [0, 1, 2], [0, 2, 3], [0, 2, 3], [0, 2, 3]], 4),
        (2, [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 2, 3], [0, 2, 3]], 5),  # too early: one more has to come back
    ],
)
def test_chunks_are_there_before_they_are_read(depth: int, seen: list[list[int]], num_fetches: int) -> None:
    house = equal_chunks(4, numel=4, capacity_bytes=3 * 16)
    steps = [Step(f"m{i}", "forward", [read]) for i, read in enumerate([0, 1, 2, 3, 0])]
    driver = _warmed_up(house, steps)
    plan, trace = house.manager.plan, house.manager.trace
    assert plan is not None
    assert trace is not None
    predicted = replay(house.facts, plan.placements, trace, 3 * 16, PROFILE, prefetch_depth=depth)
    driver.apply(with_prediction(Plan("test", plan.placements, prefetch_depth=depth), predicted, trace))
    house.manager.listener = listener = _OnDevice(house)
    driver.run(steps)
    assert listener.seen[: len(steps)] == seen
    assert house.manager.counters.num_fetches == num_fetches == predicted.num_fetches
    close(house)
