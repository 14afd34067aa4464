"""Rates that turn bytes, elements and floating-point operations into seconds: of this machine, or of a named one."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from gemini.units import parse_bytes

UPDATE_BYTES_PER_NUMEL = 28
"""DRAM traffic of one updated element: gradient, master and two moments read, master, moments and new value written."""
FETCH_BYTES_PER_NUMEL = 2
"""DRAM traffic of the fetch that follows: it reads what the update has written while the next chunk is updated."""
DISK_READ_BYTES_PER_S, DISK_WRITE_BYTES_PER_S = 2.5e9, 1.2e9
"""Assumed of a disk that nobody measured: an NVMe SSD, long after its cache is full."""


@dataclass(frozen=True)
class HostUpdate:
    """What an update on the host works on.

    Attributes:
        numel: elements.
        bytes_per_numel: read and written in host memory, per element.
        speed: of the cores, as a multiple of what they do with fp32 states.
        disk_bytes: read from disk before, and written there after.
    """

    numel: int
    bytes_per_numel: float = UPDATE_BYTES_PER_NUMEL
    speed: float = 1.0
    disk_bytes: int = 0


@dataclass(frozen=True)
class HardwareProfile:
    """What a machine can do. Defaults: a PCIe 4 card in a desktop, see :data:`NAMED` for others.

    Attributes:
        name: for messages.
        source: where the figures come from.
        measured: on the machine itself, not from data sheets.
        h2d_bytes_per_s: host to device, nothing else running.
        d2h_bytes_per_s: device to host, likewise.
        both_bytes_per_s: each way while both run.
        host_dram_bytes_per_s: host memory, reads and writes together.
        host_update_numel_per_s: elements that the host's cores update with the optimizer.
        device_update_numel_per_s: the same on the device.
        device_flops_per_s: matrix products in bf16 and fp16.
        device_fp32_flops_per_s: matrix products in fp32.
        device_bytes_per_s: device memory, for everything that is no matrix product.
        launch_s: that the program takes to issue one operator, copy or update.
        disk_read_bytes_per_s: of ``memory.disk``.
        disk_write_bytes_per_s: likewise.
        rank_link_bytes_per_s: what one rank receives from all others.
        capacity_bytes: of the device; 0 where the profile says nothing of it.
    """

    name: str = "default"
    source: str = "assumed: a PCIe 4 card in a desktop"
    measured: bool = False
    h2d_bytes_per_s: float = 22e9
    d2h_bytes_per_s: float = 22e9
    both_bytes_per_s: float = 20e9
    host_dram_bytes_per_s: float = 45e9
    host_update_numel_per_s: float = 1.5e9
    device_update_numel_per_s: float = 25e9
    device_flops_per_s: float = 50e12
    device_fp32_flops_per_s: float = 20e12
    device_bytes_per_s: float = 700e9
    launch_s: float = 5e-6
    disk_read_bytes_per_s: float = DISK_READ_BYTES_PER_S
    disk_write_bytes_per_s: float = DISK_WRITE_BYTES_PER_S
    rank_link_bytes_per_s: float = 10e9
    capacity_bytes: int = 0

    def host_update_s(self, numel: int, bytes_per_numel: float = UPDATE_BYTES_PER_NUMEL, speed: float = 1.0) -> float:
        """Seconds of an update on the host: the cores' rate, or what host memory gives beside the fetches that follow.

        Args:
            numel: elements.
            bytes_per_numel: as in :class:`HostUpdate`.
            speed: likewise.
        """
        floor = (bytes_per_numel + FETCH_BYTES_PER_NUMEL) / self.host_dram_bytes_per_s
        return numel * max(1 / (self.host_update_numel_per_s * speed), floor)

    def device_update_s(self, numel: int, cost: float = 1.0) -> float:
        """Seconds of an update on the device; ``cost`` as :attr:`gemini.codec.Codec.device_cost` has it."""
        return numel * cost / self.device_update_numel_per_s

    @property
    def streamed_slowdown(self) -> float:
        """How many times as long a copy takes of an update that is streamed: half of host memory's rate is the cores'."""
        return (
            max(1.0, 4 * self.both_bytes_per_s / self.host_dram_bytes_per_s) if self.h2d_bytes_per_s < math.inf else 1.0
        )

    @property
    def streams_updates(self) -> bool:
        """Whether the device could take updates off the host.

        Not where the host's memory is what limits it: a streamed update reads and writes as much there. So the cores must
        be too slow to use half of its rate.
        """
        cores_s = 1 / self.host_update_numel_per_s
        return cores_s > 2 * UPDATE_BYTES_PER_NUMEL / self.host_dram_bytes_per_s

    def compute_s(self, flops: float, fp32_flops: float, traffic_bytes: float) -> float:
        """Seconds of computation on the device, apart from issuing it."""
        products_s = flops / self.device_flops_per_s + fp32_flops / self.device_fp32_flops_per_s
        return products_s + traffic_bytes / self.device_bytes_per_s


# What matrix products, memory and links reach of the figures on data sheets in long-running training.
_PRODUCTS, _MEMORY, _LINK, _BOTH = 0.7, 0.8, 0.8, 0.85
_LINK_BYTES_PER_S = {"PCIe 3 x16": 15.75e9, "PCIe 4 x8": 15.75e9, "PCIe 4 x16": 31.5e9, "PCIe 5 x16": 63e9}
_HOSTS = {  # peak of the memory, and cores enough to reach it
    "2 x DDR4-3200": 51.2e9,
    "2 x DDR5-5600": 89.6e9,
    "16 cores of a shared 8 x DDR5-4800 server": 150e9,
    "16 cores of a shared 8 x DDR4-3200 server": 100e9,
}


def _published(
    name: str, memory: str, tflops: float, fp32_tflops: float, memory_gb_per_s: float, link: str, host: str
) -> HardwareProfile:
    """A card by its data sheet: dense bf16 with fp32 sums, and the kind of machine it usually sits in."""
    memory_bytes_per_s = memory_gb_per_s * 1e9 * _MEMORY
    link_bytes_per_s, dram_bytes_per_s = _LINK_BYTES_PER_S[link] * _LINK, _HOSTS[host] * _MEMORY
    return HardwareProfile(
        name=name,
        source=f"published figures, not measured: {tflops:g} TFLOP/s, {memory_gb_per_s:g} GB/s, {link}; host {host}; "
        "disk assumed",
        h2d_bytes_per_s=link_bytes_per_s,
        d2h_bytes_per_s=link_bytes_per_s,
        both_bytes_per_s=link_bytes_per_s * _BOTH,
        host_dram_bytes_per_s=dram_bytes_per_s,
        host_update_numel_per_s=dram_bytes_per_s / UPDATE_BYTES_PER_NUMEL,
        device_update_numel_per_s=memory_bytes_per_s / UPDATE_BYTES_PER_NUMEL,
        device_flops_per_s=tflops * 1e12 * _PRODUCTS,
        device_fp32_flops_per_s=fp32_tflops * 1e12 * _PRODUCTS,
        device_bytes_per_s=memory_bytes_per_s,
        rank_link_bytes_per_s=link_bytes_per_s / 2,  # assumed: from card to card through the host
        # Of what the card is sold with, a driver and the context of a process take a part.
        capacity_bytes=parse_bytes(memory) * 31 // 32,
    )


_DDR4, _DDR5, _SERVER5, _SERVER4 = _HOSTS
NAMED: dict[str, HardwareProfile] = {
    profile.name: profile
    for profile in (
        _published("rtx2060", "6GiB", 26, 6.5, 336, "PCIe 3 x16", _DDR4),
        _published("rtx3060-8gb", "8GiB", 25, 12.7, 240, "PCIe 4 x16", _DDR4),
        _published("rtx3060-12gb", "12GiB", 25, 12.7, 360, "PCIe 4 x16", _DDR4),
        _published("rtx4060ti-16gb", "16GiB", 44, 22, 288, "PCIe 4 x8", _DDR5),
        _published("l4", "24GiB", 121, 30, 300, "PCIe 4 x16", _SERVER5),
        _published("rtx3090", "24GiB", 71, 35.6, 936, "PCIe 4 x16", _DDR4),
        _published("rtx4090", "24GiB", 165, 82.6, 1008, "PCIe 4 x16", _DDR5),
        _published("rtx5090", "32GiB", 210, 105, 1792, "PCIe 5 x16", _DDR5),
        _published("a100-40gb", "40GiB", 312, 19.5, 1555, "PCIe 4 x16", _SERVER4),
        _published("l40s", "48GiB", 362, 91.6, 864, "PCIe 4 x16", _SERVER5),
        _published("a100-80gb", "80GiB", 312, 19.5, 2039, "PCIe 4 x16", _SERVER4),
        _published("h100", "80GiB", 989, 67, 3350, "PCIe 5 x16", _SERVER5),
        _published("h200", "141GiB", 989, 67, 4800, "PCIe 5 x16", _SERVER5),
    )
}
"""Cards by data sheet, from the smallest memory to the largest. Not measured: a guess at a machine one does not have.

Sources: the makers' data sheets (NVIDIA Turing, Ampere and Ada white papers; RTX Blackwell; A100, H100, H200, L4, L40S).
"""


def named_profile(name: str) -> HardwareProfile:
    """A published profile.

    Raises:
        ValueError: there is none of this name; says which there are.
    """
    if name in NAMED:
        return NAMED[name]
    near = difflib.get_close_matches(name.lower(), NAMED, 1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{name}: no such card; {hint}known are {', '.join(NAMED)}")


def neighbours(profile: HardwareProfile) -> tuple[HardwareProfile | None, HardwareProfile | None]:
    """The named cards with the next smaller and the next larger memory."""
    others = [card for card in NAMED.values() if card.name != profile.name]
    smaller = [card for card in others if card.capacity_bytes < profile.capacity_bytes]
    larger = [card for card in others if card.capacity_bytes > profile.capacity_bytes]
    return (smaller[-1] if smaller else None), (larger[0] if larger else None)
