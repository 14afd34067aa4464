"""Policies: ``auto`` is as fast as any of the others that fits, nothing goes over, and refusals name what would do."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from instant import INSTANT
from memory_case import trace_of

from gemini.plan import ChunkFacts, DoesNotFitError, Plan, persistent_bytes
from gemini.policy import POLICIES, Policy, does_not_fit, least_capacity_bytes
from gemini.profile import HardwareProfile
from gemini.search import DEPTHS, FRACTIONS, static_placements
from gemini.segment import Placement
from gemini.timeline import replay, required_bytes
from gemini.trace import Moment, Trace

_RATES = st.sampled_from([1e8, 1e9, 2e10, 1e12])
PROFILES = st.builds(
    HardwareProfile,
    h2d_bytes_per_s=_RATES,
    d2h_bytes_per_s=_RATES,
    both_bytes_per_s=_RATES,
    host_dram_bytes_per_s=_RATES,
    host_update_numel_per_s=_RATES,
    device_update_numel_per_s=_RATES,
    device_flops_per_s=_RATES,
    device_fp32_flops_per_s=_RATES,
)


@st.composite
def fact_lists(draw: st.DrawFn, one_itemsize: bool = False) -> list[ChunkFacts]:
    """Facts of a few chunks: fp32 (12 bytes of companions with Adam), low precision (14), frozen (none)."""
    itemsizes = [draw(st.sampled_from([2, 4]))] if one_itemsize else [2, 4]
    facts = []
    for index in range(draw(st.integers(1, 7))):
        itemsize = draw(st.sampled_from(itemsizes))
        companions = {2: 4 + 8 + 2, 4: 8 + 4}[itemsize] if draw(st.integers(0, 4)) else 0
        facts.append(ChunkFacts(index, draw(st.integers(1, 60)), itemsize, companions, f"unit{index}"))
    return facts


@st.composite
def traces(draw: st.DrawFn, facts: list[ChunkFacts]) -> Trace:
    """A pass over them, with figures such as a recorder writes: possible ones."""
    indices = st.lists(st.integers(0, len(facts) - 1), max_size=3, unique=True)
    reads = [draw(indices) for _ in range(draw(st.integers(1, 6)))]
    trace = trace_of(reads + reads[::-1])
    for moment in trace.moments:
        moment.non_model_peak_bytes = draw(st.integers(0, 400))
        moment.gathered_peak_bytes = sum(facts[c].value_bytes for c in moment.reads) if draw(st.booleans()) else 0
        if moment.gathered_peak_bytes and draw(st.booleans()):
            least = max(moment.gathered_peak_bytes, moment.non_model_peak_bytes)
            moment.both_peak_bytes = draw(st.integers(least, moment.gathered_peak_bytes + moment.non_model_peak_bytes))
    for chunk in {c for read in reads for c in read}:
        last = max(i for i, moment in enumerate(trace.moments) if chunk in moment.reads)
        trace.moments[last].gradients.append(chunk)
    trace.step_peak_bytes = draw(st.sampled_from([0, 0, 50, 300]))
    return trace


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[ChunkFacts], Trace, int, HardwareProfile]:
    """Facts, a trace, a capacity between too little and plenty, and rates."""
    facts = draw(fact_lists())
    trace = draw(traces(facts))
    least = least_capacity_bytes(facts, trace)
    everything = sum(fact.value_bytes + fact.companion_bytes for fact in facts)
    capacity_bytes = draw(st.integers(max(1, least - 20), least + everything + 500))
    return facts, trace, capacity_bytes, draw(PROFILES)


def _trained_but_never_read() -> tuple[list[ChunkFacts], Trace, int, HardwareProfile]:
    """Forward reads only what is frozen: it waits for nobody's update."""
    facts = [ChunkFacts(0, 27, 4, 12, "a"), ChunkFacts(1, 23, 2, 0, "frozen"), ChunkFacts(2, 29, 4, 12, "c")]
    trace = trace_of([[], [1], [1], [1], [1], []])
    profile = HardwareProfile(
        h2d_bytes_per_s=1e8, host_dram_bytes_per_s=1e9, host_update_numel_per_s=2e10, device_update_numel_per_s=1e12
    )
    return facts, trace, 1447, replace(profile, launch_s=0.0)


