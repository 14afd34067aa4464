"""accelerate's experiment trackers without an ``Accelerator``: TensorBoard, and optionally wandb, trackio, mlflow.

Trackers run on rank 0 only. accelerate's tracker classes ask ``accelerate.PartialState`` for the rank and refuse to log
without one, so it is made here where nobody has made it before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zero.errors import UserError

# Name of a tracker -> package that provides it.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}

# By these torchrun tells a process which rank it is; accelerate reads them, and fills in those that are missing.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


class Tracker(Protocol):
    """The part of ``accelerate.tracking.GeneralTracker`` that is used here."""

    name: str

    def start(self) -> None:
        """Open the run at the tracking service."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Show the config of the run."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Record numbers of a step."""

    def finish(self) -> None:
        """Close the run."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be used, without starting them; cheap enough for ``zero validate``.

    Args:
        names: Names as in ``TRACKERS``.

    Raises:
        UserError: If one is unknown or its package is missing; names all of them, and the command that installs each.
    """
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"unknown tracker {name!r}; allowed: {', '.join(TRACKERS)}")
        elif not _is_available(name):
            problems.append(f"tracker {name!r} needs the package {TRACKERS[name]}: pip install {TRACKERS[name]}")
    if problems:
        raise UserError("; ".join(problems))


def start_trackers(
    names: Sequence[str],
    *,
    logging_dir: Path,
    project: str,
    run_name: str,
    config: Mapping[str, Any] | None,
) -> list[Tracker]:
    """Start trackers; to be called on rank 0 only, before training.

    Args:
        names: Names as in ``TRACKERS``; repeated ones count once.
        logging_dir: Where trackers that write files do so, in a folder named after the run.
        project: Project (wandb, trackio) or experiment (mlflow).
        run_name: Name of the run.
        config: Shown beside the curves; nested mappings are flattened to dotted keys.

    Returns:
        The trackers, started.

    Raises:
        UserError: If one is unknown, is not installed or does not start.
        RuntimeError: If there are several ranks but no process group yet.
    """
    names = list(dict.fromkeys(names))
    check_trackers(names)
    if not names:
        return []
    _ensure_process_state()
    return [_start(name, logging_dir, project, run_name, flatten_config(config or {})) for name in names]


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return a nested config with dotted keys and the value types that every tracker takes; None is left out."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten_config(value, prefix=f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def _is_available(name: str) -> bool:
    """Return whether accelerate can use a tracker here."""
    from accelerate.tracking import get_available_trackers

    return name in {str(tracker) for tracker in get_available_trackers()}


def _start(name: str, logging_dir: Path, project: str, run_name: str, config: dict[str, Any]) -> Tracker:
    """Make and start one tracker.

    Raises:
        UserError: If it does not start (no login, no network, a folder that cannot be written).
    """
    try:
        tracker = _make(name, logging_dir, project, run_name)
        tracker.start()
        if config:
            tracker.store_init_configuration(config)
    except Exception as error:
        reason = str(error).rstrip(". ")
        raise UserError(f"tracker {name!r} does not start: {reason}; set it up, or leave it out") from error
    return tracker


def _make(name: str, logging_dir: Path, project: str, run_name: str) -> Tracker:
    """Return accelerate's tracker of that name."""
    from accelerate import tracking

    # The classes differ in what they call project and run, hence one line each.
    tracker: Tracker
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(run_name, logging_dir)
    elif name == "mlflow":
        tracker = tracking.MLflowTracker(experiment_name=project, run_name=run_name)
    elif name == "wandb":
        tracker = tracking.WandBTracker(project, name=run_name, dir=str(logging_dir.parent))
    else:
        tracker = tracking.TrackioTracker(project, name=run_name)
    return tracker


def _ensure_process_state() -> None:
    """Make accelerate's process state, if there is none, without touching device, thread count or process groups.

    Raises:
        RuntimeError: If there are several ranks but no process group: accelerate would open one on this rank alone and
            hang.
    """
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:
        return
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not has_group and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("with several ranks the process group must be initialised before trackers start")
    # torchrun with a single process sets the variables too; accelerate would open a process group for it.
    changes: dict[str, str | None] = {} if has_group else dict.fromkeys(_RANK_VARIABLES)
    # Left unset, accelerate would choose the number of threads.
    changes["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with _changed_environment(changes):
        # cpu=True: only the rank is of interest; anything else would claim an accelerator.
        PartialState(cpu=True)


@contextlib.contextmanager
def _changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables (None: unset) for a while; afterwards all are as before, those accelerate sets too."""
    before = {name: os.environ.get(name) for name in (*_RANK_VARIABLES, *changes)}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables; None unsets one."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
