"""Gradients of micro-batches that go through a unit one after the other: summed on the device, sent once.

Sums are made in fp32 and in the order of micro-batches, as the owner would make them, so they are the same to the bit;
and instead of one gradient per micro-batch one sum per unit crosses the link.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gemini.chunk import Chunk
from gemini.device import Device
from gemini.gradients import flat_gradient
from gemini.tensor import ChunkTensor

_NARROW = (torch.bfloat16, torch.float16)


class GradientSums:
    """The gradients of the unit whose backward runs.

    What a chunk's owner, or another rank, would not take in fp32 is not summed here, nor what would take too much room:
    it goes out after each micro-batch.

    Args:
        device: they are on; they count as non-model data.
        most_bytes: that the sums of one chunk may take.
    """

    def __init__(self, device: Device, most_bytes: int) -> None:
        self._device = device
        self._most_bytes = most_bytes
        self._present: dict[ChunkTensor, torch.Tensor] = {}
        # Gradients that have left since the last :meth:`finish`.
        self._sent: dict[ChunkTensor, None] = {}
        # Copies to the host still read these; :meth:`_settle` waits for them.
        self._leaving: list[tuple[Chunk, dict[ChunkTensor, torch.Tensor]]] = []

    def add(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        """A micro-batch's gradient of a parameter is complete; it is ours from now on."""
        present = self._present.get(tensor)
        with torch.no_grad():
            flat = flat_gradient(gradient, tensor.entry.spec)
            if present is not None:
                present.add_(flat)
                return
            self._settle()
            self._present[tensor] = flat.float() if self._is_summed(tensor.chunk) else flat

    def _is_summed(self, chunk: Chunk) -> bool:
        if chunk.layout.dtype in _NARROW and not chunk.shard.is_whole:
            return False  # between ranks gradients travel as they are, and would be rounded
        return not self._device.is_host and 4 * chunk.numel <= self._most_bytes

    def end_micro_batch(self) -> None:
        """A micro-batch's backward through the unit is over: what is not summed goes out."""
        self._send([tensor for tensor in self._present if not self._is_summed(tensor.chunk)])

    def finish(self) -> list[ChunkTensor]:
        """All micro-batches are through: sums go out.

        Returns:
            Whose gradients have gone out since this was last asked.
        """
        self._send(list(self._present))
        sent, self._sent = list(self._sent), {}
        return sent

    def _send(self, tensors: Iterable[ChunkTensor]) -> None:
        by_chunk: dict[Chunk, dict[ChunkTensor, torch.Tensor]] = {}
        for tensor in tensors:
            by_chunk.setdefault(tensor.chunk, {})[tensor] = self._present.pop(tensor)
            self._sent[tensor] = None
        if by_chunk:
            self._settle()
        with self._device.bookkeeping():
            for chunk, gradients in by_chunk.items():
                self._leaving.append((chunk, gradients))
                chunk.deliver_all(gradients)

    def _settle(self) -> None:
        """What has left is there: its memory goes."""
        while self._leaving:
            chunk, _ = self._leaving[-1]
            with self._device.bookkeeping():
                chunk.settle_arrivals()
            del self._leaving[-1]

    def close(self) -> None:
        """No more will come; what was not sent is dropped."""
        self._present.clear()
        self._settle()
