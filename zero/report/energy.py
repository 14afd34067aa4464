"""Energy of a run and the CO2e it stands for: counted beside the run, never in its way."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zero.report.codecarbon import CodeCarbon
from zero.report.grid import Grid, grid_of
from zero.report.meters import CpuEstimate, Meter, cpu_meter, gpu_meter

logger = logging.getLogger("zero")

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Part:
    """What one meter has counted.

    Attributes:
        joules: So many.
        method: How they were counted.
        is_measured: Whether by hardware.
        key: Of the meter.
    """

    joules: float
    method: str
    is_measured: bool
    key: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process has counted since it began.

    Attributes:
        cpu: Processors.
        gpu: Its accelerator; None without one.
        elapsed_s: Since it began.
    """

    cpu: Part
    gpu: Part | None
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """For other ranks."""
        parts = {"cpu": self.cpu, "gpu": self.gpu}
        return {"elapsed_s": self.elapsed_s} | {
            name: part and [part.joules, part.method, part.is_measured, part.key] for name, part in parts.items()
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Reading:
        """What ``as_json`` gave."""
        gpu = value["gpu"]
        return cls(Part(*value["cpu"]), None if gpu is None else Part(*gpu), float(value["elapsed_s"]))


def combined(readings: Sequence[Reading]) -> Reading:
    """Of several processes: what several of them have counted together counts once."""
    gpus = [reading.gpu for reading in readings if reading.gpu is not None]
    return Reading(
        _sum([reading.cpu for reading in readings]),
        _sum(gpus) if gpus else None,
        max(reading.elapsed_s for reading in readings),
    )


def _sum(parts: Sequence[Part]) -> Part:
    by_key: dict[str, float] = {}
    for number, part in enumerate(parts):
        key = f"own {number}" if part.key is None else f"shared {part.key}"
        by_key[key] = max(by_key.get(key, 0.0), part.joules)
    methods = list(dict.fromkeys(part.method for part in parts))
    return Part(math.fsum(by_key.values()), "; ".join(methods), all(part.is_measured for part in parts), None)


class _Kept:
    """A meter that must not make a run fail: one that stops answering keeps its last value, and says so."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last = 0.0
        self._failed = False

    def part(self) -> Part:
        """What has been counted by now."""
        meter = self._meter
        if not self._failed:
            try:
                self._last = max(self._last, meter.joules())
            except Exception as error:
                self._failed = True
                logger.info("energy: %s has stopped answering (%s)", meter.method, error)
        return Part(
            self._last,
            meter.method + (", which stopped answering: the rest is missing" if self._failed else ""),
            meter.is_measured,
            meter.key,
        )

    def close(self) -> None:
        """Ends what the meter has begun, if it has begun something."""
        close = getattr(self._meter, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):
                close()


class EnergyMeter:
    """Counts the energy of this process's processors and accelerator, with a thread that mostly sleeps.

    Args:
        cost: the ``[cost]`` table.
        device: the ``torch.device`` that computes; anything but CUDA is part of the processors.
        clock: seconds; for tests.
        meters: processors' and accelerator's; for tests.
    """

    def __init__(
        self,
        cost: Any,
        device: Any = None,
        clock: Callable[[], float] = time.monotonic,
        meters: tuple[Meter, Meter | None] | None = None,
    ) -> None:
        self._clock = clock
        self._start_s = clock()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        cpu, gpu = meters or _meters(cost, device)
        self._cpu, self._gpu = _Kept(cpu), None if gpu is None else _Kept(gpu)
        self._period_s = min(meter.period_s for meter in (cpu, gpu) if meter is not None)

    def start(self) -> None:
        """Begins to read in the background, as often as the meters need it."""
        self._thread = threading.Thread(target=self._watch, name="zero-energy", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            self.read()

    def read(self) -> Reading:
        """What has been used since this was made."""
        with self._lock:
            gpu = None if self._gpu is None else self._gpu.part()
            return Reading(self._cpu.part(), gpu, self._clock() - self._start_s)

    def stop(self) -> None:
        """Ends the background thread, after the last reading. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._cpu.close()


def _meters(cost: Any, device: Any) -> tuple[Meter, Meter | None]:
    """Those that ``[cost]`` asks for; an estimate where something goes wrong."""
    try:
        if cost.energy == "codecarbon":
            tracker = CodeCarbon(cost.country)
            return tracker.cpu, tracker.gpu
        may_measure = cost.energy == "auto"
        return cpu_meter(cost.cpu_core_watts, may_measure), gpu_meter(device, cost.gpu_watts, may_measure)
    except Exception as error:  # no reading is worth a run
        logger.warning("energy: nothing can be measured (%s); an estimate of the processors is all there is", error)
        return CpuEstimate(cost.cpu_core_watts), None


@dataclass(frozen=True, slots=True)
class Lost:
    """Steps that did nothing for the result.

    Attributes:
        kind: Why: skipped, rolled back or repeated.
        num_steps: So many.
        joules: Their share of the energy of processors and accelerators, by time.
    """

    kind: str
    num_steps: int
    joules: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run has cost.

    Attributes:
        cpu: Processors of all ranks.
        gpu: Accelerators of all ranks.
        pue: Energy of the building for each kWh of the machines.
        grid: What a kWh stands for.
        elapsed_s: Of this process and of those before it.
        lost: What it holds of steps that did nothing for the result.
        num_processes: That worked on the run one after the other: 1 and the number of times it went on.
    """

    cpu: Part
    gpu: Part | None
    pue: float
    grid: Grid
    elapsed_s: float
    lost: list[Lost] = field(default_factory=list)
    num_processes: int = 1

    @property
    def kwh(self) -> float:
        """All of it, the building's share included."""
        return self._kwh(self.cpu.joules + (0.0 if self.gpu is None else self.gpu.joules))

    @property
    def kg(self) -> float:
        """CO2e."""
        return self.kwh * self.grid.kg_per_kwh

    def _kwh(self, joules: float) -> float:
        return joules / _JOULES_PER_KWH * self.pue

    def rows(self) -> list[tuple[str, str]]:
        """For a person, as names and values."""
        gpu = "none" if self.gpu is None else f"{_kwh_text(self.gpu.joules / _JOULES_PER_KWH)}, {self.gpu.method}"
        factor = f"{self.grid.kg_per_kwh:g} kg/kWh ({self.grid.source})"
        rows = [
            ("energy, GPU", gpu),
            ("energy, CPU", f"{_kwh_text(self.cpu.joules / _JOULES_PER_KWH)}, {self.cpu.method}"),
            ("CO2e", f"{_kg_text(self.kg)} = {_kwh_text(self.kwh)} with PUE {self.pue:g} x {factor}"),
        ]
        if self.num_processes > 1:
            rows.append(("energy is of", f"{self.num_processes} processes, one after the other"))
        for lost in self.lost:
            if lost.num_steps:
                steps = "1 step" if lost.num_steps == 1 else f"{lost.num_steps} steps"
                rows.append((f"of it {lost.kind}", f"{steps}, {_kwh_text(self._kwh(lost.joules))}"))
        return rows

    def as_json(self) -> dict[str, Any]:
        """For ``summary.json``."""
        gpu = self.gpu
        return {
            "cpu_kwh": self.cpu.joules / _JOULES_PER_KWH,
            "cpu_method": self.cpu.method,
            "cpu_measured": self.cpu.is_measured,
            "gpu_kwh": None if gpu is None else gpu.joules / _JOULES_PER_KWH,
            "gpu_method": None if gpu is None else gpu.method,
            "gpu_measured": None if gpu is None else gpu.is_measured,
            "pue": self.pue,
            "kwh": self.kwh,
            "grid_kg_per_kwh": self.grid.kg_per_kwh,
            "grid_source": self.grid.source,
            "co2e_kg": self.kg,
            "elapsed_s": self.elapsed_s,
            "num_processes": self.num_processes,
            "lost": [{"kind": x.kind, "num_steps": x.num_steps, "kwh": self._kwh(x.joules)} for x in self.lost],
        }


def cost_of(reading: Reading, cost: Any) -> Cost:
    """What a reading stands for.

    Args:
        reading: of all ranks.
        cost: the ``[cost]`` table.
    """
    return Cost(reading.cpu, reading.gpu, cost.pue, grid_of(cost.country, cost.grid_factor), reading.elapsed_s)


def _kwh_text(kwh: float) -> str:
    """In a unit that leaves digits to read."""
    if kwh >= 1000:
        return f"{kwh / 1000:,.3g} MWh"
    if kwh >= 0.1:
        return f"{kwh:.3g} kWh"
    return f"{kwh * 1000:.3g} Wh"


def _kg_text(kg: float) -> str:
    if kg >= 1000:
        return f"{kg / 1000:,.3g} t"
    return f"{kg:.3g} kg" if kg >= 0.1 else f"{kg * 1000:.3g} g"
