"""Tensors out of safetensors files without mapping them: bytes go from the file straight to where they will stay.

Mapped pages count as resident memory, so a mapped file beside the chunks would be a second copy of the model.
"""

from __future__ import annotations

import functools
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from zero.errors import UserError
from zero.safetensors_header import StoredTensor, damaged, parse_header

_PART_BYTES = 2 << 20
"""What one thread reads and casts at a time: small enough to stay in cache between the two."""
_SERIAL_NUMEL = 1 << 15
"""Most elements that torch copies without asking other threads for help."""
_READ_BYTES = 1 << 30
"""Most bytes of one system call (Linux stops at 2 GiB)."""


class SafetensorsFile:
    """One file, its header read and checked, held open until the object goes.

    Args:
        path: of the file.

    Raises:
        UserError: it cannot be opened, or is not a sound safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # Not blocking: opening a named pipe would otherwise wait for a writer for ever.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise UserError(f"{self.path} is not a file; a safetensors file is needed")
        self._tensors = parse_header(self.path, self._descriptor)

    def close(self) -> None:
        """Closes the file; nothing can be read afterwards."""
        self._close()

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor.

        Raises:
            KeyError: there is no such tensor. So do the methods below.
        """
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor as stored."""
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """A new tensor with the stored values."""
        stored = self._tensors[name]
        target = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.read_into(name, target)
        return target

    def read_into(
        self, name: str, target: torch.Tensor, *more: torch.Tensor, through: torch.dtype | None = None
    ) -> None:
        """Writes the stored values into tensors on the host, the file being read once.

        Args:
            name: of the tensor.
            target: of the stored shape and any dtype. Where its elements do not lie in row-major order, one temporary
                of the whole tensor is made.
            more: further targets.
            through: cast to this dtype first and from there to the targets', as a model of that dtype would have it.

        Raises:
            UserError: the file ended early.
            ValueError: the shapes differ.
        """
        for job in self.jobs(name, target, *more, through=through):
            job()

    def jobs(
        self,
        name: str,
        target: torch.Tensor,
        *more: torch.Tensor,
        through: torch.dtype | None = None,
        first: int | None = None,
    ) -> list[Callable[[], None]]:
        """The work of :meth:`read_into` in pieces that may run in any order and in any threads.

        Args:
            name, target, more, through: as there.
            first: read no more than the elements from this one on, in row-major order, for which the targets, then 1-D
                and contiguous, have room.
        """
        stored, seen = self._tensors[name], through or self._tensors[name].dtype
        jobs: list[Callable[[], None]] = []
        flat: list[torch.Tensor] = []
        if first is not None:
            return self._part_jobs(stored, [target, *more], seen, first)
        for each in (target, *more):
            if each.shape != stored.shape:
                raise ValueError(f"{name} has shape {tuple(stored.shape)}, the target {tuple(each.shape)}")
            if each.is_contiguous():
                flat.append(each.detach().view(-1))
            else:
                jobs.append(functools.partial(self._read_whole, name, each, seen))
        return jobs + (self._part_jobs(stored, flat, seen, 0) if flat else [])

    def _part_jobs(
        self, stored: StoredTensor, targets: list[torch.Tensor], through: torch.dtype, first: int
    ) -> list[Callable[[], None]]:
        part_numel = _PART_BYTES // stored.dtype.itemsize
        return [
            functools.partial(
                self._read_part, stored, [t[start : start + part_numel] for t in targets], through, first + start
            )
            for start in range(0, targets[0].numel(), part_numel)
        ]

    def _read_whole(self, name: str, target: torch.Tensor, through: torch.dtype) -> None:
        whole = torch.empty(target.shape, dtype=through, device="cpu")
        self.read_into(name, whole)
        target.copy_(whole)

    def _read_part(self, stored: StoredTensor, parts: list[torch.Tensor], through: torch.dtype, start: int) -> None:
        """Reads some elements straight into the target of the stored dtype, or into a buffer; the others get copies."""
        home = next((part for part in parts if part.dtype == stored.dtype == through), None)
        values = torch.empty(parts[0].numel(), dtype=stored.dtype, device="cpu") if home is None else home
        self._fill(stored, values, start)
        others = [part for part in parts if part is not home]
        # Blocks that torch copies in this very thread: several readers with a team of helpers each hinder one another.
        for at in range(0, values.numel() if others else 0, _SERIAL_NUMEL):
            block = values[at : at + _SERIAL_NUMEL].to(through)
            for part in others:
                part[at : at + _SERIAL_NUMEL].copy_(block)

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The values in 1-D blocks, each with the index of its first element; a block is overwritten by the next.

        Args:
            name: of the tensor.
            dtype: cast to it; None for the stored one.
        """
        stored = self._tensors[name]
        numel, block_numel = stored.shape.numel(), _PART_BYTES // stored.dtype.itemsize
        staging = torch.empty(min(numel, block_numel), dtype=stored.dtype, device="cpu")
        for start in range(0, numel, block_numel):
            block = staging[: min(block_numel, numel - start)]
            self._fill(stored, block, start)
            yield start, block if dtype is None else block.to(dtype)

    def _fill(self, stored: StoredTensor, flat: torch.Tensor, start: int) -> None:
        """Reads elements from ``start`` on into a 1-D tensor of the stored dtype."""
        if not flat.numel():
            return
        memory = flat.view(torch.uint8).numpy().data
        at_byte, filled_bytes = stored.start_byte + start * stored.dtype.itemsize, 0
        while filled_bytes < len(memory):
            piece = memory[filled_bytes : filled_bytes + _READ_BYTES]
            num_bytes = os.preadv(self._descriptor, [piece], at_byte + filled_bytes)
            if num_bytes == 0:
                raise damaged(self.path, "it ended early: something changed it while it was read")
            filled_bytes += num_bytes
