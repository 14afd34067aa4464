"""Bytes per tier and per kind: every persistent buffer goes through here, so the sums can be checked."""

from __future__ import annotations

from collections import Counter
from enum import Enum, unique

import torch

from gemini.arena import HostArena
from gemini.device import Device
from gemini.disk import DiskArena


@unique
class Tier(Enum):
    """A place for bytes."""

    __hash__ = object.__hash__  # members are single objects; Enum's own is a Python function

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@unique
class Kind(Enum):
    """What a buffer is for."""

    __hash__ = object.__hash__  # members are single objects; Enum's own is a Python function

    PARAMETERS = "parameters"
    GATHERED = "gathered"
    GRADIENTS = "gradients"
    MASTER = "master"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    SNAPSHOTS = "snapshots"
    PIECES = "update pieces"


class Store:
    """Allocates and frees buffers on a tier and counts them by kind."""

    def __init__(self, device: Device, host: HostArena, disk: DiskArena | None = None) -> None:
        self.device = device
        self.host = host
        self.disk = disk or DiskArena(None)
        self.bytes_by: Counter[tuple[Tier, Kind]] = Counter()

    def allocate(self, tier: Tier, kind: Kind, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer.

        Raises:
            torch.OutOfMemoryError: the device has no room.
            HostMemoryError: the host has no room.
            DiskError: the disk has no room.
        """
        allocate = {Tier.DEVICE: self.device.allocate, Tier.HOST: self.host.allocate, Tier.DISK: self.disk.allocate}
        buffer: torch.Tensor = allocate[tier](numel, dtype)
        self.bytes_by[tier, kind] += buffer.nbytes
        return buffer

    def free(self, tier: Tier, kind: Kind, buffer: torch.Tensor) -> None:
        """Gives a buffer's bytes back. The tensor object must not be read afterwards.

        A gathered buffer is emptied and may be filled again; of any other the memory goes with its last reference.
        """
        self.bytes_by[tier, kind] -= buffer.nbytes
        if tier is Tier.DEVICE and kind is Kind.GATHERED:
            self.device.give_back(buffer)
        elif tier is Tier.DEVICE:
            self.device.forget(buffer)
        elif tier is Tier.HOST:
            self.host.release(buffer)
        else:
            self.disk.release(buffer)

    def tier_bytes(self, tier: Tier) -> int:
        """Bytes of all kinds on one tier."""
        return sum(count for (where, _), count in self.bytes_by.items() if where is tier)

    def kinds(self, tier: Tier) -> dict[str, int]:
        """Bytes per kind on one tier, without the empty ones."""
        return {kind.value: count for (where, kind), count in self.bytes_by.items() if where is tier and count}

    def check_integrity(self) -> None:
        """Raises RuntimeError if the sums here differ from what device and host have counted."""
        for name, counted, known in (
            ("device", self.tier_bytes(Tier.DEVICE), self.device.model_data_bytes),
            ("host", self.tier_bytes(Tier.HOST), self.host.host_bytes),
            ("disk", self.tier_bytes(Tier.DISK), self.disk.disk_bytes),
        ):
            if counted != known:
                raise RuntimeError(f"{name}: buffers add up to {counted} bytes, the {name} counted {known}")
        negative = {key: count for key, count in self.bytes_by.items() if count < 0}
        if negative:
            raise RuntimeError(f"negative byte counts: {negative}")
