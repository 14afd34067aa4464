"""A checkpoint's tensors by slice, block by block, from as many files as they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch

from zero.checkpoint.codec import dtype_of
from zero.checkpoint.files import open_plain
from zero.checkpoint.finding import stored_as
from zero.checkpoint.manifest import Slice
from zero.checkpoint.tensorfile import Incoming, read_blocks, read_header

_MOST_OPEN_FILES = 32
Block = tuple[int, torch.Tensor]
"""First element, and a 1-D host tensor of the elements from there on."""


class TensorReader:
    """Keeps some files of one checkpoint open while they are read; a context manager.

    Args:
        checkpoint: a folder that has been verified.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, FileIO] = {}
        self._headers: dict[str, dict[str, Incoming]] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._open.values():
            handle.close()
        self._open.clear()

    def _file(self, path: str) -> tuple[FileIO, dict[str, Incoming]]:
        handle = self._open.pop(path, None) or open_plain(self._checkpoint, path)
        self._open[path] = handle  # the last one used is the last one
        while len(self._open) > _MOST_OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        if path not in self._headers:
            self._headers[path] = read_header(handle)
        return handle, self._headers[path]

    def blocks(self, part: Slice, first: int | None = None, stop: int | None = None) -> Iterator[Block]:
        """A slice's elements: ``(first element of the flattened tensor, 1-D host tensor)``.

        The tensor is overwritten by the next block. Blocks of one slice are read to their end before another's.

        Args:
            part: the slice.
            first: elements of the flattened tensor before it are not wanted.
            stop: nor are those from here on.

        Raises:
            DamagedError: the file does not hold it.
        """
        left = part.start if first is None else max(first, part.start)
        right = part.stop if stop is None else min(stop, part.stop)
        if left >= right:
            return
        handle, header = self._file(part.file)
        for start, block in read_blocks(handle, stored_as(part, header), left - part.start, right - part.start):
            yield part.start + start, block

    def whole(self, parts: list[Slice]) -> torch.Tensor:
        """A whole tensor in its shape and in C order; takes its bytes of host memory."""
        first = parts[0]
        flat = torch.empty(first.numel, dtype=dtype_of(first.dtype))
        for part in parts:
            for start, block in self.blocks(part):
                flat[start : start + block.numel()] = block
        if first.order is None:
            return flat.reshape(first.shape)
        in_order = flat.reshape([first.shape[dim] for dim in first.order])
        return in_order.permute([first.order.index(dim) for dim in range(len(first.shape))]).contiguous()
