"""Host memory for chunks, mapped at its exact number of bytes and pinned in place.

The framework's pinned allocator rounds every block up to a power of two (1.67 to 1.9 times the bytes asked for were
measured by others). Here each buffer is an anonymous mapping, registered with the device where the device can; what is
really pinned is what :attr:`HostArena.pinned_bytes` says.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from gemini.device import Device
from gemini.heap import HUGE_PAGE_BYTES
from gemini.units import format_bytes


class HostMemoryError(MemoryError):
    """The host budget cannot hold one more buffer; says how much was asked for and how much is in use."""


class HostArena:
    """Gives out 1-D host tensors and counts their bytes.

    Args:
        device: whose transfers the memory is pinned for.
        pin: register the memory with the device.
        budget_bytes: refuse to go beyond; None for no limit of ours.
    """

    def __init__(self, device: Device, pin: bool = True, budget_bytes: int | None = None) -> None:
        self._device = device
        self._pin = pin
        self.budget_bytes = budget_bytes
        self.host_bytes = 0
        self.pinned_bytes = 0
        self._pinned: dict[int, int] = {}

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor of ``numel`` elements, zero-filled by the operating system on first touch.

        Raises:
            HostMemoryError: if the budget or the machine has no room.
        """
        num_bytes = numel * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(0, dtype=dtype)
        if self.budget_bytes is not None and self.host_bytes + num_bytes > self.budget_bytes:
            raise HostMemoryError(
                f"host memory: {format_bytes(num_bytes)} more were needed, {format_bytes(self.host_bytes)} of the "
                f"budget of {format_bytes(self.budget_bytes)} are in use; raise memory.host"
            )
        tensor = self._map(num_bytes, numel, dtype)
        self.host_bytes += num_bytes
        if self._pin and self._device.register_host_memory(tensor.data_ptr(), num_bytes):
            self.pinned_bytes += num_bytes
            self._pinned[tensor.data_ptr()] = num_bytes
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Takes a tensor from :meth:`allocate` back; its memory goes when the last reference does."""
        self.host_bytes -= tensor.nbytes
        pinned_bytes = self._pinned.pop(tensor.data_ptr(), None) if tensor.numel() else None
        if pinned_bytes is not None:
            self._device.unregister_host_memory(tensor.data_ptr())
            self.pinned_bytes -= pinned_bytes

    @staticmethod
    def _map(num_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        try:
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise HostMemoryError(
                f"the operating system gave no {format_bytes(num_bytes)} of host memory: {error}"
            ) from error
        if num_bytes >= HUGE_PAGE_BYTES:
            # Fewer page faults and TLB misses in the optimizer's pass; not every kernel has it.
            with contextlib.suppress(OSError, AttributeError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        # The tensor keeps the mapping alive; dropping the tensor unmaps it.
        return torch.frombuffer(mapping, dtype=dtype, count=numel)
