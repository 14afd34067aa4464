"""The folder of a run: checked before anything is written, and cleared of what an earlier run left there."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zero.errors import UserError
from zero.report.metrics import METRICS_FILE, TENSORBOARD_FOLDER

CONFIG_FILE, SUMMARY_FILE, MAP_FILE = "config.toml", "summary.json", "memory_map.png"
CHECKPOINTS_FOLDER, MODEL_FOLDER = "checkpoints", "model"
ENERGY_FILE = "energy.jsonl"
"""What each process that worked on the run has used: the last line of each counts, a killed one's too."""

_CONTENTS = (
    *(METRICS_FILE, SUMMARY_FILE, MAP_FILE, CHECKPOINTS_FOLDER, MODEL_FOLDER, TENSORBOARD_FOLDER),
    CONFIG_FILE,
    ENERGY_FILE,
)


def check_run_folder(folder: Path) -> None:
    """Sees whether a run could write there, without writing.

    Raises:
        UserError: a file is in the way, or the folder is not ours to write to.
    """
    existing = folder
    try:
        while not _is_there(existing) and existing != existing.parent:
            existing = existing.parent
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from error
    if not existing.is_dir():
        kind = "a link that leads nowhere" if existing.is_symlink() else "a file"
        raise _unusable(folder, f"{existing} is {kind}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(folder, f"{existing} cannot be written to")


def check_own_files(folder: Path, config_source: str, model: str | None) -> None:
    """Sees that a run would not write over what it is made from.

    Args:
        folder: of the run.
        config_source: path of the config that was given.
        model: path or Hub name of the model that is trained.

    Raises:
        UserError: it would.
    """
    if _is_within(config_source, folder / CONFIG_FILE) and not _holds_run(folder):
        raise _unusable(folder, f"a run writes its own {CONFIG_FILE} there, over the config that was given")
    if model is not None and _is_within(model, folder / MODEL_FOLDER):
        raise _unusable(folder, f"a run writes its own {MODEL_FOLDER}/ there, over the model that is to be trained")


def _is_there(path: Path) -> bool:
    """Whether there is anything, be it a link that leads nowhere.

    Raises:
        OSError: there cannot be: the name is too long, say.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_within(given: str, place: Path) -> bool:
    path = Path(given)
    return path.exists() and path.resolve().is_relative_to(place.resolve())


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS_FILE, CHECKPOINTS_FOLDER))


def _unusable(folder: Path, reason: str) -> UserError:
    return UserError(f"train.output_dir = {str(folder)!r}: {reason}; name another folder")


@contextlib.contextmanager
def held_run_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it while this one writes there.

    Raises:
        UserError: it cannot be made, or another run is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock, as when the process dies


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # not a POSIX system: no lock
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _unusable(folder, "another run is writing there; let it end") from error
    except OSError:  # a file system without locks
        return


def set_aside_earlier_run(folder: Path) -> Path | None:
    """Moves what lies where a run writes (an earlier run, as a rule) into a folder ``earlier-N``: two runs never mix.

    A resume would otherwise go on from the other run's checkpoint, and the metrics would hold both.

    Returns:
        Where it is now; None if there was nothing.
    """
    found = [folder / name for name in _CONTENTS if os.path.lexists(folder / name)]
    if not found:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


def forget_metrics_after(folder: Path, step: int) -> None:
    """Cuts the metrics of steps that a resumed run will do again.

    Args:
        folder: of the run.
        step: the checkpoint's; its own lines stay, and with them what a run that went back had done before.
    """
    file = folder / METRICS_FILE
    if not file.exists():
        return
    kept_bytes = read_bytes = 0
    with file.open("rb") as lines:
        for line in lines:
            read_bytes += len(line)
            try:
                is_later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError):
                break  # torn by whatever stopped the run: nothing behind it can be read
            if not is_later:
                kept_bytes = read_bytes
    os.truncate(file, kept_bytes)
