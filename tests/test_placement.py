"""Placements: any sequence of them is exact, bytes per tier add up, and one that fails changes nothing."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import House, build, close, equal_chunks, gradient_like, spec

from gemini.arena import HostMemoryError
from gemini.chunk import Chunk
from gemini.plan import Plan, persistent_bytes
from gemini.policy import Policy
from gemini.segment import GRADIENT, MASTER, Placement
from gemini.store import Kind, Store, Tier

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _trained(dtype: torch.dtype, capacity_bytes: int = 1 << 30) -> tuple[House, Chunk]:
    """A chunk of 12 elements with values, master, states and gradients, all different."""
    house = build([[spec("a", 5, dtype=dtype), spec("b", 7, dtype=dtype)]], capacity_bytes=capacity_bytes)
    chunk = house.chunks[0]
    for number, tensor in enumerate(chunk.tensors):
        shape = tensor.entry.spec.shape
        for key in ("exp_avg", "exp_avg_sq"):
            chunk.write_companion(tensor, key, torch.randn(shape))
        chunk.deliver(tensor, gradient_like(tensor, number))
    return house, chunk


def _contents(chunk: Chunk) -> dict[tuple[str, str], torch.Tensor]:
    held: dict[tuple[str, str], torch.Tensor] = {}
    for tensor in chunk.tensors:
        held[tensor.name, "values"] = chunk.values_of(tensor)
        for key in (MASTER, GRADIENT, "exp_avg", "exp_avg_sq"):
            held[tensor.name, key] = chunk.companion_of(tensor, key)
    return held


def _assert_same(before: dict[Any, torch.Tensor], after: dict[Any, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert torch.equal(values.float(), after[key].float()), key


_SEQUENCES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(sequence=_SEQUENCES)
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_placements_is_exact_and_adds_up(dtype: torch.dtype, sequence: list[tuple[int, int]]) -> None:
    house, chunk = _trained(dtype)
    before = _contents(chunk)
    for resident, companions in sequence:
        wanted = Placement(resident, companions)
        start_bytes, growth_bytes = house.store.tier_bytes(Tier.DEVICE), chunk.growth_bytes(wanted)
        house.device.reset_peaks()
        chunk.place(wanted)
        _assert_same(before, _contents(chunk))
        house.store.check_integrity()
        chunk.check_integrity()
        on_device = house.store.tier_bytes(Tier.DEVICE)
        # Never more than the greater of before and after, so that plans which fit can follow one another.
        assert house.device.memory().peak_bytes == max(start_bytes, on_device)
        assert on_device - start_bytes == growth_bytes
        kinds = house.store.bytes_by
        values_bytes, companions_bytes = persistent_bytes(house.facts, [wanted])
        assert kinds[Tier.DEVICE, Kind.PARAMETERS] == values_bytes
        assert on_device == values_bytes + companions_bytes
        assert house.store.tier_bytes(Tier.HOST) == house.arena.host_bytes
    close(house)


def test_resident_parameters_point_into_what_is_resident() -> None:
    house, chunk = _trained(torch.bfloat16)
    pointers = []
    for resident in (12, 0, 12, 11, 12):
        chunk.place(Placement(resident, 0))
        assert chunk.resident == (resident == 12)
        if chunk.resident:
            assert torch.equal(chunk.tensors[1].parameter, house.originals["b"].bfloat16())
        else:
            assert chunk.tensors[1].parameter.isnan().all()
        pointers.append(chunk.tensors[1].parameter.data_ptr())
    chunk.place(Placement(12, 0))
    assert chunk.tensors[1].parameter.data_ptr() == pointers[-1], "a placement that changes nothing moved the values"
    close(house)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_was_left_is_really_gone(dtype: torch.dtype) -> None:
    house, chunk = _trained(dtype)
    for placement in (Placement(12, 12), Placement(5, 9), Placement(9, 5), Placement()):
        buffers = [s.values for s in chunk.segments] + [b for s in chunk.segments for b in s.companions.values()]
        alive = [weakref.ref(buffer.untyped_storage()) for buffer in buffers]
        del buffers
        chunk.place(placement)
        assert [ref() for ref in alive] == [None] * len(alive)
    close(house)


def test_a_view_of_resident_values_outlives_them() -> None:
    """The user, or a graph, may keep ``parameter.data``: reading it must not end the process, and it still counts."""
    house, chunk = _trained(torch.float32)
    chunk.place(Placement(12, 12))
    kept = chunk.tensors[0].parameter.data
    chunk.place(Placement())
    assert torch.equal(kept, house.originals["a"])
    memory = house.device.memory()
    assert (memory.model_data_bytes, memory.non_model_bytes) == (0, 48)
    del kept
    assert house.device.memory().non_model_bytes == 0
    close(house)


def test_segments_whose_gradients_differ_in_dtype_lose_nothing() -> None:
    """A sum over micro-batches is fp32 where a second gradient came, and still narrow in the segment where none did."""
    house = build([[spec("a", 4, dtype=torch.bfloat16), spec("b", 4, dtype=torch.bfloat16)]])
    chunk = house.chunks[0]
    a, b = chunk.tensors
    chunk.place(Placement(4, 0))
    gradients = [torch.full((4,), 256.0), torch.full((4,), 1.0)]
    for tensor in (a, b):
        chunk.deliver(tensor, gradients[0].bfloat16())
    chunk.deliver(b, gradients[1].bfloat16())
    assert {s.companions[GRADIENT].dtype for s in chunk.segments} == {torch.bfloat16, torch.float32}
    chunk.place(Placement(0, 3))
    assert torch.equal(chunk.companion_of(b, GRADIENT), torch.full((4,), 257.0))
    assert torch.equal(chunk.companion_of(a, GRADIENT).float(), gradients[0])
    close(house)


def test_a_state_that_some_segments_lack_starts_from_zero() -> None:
    house = build([[spec("a", 4), spec("b", 4)]])
    chunk = house.chunks[0]
    chunk.place(Placement(4, 4))
    chunk.write_companion(chunk.tensors[1], "momentum", torch.full((4,), 3.0))
    chunk.place(Placement(6, 2))
    assert torch.equal(chunk.companion_of(chunk.tensors[1], "momentum"), torch.full((4,), 3.0))
    assert torch.equal(chunk.companion_of(chunk.tensors[0], "momentum"), torch.zeros(4))
    close(house)


@pytest.mark.parametrize("wrong", [Placement(13, 0), Placement(0, 13), Placement(-1, 0)])
def test_a_placement_larger_than_the_chunk_is_refused(wrong: Placement) -> None:
    house, chunk = _trained(torch.float32)
    before = _contents(chunk)
    with pytest.raises(ValueError, match="cannot be had of 12 elements"):
        chunk.place(wrong)
    _assert_same(before, _contents(chunk))
    close(house)


# -- no room in the middle -------------------------------------------------------------------------------------------


class _Failing:
    """Makes the n-th allocation of a store fail."""

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._allocate, self._left = store, store.allocate, number
        self.failed = False
        store.allocate = self.allocate  # type: ignore[method-assign]

    def allocate(self, tier: Tier, kind: Kind, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self.failed = True
            raise torch.OutOfMemoryError("device") if tier is Tier.DEVICE else HostMemoryError("host")
        return self._allocate(tier, kind, numel, dtype)

    def stop(self) -> None:
        self._store.allocate = self._allocate  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    old=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    new=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    number=st.integers(1, 15),
)
@settings(max_examples=150, deadline=None)
def test_a_placement_that_fails_anywhere_changes_nothing(
    dtype: torch.dtype, old: tuple[int, int], new: tuple[int, int], number: int
) -> None:
    house, chunk = _trained(dtype)
    chunk.place(Placement(*old))
    contents, books = _contents(chunk), +house.store.bytes_by
    failing = _Failing(house.store, number)
    try:
        chunk.place(Placement(*new))
    except (torch.OutOfMemoryError, HostMemoryError):
        assert chunk.placement == Placement(*old)
        assert +house.store.bytes_by == books
    failing.stop()
    assert failing.failed == (chunk.placement != Placement(*new))
    _assert_same(contents, _contents(chunk))
    house.store.check_integrity()
    chunk.check_integrity()
    chunk.place(Placement(*new))
    _assert_same(contents, _contents(chunk))
    close(house)


def test_a_host_budget_that_ends_in_the_middle_of_a_placement() -> None:
    house, chunk = _trained(torch.bfloat16)
    chunk.place(Placement(12, 12))
    contents = _contents(chunk)
    for budget_bytes in range(0, 12 * 16, 8):
        house.arena.budget_bytes = budget_bytes
        with pytest.raises(HostMemoryError):
            chunk.place(Placement())
        assert chunk.resident
        house.manager.check_integrity()
        _assert_same(contents, _contents(chunk))
        assert torch.equal(chunk.tensors[0].parameter, house.originals["a"].bfloat16())
    house.arena.budget_bytes = 12 * 16
    chunk.place(Placement())
    _assert_same(contents, _contents(chunk))
    close(house)


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_plan_that_fits_is_reached_from_any_other_without_ever_going_over(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    specs = [[spec(f"p{i}", numel, dtype=dtype)] for i, numel in enumerate((5, 9, 3, 7))]
    house = build(specs)
    for chunk in house.chunks:
        for tensor in chunk.tensors:
            chunk.deliver(tensor, gradient_like(tensor, 1))
            for key in ("exp_avg", "exp_avg_sq"):
                chunk.write_companion(tensor, key, torch.ones(tensor.entry.spec.shape))
    plans = [
        [
            Placement(data.draw(st.integers(0, chunk.numel)), data.draw(st.integers(0, chunk.numel)))
            for chunk in house.chunks
        ]
        for _ in range(3)
    ]
    house.device.capacity_bytes = max(sum(persistent_bytes(house.facts, placements)) for placements in plans)
    for placements in (*plans, plans[0]):
        house.manager.apply(Plan("test", placements))
        house.manager.check_integrity()
        assert house.store.tier_bytes(Tier.DEVICE) == sum(persistent_bytes(house.facts, placements))
    for tensor in house.tensors:
        assert torch.equal(tensor.chunk.values_of(tensor), house.originals[tensor.name].to(dtype))
    close(house)


def test_a_plan_that_fails_says_where_everything_came_to_lie() -> None:
    house = equal_chunks(3, numel=8, capacity_bytes=2 * 8 * 4)
    wanted = Plan("test", [Placement(8, 8)] * 3)
    with pytest.raises(torch.OutOfMemoryError):
        house.manager.apply(wanted)
    assert house.manager.plan is not None
    assert house.manager.plan.placements == [chunk.placement for chunk in house.chunks]
    assert sorted(p.resident_numel for p in house.manager.plan.placements) == [0, 8, 8]
    house.manager.check_integrity()
    house.manager.apply(Plan("test", [Placement()] * 3))
    house.manager.check_integrity()
    for tensor in house.tensors:
        assert torch.equal(tensor.chunk.values_of(tensor), house.originals[tensor.name])
    close(house)


def test_a_plan_is_not_applied_while_a_pass_runs() -> None:
    house = equal_chunks(2)
    house.manager.begin_pass(training=True, batch_shape=(1,))
    with pytest.raises(RuntimeError, match="FORWARD"):
        house.manager.apply(Plan("test", [Placement()] * 2))
    close(house)


# -- fractions -------------------------------------------------------------------------------------------------------

FRACTIONS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("parameters", FRACTIONS)
@pytest.mark.parametrize("optimizer", FRACTIONS)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from([True, True, False])),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=8, deadline=None)
def test_static_fractions_are_exact_to_one_element(
    parameters: float, optimizer: float, sizes: list[tuple[int, torch.dtype, bool]]
) -> None:
    units = [[spec(f"p{i}", n, dtype=dtype, trainable=trained)] for i, (n, dtype, trained) in enumerate(sizes)]
    house = build(units)
    plan = Policy("static", parameters, optimizer).initial(house.facts, 1 << 30)
    house.manager.apply(plan)
    for chunk in house.chunks:
        for tensor in chunk.tensors if chunk.layout.trainable else ():
            chunk.deliver(tensor, gradient_like(tensor, 1))
            for key in ("exp_avg", "exp_avg_sq"):
                chunk.write_companion(tensor, key, torch.ones(tensor.entry.spec.shape))
    facts = house.facts
    kinds = house.store.bytes_by
    wanted = round(parameters * sum(fact.value_bytes for fact in facts))
    itemsize = max(fact.value_itemsize for fact in facts)
    assert 0 <= wanted - kinds[Tier.DEVICE, Kind.PARAMETERS] < itemsize
    assert plan.resident_parameter_bytes == kinds[Tier.DEVICE, Kind.PARAMETERS]
    placed = sum(f.companion_bytes_per_numel * p.companion_numel for f, p in zip(facts, plan.placements, strict=True))
    wanted = round(optimizer * sum(fact.companion_bytes for fact in facts))
    assert 0 <= wanted - placed < max(1, 1, *(fact.companion_bytes_per_numel for fact in facts))
    device_optimizer = sum(kinds[Tier.DEVICE, kind] for kind in (Kind.MASTER, Kind.OPTIMIZER, Kind.GRADIENTS))
    assert plan.device_optimizer_bytes == device_optimizer
    # Leading elements: at most one chunk is cut, those before it are whole, those after it have nothing.
    for counts in (
        [(p.resident_numel, f.numel) for p, f in zip(plan.placements, facts, strict=True)],
        [(p.companion_numel, f.numel) for p, f in zip(plan.placements, facts, strict=True) if f.companion_bytes],
    ):
        cut = next((i for i, (placed, numel) in enumerate(counts) if placed < numel), len(counts))
        assert all(placed == 0 for placed, _ in counts[cut + 1 :])
    close(house)
