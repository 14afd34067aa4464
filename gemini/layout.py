"""Parameters to chunks: which bytes lie side by side.

A chunk never straddles units, holds one dtype, and keeps trainable and frozen parameters apart (frozen ones have no
gradient and no optimizer states, so their chunks have no companions at all). Order within a unit is the order given,
which callers make the order of first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParameterSpec:
    """What the layout must know of one parameter (a tied parameter appears once, under its first name)."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    """dtype of the values that computations see."""
    trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class UnitSpec:
    """Parameters fetched together: one transformer block, or one module outside the blocks."""

    name: str
    parameters: tuple[ParameterSpec, ...]


@dataclass(frozen=True)
class Entry:
    """One parameter's place in its chunk, in elements."""

    spec: ParameterSpec
    offset: int

    @property
    def stop(self) -> int:
        """First element after this parameter."""
        return self.offset + self.spec.numel


@dataclass(frozen=True)
class ChunkLayout:
    """One chunk: a 1-D buffer of ``numel`` elements of ``dtype``."""

    index: int
    unit: int
    unit_name: str
    dtype: torch.dtype
    trainable: bool
    entries: tuple[Entry, ...]
    align_numel: int = 1
    """Parameters begin, and the buffer ends, at multiples of so many elements."""

    @property
    def numel(self) -> int:
        """Number of elements of the buffer."""
        return _aligned(self.entries[-1].stop, self.align_numel)

    @property
    def num_bytes(self) -> int:
        """Bytes of the gathered buffer."""
        return self.numel * self.dtype.itemsize


Align = Callable[[torch.dtype, bool], int]
"""The ``align_numel`` of chunks of a dtype, trainable or not."""


def build_layout(
    units: Sequence[UnitSpec], max_chunk_bytes: int, align: Align = lambda dtype, trainable: 1
) -> list[ChunkLayout]:
    """Fills chunks in order; a parameter larger than ``max_chunk_bytes`` gets a chunk of its own.

    Args:
        units: in order of first use.
        max_chunk_bytes: the largest chunk, in bytes of the compute dtype.
        align: where parameters begin.

    Raises:
        ValueError: if ``max_chunk_bytes`` is not positive or a name appears twice.
    """
    if max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes must be positive, got {max_chunk_bytes}")
    _check_names(units)
    chunks: list[ChunkLayout] = []
    for unit_index, unit in enumerate(units):
        for dtype, trainable, specs in _group(unit.parameters):
            aligned = align(dtype, trainable)
            for part in _cut(specs, max_chunk_bytes):
                entries = _place(part, aligned)
                chunks.append(ChunkLayout(len(chunks), unit_index, unit.name, dtype, trainable, entries, aligned))
    return chunks


def _check_names(units: Sequence[UnitSpec]) -> None:
    seen: set[str] = set()
    for unit in units:
        for spec in unit.parameters:
            if spec.name in seen:
                raise ValueError(
                    f"parameter {spec.name} appears twice in the layout; tied parameters must be given once"
                )
            seen.add(spec.name)


def _group(specs: Iterable[ParameterSpec]) -> list[tuple[torch.dtype, bool, list[ParameterSpec]]]:
    """Keeps order within each (dtype, trainable); groups come in order of their first parameter."""
    groups: dict[tuple[torch.dtype, bool], list[ParameterSpec]] = {}
    for spec in specs:
        if spec.numel:
            groups.setdefault((spec.dtype, spec.trainable), []).append(spec)
    return [(dtype, trainable, members) for (dtype, trainable), members in groups.items()]


def _cut(specs: Sequence[ParameterSpec], max_chunk_bytes: int) -> list[list[ParameterSpec]]:
    parts: list[list[ParameterSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        spec_bytes = spec.numel * spec.dtype.itemsize
        if parts[-1] and filled_bytes + spec_bytes > max_chunk_bytes:
            parts.append([])
            filled_bytes = 0
        parts[-1].append(spec)
        filled_bytes += spec_bytes
    return parts


def _place(specs: Sequence[ParameterSpec], align_numel: int) -> tuple[Entry, ...]:
    entries, offset = [], 0
    for spec in specs:
        entries.append(Entry(spec, offset))
        offset = _aligned(offset + spec.numel, align_numel)
    return tuple(entries)


def _aligned(numel: int, multiple: int) -> int:
    return numel + -numel % multiple


def joined(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """``(start, stop)`` of what entries cover, in chunk elements; neighbours as one."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry.offset:
            runs[-1] = runs[-1][0], entry.stop
        else:
            runs.append((entry.offset, entry.stop))
    return runs


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in some order of dimensions."""
    expected = 1
    for length, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if length == 1:
            continue
        if stride != expected:
            return False
        expected *= length
    return True
