"""What a chunk holds, on the device or not: its segments, and reads and writes of one parameter in them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemini.exchange import Shard
from gemini.layout import Entry
from gemini.segment import GRADIENT, MASTER, Placement, Segment, device_bytes_at, overlaps, placement_of
from gemini.store import Store


class Holdings:
    """The segments of a chunk: the elements of it that this process owns.

    Args:
        store: gives memory for companions that appear later.
        shard: which elements these are.

    Attributes:
        segments: in order, without gap or overlap.
        before_change: called before values or companions change or move, gradients apart: somebody may still be
            reading them, such as a checkpoint that is written in the background.
    """

    def __init__(self, store: Store, shard: Shard) -> None:
        self._store = store
        self.shard = shard
        self.segments: list[Segment] = []
        self.before_change: Callable[[], None] = nothing

    @property
    def placement(self) -> Placement:
        """Where the elements live now."""
        return placement_of(self.segments)

    def growth_bytes(self, placement: Placement) -> int:
        """Device bytes that a placement would add; negative where it frees some."""
        return device_bytes_at(self.segments, placement) - device_bytes_at(self.segments, self.placement)

    def pieces(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """Segments that hold elements ``[start, stop)``, each with the overlap in chunk elements."""
        return list(overlaps(self.segments, start, stop))

    def own_part(self, entry: Entry, key: str | None) -> torch.Tensor:
        """A host copy of what is owned of one parameter's values (``key`` None) or companion, 1-D, in memory order.

        Raises:
            KeyError: a segment of the parameter has no such companion.
        """
        parts = [
            (s.values if key is None else s.companions[key])[left - s.start : right - s.start].cpu()
            for s, left, right in self.pieces(entry.offset, entry.stop)
        ]
        if not parts:
            return torch.empty(0, dtype=entry.spec.dtype if key is None else torch.float32)
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def put_companion(self, entry: Entry, key: str, data: torch.Tensor) -> None:
        """Writes one parameter's share of a companion, as far as it is owned, allocating the companion if need be."""
        if key != GRADIENT:
            self.before_change()
        flat = _flat(entry, data, data.dtype)
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            present = segment.companions.get(key)
            target = segment.companion(self._store, key, data.dtype if present is None else present.dtype)
            target[left - segment.start : right - segment.start].copy_(flat[left - entry.offset : right - entry.offset])

    def put_values(self, entry: Entry, data: torch.Tensor) -> None:
        """Writes what is owned of one parameter's values, and of its master where there is one, from any float dtype."""
        self.before_change()
        flat = _flat(entry, data, torch.promote_types(data.dtype, entry.spec.dtype))
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            source = flat[left - entry.offset : right - entry.offset]
            inside = slice(left - segment.start, right - segment.start)
            if MASTER in segment.companions:
                segment.companions[MASTER][inside].copy_(source)
            if not segment.master_is_values:
                segment.values[inside].copy_(source)

    def check_cover(self, index: int) -> None:
        """Raises RuntimeError if the segments of chunk ``index`` do not cover what is owned of it, each element once."""
        at = self.shard.start
        for segment in self.segments:
            if segment.start != at or segment.values.numel() != segment.numel:
                raise RuntimeError(f"chunk {index}: segments do not cover it: gap or overlap at element {at}")
            at = segment.stop
        if at != self.shard.stop:
            raise RuntimeError(f"chunk {index}: segments end at element {at}, not at {self.shard.stop}")


def nothing() -> None:
    """Nobody is reading."""


def _flat(entry: Entry, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a tensor of the parameter's shape, in the order in which they lie in the chunk."""
    flat = torch.empty(entry.spec.numel, dtype=dtype)
    flat.as_strided(entry.spec.shape, entry.spec.stride).copy_(data)
    return flat
