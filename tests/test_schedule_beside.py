"""What a step may have beside it: disk, saved activations on the host, updates inside backward, formats, other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from memory_case import trace_of
from test_schedule import SLOW

from gemini.clock import COMPUTE, DISK, EXCHANGE, IN, OUT, UPDATE, Clock
from gemini.plan import ChunkFacts
from gemini.profile import HostUpdate
from gemini.schedule import Run
from gemini.segment import Placement
from gemini.timeline import Prediction, replay
from gemini.trace import Trace

DISKED = replace(SLOW, disk_read_bytes_per_s=40.0, disk_write_bytes_per_s=20.0, rank_link_bytes_per_s=5.0)


def _units(num_units: int = 2) -> tuple[list[ChunkFacts], Trace]:
    """Chunks of ten bf16 elements; each moment computes for 3 seconds."""
    facts = [ChunkFacts(i, 10, 2, 14, f"unit{i}", 2) for i in range(num_units)]
    order = list(range(num_units))
    trace = trace_of([[i] for i in order + order[::-1]])
    for moment in trace.moments:
        moment.flops, moment.num_ops = 3.0, 1
    for moment in trace.moments[num_units:]:
        moment.gradients = list(moment.reads)
    return facts, trace


def _replay(facts: list[ChunkFacts], trace: Trace, run: Run | None = None, depth: int = 0) -> Prediction:
    return replay(facts, [Placement()] * len(facts), trace, 10_000, DISKED, prefetch_depth=depth, run=run)


class TestDisk:
    def test_states_are_read_under_the_update_before_and_written_under_the_one_after(self) -> None:
        clock = Clock(DISKED)
        assert clock.update(HostUpdate(10, disk_bytes=120)).stop_s == 3 + 10  # read 0-3, update 3-13
        assert clock.update(HostUpdate(10, disk_bytes=120)).stop_s == 13 + 10  # read 3-6; written 13-19
        assert clock.update(HostUpdate(10, disk_bytes=120)).stop_s == 23 + 10  # read 19-22; written 23-29
        clock.write_disk()
        assert clock.busy_s[DISK] == pytest.approx(3 * 3 + 3 * 6)

    def test_states_on_disk(self) -> None:
        facts, trace = _units()
        plain = _replay(facts, trace)
        spilled = _replay([replace(fact, companions_on_disk=True) for fact in facts], trace)
        assert spilled.busy_s[DISK] == pytest.approx(2 * (120 / 40 + 120 / 20))
        assert spilled.step_s == pytest.approx(plain.step_s + 3.0), "the first has nothing to hide under"

    def test_values_on_disk_are_read_before_they_are_fetched(self) -> None:
        """Updates as ever; then each fetch waits for 20 bytes from disk, unless they were read ahead."""
        facts, trace = _units()
        facts = [replace(fact, companion_bytes_per_numel=0, gradient_itemsize=0) for fact in facts]
        plain = _replay(facts, trace)
        spilled = _replay([replace(fact, values_on_disk=True) for fact in facts], trace)
        assert spilled.busy_s[DISK] == pytest.approx(2 * 20 / 40)
        assert spilled.step_s == pytest.approx(plain.step_s + 0.5), "the second is read under the first's computation"

    def test_a_disk_that_is_slow_is_what_limits(self) -> None:
        facts, trace = _units()
        facts = [replace(fact, companions_on_disk=True) for fact in facts]
        slow = replace(DISKED, disk_read_bytes_per_s=1.0, disk_write_bytes_per_s=1.0)
        found = replay(facts, [Placement()] * 2, trace, 10_000, slow)
        assert (
            max(found.busy_s, key=lambda lane: found.busy_s[lane] * (lane in (COMPUTE, IN, OUT, UPDATE, DISK))) == DISK
        )
        assert found.step_s > 240


class TestActivations:
    def test_they_cross_the_link_both_ways(self) -> None:
        facts, trace = _units(4)
        plain = _replay(facts, trace)
        for moment in trace.moments:
            saved = 20 if moment.phase == "forward" else 0
            moment.saved_bytes, moment.brought_bytes = saved, 0 if saved else 20
        saved_on_host = _replay(facts, trace)
        assert saved_on_host.busy_s[OUT] >= plain.busy_s[OUT] + 4 * 2 - 1e-6
        assert saved_on_host.busy_s[IN] >= plain.busy_s[IN] + 4 * 2 - 1e-6
        assert saved_on_host.step_s > plain.step_s
        assert saved_on_host.step_s < plain.step_s + 4 * (2 + 2), "some of it hides"


class TestEarly:
    def test_updates_hide_under_backward(self) -> None:
        facts, trace = _units(4)
        for moment in trace.moments:
            moment.flops = 3.0 if moment.phase == "forward" else 10.0
        late = _replay(facts, trace)
        early = _replay(facts, trace, Run(early_bytes=10**6))
        assert early.step_s < late.step_s - 10
        assert early.busy_s[UPDATE] == pytest.approx(late.busy_s[UPDATE]), "memory is not what limits here"

    def test_room_for_what_is_overwritten_limits_them(self) -> None:
        facts, trace = _units(4)
        for moment in trace.moments:
            moment.flops = 3.0 if moment.phase == "forward" else 10.0
        each_bytes = facts[0].overwritten_bytes(Placement())
        assert each_bytes == 10 * 14
        steps = [_replay(facts, trace, Run(early_bytes=n * each_bytes)).step_s for n in (0, 1, 2, 4, 8)]
        assert steps[0] > steps[1] > steps[2]
        assert steps[3] == steps[4]
        assert _replay(facts, trace, Run(early_bytes=each_bytes - 1)).step_s == pytest.approx(
            _replay(facts, trace).step_s
        )

    def test_not_where_gradients_are_added(self) -> None:
        facts, trace = _units()
        assert _replay(facts, trace, Run(2, early_bytes=10**6)).step_s == _replay(facts, trace, Run(2)).step_s

    def test_what_is_kept_costs_memory_traffic(self) -> None:
        fact = _units()[0][0]
        assert fact.host_update(Placement()).bytes_per_numel == 28
        assert fact.host_update(Placement(), early=True).bytes_per_numel == 28 + 2 * 14


class TestFormats:
    @pytest.mark.parametrize(
        ("coded_bytes", "traffic"),
        [pytest.param(10, 26, id="split"), pytest.param(6, 18, id="bf16"), pytest.param(3, 12, id="8bit")],
    )
    def test_bytes_of_an_update(self, coded_bytes: float, traffic: float) -> None:
        fact = ChunkFacts(0, 10, 2, coded_bytes + 2, "unit", 2, coded_bytes_per_numel=coded_bytes)
        assert fact.host_update(Placement()).bytes_per_numel == traffic

    def test_memory_or_cores(self) -> None:
        profile = replace(SLOW, host_update_numel_per_s=1.0, host_dram_bytes_per_s=14.0)
        assert profile.host_update_s(7) == pytest.approx(7 * 30 / 14)
        assert profile.host_update_s(7, 12) == pytest.approx(7.0)
        assert profile.host_update_s(7, 12, 0.5) == pytest.approx(14.0)


class TestRanks:
    def test_values_and_gradients_are_exchanged(self) -> None:
        facts, trace = _units()
        alone = _replay(facts, trace)
        shared = _replay([replace(fact, others_numel=10) for fact in facts], trace)
        # Two gathers (the second chunk stays) of 20 bytes, and two reductions of as many, at 5 B/s.
        assert shared.busy_s[EXCHANGE] == pytest.approx(4 * 4.0)
        assert shared.step_s >= alone.step_s + 4 * 4.0 - 1e-6

    def test_values_come_while_the_unit_before_computes(self) -> None:
        """Three gathers of 4 s; fetched a moment ahead, all but the first hide under 3 s of computing each."""
        facts, trace = _units(3)
        facts = [replace(fact, others_numel=10, companion_bytes_per_numel=0, gradient_itemsize=0) for fact in facts]
        late, ahead = _replay(facts, trace), _replay(facts, trace, depth=1)
        assert ahead.busy_s[EXCHANGE] == late.busy_s[EXCHANGE] == pytest.approx(3 * 4.0)
        assert late.step_s - ahead.step_s >= 2 * 3.0 - 1e-6
