"""The disk tier: what neither device nor host hold, in one file that is mapped into memory.

A mapping makes tensors of it: updates, checkpoints and copies to the device work on them as on any other, and the
operating system reads and writes behind them. Measured against explicit reads and writes by threads, buffered and
direct, it is as fast (``docs/measurements.md``): the disk is the limit. All space is reserved when a buffer is made, so a
full disk is an error at that point and never in the middle of an update.

The file has no name: whatever becomes of the process, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

import torch

from gemini.units import format_bytes

_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY


class DiskError(OSError):
    """The disk tier cannot hold one more buffer, or cannot be had; says what to do."""


class DiskArena:
    """Gives out 1-D tensors whose memory is a file's.

    Args:
        folder: for the file; made if it is not there. None: no buffer can be had.

    Attributes:
        disk_bytes: given out.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.disk_bytes = 0
        self._file: int | None = None
        self._file_bytes = 0
        # By address: the mapping and its place in the file, None in one that is closed. Places that were given back, by
        # their bytes.
        self._mapped: dict[int, tuple[mmap.mmap, int | None]] = {}
        self._holes: dict[int, list[int]] = {}

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor of zeros.

        Raises:
            DiskError: there is no folder, or no room in it.
        """
        num_bytes = numel * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(0, dtype=dtype)
        whole_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        fresh = not self._holes.get(whole_bytes)
        place = self._grow(whole_bytes) if fresh else self._holes[whole_bytes].pop()
        try:
            mapping = mmap.mmap(self._descriptor(), whole_bytes, flags=mmap.MAP_SHARED, offset=place)
        except OSError as error:
            self._holes.setdefault(whole_bytes, []).append(place)
            raise DiskError(
                f"memory.disk = {str(self.folder)!r}: the operating system does not map a file there ({error.strerror}); "
                "name a folder on another disk"
            ) from error
        tensor = torch.frombuffer(mapping, dtype=dtype, count=numel)
        if not fresh:
            tensor.zero_()
        self._mapped[tensor.data_ptr()] = mapping, place
        self.disk_bytes += num_bytes
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Takes a tensor from :meth:`allocate` back; its place in the file is used again."""
        self.disk_bytes -= tensor.nbytes
        if tensor.numel():
            mapping, place = self._mapped.pop(tensor.data_ptr())
            if place is not None:
                self._holes.setdefault(len(mapping), []).append(place)

    def will_need(self, tensor: torch.Tensor) -> None:
        """Starts to read ahead."""
        if tensor.numel():
            self._advise(tensor, mmap.MADV_WILLNEED)

    def let_go(self, tensor: torch.Tensor) -> None:
        """Nobody needs it for a while: starts to write, and takes it out of this process's memory."""
        if not tensor.numel():
            return
        self._advise(tensor, mmap.MADV_DONTNEED)
        mapping, place = self._mapped[tensor.data_ptr()]
        if place is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(), place, len(mapping), os.POSIX_FADV_DONTNEED)

    def _advise(self, tensor: torch.Tensor, advice: int) -> None:
        mapping, _ = self._mapped[tensor.data_ptr()]
        with contextlib.suppress(OSError):  # only advice
            mapping.madvise(advice)

    def close(self) -> None:
        """Forgets the file; its space is free when the last tensor goes."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        # No place outlives its file: in another it is somebody else's, or beyond the end.
        self._file_bytes = 0
        self._holes.clear()
        self._mapped = {address: (mapping, None) for address, (mapping, _) in self._mapped.items()}

    def _grow(self, num_bytes: int) -> int:
        """A new place at the file's end."""
        descriptor, place = self._descriptor(), self._file_bytes
        try:
            os.posix_fallocate(descriptor, place, num_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, place)
            raise DiskError(self._refusal(num_bytes, error)) from error
        self._file_bytes += num_bytes
        return place

    def _refusal(self, num_bytes: int, error: OSError) -> str:
        free = ""
        with contextlib.suppress(OSError):
            status = os.statvfs(self.folder or ".")
            free = f", {format_bytes(status.f_bavail * status.f_frsize)} are free there"
        return (
            f"memory.disk = {str(self.folder)!r}: {format_bytes(num_bytes)} more were needed beside "
            f"{format_bytes(self.disk_bytes)} that are in use{free} ({error.strerror}); free space there or name another "
            "folder"
        )

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = self._open()
        return self._file

    def _open(self) -> int:
        if self.folder is None:
            raise DiskError("memory.disk is not set: nothing can go to disk")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".zero-disk-", dir=self.folder)
            os.unlink(name)
        except OSError as error:
            raise DiskError(
                f"memory.disk = {str(self.folder)!r}: no file can be made there ({error.strerror}); name a folder that "
                "you may write to"
            ) from error
        return descriptor
