"""The time model: queues by hand, a whole step by hand, and what must hold of every step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instant import INSTANT
from memory_case import trace_of

from gemini.clock import COMPUTE, IN, ISSUE, LANES, OUT, UPDATE, WAIT, Clock
from gemini.plan import ChunkFacts
from gemini.profile import HardwareProfile, HostUpdate
from gemini.schedule import Run, moment_costs
from gemini.segment import Placement
from gemini.timeline import replay
from gemini.trace import Moment, Trace

# A machine whose seconds can be reckoned in the head: 10 B/s each way, 5 of them while both run, 1 element updated a
# second on the host and 10 on the device, 1 FLOP/s.
SLOW = replace(
    INSTANT,
    name="slow",
    h2d_bytes_per_s=10.0,
    d2h_bytes_per_s=10.0,
    both_bytes_per_s=5.0,
    host_update_numel_per_s=1.0,
    device_update_numel_per_s=10.0,
    device_flops_per_s=1.0,
    device_fp32_flops_per_s=0.5,
)


class TestClock:
    def test_computation_is_a_queue_behind_the_program(self) -> None:
        clock = Clock(replace(SLOW, launch_s=1.0))
        clock.compute(5.0)
        assert (clock.host_s, clock.compute_s) == (1.0, 5.0)
        clock.compute(2.0)
        assert (clock.host_s, clock.compute_s) == (2.0, 7.0)
        clock.compute(0.5, num_ops=9)  # shorter than it takes to issue
        assert (clock.host_s, clock.compute_s) == (11.0, 11.0)
        assert clock.busy_s[ISSUE] == 11.0

    def test_copies_the_same_way_follow_one_another(self) -> None:
        clock = Clock(SLOW)
        assert clock.copy_in(20) == 2.0
        assert clock.copy_in(10) == 3.0
        assert clock.copy_in(10, earliest_s=7.0) == 8.0
        assert clock.busy_s[IN] == 4.0

    @pytest.mark.parametrize(
        ("start_s", "num_bytes", "stop_s"),
        [
            pytest.param(0.0, 10, 2.0, id="wholly beside the other way"),
            pytest.param(0.0, 30, 5.0, id="the other way ends first"),  # 4 s at 5 B/s, 1 s at 10 B/s
            pytest.param(4.0, 10, 5.0, id="after it"),
            pytest.param(2.0, 20, 5.0, id="in the middle of it"),  # 2 s at 5 B/s, 1 s at 10 B/s
        ],
    )
    def test_both_ways_at_once_are_slower(self, start_s: float, num_bytes: int, stop_s: float) -> None:
        clock = Clock(SLOW)
        clock.copy_in(40)
        assert clock.copy_out(num_bytes, start_s) == pytest.approx(stop_s)

    def test_updates_wait_for_the_program_and_for_one_another(self) -> None:
        clock = Clock(SLOW)
        clock.wait(3.0)
        assert clock.update(HostUpdate(2)).stop_s == 5.0
        assert clock.update(HostUpdate(1)).stop_s == 6.0
        assert clock.host_s == 3.0
        assert (clock.busy_s[WAIT], clock.busy_s[UPDATE]) == (3.0, 3.0)

    def test_an_update_that_is_withdrawn_leaves_no_trace(self) -> None:
        clock = Clock(replace(SLOW, disk_read_bytes_per_s=10.0, disk_write_bytes_per_s=10.0), draws=True)
        clock.update(HostUpdate(3), "first")
        clock.compute(1.0, label="forward")
        for numel in (2, 0):  # one of no elements has no span of its own
            assert clock.withdraw(clock.update(HostUpdate(numel), "second"))
        assert [span.label for span in clock.spans or []] == ["first", "forward"]
        assert (clock.update_s, clock.busy_s[UPDATE]) == (3.0, 3.0)
        # What is on disk is read from when the update before it begins: the first, at 0.
        assert clock.update(HostUpdate(1, disk_bytes=20)).start_s == 3.0

    def test_host_memory_bounds_updates(self) -> None:
        slow_memory = replace(SLOW, host_update_numel_per_s=1e9, host_dram_bytes_per_s=30.0)
        assert slow_memory.host_update_s(7) == pytest.approx(7.0)  # 28 bytes, and 2 of the fetch that follows

    def test_spans_are_kept_only_where_a_picture_is_wanted(self) -> None:
        assert Clock(SLOW).spans is None
        clock = Clock(SLOW, draws=True)
        clock.copy_in(20, label="a")
        spans = clock.spans
        assert spans is not None
        assert [(span.lane, span.label, span.start_s, span.stop_s, span.num_bytes) for span in spans] == [
            (IN, "a", 0.0, 2.0, 20)
        ]


def _two_units() -> tuple[list[ChunkFacts], Trace]:
    """Two chunks of ten bf16 elements; each moment computes for 3 seconds."""
    facts = [ChunkFacts(i, 10, 2, 14, f"unit{i}", 2) for i in range(2)]
    trace = trace_of([[0], [1], [1], [0]])
    for moment in trace.moments:
        moment.flops, moment.num_ops = 3.0, 1
    trace.moments[2].gradients, trace.moments[3].gradients = [1], [0]
    return facts, trace


class TestStep:
    def test_all_offloaded_without_prefetching(self) -> None:
        """Updates 0-10 and 10-20; fetch 10-12, compute 12-15, fetch 20-22, compute 22-25 and again 25-28 (it stayed),
        gradient 28-30; fetch of the first: it stayed too, compute 28-31, gradient 31-33."""
        facts, trace = _two_units()
        found = replay(facts, [Placement()] * 2, trace, 10_000, SLOW)
        assert found.step_s == pytest.approx(33.0)
        busy = {lane: found.busy_s[lane] for lane in (COMPUTE, IN, OUT, UPDATE)}
        assert busy == pytest.approx({COMPUTE: 12.0, IN: 4.0, OUT: 4.0, UPDATE: 20.0})

    def test_a_chunk_that_had_to_go_is_fetched_again_beside_a_gradient(self) -> None:
        """Room for one copy: as above, but the second fetch of the first chunk begins at 28: 10 bytes in the 2 s for which
        the gradient leaves, 10 more until 31; compute until 34, gradient until 36."""
        facts, trace = _two_units()
        found = replay(facts, [Placement()] * 2, trace, 20, SLOW)
        assert found.num_fetches == 3
        assert found.step_s == pytest.approx(36.0)

    def test_what_is_on_the_device_needs_no_link(self) -> None:
        facts, trace = _two_units()
        found = replay(facts, [Placement(10, 10)] * 2, trace, 10_000, SLOW)
        assert found.step_s == pytest.approx(2 * 1.0 + 4 * 3.0)
        assert found.busy_s[IN] == found.busy_s[OUT] == found.busy_s[UPDATE] == 0.0

    def test_states_that_are_taken_apart_cost_the_device_more(self) -> None:
        facts, trace = _two_units()
        coded = [replace(fact, device_update_cost=8.0) for fact in facts]
        one, other = (replay(each, [Placement(10, 10)] * 2, trace, 10_000, SLOW) for each in (facts, coded))
        assert other.step_s - one.step_s == pytest.approx(2 * 7.0)
        assert (
            replay(coded, [Placement()] * 2, trace, 10_000, SLOW).step_s
            == replay(facts, [Placement()] * 2, trace, 10_000, SLOW).step_s
        )  # on the host they go through the kernel

    def test_companions_on_the_device_of_early_layers_let_the_forward_begin_at_once(self) -> None:
        """Device update of the first 0-1; update of the second on the host 0-10, under the forward of the first."""
        facts, trace = _two_units()
        found = replay(facts, [Placement(10, 10), Placement()], trace, 10_000, SLOW)
        assert found.step_s == pytest.approx(10 + 2 + 3 + 3 + 3)  # update, fetch, three moments; the gradient hides
        late = replay(facts, [Placement(), Placement(10, 10)], trace, 10_000, SLOW)
        assert late.step_s > found.step_s

    def test_prefetching_hides_fetches_under_computing(self) -> None:
        facts = [ChunkFacts(i, 10, 2, 0, f"unit{i}") for i in range(6)]
        trace = trace_of([[i] for i in range(6)])
        for moment in trace.moments:
            moment.flops, moment.num_ops = 3.0, 1
        serial, hidden = (replay(facts, [Placement()] * 6, trace, 60, SLOW, prefetch_depth=depth) for depth in (0, 1))
        assert serial.step_s == pytest.approx(6 * 5)
        assert hidden.step_s == pytest.approx(6 * 3 + 2)

    def test_passes_from_the_third_on_are_alike(self) -> None:
        facts, trace = _two_units()
        steps = [replay(facts, [Placement()] * 2, trace, 20, SLOW, run=Run(n)) for n in (2, 3, 4, 5, 9)]
        times = [step.step_s for step in steps]
        each = times[3] - times[2]
        assert times[2] - times[1] == pytest.approx(each)
        assert times[4] - times[3] == pytest.approx(4 * each)
        assert steps[4].busy_s[COMPUTE] == pytest.approx(9 * 12.0)

    def test_the_program_waits_when_too_many_gradients_are_on_their_way(self) -> None:
        facts, trace = _two_units()
        free, bound = (replay(facts, [Placement()] * 2, trace, 10_000, SLOW, run=Run(1, most)) for most in (1 << 20, 0))
        assert bound.step_s > free.step_s


class TestCosts:
    def test_operators_that_were_counted_count(self) -> None:
        moment = Moment("a", "forward", [0], flops=4.0, fp32_flops=2.0, num_ops=7)
        costs = moment_costs([ChunkFacts(0, 10, 2, 14, "a")], Trace([moment], [(1,)]), SLOW)
        assert (costs[0].duration_s, costs[0].num_ops) == (4 + 4, 7)

    def test_an_uncounted_backward_is_twice_its_forward(self) -> None:
        moments = [Moment("a", "forward", [0], flops=4.0, num_ops=7), Moment("a", "backward", [0])]
        costs = moment_costs([ChunkFacts(0, 10, 2, 14, "a")], Trace(moments, [(1,)]), SLOW)
        assert (costs[1].duration_s, costs[1].num_ops) == (8.0, 14)

    def test_where_nobody_counted_what_is_read_tells(self) -> None:
        trace = trace_of([[0], [0]])
        trace.batch_shapes = [(3, 5)]
        costs = moment_costs([ChunkFacts(0, 10, 2, 14, "a")], trace, SLOW)
        assert [cost.duration_s for cost in costs] == [2 * 15 * 10, 4 * 15 * 10]


@st.composite
def _steps(draw: st.DrawFn) -> tuple[list[ChunkFacts], list[Placement], Trace, HardwareProfile, int, Run]:
    num_chunks = draw(st.integers(1, 6))
    facts = [
        ChunkFacts(i, draw(st.integers(1, 30)), 2, draw(st.sampled_from([0, 14])), f"u{i}", 2)
        for i in range(num_chunks)
    ]
    placements = [
        Placement(
            draw(st.sampled_from([0, fact.numel // 2, fact.numel])),
            draw(st.sampled_from([0, fact.numel // 2, fact.numel])) if fact.companion_bytes_per_numel else 0,
        )
        for fact in facts
    ]
    trace = trace_of([[i] for i in range(num_chunks)] + [[i] for i in reversed(range(num_chunks))])
    for moment in trace.moments:
        moment.flops, moment.num_ops = draw(st.floats(0, 20)), 1
        if moment.phase == "backward":
            moment.gradients = list(moment.reads)
    return (
        facts,
        placements,
        trace,
        SLOW,
        draw(st.integers(0, 4)),
        Run(draw(st.integers(1, 3)), draw(st.sampled_from([0, 50, 10**6]))),
    )


def _cut_beside_a_queued_update() -> tuple[list[ChunkFacts], list[Placement], Trace, HardwareProfile, int, Run]:
    """The program updates its part of the second chunk while the first one's update is queued: both take the same cores."""
    facts, trace = _two_units()
    for moment in trace.moments:
        moment.flops = 0.0
    facts = [replace(facts[0], numel=14), replace(facts[1], numel=18)]
    return facts, [Placement(14, 0), Placement(18, 9)], trace, SLOW, 4, Run(1, 50)


