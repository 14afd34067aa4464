"""Parameters to chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_case import build, close, spec

from gemini.layout import ChunkLayout, ParameterSpec, UnitSpec, build_layout

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@st.composite
def _units(draw: st.DrawFn) -> list[UnitSpec]:
    shapes = st.lists(st.integers(0, 7), max_size=3)
    names = iter(range(10**6))
    return [
        UnitSpec(
            f"unit{number}",
            tuple(
                spec(
                    f"p{next(names)}", *draw(shapes), dtype=draw(st.sampled_from(DTYPES)), trainable=draw(st.booleans())
                )
                for _ in range(draw(st.integers(0, 8)))
            ),
        )
        for number in range(draw(st.integers(0, 4)))
    ]


def _places(chunks: list[ChunkLayout]) -> list[tuple[ParameterSpec, ChunkLayout, int]]:
    return [(entry.spec, chunk, entry.offset) for chunk in chunks for entry in chunk.entries]


@given(units=_units(), max_chunk_bytes=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_what_every_layout_promises(units: list[UnitSpec], max_chunk_bytes: int) -> None:
    chunks = build_layout(units, max_chunk_bytes)
    given_once = [parameter for unit in units for parameter in unit.parameters if parameter.numel]
    # Each parameter with elements stands in exactly one chunk; one without elements needs no place.
    assert sorted(s.name for s, _, _ in _places(chunks)) == sorted(s.name for s in given_once)
    unit_of = {s.name: number for number, unit in enumerate(units) for s in unit.parameters}
    for position, chunk in enumerate(chunks):
        assert chunk.index == position
        assert {unit_of[entry.spec.name] for entry in chunk.entries} == {chunk.unit}
        assert chunk.unit_name == units[chunk.unit].name
        assert {(entry.spec.dtype, entry.spec.trainable) for entry in chunk.entries} == {(chunk.dtype, chunk.trainable)}
        # No gap and no overlap.
        assert [entry.offset for entry in chunk.entries] == [0, *(entry.stop for entry in chunk.entries)][:-1]
        assert chunk.numel == sum(entry.spec.numel for entry in chunk.entries)
        assert chunk.num_bytes == chunk.numel * chunk.dtype.itemsize
        assert chunk.num_bytes <= max_chunk_bytes or len(chunk.entries) == 1
    # Order: units as given, and within a unit parameters of one kind as given.
    assert [chunk.unit for chunk in chunks] == sorted(chunk.unit for chunk in chunks)
    order = {s.name: number for number, s in enumerate(given_once)}
    for key in {(c.unit, c.dtype, c.trainable) for c in chunks}:
        numbers = [order[s.name] for s, c, _ in _places(chunks) if (c.unit, c.dtype, c.trainable) == key]
        assert numbers == sorted(numbers)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), max_numel=st.integers(1, 40))
def test_chunks_are_filled_before_the_next_begins(sizes: list[int], max_numel: int) -> None:
    unit = UnitSpec("u", tuple(spec(f"p{i}", numel) for i, numel in enumerate(sizes)))
    chunks = build_layout([unit], max_numel * 4)
    for chunk, following in zip(chunks, chunks[1:], strict=False):
        assert chunk.numel + following.entries[0].spec.numel > max_numel


def test_a_parameter_larger_than_a_chunk_gets_its_own() -> None:
    unit = UnitSpec("u", (spec("small", 2), spec("large", 100), spec("last", 2)))
    assert [[e.spec.name for e in c.entries] for c in build_layout([unit], 64)] == [["small"], ["large"], ["last"]]


def test_frozen_and_trained_and_dtypes_stand_apart_in_the_order_of_their_first() -> None:
    unit = UnitSpec(
        "u",
        (
            spec("frozen", 2, trainable=False),
            spec("half", 2, dtype=torch.bfloat16),
            spec("trained", 2),
            spec("frozen too", 2, trainable=False),
            spec("half too", 2, dtype=torch.bfloat16),
        ),
    )
    chunks = build_layout([unit], 1 << 20)
    assert [[e.spec.name for e in c.entries] for c in chunks] == [
        ["frozen", "frozen too"],
        ["half", "half too"],
        ["trained"],
    ]


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_chunk_must_have_bytes(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"positive, got {wrong}"):
        build_layout([], wrong)


def test_a_tied_parameter_given_twice_is_refused_by_name() -> None:
    units = [UnitSpec("a", (spec("shared.weight", 2),)), UnitSpec("b", (spec("shared.weight", 2),))]
    with pytest.raises(ValueError, match=r"shared\.weight appears twice"):
        build_layout(units, 64)


def test_the_tensor_at_every_offset() -> None:
    house = build([[spec("a", 3), spec("b", 1), spec("empty", 0), spec("c", 2, 2)]])
    chunk = house.chunks[0]
    assert [chunk.tensor_at(offset).name for offset in range(8)] == list("aaabcccc")
    assert [(t.name, t.entry.offset, t.entry.stop) for t in chunk.tensors] == [("a", 0, 3), ("b", 3, 4), ("c", 4, 8)]
    close(house)
