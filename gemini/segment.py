"""Where a range of a chunk's elements lives when it is not gathered.

A chunk is cut into at most three segments, because the plan names two boundaries: elements before the first keep their
*values* on the device (resident parameters), elements before the second keep their *companions* there (fp32 master,
optimizer states, gradients). So fractions of parameters and of states can be exact to the element.

What is not on the device is at home: on the host, or for chunks that the host has no room for, on disk
(:class:`Homes`). Gradients come and go with every step and are always on the host then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gemini.store import Kind, Store, Tier

MASTER = "master"
"""Companion key of the fp32 copy of the values that the optimizer updates."""
GRADIENT = "gradient"
"""Companion key of the gradient, present from the first gradient of a step on."""

_KINDS = {MASTER: Kind.MASTER, GRADIENT: Kind.GRADIENTS}
_VALUES = "values"
_NOTHING = torch.empty(0)


def kind_of(key: str) -> Kind:
    """The kind under which a companion's bytes are counted."""
    return _KINDS.get(key, Kind.OPTIMIZER)


@dataclass(frozen=True)
class Homes:
    """Where a chunk's values, and its companions, are when they are not on the device: HOST or DISK."""

    values: Tier = Tier.HOST
    companions: Tier = Tier.HOST


AT_HOME = Homes()


@dataclass
class Segment:
    """Elements ``[start, stop)`` of a chunk.

    ``values`` is authoritative: a gathered copy is made from it and updates are written to it. In fp32 with both on the
    device, or both not, the master *is* the values, and no second buffer exists.
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

    @property
    def updates_on_device(self) -> bool:
        """Whether the companions are on the device."""
        return self.companion_tier is Tier.DEVICE

    @property
    def values_cross(self) -> bool:
        """Whether new values cross the link after an update."""
        return (self.value_tier is Tier.DEVICE) != self.updates_on_device

    def tier_of(self, key: str) -> Tier:
        """Where a companion is, or would be."""
        return Tier.HOST if key == GRADIENT and not self.updates_on_device else self.companion_tier

    def on_disk(self) -> list[torch.Tensor]:
        """Buffers on disk: what an update reads and writes there."""
        keys = [key for key in self.companions if self.tier_of(key) is Tier.DISK]
        buffers = [self.companions[key] for key in keys if self.companions[key] is not self.values]
        return [*buffers, self.values] if self.value_tier is Tier.DISK else buffers

    def companion(self, store: Store, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The companion buffer, allocated (zero-filled) on first use.

        Raises:
            ValueError: it exists with another dtype.
        """
        if key not in self.companions:
            buffer = store.allocate(self.tier_of(key), kind_of(key), self.numel, dtype)
            # Other memory comes zero-filled; touching it here would only make the machine write it twice.
            self.companions[key] = buffer.zero_() if self.updates_on_device else buffer
        buffer = self.companions[key]
        if buffer.dtype != dtype:
            raise ValueError(f"companion {key} has dtype {buffer.dtype}, {dtype} was asked for")
        return buffer

    def drop(self, store: Store, key: str) -> None:
        """Frees a companion; a master that is the values is only forgotten."""
        buffer = self.companions.pop(key)
        if buffer is not self.values:
            store.free(self.tier_of(key), kind_of(key), buffer)

    def drop_values(self, store: Store) -> None:
        """Frees the values, and with them a master that is the values."""
        if self.master_is_values:
            del self.companions[MASTER]
        if self.values.numel():
            store.free(self.value_tier, Kind.PARAMETERS, self.values)
        self.values = _NOTHING

    def free(self, store: Store) -> None:
        """Frees everything."""
        for key in list(self.companions):
            self.drop(store, key)
        self.drop_values(store)


@dataclass(frozen=True)
class Placement:
    """How many leading elements of what is owned of a chunk keep values, and how many companions, on the device."""

    resident_numel: int = 0
    companion_numel: int = 0

    def bounds(self, first: int, last: int, homes: Homes = AT_HOME) -> list[tuple[int, int, Tier, Tier]]:
        """``(start, stop, value tier, companion tier)`` of each segment of elements ``[first, last)``, in order.

        Args:
            first: element of the chunk.
            last: element after the last.
            homes: of what is not on the device.

        Raises:
            ValueError: there are fewer elements than are to be placed.
        """
        numel = last - first
        if not (0 <= self.resident_numel <= numel and 0 <= self.companion_numel <= numel):
            raise ValueError(f"{self} cannot be had of {numel} elements")
        cuts = sorted({0, self.resident_numel, self.companion_numel, numel})
        return [
            (
                first + start,
                first + stop,
                Tier.DEVICE if stop <= self.resident_numel else homes.values,
                Tier.DEVICE if stop <= self.companion_numel else homes.companions,
            )
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]