@given(case=cases())
@example(case=_trained_but_never_read())
@settings(max_examples=50, deadline=None)
def test_auto_is_never_predicted_slower_than_a_fixed_policy_that_fits(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile],
) -> None:
    facts, trace, capacity_bytes, profile = case
    assume(required_bytes(facts, [Placement()] * len(facts), trace) <= capacity_bytes)
    auto = Policy("auto", profile=profile).decide(facts, trace, capacity_bytes)
    fixed = [Policy("cuda", profile=profile), Policy("cpu", profile=profile)]
    fixed += [Policy("static", p, o, profile) for p in FRACTIONS for o in FRACTIONS]
    for policy in fixed:
        placements = static_placements(facts, *_fractions(policy))
        # What auto puts on the device leaves a margin for activations; what a user asks for may use that up.
        if required_bytes(facts, placements, trace, with_margin=any(placements)) <= capacity_bytes:
            other = policy.decide(facts, trace, capacity_bytes)
            assert auto.predicted_step_s <= other.predicted_step_s, policy


def _fractions(policy: Policy) -> tuple[float, float]:
    return {"cuda": (1.0, 1.0), "cpu": (0.0, 0.0)}.get(
        policy.name, (policy.resident_parameters, policy.resident_optimizer)
    )


@given(case=cases(), parameters=st.floats(0, 1), optimizer=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_auto_is_about_as_fast_as_any_hand_tuned_fractions(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile], parameters: float, optimizer: float
) -> None:
    """Between the grid's points a hand may find a better one by a little, in models of a few dozen elements."""
    facts, trace, capacity_bytes, profile = case
    placements = static_placements(facts, parameters, optimizer)
    assume(required_bytes(facts, placements, trace, with_margin=True) <= capacity_bytes)
    assume(required_bytes(facts, [Placement()] * len(facts), trace) <= capacity_bytes)
    auto = Policy("auto", profile=profile).decide(facts, trace, capacity_bytes)
    other = Policy("static", parameters, optimizer, profile).decide(facts, trace, capacity_bytes)
    assert auto.predicted_step_s <= other.predicted_step_s * 1.1


@given(case=cases(), name=st.sampled_from(POLICIES), parameters=st.floats(0, 1), optimizer=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_plan_goes_over_capacity_and_no_refusal_is_false(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile], name: str, parameters: float, optimizer: float
) -> None:
    facts, trace, capacity_bytes, profile = case
    fractions = (parameters, optimizer) if name == "static" else (0.0, 0.0)
    policy = Policy(name, *fractions, profile)
    fixed = [Placement()] * len(facts) if name == "auto" else static_placements(facts, *_fractions(policy))
    try:
        plan = policy.decide(facts, trace, capacity_bytes)
    except DoesNotFitError as refusal:
        assert required_bytes(facts, fixed, trace) > capacity_bytes
        _check(refusal, capacity_bytes)
        return
    assert required_bytes(facts, plan.placements, trace) <= capacity_bytes
    assert plan.predicted_device_peak_bytes <= capacity_bytes
    assert plan.predicted_device_peak_bytes >= sum(persistent_bytes(facts, plan.placements))
    assert name == "auto" or plan.placements == fixed
    assert plan.reserve_bytes == [moment.reserve_bytes for moment in trace.moments]
    assert (plan.resident_parameter_bytes, plan.device_optimizer_bytes) == persistent_bytes(facts, plan.placements)
    assert plan.prefetch_depth in DEPTHS
    again = replay(facts, plan.placements, trace, capacity_bytes, profile, prefetch_depth=plan.prefetch_depth)
    assert (again.num_fetches, again.h2d_bytes, again.step_s) == (
        plan.predicted_fetches,
        plan.predicted_h2d_bytes,
        plan.predicted_step_s,
    )


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_plenty_of_capacity_is_never_slower(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile],
) -> None:
    facts, trace, capacity_bytes, profile = case
    assume(required_bytes(facts, [Placement()] * len(facts), trace) <= capacity_bytes)
    policy = Policy("auto", profile=profile)
    small = policy.decide(facts, trace, capacity_bytes)
    large = policy.decide(facts, trace, capacity_bytes + 10**6)
    assert large.predicted_step_s <= small.predicted_step_s


# -- refusals --------------------------------------------------------------------------------------------------------


def _check(refusal: DoesNotFitError, capacity_bytes: int) -> None:
    rows = {what: num_bytes for what, _, num_bytes, _ in refusal.rows}
    assert rows.pop("needed in all") > capacity_bytes
    assert len(rows) >= 3
    assert all(num_bytes >= 0 for num_bytes in rows.values())
    assert {tier for _, tier, _, _ in refusal.rows} == {"device"}
    text = str(refusal)
    assert refusal.advice in text
    assert all(what in text for what in rows)


