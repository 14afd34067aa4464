"""Parameters read outside any pass: what the user sees, and what is taken over of what the user writes.

A parameter that is not resident is shown as a copy of its own, which nothing that the manager does later can pull away
from under a view of it. A resident one is shown where it lies, but for one whose values are a part of its master: what
is written there could not be told from what was there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemini.device import Device
from gemini.segment import MASTER
from gemini.tensor import ChunkTensor


class IdleReads:
    """Shows parameters between passes.

    Args:
        device: where copies live; they count as non-model data.
        make_room: evicts what is gathered until so many bytes more fit, as far as that goes.
        write: takes over new values.
    """

    def __init__(
        self,
        device: Device,
        make_room: Callable[[int], None],
        write: Callable[[ChunkTensor, torch.Tensor], None],
    ) -> None:
        self._device = device
        self._make_room = make_room
        self._write = write
        self._shown: dict[ChunkTensor, None] = {}

    def show(self, tensor: ChunkTensor) -> None:
        """Makes the parameter readable and writable until :meth:`settle`.

        Raises:
            torch.OutOfMemoryError: the device has no room for this one parameter.
        """
        if tensor in self._shown:
            return
        if tensor.chunk.resident and tensor.chunk.codec is None:
            tensor.chunk.settle_update()
            tensor.chunk.before_change()  # the user may write where it lies
            self._device.synchronize()
        else:
            tensor.bound = self.copy(tensor)
        self._shown[tensor] = None
        tensor.is_shown = True

    def copy(self, tensor: ChunkTensor) -> torch.Tensor:
        """A copy of a parameter's values on the device; what is shown gives way to it.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        with self._device.bookkeeping():
            values = tensor.chunk.values_of(tensor)
        while True:
            self._make_room(values.nbytes)
            try:
                with torch.no_grad(), self._device.activity():
                    empty = torch.empty_strided(
                        values.shape, values.stride(), dtype=values.dtype, device=self._device.torch_device
                    )
                    return empty.copy_(values)
            except torch.OutOfMemoryError:
                if not self._shown:
                    raise
                with self._device.bookkeeping():
                    self._settle_one(next(iter(self._shown)))

    def settle(self) -> None:
        """Takes over what was written; parameters point at where their values are again."""
        with self._device.bookkeeping():
            for tensor in list(self._shown):
                self._settle_one(tensor)

    def _settle_one(self, tensor: ChunkTensor) -> None:
        del self._shown[tensor]
        tensor.is_shown = False
        written = self.written_values(tensor)
        if written is not None:
            self._write(tensor, written)
        tensor.note_written()
        tensor.chunk.bind(tensor)

    def written_values(self, tensor: ChunkTensor) -> torch.Tensor | None:
        """On the host what the parameter holds now, if that is not what its owner has.

        Elements that nobody touched keep what the master knows beyond the parameter's dtype.
        """
        present = tensor.bound.cpu()
        known = _known_values(tensor)
        # How a coded master was rounded only its values tell.
        rounded = known.to(present.dtype) if tensor.chunk.codec is None else tensor.chunk.values_of(tensor)
        if torch.equal(present, rounded):
            return None
        return torch.where(present == rounded, known, present.to(known.dtype))


def _known_values(tensor: ChunkTensor) -> torch.Tensor:
    """A host copy of the master, or of the values where there is none."""
    chunk, entry = tensor.chunk, tensor.entry
    if all(MASTER in segment.companions for segment, _, _ in chunk.pieces(entry.offset, entry.stop)):
        return chunk.companion_of(tensor, MASTER)
    return chunk.values_of(tensor)