def overlaps(segments: Iterable[Segment], start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
    """Segments that hold some of the elements ``[start, stop)``, each with the overlap in chunk elements."""
    for segment in segments:
        left, right = max(start, segment.start), min(stop, segment.stop)
        if left < right:
            yield segment, left, right


def placement_of(segments: Sequence[Segment]) -> Placement:
    """The placement that segments are cut by."""
    return Placement(
        sum(s.numel for s in segments if s.value_tier is Tier.DEVICE),
        sum(s.numel for s in segments if s.companion_tier is Tier.DEVICE),
    )


def device_bytes_at(segments: Sequence[Segment], placement: Placement) -> int:
    """Device bytes that these values and companions would take under a placement."""
    return sum(_device_bytes(segments, placement, key) for key in _keys(segments))


def rebuild(old: list[Segment], placement: Placement, store: Store, homes: Homes = AT_HOME) -> list[Segment]:
    """Moves a chunk's elements to a new placement, buffer by buffer, so at most one buffer exists twice at a time.

    Exact: values, master, states and pending gradients arrive bit for bit. What leaves the device goes first: it never
    holds more than the greater of before and after.

    Raises:
        torch.OutOfMemoryError: the device has no room; ``old`` is then what it was.
        HostMemoryError: the host has no room; likewise.
        DiskError: the disk has no room; likewise.
    """
    bounds = placement.bounds(old[0].start, old[-1].stop, homes)
    if [(s.start, s.stop, s.value_tier, s.companion_tier) for s in old] == bounds:
        return old
    new = [Segment(*bound, values=_NOTHING) for bound in bounds]
    joint = _master_follows_values(old)
    holders = {key: [s for s in old if key in (_VALUES, *s.companions)] for key in _keys(old)}
    present = placement_of(old)
    growth = {key: _device_bytes(old, placement, key) - _device_bytes(old, present, key) for key in holders}
    moved: list[str] = []
    try:
        for key in sorted(holders, key=lambda k: growth[k]):
            _carry(key, holders[key], new, store, joint)
            moved.append(key)
    except Exception:
        for key in reversed(moved):
            _carry(key, new, holders[key], store, joint)
        raise
    return new


def _keys(segments: Sequence[Segment]) -> list[str]:
    """What is carried as one: the values (in fp32 with their master), then each companion."""
    keys = dict.fromkeys(key for segment in segments for key in segment.companions)
    if _master_follows_values(segments):
        keys.pop(MASTER)
    return [_VALUES, *keys]


def _master_follows_values(segments: Sequence[Segment]) -> bool:
    """In fp32 the master has the values' bits, as one buffer or as two."""
    return segments[0].values.dtype == torch.float32 and any(MASTER in s.companions for s in segments)


def _device_bytes(segments: Sequence[Segment], placement: Placement, key: str) -> int:
    if key == _VALUES:
        both = _master_follows_values(segments)
        numel = max(placement.resident_numel, placement.companion_numel) if both else placement.resident_numel
        return numel * segments[0].values.dtype.itemsize
    return placement.companion_numel * _widest(segments, key).itemsize


def _widest(segments: Iterable[Segment], key: str) -> torch.dtype:
    """The dtype that loses nothing of a companion whose segments differ in it (a gradient that was widened in part)."""
    dtypes = [s.values.dtype if key == _VALUES else s.companions[key].dtype for s in segments if _has(s, key)]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _has(segment: Segment, key: str) -> bool:
    return key == _VALUES or key in segment.companions


def _carry(key: str, old: list[Segment], new: list[Segment], store: Store, joint: bool) -> None:
    """Moves one buffer from old segments to new ones through host memory; if that fails, puts it back."""
    first, last = min(old[0].start, new[0].start), max(old[-1].stop, new[-1].stop)
    whole = torch.zeros(last - first, dtype=_widest(old, key))
    for segment in old:
        whole[segment.start - first : segment.stop - first].copy_(_source(segment, key, joint))
        _free(segment, key, store, joint)
    try:
        _fill(key, new, whole, first, store, joint)
    except Exception:
        for segment in new:
            _free(segment, key, store, joint)
        _fill(key, old, whole, first, store, joint)
        raise


def _source(segment: Segment, key: str, joint: bool) -> torch.Tensor:
    if key != _VALUES:
        return segment.companions[key]
    return segment.companions.get(MASTER, segment.values) if joint else segment.values


def _fill(key: str, segments: list[Segment], whole: torch.Tensor, first: int, store: Store, joint: bool) -> None:
    for segment in segments:
        inside = whole[segment.start - first : segment.stop - first]
        if key != _VALUES:
            segment.companion(store, key, whole.dtype).copy_(inside)
            continue
        segment.values = store.allocate(segment.value_tier, Kind.PARAMETERS, segment.numel, whole.dtype).copy_(inside)
        if not joint:
            continue
        if segment.values_cross:
            segment.companion(store, MASTER, whole.dtype).copy_(inside)
        else:
            segment.companions[MASTER] = segment.values


def _free(segment: Segment, key: str, store: Store, joint: bool) -> None:
    """Frees what :func:`_fill` makes, as far as it is there."""
    for companion in (MASTER,) if key == _VALUES and joint else (key,):
        if companion in segment.companions:
            segment.drop(store, companion)
    if key == _VALUES:
        segment.drop_values(store)
