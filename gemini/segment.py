"""Where a range of a chunk's elements lives when it is not gathered.

A chunk is cut into at most three segments, because the plan names two boundaries: elements before the first keep their
*values* on the device (resident parameters), elements before the second keep their *companions* there (fp32 master,
optimizer states, gradients). So fractions of parameters and of states can be exact to the element.

What is not on the device is at home: on the host, or for chunks that the host has no room for, on disk
(:class:`Homes`). Gradients come and go with every step and are always on the host then.

Master and states may be coded (:mod:`gemini.codec`): whoever wants numbers asks :meth:`Segment.read`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gemini.codec import PIECE_NUMEL, Codec
from gemini.store import Kind, Store, Tier

MASTER = "master"
"""Companion key of the fp32 copy of the values that the optimizer updates; of a coded one, of its upper part."""
MASTER_LOW = "master_low"
"""Companion key of what values leave of a master whose upper part they are."""
GRADIENT = "gradient"
"""Companion key of the gradient, present from the first gradient of a step on."""

_KINDS = {MASTER: Kind.MASTER, MASTER_LOW: Kind.MASTER, GRADIENT: Kind.GRADIENTS}
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

    ``values`` is authoritative: a gathered copy is made from it and updates are written to it. In fp32, and where master
    and states are coded, with both on the device, or both not, the master *is* the values, and no second buffer exists.
    """

    start: int
    stop: int
    value_tier: Tier
    companion_tier: Tier
    values: torch.Tensor
    companions: dict[str, torch.Tensor] = field(default_factory=dict)
    codec: Codec | None = None

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

    @property
    def update_bytes(self) -> int:
        """That an update reads and writes."""
        held = [buffer for key, buffer in self.companions.items() if key != GRADIENT]
        gradient = self.companions.get(GRADIENT, _NOTHING)
        return gradient.nbytes + 2 * sum(b.nbytes for b in held) + self.values.nbytes * (not self.master_is_values)

    def companion(self, store: Store, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The companion buffer, allocated (zero-filled) on first use.

        Raises:
            ValueError: it exists with another dtype.
        """
        if key not in self.companions:
            part = None if self.codec is None else self.codec.part(key)
            numel = self.numel if part is None else part.numel(self.numel)
            buffer = store.allocate(self.tier_of(key), kind_of(key), numel, dtype)
            # Other memory comes zero-filled; touching it here would only make the machine write it twice.
            self.companions[key] = buffer.zero_() if self.updates_on_device else buffer
        buffer = self.companions[key]
        if buffer.dtype != dtype:
            raise ValueError(f"companion {key} has dtype {buffer.dtype}, {dtype} was asked for")
        return buffer

    # -- what is in it -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """Keys of :meth:`read`, gradients among them."""
        if self.codec is None:
            return list(self.companions)
        return [*self.codec.states, *(key for key in (GRADIENT,) if key in self.companions)]

    def codes(self, key: str | None) -> bool:
        """Whether a companion is not what its buffer holds."""
        return self.codec is not None and key in self.codec.states

    def decoded(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Master and states of elements ``[start, stop)`` of the chunk, in fp32: views where they are not coded."""
        if self.codec is None:
            inside = slice(start - self.start, stop - self.start)
            return {key: buffer[inside] for key, buffer in self.companions.items() if key != GRADIENT}
        return self.codec.decode(*self._coded(start, stop))

    def encode(self, states: Mapping[str, torch.Tensor], start: int, stop: int, step: int | None) -> None:
        """Writes what :meth:`decoded` returned of whole blocks; see :meth:`gemini.codec.Codec.encode`."""
        if self.codec is not None:
            self.codec.encode(states, *self._coded(start, stop), start, step)

    def read(self, key: str | None, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the chunk of a companion, or of the values (``key`` None).

        A view where they lie as they are; else on the host.

        Raises:
            KeyError: there is no such companion.
        """
        if key is None or not self.codes(key):
            held = self.values if key is None else self.companions[key]
            return held[start - self.start : stop - self.start]
        found = torch.empty(stop - start, dtype=torch.float32)
        for first, last, on_host in self._on_host(start, stop):
            states = on_host.decoded(first, last)
            left, right = max(start, first), min(stop, last)
            found[left - start : right - start] = states[key][left - first : right - first]
        return found

    def write(self, store: Store, states: Mapping[str, torch.Tensor], start: int, step: int | None = None) -> None:
        """Writes companions, each made if need be, from element ``start`` of the chunk on.

        Args:
            store: gives memory.
            states: by key, of one length.
            start: first element of the chunk.
            step: see :meth:`gemini.codec.Codec.encode`.
        """
        coded = {key: source for key, source in states.items() if self.codes(key)}
        for key, source in states.items():
            if key not in coded:
                present = self.companions.get(key)
                target = self.companion(store, key, source.dtype if present is None else present.dtype)
                target[start - self.start : start - self.start + source.numel()].copy_(source)
        if not coded:
            return
        stop = start + next(iter(coded.values())).numel()
        for first, last, on_host in self._on_host(start, stop):
            changed = on_host.decoded(first, last)
            left, right = max(start, first), min(stop, last)
            for key, source in coded.items():
                changed[key][left - first : right - first] = source[left - start : right - start]
            on_host.encode(changed, first, last, step)
            for key, buffer in on_host.companions.items():
                if self.companions[key].device != buffer.device:  # else it is no copy
                    self.companions[key][self._inside(key, first, last)].copy_(buffer)

    def write_values(self, store: Store, source: torch.Tensor, start: int) -> None:
        """Writes values, and the master where there is one, from element ``start`` of the chunk on."""
        inside = slice(start - self.start, start - self.start + source.numel())
        if MASTER in self.companions:
            self.write(store, {MASTER: source}, start)
        if not self.master_is_values:
            self.values[inside].copy_(source if self.codec is None else self.companions[MASTER][inside])

    def _inside(self, key: str, start: int, stop: int) -> slice:
        """Where a companion has elements of whole blocks of the chunk."""
        part = None if self.codec is None else self.codec.part(key)
        block_numel = 1 if part is None else part.block_numel
        return slice((start - self.start) // block_numel, -(-(stop - self.start) // block_numel))

    def _coded(self, start: int, stop: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts = {key: buffer[self._inside(key, start, stop)] for key, buffer in self.companions.items()}
        return parts, parts[MASTER]

    def _on_host(self, start: int, stop: int) -> Iterator[tuple[int, int, Segment]]:
        """Whole blocks that hold ``[start, stop)``, a few at a time: first element, last, and a segment on the host."""
        block_numel = 1 if self.codec is None else self.codec.block_numel
        start -= (start - self.start) % block_numel
        stop = min(self.stop, stop + -(stop - self.start) % block_numel)
        keys = [key for key in self.companions if key != GRADIENT]
        for first in range(start, stop, PIECE_NUMEL):
            last = min(first + PIECE_NUMEL, stop)
            companions = {key: self.companions[key][self._inside(key, first, last)].cpu() for key in keys}
            yield first, last, Segment(first, last, Tier.HOST, Tier.HOST, companions[MASTER], companions, self.codec)

    # -- giving back -------------------------------------------------------------------------------------------------

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
    """How many leading elements of what is owned of a chunk keep values, and how many companions, on the device.

    And where companions that do not are updated: by the host, or on the device, to which they are streamed
    (:mod:`gemini.streamed`).
    """

    resident_numel: int = 0
    companion_numel: int = 0
    streams_update: bool = False

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
    new = [Segment(*bound, values=_NOTHING, codec=old[0].codec) for bound in bounds]
    _require_whole_blocks(new)
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


def _require_whole_blocks(segments: Sequence[Segment]) -> None:
    codec, cuts = segments[0].codec, [s.start - segments[0].start for s in segments]
    if codec is not None and any(cut % codec.block_numel for cut in cuts):
        raise ValueError(
            f"coded states can be cut at multiples of {codec.block_numel} elements only, not at {cuts[1:]}"
        )


def _keys(segments: Sequence[Segment]) -> list[str]:
    """What is carried as one: the values (with a master that has their bits), then each companion."""
    keys = dict.fromkeys(key for segment in segments for key in segment.companions)
    if _master_follows_values(segments):
        keys.pop(MASTER)
    return [_VALUES, *keys]


def _master_follows_values(segments: Sequence[Segment]) -> bool:
    """In fp32, and where it is coded, the master has the values' bits, as one buffer or as two."""
    return any(MASTER in s.companions and s.companions[MASTER].dtype == s.values.dtype for s in segments)


def _device_bytes(segments: Sequence[Segment], placement: Placement, key: str) -> int:
    if key == _VALUES:
        both = _master_follows_values(segments)
        numel = max(placement.resident_numel, placement.companion_numel) if both else placement.resident_numel
        return numel * segments[0].values.dtype.itemsize
    return _entries(segments, key, placement.companion_numel) * _widest(segments, key).itemsize


def _entries(segments: Sequence[Segment], key: str, numel: int) -> int:
    """Entries that a companion has for so many elements."""
    codec = segments[0].codec
    part = None if codec is None else codec.part(key)
    return numel if part is None else part.numel(numel)


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
    whole = torch.zeros(_entries(old, key, last - first), dtype=_widest(old, key))
    for segment in old:
        _part_of(whole, key, segment, first).copy_(_source(segment, key, joint))
        _free(segment, key, store, joint)
    try:
        _fill(key, new, whole, first, store, joint)
    except Exception:
        for segment in new:
            _free(segment, key, store, joint)
        _fill(key, old, whole, first, store, joint)
        raise


def _part_of(whole: torch.Tensor, key: str, segment: Segment, first: int) -> torch.Tensor:
    start = _entries([segment], key, segment.start - first)
    return whole[start : start + _entries([segment], key, segment.numel)]


def _source(segment: Segment, key: str, joint: bool) -> torch.Tensor:
    if key != _VALUES:
        return segment.companions[key]
    return segment.companions.get(MASTER, segment.values) if joint else segment.values


def _fill(key: str, segments: list[Segment], whole: torch.Tensor, first: int, store: Store, joint: bool) -> None:
    for segment in segments:
        inside = _part_of(whole, key, segment, first)
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
