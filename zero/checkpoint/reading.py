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
from zero.checkpoint.problems import DamagedError
from zero.checkpoint.tensorfile import Incoming, read_blocks, read_header


class TensorReader:
    """Keeps the files of one checkpoint open while they are read; a context manager.

    Args:
        checkpoint: a folder that has been verified.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, tuple[FileIO, dict[str, Incoming]]] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle, _ in self._open.values():
            handle.close()
        self._open.clear()

    def _file(self, path: str) -> tuple[FileIO, dict[str, Incoming]]:
        if path not in self._open:
            handle = open_plain(self._checkpoint, path)
            try:
                self._open[path] = handle, read_header(handle)
            except DamagedError:
                handle.close()
                raise
        return self._open[path]

    def blocks(self, part: Slice) -> Iterator[tuple[int, torch.Tensor]]:
        """A slice's elements: ``(first element of the flattened tensor, 1-D host tensor)``.

        The tensor is overwritten by the next block.

        Raises:
            DamagedError: the file does not hold it.
        """
        handle, header = self._file(part.file)
        for start, block in read_blocks(handle, stored_as(part, header)):
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