@given(case=cases(), name=st.sampled_from(["auto", "cuda", "static"]), resident=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_advised_change_really_fits(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile], name: str, resident: bool
) -> None:
    facts, trace, capacity_bytes, profile = case
    if resident:  # recorded while some chunks were resident, so that their bytes are in no moment's figures
        trace.resident = [fact.index for fact in facts[::2]]
        for moment in trace.moments:
            moment.gathered_peak_bytes = sum(facts[c].value_bytes for c in moment.reads if c not in trace.resident)
            moment.both_peak_bytes = 0
    policy = Policy(name, *((0.8, 0.7) if name == "static" else (0.0, 0.0)), profile)
    for stage in ("trace", "no trace yet"):
        try:
            policy.decide(facts, trace, capacity_bytes) if stage == "trace" else policy.initial(facts, capacity_bytes)
        except DoesNotFitError as refusal:
            changed, enough_bytes = _advised(refusal.advice, policy, capacity_bytes)
            changed.initial(facts, enough_bytes)
            if stage == "trace":
                changed.decide(facts, trace, enough_bytes)


def _advised(advice: str, policy: Policy, capacity_bytes: int) -> tuple[Policy, int]:
    """The policy and the capacity that a refusal tells the user to take."""
    auto = 'memory.policy = "auto"' in advice
    capacity = re.search(r"device\.memory of at least (\d+)KiB", advice)
    assert auto or capacity
    assert capacity is None or int(capacity[1]) * 1024 > capacity_bytes
    enough_bytes = int(capacity[1]) * 1024 if capacity else capacity_bytes
    return Policy("auto", profile=policy.profile) if auto else policy, enough_bytes


def test_the_refusal_before_anything_ran() -> None:
    facts = [ChunkFacts(0, 100, 4, 12, "embed"), ChunkFacts(1, 5000, 4, 12, "block")]
    with pytest.raises(DoesNotFitError) as refusal:
        Policy().initial(facts, 10_000)
    _check(refusal.value, 10_000)
    assert ("largest chunk", "device", 20_000, "block") in refusal.value.rows
    assert "at least 20KiB" in refusal.value.advice
    assert "auto" not in refusal.value.advice
    with pytest.raises(DoesNotFitError, match=r'memory\.policy = "auto"') as refusal:
        Policy("cuda").initial(facts, 30_000)
    assert ("largest chunk", "device", 0, "all parameters stay") in refusal.value.rows
    # The largest chunk is the largest of those that must be gathered, by name and by bytes.
    with pytest.raises(DoesNotFitError) as refusal:
        Policy("static", 0.8, 0.0).initial(facts, 30_000)
    assert ("largest chunk", "device", 20_000, "block") in refusal.value.rows
    with pytest.raises(DoesNotFitError) as refusal:
        Policy("static", 1.0, 0.5).initial(facts, 30_000)
    assert ("largest chunk", "device", 20_000, "block") in refusal.value.rows, "cut companions cut the values"


def test_a_pass_that_broke_off_advises_more_than_there_was() -> None:
    """What it needed is not known; that it was more than the capacity is."""
    facts = [ChunkFacts(0, 100, 4, 12, "block")]
    partial = Trace([Moment("block", "forward", [0], non_model_peak_bytes=200, gathered_peak_bytes=400)])
    refusal = does_not_fit(facts, Plan("auto", [Placement()]), partial, 5 * 1024)
    _check(refusal, 5 * 1024)
    assert "at least 6KiB" in refusal.advice
    assert "fewer tokens" in refusal.advice


def test_every_policy_is_a_point_of_one_space() -> None:
    facts = [ChunkFacts(0, 10, 2, 14, "a"), ChunkFacts(1, 10, 2, 0, "frozen"), ChunkFacts(2, 10, 2, 14, "b")]
    everything = Policy("cuda").initial(facts, 1 << 30)
    assert everything.placements == [Placement(10, 10), Placement(10, 0), Placement(10, 10)]
    assert everything.placements == Policy("static", 1.0, 1.0).initial(facts, 1 << 30).placements
    assert (everything.resident_parameter_bytes, everything.device_optimizer_bytes) == (60, 280)
    nothing = Policy("cpu").initial(facts, 1 << 30)
    assert nothing.placements == Policy().initial(facts, 1 << 30).placements == [Placement()] * 3
    half = Policy("static", 0.5, 0.25).initial(facts, 1 << 30)
    assert half.placements == [Placement(10, 5), Placement(5, 0), Placement(0, 0)]