@given(case=_steps(), room=st.integers(0, 200))
@example(case=_cut_beside_a_queued_update(), room=0)
@settings(max_examples=150, deadline=None)
def test_no_step_is_faster_than_its_busiest_queue_nor_slower_than_all_in_turn(
    case: tuple[list[ChunkFacts], list[Placement], Trace, HardwareProfile, int, Run], room: int
) -> None:
    facts, placements, trace, profile, depth, run = case
    found = replay(facts, placements, trace, 700 + room, profile, prefetch_depth=depth, run=run, draws=True)
    busy = [found.busy_s[lane] for lane in (COMPUTE, IN, OUT, UPDATE)]
    assert found.step_s >= max(busy) - 1e-6
    assert found.step_s <= sum(busy) + 1e-6
    spans = found.clock.spans
    assert spans is not None
    for lane in LANES:
        of_lane = sorted((span.start_s, span.stop_s) for span in spans if span.lane == lane)
        assert all(before[1] <= after[0] + 1e-9 for before, after in zip(of_lane, of_lane[1:], strict=False)), lane


@given(case=_steps(), number=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_faster_machine_is_never_slower_where_nothing_is_evicted(
    case: tuple[list[ChunkFacts], list[Placement], Trace, HardwareProfile, int, Run], number: int
) -> None:
    facts, placements, trace, profile, _, run = case
    name = random.Random(number).choice(["host_update_numel_per_s", "device_flops_per_s", "device_update_numel_per_s"])
    faster = replace(profile, **{name: 3 * getattr(profile, name)})
    slow, fast = (replay(facts, placements, trace, 10**6, p, prefetch_depth=0, run=run) for p in (profile, faster))
    assert fast.step_s <= slow.step_s + 1e-6
