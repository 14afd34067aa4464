"""What is recorded of a pass, how passes are laid over one another, and where in a trace a pass stands."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import House, build, close, equal_chunks, spec, trace_of
from pass_case import Driver, Pass, Step, passes

from gemini.plan import Plan
from gemini.policy import Policy
from gemini.segment import Placement
from gemini.trace import Moment, Trace

# -- absorbing -------------------------------------------------------------------------------------------------------

_PASSES = st.lists(
    st.builds(
        Moment,
        label=st.sampled_from("ab"),
        phase=st.sampled_from(["forward", "backward"]),
        non_model_peak_bytes=st.integers(0, 9),
        gathered_peak_bytes=st.integers(0, 9),
    ),
    max_size=5,
)


@given(mine=_PASSES, theirs=_PASSES, step_peaks=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=200)
def test_absorbing_never_forgets_a_peak(mine: list[Moment], theirs: list[Moment], step_peaks: tuple[int, int]) -> None:
    for moment in mine:
        moment.both_peak_bytes = max(moment.non_model_peak_bytes, moment.gathered_peak_bytes)
    known, recorded = Trace(mine, [(4, 4)], step_peaks[0]), Trace(theirs, [(2, 8)], step_peaks[1])
    before = copy.deepcopy(known)
    grew = known.absorb(recorded)
    assert [m.key for m in known.moments] == [m.key for m in before.moments]
    for number, (now, old) in enumerate(zip(known.moments, before.moments, strict=True)):
        seen = theirs[number].non_model_peak_bytes if before.same_shape(recorded) else recorded.non_model_peak_bytes
        assert now.non_model_peak_bytes == max(old.non_model_peak_bytes, seen)
        assert now.gathered_peak_bytes == old.gathered_peak_bytes
        growth = now.non_model_peak_bytes - old.non_model_peak_bytes
        assert now.both_peak_bytes == (old.both_peak_bytes + growth if old.both_peak_bytes else 0)
    assert grew == any(a != b for a, b in zip(known.moments, before.moments, strict=True))
    assert known.step_peak_bytes == max(step_peaks)
    assert known.covers((4, 4))
    assert known.covers((2, 8))
    assert not known.absorb(recorded), "the same pass is news twice"


def test_other_shapes_are_covered_by_rows_and_lengths() -> None:
    trace = Trace(batch_shapes=[(4, 16)])
    assert trace.covers((4, 16))
    assert trace.covers((1, 16))
    assert not trace.covers((1, 64)), "as many elements, but attention is quadratic in the length"
    assert not trace.covers((4, 16, 1))
    trace.cover([(1, 64), (2, 8), (4, 8)])
    assert sorted(trace.batch_shapes) == [(1, 64), (4, 16)]
    trace.cover([(8, 128)])
    assert trace.batch_shapes == [(8, 128)]


def test_the_reserve_is_the_peak_and_a_little() -> None:
    assert Moment("a", "forward", non_model_peak_bytes=3200).reserve_bytes == 3300
    assert Moment("a", "forward").reserve_bytes == 0
    assert Trace().non_model_peak_bytes == 0


# -- recording -------------------------------------------------------------------------------------------------------


def _recorded(house: House, steps: Pass) -> Trace:
    driver = Driver(house)
    driver.apply(Plan("test", [chunk.placement for chunk in house.chunks]))
    driver.run(steps)
    trace = house.manager.trace
    assert trace is not None
    return trace


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_warm_up_records_what_happened(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    house = build([[spec(f"{i}.a", n), spec(f"{i}.b", n)] for i, n in enumerate(sizes)])
    resident = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    for index in resident:
        house.chunks[index].place(Placement(house.chunks[index].numel, 0))
    steps = data.draw(passes(len(sizes)))
    trace = _recorded(house, steps)
    assert trace.batch_shapes == [(1,)]
    assert [moment.key for moment in trace.moments] == [(step.phase, step.label) for step in steps]
    read = {index for step in steps for index in step.reads}
    assert sorted(trace.resident) == sorted(resident & read)
    for moment, step in zip(trace.moments, steps, strict=True):
        assert moment.reads == step.reads
        assert sorted(moment.gradients) == sorted(step.gradients)
        gathered = sum(house.chunks[index].num_bytes for index in step.reads if index not in resident)
        assert moment.gathered_peak_bytes == gathered
        assert moment.non_model_peak_bytes == step.activation_bytes
        assert moment.both_peak_bytes == gathered + step.activation_bytes
        assert moment.duration_s > 0
    close(house)


def test_peaks_at_different_instants_are_not_added() -> None:
    house = equal_chunks(2, numel=8)
    manager = house.manager
    Driver(house).apply(Plan("test", [Placement()] * 2))
    manager.begin_pass(True, (1,))
    manager.enter("root")
    manager.begin_moment("a", "forward")
    with house.device.activity():
        torch.empty(100)
    manager.read(house.tensors[0])
    manager.leave()
    manager.end_forward_pass()
    (moment,) = manager.pass_moments
    assert (moment.non_model_peak_bytes, moment.gathered_peak_bytes, moment.both_peak_bytes) == (400, 32, 400)
    manager.abort_pass()
    close(house)


def test_a_chunk_held_over_a_border_is_read_on_the_other_side() -> None:
    """A parent that reads a weight before its children run holds it through all of their moments."""
    house = equal_chunks(3, numel=8)
    manager = house.manager
    Driver(house).apply(Plan("test", [Placement()] * 3))
    manager.begin_pass(True, (1,))
    manager.enter("root")
    manager.read(house.tensors[2])
    for label, index in (("a", 0), ("b", 1)):
        manager.enter(label)
        manager.begin_moment(label, "forward")
        manager.read(house.tensors[index])
        manager.leave()
    manager.leave()
    manager.end_forward_pass()
    moments = manager.pass_moments
    assert [(m.label, m.reads, m.gathered_peak_bytes) for m in moments] == [
        ("<start>", [2], 32),
        ("a", [2, 0], 64),
        ("b", [2, 1], 64),
    ]
    manager.abort_pass()
    close(house)


def test_a_pass_that_breaks_off_records_what_was_refused() -> None:
    house = equal_chunks(2, numel=8, capacity_bytes=100)
    manager = house.manager
    Driver(house).apply(Plan("test", [Placement()] * 2))
    manager.begin_pass(True, (1,))
    manager.enter("root")
    manager.begin_moment("a", "forward")
    manager.read(house.tensors[0])
    with house.device.activity():
        kept = torch.empty(10)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(20)
        (moment,) = manager.pass_moments
        assert (moment.non_model_peak_bytes, moment.gathered_peak_bytes, moment.both_peak_bytes) == (120, 32, 152)
        with pytest.raises(torch.OutOfMemoryError):
            manager.read(house.tensors[1])
    (moment,) = manager.pass_moments
    assert (moment.non_model_peak_bytes, moment.gathered_peak_bytes, moment.both_peak_bytes) == (120, 64, 184)
    assert kept.numel() == 10
    manager.abort_pass()
    manager.check_integrity()
    assert manager.trace is None, "a pass that broke off was learnt from"
    close(house)


# -- learning --------------------------------------------------------------------------------------------------------


def _forward(*labels: str, activation_bytes: int = 0) -> Pass:
    return [Step(label, "forward", [0], [], activation_bytes) for label in labels]


def test_a_larger_batch_is_recorded_anew_and_the_old_peaks_stay() -> None:
    house = equal_chunks(1)
    driver = Driver(house)
    driver.apply(Plan("test", [Placement()]))
    driver.run(_forward("a", "b", activation_bytes=80), rows=2)
    trace = house.manager.trace
    assert trace is not None
    trace.step_peak_bytes = 77
    driver.run(_forward("a", "b", activation_bytes=40), rows=3)
    assert house.manager.trace is not None
    assert [m.non_model_peak_bytes for m in house.manager.trace.moments] == [80, 80]
    assert house.manager.trace.step_peak_bytes == 77
    assert house.manager.trace.covers((3,))
    # Other moments: the new record stands alone, but what a step needs is no matter of the pass.
    driver.run(_forward("a", "c", activation_bytes=20), rows=4)
    assert [m.label for m in house.manager.trace.moments] == ["a", "c"]
    assert house.manager.trace.step_peak_bytes == 77
    close(house)


def test_learning_says_when_a_new_plan_is_due() -> None:
    house = equal_chunks(1)
    manager = house.manager
    driver = Driver(house)
    driver.apply(Plan("test", [Placement()]))
    due = []
    original = manager.recorder.learn
    manager.recorder.learn = lambda: due.append(original()) or due[-1]  # type: ignore[method-assign, func-returns-value]
    driver.run(_forward("a", activation_bytes=40))
    driver.run(_forward("a", activation_bytes=40))
    driver.run(_forward("a", activation_bytes=44))
    driver.run(_forward("x", activation_bytes=44))
    driver.run(_forward("x", activation_bytes=48))
    driver.run(_forward("a", activation_bytes=40), training=False, rows=9)
    assert due == [True, False, True, False, True]
    close(house)


# -- where a pass stands ---------------------------------------------------------------------------------------------


def _positions(known: list[str], labels: list[str]) -> list[int]:
    house = equal_chunks(1)
    recorder = house.manager.recorder
    recorder.trace = trace_of([[0]] * len(known), num_forward=len(known))
    for moment, label in zip(recorder.trace.moments, known, strict=True):
        moment.label = label
    recorder.begin_pass((1,), active=True)
    positions = []
    for label in labels:
        recorder.begin_moment(label, "forward")
        positions.append(recorder.position)
    close(house)
    return positions


@pytest.mark.parametrize(
    ("labels", "positions"),
    [
        ("abcd", [0, 1, 2, 3]),
        ("acd", [0, 2, 3]),  # a layer was dropped
        ("abbcd", [0, 1, 1, 2, 3]),  # one ran twice: it stays where it is
        ("xabcd", [-1, 0, 1, 2, 3]),  # an unknown one before all others must not use up the first place
        ("axbcd", [0, 0, 1, 2, 3]),
        ("dcba", [3, 3, 3, 3]),
    ],
)
def test_a_pass_is_located_by_name_and_order(labels: str, positions: list[int]) -> None:
    assert _positions(list("abcd"), list(labels)) == positions


def test_a_layer_that_runs_again_and_again_stands_at_its_next_turn() -> None:
    assert _positions(list("asshs"), list("asshs")) == [0, 1, 2, 3, 4]
    assert _positions(list("asssh"), list("ash")) == [0, 1, 4]
    assert _positions(list("asssh"), list("assssssh")) == [0, 1, 2, 3, 3, 3, 3, 4]


@given(known=st.lists(st.sampled_from("abc"), max_size=8), labels=st.lists(st.sampled_from("abcx"), max_size=8))
def test_positions_never_go_back(known: list[str], labels: list[str]) -> None:
    positions = _positions(known, labels)
    assert positions == sorted(positions)
    for label, position, before in zip(labels, positions, [-1, *positions], strict=False):
        assert position == before or known[position] == label


def test_a_unit_that_runs_twice_reserves_what_each_turn_needs() -> None:
    """A layer shared by two places of a pass: each place has figures of its own."""
    house = equal_chunks(2, numel=8, capacity_bytes=500)
    steps = [
        Step("shared", "forward", [0], [], 400),
        Step("other", "forward", [1], [], 40),
        Step("shared", "forward", [0], [], 40),
    ]
    driver = Driver(house)
    driver.apply(Plan("cpu", [Placement()] * 2))
    driver.run(steps)
    trace = house.manager.trace
    assert trace is not None
    driver.apply(Policy("cpu").decide(house.facts, trace, 500))
    driver.run(steps)
    assert house.manager.counters.num_fetches == 2, "the second turn is not the first: its chunk could stay"
    close(house)