def test_auto_takes_all_when_all_just_fits() -> None:
    """fp32 values beside their companions cost nothing: what fits need not fit with fewer residents."""
    facts = [ChunkFacts(i, 100, 4, 12, f"unit{i}") for i in range(8)]
    trace = trace_of([[i] for i in range(8)] + [[i] for i in reversed(range(8))])
    everything = sum(persistent_bytes(facts, static_placements(facts, 1.0, 1.0)))
    plan = Policy().decide(facts, trace, everything)
    assert plan.placements == [Placement(100, 100)] * 8
    assert plan.predicted_fetches == 0


def test_auto_uses_spare_bytes_to_the_element() -> None:
    facts = [ChunkFacts(i, 100, 2, 14, f"unit{i}") for i in range(4)]
    trace = trace_of([[i] for i in range(4)] + [[i] for i in reversed(range(4))])
    everything = sum(persistent_bytes(facts, static_placements(facts, 1.0, 1.0)))
    capacity_bytes = everything - 14 * 30
    slow_host = HardwareProfile(host_update_numel_per_s=1e3)  # every element less on the host is a gain
    plan = Policy(profile=slow_host).decide(facts, trace, capacity_bytes)
    assert [placement.companion_numel for placement in plan.placements] == [100] * 4
    assert required_bytes(facts, plan.placements, trace, with_margin=True) <= capacity_bytes
    border = next(i for i, placement in enumerate(plan.placements) if placement.resident_numel < 100)
    more = list(plan.placements)
    more[border] = Placement(more[border].resident_numel + 1, 100)
    assert required_bytes(facts, more, trace, with_margin=True) > capacity_bytes


def test_a_plan_for_a_large_model_takes_no_time_to_speak_of() -> None:
    num_units = 80
    facts = [ChunkFacts(i, 10**8, 2, 14, f"unit{i}") for i in range(2 * num_units)]
    reads = [[2 * i, 2 * i + 1] for i in range(num_units)]
    trace = trace_of(reads + reads[::-1], non_model_bytes=10**9)
    started_s = time.perf_counter()
    Policy().decide(facts, trace, 24 * 10**9)
    assert time.perf_counter() - started_s < 10.0  # about one on a quiet machine


def test_a_machine_on_which_nothing_takes_time_has_a_plan_too() -> None:
    facts = [ChunkFacts(i, 100, 2, 14, f"unit{i}") for i in range(4)]
    trace = trace_of([[i] for i in range(4)] + [[i] for i in reversed(range(4))])
    plan = Policy(profile=INSTANT).decide(facts, trace, 2000)
    assert plan.predicted_step_s == 0.0
    assert plan.predicted_device_peak_bytes <= 2000


@given(facts=fact_lists(), capacity_bytes=st.integers(1, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_trace_without_moments_is_enough_to_plan_with(facts: list[ChunkFacts], capacity_bytes: int) -> None:
    try:
        plan = Policy().decide(facts, Trace(), capacity_bytes)
    except DoesNotFitError:
        assert capacity_bytes < max(fact.value_bytes for fact in facts)
    else:
        assert plan.reserve_bytes == []


@given(case=cases(), name=st.sampled_from(["cpu", "cuda", "auto"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_plan_that_spares_memory_takes_what_the_passes_need_and_no_more(
    case: tuple[list[ChunkFacts], Trace, int, HardwareProfile], name: str
) -> None:
    facts, trace, capacity_bytes, profile = case
    policy = Policy(name, profile=profile)
    sparing = replace(policy, spares_memory=True)
    try:
        policy.decide(facts, trace, capacity_bytes)
    except DoesNotFitError:
        with pytest.raises(DoesNotFitError):
            sparing.decide(facts, trace, capacity_bytes)
        return
    plan = sparing.decide(facts, trace, capacity_bytes)
    asked = plan.placements if name != "auto" else [Placement() for _ in facts]
    needed_bytes = required_bytes(facts, asked, trace, with_margin=True)
    assert plan.predicted_device_peak_bytes <= needed_bytes
    assert plan.spared_bytes == max(0, capacity_bytes - needed_bytes)
    assert plan.reserve_bytes == [moment.reserve_bytes for moment in trace.moments]
