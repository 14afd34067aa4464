"""What a source is: files on disk, a pattern, or a name on the Hub; and what is there instead where it is nothing."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from zero.data.hub import is_saved_dataset
from zero.data.readers import GZIPPED, READERS, reader_for
from zero.errors import DataError

SUFFIXES = ", ".join(READERS) + " (" + ", ".join(f"{suffix}.gz" for suffix in GZIPPED) + ")"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_hub_name(source: str) -> bool:
    """True where a text names nothing on disk and can be meant as ``owner/name`` or ``name`` on the Hub."""
    if _exists(Path(source).expanduser()) or not _HUB_NAME.match(source):
        return False
    if reader_for(Path(source)) is not None or source.endswith(".gz"):
        return False
    # `data/train` beside a folder `data` is a misspelt path.
    return "/" not in source or not Path(source.split("/")[0]).is_dir()


def find_files(source: str) -> list[Path]:
    """The data files that a path, folder or pattern stands for, in order of name; a folder only where it is a saved
    dataset.

    Raises:
        DataError: There are none; says what there is instead.
    """
    path = Path(source).expanduser()
    if _exists(path):
        if path.is_dir():
            return _files_in(path)
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; name a data file or a folder of them")
        return [path]
    if _is_pattern(source):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if files:
            return files
        found = f"only folders ({matches[0]}, ...)" if matches else "nothing"
        raise DataError(f'"{source}": the pattern matches {found}; data files end in {SUFFIXES}')
    raise DataError(f"{path}: no such file or folder{_what_is_there(path)}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read: permission denied for a folder above it") from error
    except (OSError, ValueError):
        return False


def _is_pattern(source: str) -> bool:
    return any(mark in source for mark in "*?[")


def _files_in(folder: Path) -> list[Path]:
    try:
        os.listdir(folder)  # walking passes over folders that cannot be read
        if is_saved_dataset(folder):
            return [folder]
        files = sorted(file for file in _walk(folder) if file.is_file())
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror or error}") from error
    data_files = [file for file in files if reader_for(file) is not None]
    if not data_files:
        there = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        there = f"it has {there}{', ...' if len(files) > 5 else ''}" if files else "it is empty"
        raise DataError(f"{folder}: no data file in this folder ({there}); data files end in {SUFFIXES}")
    return data_files


def _walk(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _what_is_there(path: Path) -> str:
    """The nearest name beside a path that does not exist, or the first folder of it that does not exist."""
    if path.is_symlink():
        return f" (it is a link to {os.readlink(path)}, which is missing)"
    parent = path.parent
    if not _exists(parent):
        return f" (the folder {parent} does not exist either)"
    try:
        names = os.listdir(parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f' (did you mean "{parent / close[0]}"?)' if close else f" in {parent.absolute()}"
