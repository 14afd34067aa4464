"""Model folders made by converters: the target checked first, written aside, and there only when it is whole."""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from zero.checkpoint.huggingface import may_be_kept
from zero.errors import UserError

logger = logging.getLogger("zero")

_REMADE = "config.json"
_SHARD_INDEX = ".index.json"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` at the end; after an error nothing is left.

    Raises:
        UserError: ``target`` exists and is not empty, or cannot be made.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is not empty; name a new folder, or remove it first")
    aside = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}") from error
    try:
        yield aside
        if target.is_dir():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, chat template and generation config, whatever of them is there.

    Returns:
        Names of the files.
    """
    copied = []
    inside = source.resolve()
    if inside.parent.name == "snapshots":  # of the Hub's cache, where files are links to those beside the snapshots
        inside = inside.parent.parent
    for path in sorted(source.iterdir()):
        name = path.name
        if name == _REMADE or name.endswith(_SHARD_INDEX) or not may_be_kept(name) or (target / name).exists():
            continue
        if path.is_file() and path.resolve().is_relative_to(inside):
            shutil.copyfile(path, target / name)
            copied.append(name)
    return copied
