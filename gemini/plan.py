"""The plan, as data: where each chunk's values and companions live, and how much room each moment needs.

Also the facts a policy decides from (:class:`ChunkFacts`), and the refusal when nothing fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gemini.codec import Codec
from gemini.exchange import Shard
from gemini.layout import ChunkLayout
from gemini.profile import HostUpdate
from gemini.segment import Homes, Placement
from gemini.store import Tier
from gemini.units import format_bytes


@dataclass(frozen=True)
class ChunkFacts:
    """What a policy must know of one chunk."""

    index: int
    numel: int
    """Elements that this process owns."""
    value_itemsize: int
    """Bytes per element of the values."""
    companion_bytes_per_numel: float
    """Bytes per element of master (where it is not the values), optimizer states and gradient; 0 if frozen."""
    unit_name: str
    gradient_itemsize: int = 0
    """Bytes per element of the gradient alone (part of ``companion_bytes_per_numel``)."""
    others_numel: int = 0
    """Elements of a gathered copy that other processes own."""
    values_on_disk: bool = False
    """Whether values that are not on the device are on disk."""
    companions_on_disk: bool = False
    """Whether companions that are not on the device are on disk, but for the gradient."""
    coded_bytes_per_numel: float = 0.0
    """Bytes per element of a codec's parts (part of ``companion_bytes_per_numel``); 0 where nothing is coded."""
    block_numel: int = 1
    """The chunk may be cut at multiples of so many elements."""
    update_speed: float = 1.0
    """As :attr:`gemini.codec.Codec.speed` has it."""
    device_update_cost: float = 1.0
    """As :attr:`gemini.codec.Codec.device_cost` has it."""

    @property
    def _state_bytes_per_numel(self) -> float:
        """Of master, where it is not the values, and states."""
        return self.companion_bytes_per_numel - self.gradient_itemsize

    def host_update(self, placement: Placement, early: bool = False) -> HostUpdate:
        """The update of what has its companions on the host.

        Args:
            placement: of the chunk.
            early: it begins inside backward, and keeps what it overwrites.
        """
        numel = self.numel - placement.companion_numel
        values = (
            2 * self.value_itemsize if self.master_is_values else self.value_itemsize
        )  # read and written, or written
        per_numel = self.gradient_itemsize + 2 * self._state_bytes_per_numel + values
        if early:
            per_numel += 2 * self.overwritten_bytes(placement) / max(1, numel)
        on_disk = self._state_bytes_per_numel * self.companions_on_disk
        disk_bytes = int(on_disk * numel)
        if self.values_on_disk:
            disk_bytes += self.value_itemsize * (self.numel - max(placement.resident_numel, placement.companion_numel))
        return HostUpdate(numel, per_numel, self.update_speed, disk_bytes)

    def overwritten_bytes(self, placement: Placement) -> int:
        """Bytes on the host, or on disk, that an update on the host overwrites."""
        numel = self.numel - placement.companion_numel
        values = (
            numel if self.master_is_values else self.numel - max(placement.resident_numel, placement.companion_numel)
        )
        return int(self._state_bytes_per_numel * numel) + self.value_itemsize * values

    @property
    def master_is_values(self) -> bool:
        """Whether the master's own buffer, where values and companions part, is a copy of the values."""
        return bool(self.companion_bytes_per_numel) and (self.value_itemsize == 4 or self.coded_bytes_per_numel > 0)

    @property
    def may_stream(self) -> bool:
        """Whether its companions could be streamed to the device to be updated: they are on the host, as they are."""
        on_disk = self.values_on_disk or self.companions_on_disk
        return bool(self.companion_bytes_per_numel) and not on_disk and not self.coded_bytes_per_numel

    @property
    def streamed_bytes_per_numel(self) -> tuple[float, float]:
        """Bytes per element that such an update moves to the device, and back."""
        in_fp32 = self.value_itemsize >= 4
        to_device = self.companion_bytes_per_numel + (self.value_itemsize if in_fp32 else 0)
        return to_device, to_device - self.gradient_itemsize + (0 if in_fp32 else self.value_itemsize)

    @property
    def first_bytes_per_numel(self) -> float:
        """Bytes per element of the companions that are there from the beginning."""
        plain = 4 if self.companion_bytes_per_numel and self.value_itemsize < 4 else 0
        return self.coded_bytes_per_numel or plain

    @property
    def homes(self) -> Homes:
        """Where the chunk is when it is not on the device."""
        return Homes(*(Tier.DISK if on else Tier.HOST for on in (self.values_on_disk, self.companions_on_disk)))

    @property
    def value_bytes(self) -> int:
        """Bytes of the values that this process owns."""
        return self.numel * self.value_itemsize

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a gathered copy."""
        return (self.numel + self.others_numel) * self.value_itemsize

    @property
    def companion_bytes(self) -> int:
        """Bytes of all companions."""
        return int(self.numel * self.companion_bytes_per_numel)


def chunk_facts(
    layout: ChunkLayout, shard: Shard, state_bytes_per_numel: int, gradient_itemsize: int, codec: Codec | None = None
) -> ChunkFacts:
    """Facts of a chunk.

    Args:
        layout: the chunk.
        shard: what this process owns of it.
        state_bytes_per_numel: bytes of the optimizer's states per element (8 for Adam).
        gradient_itemsize: bytes per element of the gradient buffer (the dtype's own, 4 with accumulation).
        codec: of master and states.
    """
    itemsize = layout.dtype.itemsize
    companions: float = 0
    coded = 0.0 if codec is None else codec.bytes_per_numel
    if codec is not None:
        companions = coded + gradient_itemsize
    elif layout.trainable:
        companions = (0 if itemsize == 4 else 4) + state_bytes_per_numel + gradient_itemsize
    return ChunkFacts(
        layout.index,
        shard.numel,
        itemsize,
        companions,
        layout.unit_name,
        gradient_itemsize if layout.trainable else 0,
        shard.gathered_numel - shard.numel,
        coded_bytes_per_numel=coded,
        block_numel=1 if codec is None else codec.block_numel,
        update_speed=1.0 if codec is None else codec.speed,
        device_update_cost=1.0 if codec is None else codec.device_cost,
    )


@dataclass
class Plan:
    """What ``auto`` (or another policy) decided.

    Attributes:
        policy: who decided.
        placements: per chunk, in chunk order.
        reserve_bytes: per moment of the trace, device bytes kept free of model data for activations. Empty until a
            trace exists: chunks are then released as soon as nobody reads them.
        spared_bytes: of the device, left to others at every moment (:attr:`gemini.policy.Policy.spares_memory`).
        prefetch_depth: moments ahead of which chunks are fetched, as far as room is spare; 0: when they are read.
        predicted_device_peak_bytes: highest device bytes of a step, everything counted; 0 while unknown.
        predicted_fetches: chunk fetches per micro-batch.
        predicted_h2d_bytes: bytes to the device per micro-batch.
        predicted_step_s: from one update to the next, all micro-batches, by the profile's rates; 0 while unknown.
        predicted_busy_s: of it, seconds by :attr:`gemini.clock.Clock.busy_s`.
        resident_parameter_bytes: values that stay on the device.
        device_optimizer_bytes: companions that live on the device.
        streamed_numel: elements whose companions are at home, and are streamed to the device to be updated.
        streamed_bytes: device bytes for the pieces that are on their way.
    """

    policy: str
    placements: list[Placement]
    reserve_bytes: list[int] = field(default_factory=list)
    spared_bytes: int = 0
    prefetch_depth: int = 0
    predicted_device_peak_bytes: int = 0
    predicted_fetches: int = 0
    predicted_h2d_bytes: int = 0
    predicted_step_s: float = 0.0
    predicted_busy_s: dict[str, float] = field(default_factory=dict)
    resident_parameter_bytes: int = 0
    device_optimizer_bytes: int = 0
    streamed_numel: int = 0
    streamed_bytes: int = 0


def offload_all(policy: str, facts: list[ChunkFacts]) -> Plan:
    """Nothing stays on the device: the plan of a warm-up, and the one that needs the least memory."""
    return Plan(policy, [Placement() for _ in facts])


def persistent_bytes(facts: list[ChunkFacts], placements: list[Placement]) -> tuple[int, int]:
    """Device bytes that stay through the whole step: ``(values, companions)``."""
    values = sum(f.value_itemsize * p.resident_numel for f, p in zip(facts, placements, strict=True))
    companions = 0
    for fact, placement in zip(facts, placements, strict=True):
        shared = 0
        if fact.master_is_values:
            # Where values and companions part, the master is a buffer of its own on the companions' side.
            shared = fact.value_itemsize * max(0, placement.companion_numel - placement.resident_numel)
        companions += int(fact.companion_bytes_per_numel * placement.companion_numel) + shared
    return values, companions


def host_bytes(facts: list[ChunkFacts], placements: list[Placement]) -> int:
    """Host bytes of everything that these placements do not keep on the device, every companion being there."""
    return sum(_home_bytes(fact, placement)[0] for fact, placement in zip(facts, placements, strict=True))


def disk_bytes(facts: list[ChunkFacts], placements: list[Placement]) -> int:
    """Bytes on disk, likewise."""
    return sum(_home_bytes(fact, placement)[1] for fact, placement in zip(facts, placements, strict=True))


def _home_bytes(fact: ChunkFacts, placement: Placement) -> tuple[int, int]:
    """Bytes on the host and on disk of what is not on the device."""
    values = fact.value_itemsize * (fact.numel - placement.resident_numel)
    gradients = fact.gradient_itemsize * (fact.numel - placement.companion_numel)
    states = int(fact.companion_bytes_per_numel * (fact.numel - placement.companion_numel)) - gradients
    if fact.master_is_values:  # as in persistent_bytes, from the other side
        states += fact.value_itemsize * max(0, placement.resident_numel - placement.companion_numel)
    on_disk = values * fact.values_on_disk + states * fact.companions_on_disk
    return values + gradients + states - on_disk, on_disk


def first_host_bytes(facts: list[ChunkFacts]) -> int:
    """Host bytes while the model is taken over, before any placement: all values and masters."""
    return sum(
        fact.value_bytes * (not fact.values_on_disk)
        + int(fact.numel * fact.first_bytes_per_numel) * (not fact.companions_on_disk)
        for fact in facts
    )


def widening_bytes(facts: list[ChunkFacts]) -> int:
    """Host bytes while a second micro-batch's gradient is added to a first one's: one chunk's is there in two dtypes."""
    return max((f.value_bytes for f in facts if f.gradient_itemsize > f.value_itemsize), default=0)


class DoesNotFitError(ValueError):
    """The run cannot fit, said before it starts.

    Attributes:
        rows: ``(what, tier, bytes, note)`` of everything that needs room.
        advice: the smallest change that would fit.
    """

    def __init__(self, message: str, rows: list[tuple[str, str, int, str]], advice: str) -> None:
        self.message = message
        self.rows = rows
        self.advice = advice
        super().__init__(self._text())

    def _text(self) -> str:
        width = max((len(what) for what, _, _, _ in self.rows), default=0)
        table = "\n".join(
            f"  {what:<{width}}  {tier:<6}  {format_bytes(num_bytes):>10}  {note}"
            for what, tier, num_bytes, note in self.rows
        )
        return f"{self.message}\n{table}\n{self.advice}"
