"""What a run of ``zero train`` costs: energy of all its processes, and the share of steps that did nothing for the result.

A step may be skipped (overflow, spike), rolled back (the run went back to a checkpoint before it) or repeated (a process
that was stopped had made it already, after the last checkpoint). Their energy is their share of time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from zero.config.cost import CostSection
from zero.ranks import Ranks
from zero.report.energy import Cost, EnergyMeter, Lost, Part, Reading, combined, cost_of
from zero.report.metrics import read_metrics
from zero.run_folder import ENERGY_FILE

logger = logging.getLogger("zero")

_KINDS = ("skipped", "rolled back", "repeated")
_USEFUL = "useful"
_NOTED_EVERY_S = 10.0
_REMEMBERED = 100_000
"""Steps that can be rolled back; nobody goes back farther."""


class StepLedger:
    """Times of steps, by what became of them.

    Attributes:
        repeats_until: a process before this one had come to this step.
    """

    def __init__(self) -> None:
        self.repeats_until = 0
        self._num = dict.fromkeys((_USEFUL, *_KINDS), 0)
        self._seconds = dict.fromkeys((_USEFUL, *_KINDS), 0.0)
        self._done: deque[tuple[int, float, str]] = deque(maxlen=_REMEMBERED)

    def note(self, step: int, step_s: float, skipped: bool) -> None:
        """Takes a step."""
        kind = "skipped" if skipped else "repeated" if step <= self.repeats_until else _USEFUL
        self._add(kind, 1, step_s)
        if not skipped:
            self._done.append((step, step_s, kind))

    def go_back(self, step: int) -> None:
        """What was done after a step is undone."""
        while self._done and self._done[-1][0] > step:
            _, step_s, kind = self._done.pop()
            self._add(kind, -1, -step_s)
            self._add("rolled back", 1, step_s)
        self.repeats_until = min(self.repeats_until, step)  # what comes now is other data

    def _add(self, kind: str, number: int, seconds: float) -> None:
        self._num[kind] += number
        self._seconds[kind] += seconds

    def lost(self, joules: float, elapsed_s: float) -> list[Lost]:
        """Each kind of steps that did nothing for the result, with its share of the energy.

        Args:
            joules: of all that ran.
            elapsed_s: in which they were used.
        """
        share = joules / elapsed_s if elapsed_s else 0.0
        return [Lost(kind, self._num[kind], min(joules, self._seconds[kind] * share)) for kind in _KINDS]


class RunCost:
    """Counts beside a run; a context manager. Does nothing with ``cost.energy = "off"``.

    Args:
        cost: the ``[cost]`` table.
        ranks: of the run.
        device: the ``torch.device`` that computes.
        meter: counts this process's energy; for tests.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        cost: CostSection,
        ranks: Ranks,
        device: Any,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = StepLedger()
        self._cost = cost
        self._ranks = ranks
        self._clock = clock
        self._meter = meter
        if meter is None and cost.energy != "off":
            self._meter = EnergyMeter(cost, device)
        self._file: Path | None = None
        self._session = uuid.uuid4().hex
        self._noted_s = -math.inf
        self._is_told = False

    def __enter__(self) -> Self:
        if self._meter is not None:
            self._meter.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._meter is not None:
            if not self._is_told:  # a run that failed has cost something, too
                self._write(self._meter.read(), is_final=False)
            self._meter.stop()

    def open(self, folder: Path) -> None:
        """The run folder, before what a resumed run will do again is cut from its metrics. On the first rank only."""
        if self._meter is None:
            return
        self._file = folder / ENERGY_FILE
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            lines = read_metrics(folder)
            self.ledger.repeats_until = int(lines[-1]["step"]) if lines else 0

    def note(self, step: int, step_s: float, skipped: bool) -> None:
        """Takes a step; every now and then leaves a line for a process that may be killed."""
        if self._meter is None:
            return
        self.ledger.note(step, step_s, skipped)
        if self._file is not None and self._clock() - self._noted_s >= _NOTED_EVERY_S:
            self._write(self._meter.read(), is_final=False)

    def finish(self) -> Cost | None:
        """What the run has cost by now, the processes before this one included. All ranks must call it.

        Returns:
            None on ranks other than the first, and where nothing is counted.
        """
        if self._meter is None:
            return None
        readings = self._ranks.gather(self._meter.read().as_json(), "adding up energy")
        if not self._ranks.is_first:
            return None
        own = combined([Reading.from_json(reading) for reading in readings])
        self._write(own, is_final=True)
        earlier = [] if self._file is None else earlier_sessions(self._file, self._session)
        return _with_earlier(cost_of(own, self._cost), self._lost(own), earlier)

    def _lost(self, reading: Reading) -> list[Lost]:
        joules = reading.cpu.joules + (0.0 if reading.gpu is None else reading.gpu.joules)
        return self.ledger.lost(joules, reading.elapsed_s)

    def _write(self, reading: Reading, is_final: bool) -> None:
        self._noted_s, self._is_told = self._clock(), is_final
        if self._file is None:
            return
        # A process that is killed leaves what its first rank has used; the others' is taken to be the same.
        line = {
            "session": self._session,
            "num_ranks": 1 if is_final else self._ranks.size,
            **reading.as_json(),
            "lost": [[lost.kind, lost.num_steps, lost.joules] for lost in self._lost(reading)],
        }
        try:
            with self._file.open("ab") as file:
                # One write, behind a line end: a line that was torn before stays by itself.
                file.write(b"\n" + json.dumps(line).encode() + b"\n")
        except OSError as error:
            logger.info("energy: %s cannot be written (%s)", self._file, error)
            self._file = None


def earlier_sessions(file: Path, own: str) -> list[dict[str, Any]]:
    """The last line of every process but this one that has worked on a run.

    Args:
        file: of the run folder.
        own: this process's session.
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for text in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                Reading.from_json(line)
                found[line["session"]] = line
    found.pop(own, None)
    return list(found.values())


def _with_earlier(cost: Cost, lost: list[Lost], earlier: list[dict[str, Any]]) -> Cost:
    cpu, gpu, elapsed_s = [cost.cpu], [] if cost.gpu is None else [cost.gpu], cost.elapsed_s
    lost = list(lost)
    for line in earlier:
        reading, times = Reading.from_json(line), int(line.get("num_ranks", 1))
        cpu.append(_times(reading.cpu, times))
        gpu += [] if reading.gpu is None else [_times(reading.gpu, times)]
        elapsed_s += reading.elapsed_s
        lost += [Lost(str(kind), int(number), float(joules) * times) for kind, number, joules in line.get("lost", [])]
    return Cost(
        cpu=_joined(cpu),
        gpu=_joined(gpu) if gpu else None,
        pue=cost.pue,
        grid=cost.grid,
        elapsed_s=elapsed_s,
        lost=[_of_kind(kind, lost) for kind in _KINDS],
        num_processes=1 + len(earlier),
    )


def _of_kind(kind: str, lost: list[Lost]) -> Lost:
    same = [one for one in lost if one.kind == kind]
    return Lost(kind, sum(one.num_steps for one in same), math.fsum(one.joules for one in same))


def _times(part: Part, number: int) -> Part:
    """Of so many ranks, of which one is known. What all processes of a machine count together counts once."""
    several = number if part.key is None or part.key.startswith("GPU") else 1
    return Part(part.joules * several, part.method, part.is_measured and several == 1, None)


def _joined(parts: list[Part]) -> Part:
    methods = "; ".join(dict.fromkeys(part.method for part in parts))
    return Part(math.fsum(part.joules for part in parts), methods, all(part.is_measured for part in parts), None)
