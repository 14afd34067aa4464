"""Every operation on the file system that writing a checkpoint takes, one method each.

Tests put another :class:`Files` in place with :func:`replaced` and stop a save before, in the middle of, or after any
operation. Reading goes through :func:`open_plain`, which follows no links and never leaves the checkpoint's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from zero.checkpoint.problems import DamagedError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MOST_PARTS = 2


class Files:
    """The operations. Durable means: a sync has returned."""

    def make_directory(self, path: Path) -> None:
        """Makes one directory; durable after the parent's :meth:`sync_directory`."""
        os.mkdir(path)

    def create(self, path: Path) -> FileIO:
        """Opens a new file for writing; one that exists is an error."""
        return FileIO(path, "xb")

    def write(self, handle: FileIO, data: memoryview) -> None:
        """Writes all of ``data``; durable after :meth:`sync`."""
        while data:
            data = data[handle.write(data) or 0 :]

    def sync(self, handle: FileIO) -> None:
        """Blocks until a file's bytes are on the medium."""
        os.fsync(handle.fileno())

    def sync_directory(self, path: Path) -> None:
        """Blocks until the names in a directory are on the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames at once, or not at all; durable after the parent's :meth:`sync_directory`."""
        os.rename(source, target)

    def remove_file(self, path: Path) -> None:
        """Removes a file or a link."""
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        """Removes an empty directory."""
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write to the file system of ``path``."""
        return shutil.disk_usage(path).free


_active = Files()


def active() -> Files:
    """The operations in use."""
    return _active


@contextlib.contextmanager
def replaced(files: Files) -> Iterator[Files]:
    """Other operations for the time of a ``with`` block, for tests that interrupt a save."""
    global _active
    before, _active = _active, files
    try:
        yield files
    finally:
        _active = before


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    num_bytes: int
    sha256: str


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Writes and syncs a new file, part by part.

    Args:
        path: must not exist.
        parts: its contents in order; each is let go before the next is asked for.

    Raises:
        OSError: the file system refused.
    """
    files, digest, num_bytes = active(), hashlib.sha256(), 0
    with files.create(path) as handle:
        for part in parts:
            view = memoryview(part).cast("B")
            files.write(handle, view)
            digest.update(view)
            num_bytes += view.nbytes
        files.sync(handle)
    return Written(num_bytes, digest.hexdigest())


def make_directories(path: Path) -> None:
    """Makes a directory and its missing parents, all durable."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        active().make_directory(directory)
        active().sync_directory(directory.parent)


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it. Links are removed, not followed."""
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            active().remove_file(Path(entry.path))
    active().remove_directory(path)


def is_plain_name(relative: str) -> bool:
    """Whether a path of a manifest stays inside its folder: at most one folder and a file, both with harmless names."""
    parts = relative.split("/")
    return len(parts) <= _MOST_PARTS and all(_PLAIN_NAME.fullmatch(part) for part in parts)


def open_plain(root: Path, relative: str) -> FileIO:
    """Opens a regular file inside a checkpoint for reading.

    Args:
        root: the checkpoint's folder.
        relative: path inside it, with forward slashes.

    Raises:
        DamagedError: it is missing, a link, no regular file, or its path leaves the folder.
    """
    if not is_plain_name(relative):
        raise DamagedError(f"the path {relative!r} is not allowed in a checkpoint")
    path = root.joinpath(*relative.split("/"))
    try:
        for parent in path.relative_to(root).parents:
            if parent != Path(".") and not stat.S_ISDIR(os.lstat(root / parent).st_mode):
                raise DamagedError(f"{parent} is a link or no directory")
        # Without O_NONBLOCK a named pipe of that name would hold us for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DamagedError(f"{relative} is a link; checkpoints hold files only") from error
        raise DamagedError(f"{relative}: {error.strerror or error}") from error
    handle = FileIO(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        handle.close()
        raise DamagedError(f"{relative} is not a regular file")
    return handle


def length_bytes(handle: FileIO) -> int:
    """Length of an open file."""
    return os.fstat(handle.fileno()).st_size


def read_exactly(handle: FileIO, buffer: memoryview) -> None:
    """Fills a buffer from an unbuffered file.

    Raises:
        DamagedError: the file ends before.
    """
    while buffer:
        num_read = handle.readinto(buffer)
        if not num_read:
            raise DamagedError("the file ends before its contents do")
        buffer = buffer[num_read:]
