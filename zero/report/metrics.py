"""Metrics of a run: ``metrics.jsonl`` in the run folder, and accelerate's trackers beside it.

The JSONL file is the record that always exists: one object per line, written step by step, strict JSON. A number that
is not finite is written as null and the line says ``"finite": false``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zero.report.record import StepRecord
from zero.report.trackers import Tracker, check_trackers, start_trackers

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_log = logging.getLogger("zero")


class MetricsWriter:
    """Writes a run's metrics; a context manager. On ranks other than 0 it does nothing and creates nothing."""

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        trackers: Sequence[str] = (),
        project: str = "zero",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the file for appending and start the trackers.

        Args:
            output_dir: The run folder; made if it is missing.
            rank: This process; only rank 0 writes.
            trackers: Names as in ``trackers.TRACKERS``. With several ranks the process group must exist by now.
            project: Project name at trackers that know projects.
            run_name: Name of the run at the trackers; default: the name of the run folder.
            config: The resolved config, shown by the trackers beside the curves; may be nested.

        Raises:
            UserError: If a tracker is unknown, is not installed or does not start.
            OSError: If the run folder cannot be written.
        """
        self._file_descriptor: int | None = None
        self._trackers: list[Tracker] = []
        if rank != 0:
            return
        # Checked before anything is written; the folder is made before they start, since some write into it.
        check_trackers(trackers)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._trackers = start_trackers(
            trackers,
            logging_dir=folder / TENSORBOARD_FOLDER,
            project=project,
            run_name=run_name or folder.resolve().name,
            config=config,
        )
        self._file_descriptor = _open_for_appending(folder / METRICS_FILE)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Append one line, and hand the numbers in it to the trackers.

        Args:
            values: Names and values; JSON types, numpy and torch scalars, paths. Nested mappings are allowed.
            step: Optimizer step the values belong to, from 1 (0: before training).

        Raises:
            OSError: If the disk is full or the folder is gone.
        """
        if self._file_descriptor is None:
            return
        _append_line(self._file_descriptor, _to_line({"step": step, **values}))
        self._track(values, step)

    def log_step(self, record: StepRecord) -> None:
        """Append the figures of a step; see ``log``. The trackers get them below ``train/``."""
        if self._file_descriptor is None:
            return
        values = dataclasses.asdict(record)
        _append_line(self._file_descriptor, _to_line(values))
        # A curve of the step over the step, and one that never changes, would only be clutter.
        curves = {name: value for name, value in values.items() if name not in ("step", "num_steps")}
        self._track({"train": curves}, record.step)

    def close(self) -> None:
        """Close the file and finish the trackers. Safe to call twice."""
        if self._file_descriptor is not None:
            os.close(self._file_descriptor)
            self._file_descriptor = None
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:
                _log.warning("tracker %s did not finish: %s", tracker.name, error)
        self._trackers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _track(self, values: Mapping[str, Any], step: int) -> None:
        """Hand numbers to the trackers; one that fails is dropped, since a lost network must not end a training."""
        numbers = {name: float(value) for name, value in jsonable_numbers(values).items()}
        for tracker in list(self._trackers):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:
                _log.warning("tracker %s failed and gets no more values: %s", tracker.name, error)
                self._trackers.remove(tracker)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, or of the one in a run folder.

    A last line that was cut off (the process was killed, the disk was full) is left out.

    Args:
        path: The file, or the run folder.

    Raises:
        OSError: If there is no such file.
        ValueError: If a line before the last one is not a JSON object; the message names file and line.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    lines = file.read_bytes().split(b"\n")
    # What stands behind the last line end was never finished, even where it happens to be valid JSON.
    return [_parse_line(line, file, number) for number, line in enumerate(lines[:-1], start=1)]


def jsonable(value: Any) -> Any:
    """Return ``value`` with JSON's types only: scalars unwrapped, NaN and infinities as None, anything else as text."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def is_finite(value: Any) -> bool:
    """Return whether every number in ``value`` is finite, nested ones included."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return all(is_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def jsonable_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers and truth values in ``values`` by name; nested names are joined by ``/``."""
    numbers: dict[str, float] = {}
    for name, item in values.items():
        item = _plain(item)
        if isinstance(item, Mapping):
            numbers |= jsonable_numbers(item, prefix=f"{prefix}{name}/")
        elif isinstance(item, (bool, int, float)) and math.isfinite(item):
            numbers[f"{prefix}{name}"] = item
    return numbers


def _plain(value: Any) -> Any:
    """Return numpy and torch scalars as Python's own; everything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _open_for_appending(path: Path) -> int:
    """Return a descriptor that appends to ``path``, after cutting off a last line that was never finished.

    Without the cut, the first new line would be glued to the torn one and both would be lost.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        content = path.read_bytes()
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _to_line(values: Mapping[str, Any]) -> bytes:
    """Return values as a line of strict JSON with its line end."""
    return json.dumps({**jsonable(values), "finite": is_finite(values)}, allow_nan=False).encode() + b"\n"


def _append_line(descriptor: int, line: bytes) -> None:
    """Append a whole line or nothing.

    Raises:
        OSError: If the disk is full; what was written of the line is taken back.
    """
    start = os.fstat(descriptor).st_size
    try:
        # Usually one call, so that a process killed in between leaves a line that is either there or not.
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def _parse_line(line: bytes, file: Path, number: int) -> dict[str, Any]:
    """Return one line's object.

    Raises:
        ValueError: If it is not one.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}, line {number}: a JSON object is expected, got {type(record).__name__}")
    return record
