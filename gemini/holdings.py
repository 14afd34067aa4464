"""What a chunk holds, on the device or not: its segments, and reads and writes of one parameter in them."""

from __future__ import annotations

import torch

from gemini.layout import Entry
from gemini.segment import MASTER, Placement, Segment, device_bytes_at, overlaps, placement_of
from gemini.store import Store


class Holdings:
    """The segments of a chunk.

    Args:
        store: gives memory for companions that appear later.

    Attributes:
        segments: in order, without gap or overlap.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.segments: list[Segment] = []

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

    def copy_out(self, entry: Entry, key: str | None) -> torch.Tensor:
        """A host copy of one parameter's values (``key`` None) or share of a companion, in its shape.

        Raises:
            KeyError: a segment of the parameter has no such companion.
        """
        parts = [
            (s.values if key is None else s.companions[key])[left - s.start : right - s.start].cpu()
            for s, left, right in self.pieces(entry.offset, entry.stop)
        ]
        flat = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
        return flat.as_strided(entry.spec.shape, entry.spec.stride)

    def put_companion(self, entry: Entry, key: str, data: torch.Tensor) -> None:
        """Writes one parameter's share of a companion, allocating the companion if need be."""
        flat = _flat(entry, data, data.dtype)
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            target = segment.companion(self._store, key, data.dtype)
            target[left - segment.start : right - segment.start].copy_(flat[left - entry.offset : right - entry.offset])

    def put_values(self, entry: Entry, data: torch.Tensor) -> None:
        """Writes one parameter's values, and its master where there is one, from any float dtype."""
        flat = _flat(entry, data, torch.promote_types(data.dtype, entry.spec.dtype))
        for segment, left, right in self.pieces(entry.offset, entry.stop):
            source = flat[left - entry.offset : right - entry.offset]
            inside = slice(left - segment.start, right - segment.start)
            if MASTER in segment.companions:
                segment.companions[MASTER][inside].copy_(source)
            if not segment.master_is_values:
                segment.values[inside].copy_(source)

    def check_cover(self, index: int, numel: int) -> None:
        """Raises RuntimeError if the segments of chunk ``index`` do not cover its ``numel`` elements, each once."""
        at = 0
        for segment in self.segments:
            if segment.start != at or segment.values.numel() != segment.numel:
                raise RuntimeError(f"chunk {index}: segments do not cover it: gap or overlap at element {at}")
            at = segment.stop
        if at != numel:
            raise RuntimeError(f"chunk {index}: segments end at {at} of {numel} elements")


def _flat(entry: Entry, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a tensor of the parameter's shape, in the order in which they lie in the chunk."""
    flat = torch.empty(entry.spec.numel, dtype=dtype)
    flat.as_strided(entry.spec.shape, entry.spec.stride).copy_(data)
    return flat
