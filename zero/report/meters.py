"""What a processor or a card has used: read where it can be, estimated where it cannot.

Every meter counts joules from when it was made, says how, and may be read from any thread, one at a time.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

from zero.report.grid import UNKNOWN_CARD_WATTS, card_watts
from zero.report.nvml import NvmlCard, NvmlError

logger = logging.getLogger("zero")

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts joules.

    Attributes:
        method: how, for people.
        is_measured: whether they are read from hardware.
        key: names what is counted, the same in every process that counts it; None for what only this one counts.
        period_s: longest time between two readings that loses nothing.
    """

    method: str
    is_measured: bool
    key: str | None
    period_s: float

    def joules(self) -> float:
        """Since it was made."""


class RaplMeter:
    """All processors of this machine, by the kernel's ``powercap`` files; other programs' use is in it.

    Args:
        folder: with the zones.

    Raises:
        OSError: nothing there can be read.
    """

    is_measured = True
    period_s = 30.0  # a counter turns over after some hundred thousand joules

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = [zone for zone in sorted(folder.glob("*-rapl:*")) if _counts(_word(zone / "name"))]
        if not zones:
            raise OSError("no energy counter of a processor")
        self._zones = [(zone / "energy_uj", int(_word(zone / "max_energy_range_uj")) + 1) for zone in zones]
        self._last = [int(_word(file)) for file, _ in self._zones]
        self._total_uj = 0
        self.method = "measured by RAPL, other programs' use included"
        self.key: str | None = f"rapl {platform.node()}"

    def joules(self) -> float:
        """Since it was made."""
        for index, (file, span) in enumerate(self._zones):
            now = int(_word(file))
            self._total_uj += (now - self._last[index]) % span
            self._last[index] = now
        return self._total_uj / 1e6


def _counts(name: str) -> bool:
    """Packages hold their cores; memory is beside them. ``psys`` holds everything once more."""
    return name.startswith("package") or name == "dram"


def _word(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()


class CpuEstimate:
    """Busy time of this process and of those it has waited for, times a power per core.

    Args:
        core_watts: of one busy core.
        busy_s: gives the time; for tests.
    """

    is_measured = False
    period_s = 3600.0
    key: str | None = None

    def __init__(self, core_watts: float, busy_s: Callable[[], float] | None = None) -> None:
        self._watts = core_watts
        self._busy_s = busy_s or _busy_s
        self._start_s = self._busy_s()
        self.method = f"estimated: {core_watts:g} W for each busy core"

    def joules(self) -> float:
        """Since it was made."""
        return (self._busy_s() - self._start_s) * self._watts


def _busy_s() -> float:
    times = psutil.Process().cpu_times()
    of_children = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(times.user + times.system + of_children)


class NvmlMeter:
    """One NVIDIA card, by its own counter, or by its power read every second; other programs' use is in it.

    Args:
        card: to read.
        uuid: of the card.
        clock: seconds; for tests.
    """

    is_measured = True

    def __init__(self, card: Any, uuid: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._card = card
        self._clock = clock
        self.key: str | None = uuid
        self.period_s = 30.0 if card.has_counter else 1.0
        self.method = "measured by NVML" + ("" if card.has_counter else " (power, read every second)")
        self._start = card.joules() if card.has_counter else 0.0
        self._last_s, self._last_watts = clock(), 0.0 if card.has_counter else card.watts()
        self._total = 0.0

    def joules(self) -> float:
        """Since it was made."""
        if self._card.has_counter:
            return float(self._card.joules() - self._start)
        now_s, watts = self._clock(), self._card.watts()
        self._total += (now_s - self._last_s) * (watts + self._last_watts) / 2
        self._last_s, self._last_watts = now_s, watts
        return self._total


class GpuEstimate:
    """A card that cannot be read: all its power all the time, which is the most it can have used.

    Args:
        watts: of the card.
        source: of that number.
        clock: seconds; for tests.
    """

    is_measured = False
    period_s = 3600.0
    key: str | None = None

    def __init__(self, watts: float, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._watts = watts
        self._clock = clock
        self._start_s = clock()
        self.method = f"estimated: {watts:g} W ({source}) all the time"

    def joules(self) -> float:
        """Since it was made."""
        return (self._clock() - self._start_s) * self._watts


def cpu_meter(core_watts: float, may_measure: bool = True, folder: Path = POWERCAP) -> Meter:
    """The best meter of this machine's processors."""
    if may_measure:
        try:
            return RaplMeter(folder)
        except (OSError, ValueError) as error:
            logger.debug("no RAPL: %s", error)
    return CpuEstimate(core_watts)


def gpu_meter(device: Any, watts: float | None, may_measure: bool = True) -> Meter | None:
    """The best meter of a CUDA device; None where ``device`` is none.

    Args:
        device: a ``torch.device``.
        watts: of the card where it cannot be read; None for what is known of it.
        may_measure: False to estimate only.
    """
    if device is None or device.type != "cuda":
        return None
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", ""))
    if may_measure and uuid:
        try:
            return NvmlMeter(NvmlCard(uuid), f"GPU-{uuid}")
        except NvmlError as error:
            logger.debug("no NVML: %s", error)
    if watts is not None:
        return GpuEstimate(watts, "cost.gpu_watts")
    known = card_watts(properties.name)
    return GpuEstimate(known or UNKNOWN_CARD_WATTS, "data sheet" if known else "card not known")
