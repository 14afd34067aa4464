"""The folder that holds checkpoints: published by a rename, cleared of what interrupted saves left, kept short."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

from zero.checkpoint.files import active, remove_tree
from zero.checkpoint.finding import aside_of, is_leftover, list_candidates, verify
from zero.checkpoint.problems import CheckpointError

logger = logging.getLogger("zero")


def temporary_name() -> str:
    """Name of a folder in which a save writes until it is complete."""
    return f".tmp-{uuid.uuid4().hex}"


def publish(directory: Path, temporary: Path, name: str) -> Path:
    """The rename that makes a checkpoint of the folder; one of the same step steps aside and goes afterwards."""
    files, target = active(), directory / name
    aside = directory / f".old-{name}-{uuid.uuid4().hex}"
    replaces = target.is_dir()
    if replaces:
        files.rename(target, aside)  # until the next rename it is found under its new name
    files.rename(temporary, target)
    files.sync_directory(directory)
    if replaces:
        _retire_if_possible(aside)
    return target


def clean(directory: Path) -> None:
    """Removes what interrupted saves left, and brings back a checkpoint that was moved aside and not replaced."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_dir():
            continue
        name = aside_of(path.name)
        if is_leftover(path.name):
            logger.info("removing %s, which an interrupted save left", path)
            remove_tree(path)
        elif name is not None and (directory / name).is_dir():
            _retire(path)
        elif name is not None:
            active().rename(path, directory / name)
            active().sync_directory(directory)


def _retire(path: Path) -> None:
    """Removes a checkpoint: first its name, at once, so that no half of it is ever found."""
    grave = path.parent / temporary_name()
    active().rename(path, grave)
    active().sync_directory(path.parent)
    remove_tree(grave)


def _retire_if_possible(path: Path) -> None:
    """The new checkpoint stands already: an old one that stays is no reason to stop."""
    try:
        _retire(path)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def discard(temporary: Path) -> None:
    """Removes an unfinished save as far as that goes; the next save removes the rest."""
    try:
        if temporary.is_dir():
            remove_tree(temporary)
    except OSError as error:
        logger.warning("%s could not be removed: %s", temporary, error)


def prune(directory: Path, newest: Path, run_id: str, limit: int) -> None:
    """Removes all but the newest checkpoints of a run, once the newest has been read back.

    Raises:
        CheckpointError: it is not what was written; nothing was removed.
    """
    problems = verify(newest)
    if problems:
        raise CheckpointError(
            f"{newest} was written, but what is read back differs: {'; '.join(problems)}. Older checkpoints were kept; "
            "check the disk"
        )
    mine = [c.path for c in list_candidates(directory) if c.manifest is not None and c.manifest.run_id == run_id]
    others = [path for path in mine if path != newest]
    for path in others[limit - 1 :]:
        _retire_if_possible(path)
