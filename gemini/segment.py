"""Where a range of a chunk's elements lives when it is not gathered.

A chunk is cut into at most three segments, because the plan names two boundaries: elements before the first keep their
*values* on the device (resident parameters), elements before the second keep their *companions* there (fp32 master,
optimizer states, gradients). So fractions of parameters and of states can be exact to the element.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gemini.store import Kind, Store, Tier

MASTER = "master"
"""Companion key of the fp32 copy of the values that the optimizer updates."""
GRADIENT = "gradient"
"""Companion key of the gradient, present from the first gradient of a step on."""

_KINDS = {MASTER: Kind.MASTER, GRADIENT: Kind.GRADIENTS}


def kind_of(key: str) -> Kind:
    """The kind under which a companion's bytes are counted."""
    return _KINDS.get(key, Kind.OPTIMIZER)


@dataclass
class Segment:
    """Elements ``[start, stop)`` of a chunk.

    ``values`` is authoritative: a gathered copy is made from it and updates are written to it. In fp32 with both tiers
    equal the master *is* the values, and no second buffer exists.
    """

    start: int
    stop: int
    value_tier: Tier
    companion_tier: Tier
    values: torch.Tensor
    companions: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def master_is_values(self) -> bool:
        """Whether updates happen in ``values`` itself."""
        return MASTER in self.companions and self.companions[MASTER] is self.values

    def companion(self, store: Store, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The companion buffer, allocated (zero-filled) on first use.

        Raises:
            ValueError: it exists with another dtype.
        """
        if key not in self.companions:
            buffer = store.allocate(self.companion_tier, kind_of(key), self.numel, dtype)
            self.companions[key] = buffer.zero_()
        buffer = self.companions[key]
        if buffer.dtype != dtype:
            raise ValueError(f"companion {key} has dtype {buffer.dtype}, {dtype} was asked for")
        return buffer

    def drop(self, store: Store, key: str) -> None:
        """Frees a companion; a master that is the values is only forgotten."""
        buffer = self.companions.pop(key)
        if buffer is not self.values:
            store.free(self.companion_tier, kind_of(key), buffer)

    def free(self, store: Store) -> None:
        """Frees everything."""
        for key in list(self.companions):
            self.drop(store, key)
        store.free(self.value_tier, Kind.PARAMETERS, self.values)


@dataclass(frozen=True)
class Placement:
    """How many leading elements of a chunk keep values, and how many keep companions, on the device."""

    resident_numel: int = 0
    companion_numel: int = 0

    def bounds(self, numel: int) -> list[tuple[int, int, Tier, Tier]]:
        """``(start, stop, value tier, companion tier)`` of each segment, in order."""
        cuts = sorted({0, self.resident_numel, self.companion_numel, numel})
        return [
            (
                start,
                stop,
                Tier.DEVICE if stop <= self.resident_numel else Tier.HOST,
                Tier.DEVICE if stop <= self.companion_numel else Tier.HOST,
            )
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]


def rebuild(old: list[Segment], placement: Placement, numel: int, store: Store) -> list[Segment]:
    """Moves a chunk's elements to a new placement, buffer by buffer, so at most one buffer exists twice at a time.

    Exact: values, master, states and pending gradients arrive bit for bit.
    """
    bounds = placement.bounds(numel)
    if [(s.start, s.stop, s.value_tier, s.companion_tier) for s in old] == bounds:
        return old
    dtype = old[0].values.dtype
    keys = dict.fromkeys(key for segment in old for key in segment.companions)
    shared = all(segment.master_is_values for segment in old) or (MASTER in keys and dtype == torch.float32)
    masters = {MASTER: _take_out(old, MASTER, numel, store)} if MASTER in keys else {}
    whole_values = _take_out(old, None, numel, store)
    new = []
    for start, stop, value_tier, companion_tier in bounds:
        values = store.allocate(value_tier, Kind.PARAMETERS, stop - start, dtype)
        values.copy_(whole_values[start:stop])
        new.append(Segment(start, stop, value_tier, companion_tier, values))
    del whole_values
    for key in keys:
        whole = masters.pop(key) if key in masters else _take_out(old, key, numel, store)
        for segment in new:
            if key == MASTER and shared and segment.value_tier is segment.companion_tier:
                segment.companions[key] = segment.values
            else:
                target = store.allocate(segment.companion_tier, kind_of(key), segment.numel, whole.dtype)
                segment.companions[key] = target.copy_(whole[segment.start : segment.stop])
    return new


def _take_out(segments: list[Segment], key: str | None, numel: int, store: Store) -> torch.Tensor:
    """Copies one kind of buffer of all segments to one host tensor and frees the originals."""
    sources = [segment.values if key is None else segment.companions.get(key) for segment in segments]
    dtype = next(source.dtype for source in sources if source is not None)
    whole = torch.zeros(numel, dtype=dtype)
    for segment, source in zip(segments, sources, strict=True):
        if source is None:
            continue
        whole[segment.start : segment.stop].copy_(source)
        if key is None:
            store.free(segment.value_tier, Kind.PARAMETERS, source)
        else:
            segment.drop(store, key)
    return whole
