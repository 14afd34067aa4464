"""The folder of a run: checked before anything is written, and cleared of what an earlier run left there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from zero.errors import UserError
from zero.report.metrics import METRICS_FILE, TENSORBOARD_FOLDER

CONFIG_FILE, SUMMARY_FILE, MAP_FILE = "config.toml", "summary.json", "memory_map.png"
CHECKPOINTS_FOLDER, MODEL_FOLDER = "checkpoints", "model"

_CONTENTS = (
    *(METRICS_FILE, SUMMARY_FILE, MAP_FILE, CHECKPOINTS_FOLDER, MODEL_FOLDER, TENSORBOARD_FOLDER),
    CONFIG_FILE,
)


def check_run_folder(folder: Path) -> None:
    """Sees whether a run could write there, without writing.

    Raises:
        UserError: a file is in the way, or the folder is not ours to write to.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"train.output_dir = {str(folder)!r}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"train.output_dir = {str(folder)!r}: {existing} cannot be written to; name another folder")


def set_aside_earlier_run(folder: Path) -> Path | None:
    """Moves what an earlier run wrote into a folder ``earlier-N`` beside it, so that two runs never mix.

    A resume would otherwise go on from the other run's checkpoint, and the metrics would hold both.

    Returns:
        Where it is now; None if there was no earlier run.
    """
    found = [folder / name for name in _CONTENTS if (folder / name).exists()]
    if not any(path.name in (METRICS_FILE, CHECKPOINTS_FOLDER) for path in found):
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
        step: the checkpoint's; its own lines stay.
    """
    file = folder / METRICS_FILE
    if not file.exists():
        return
    kept_bytes = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                is_later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError):
                break  # torn by whatever stopped the run: nothing behind it can be read
            if is_later:
                break
            kept_bytes += len(line)
    os.truncate(file, kept_bytes)
