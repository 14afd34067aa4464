"""What forward saves for backward, waiting on the host: with activation checkpointing, each block's input.

A long sequence then takes no more device memory with 100 blocks than with 10. What is saved last is wanted first, so one
tensor comes back while the block after it runs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from gemini.device import Event
from gemini.store import Kind, Store, Tier
from gemini.transfer import Transfer


@dataclass
class _Slot:
    """A host buffer that is used again and again."""

    buffer: torch.Tensor
    free_after: Event | None = None
    """Recorded by the stream that has carried its contents last, out or back: until then they are written or read."""
    num_pass: int = 0
    """In which it was used last."""


class SavedOnHost:
    """A tensor on the host, and its way back. The buffer is free for others when this object goes.

    Args:
        owner: whose buffers these are.
        saved: contiguous, on the device.
        before: what was saved before it, and is wanted next.
    """

    def __init__(self, owner: Activations, saved: torch.Tensor, before: SavedOnHost | None) -> None:
        self._owner = owner
        self._shape = saved.shape
        self._dtype = saved.dtype
        self._before = None if before is None else weakref.ref(before)
        self._slot = owner.slot(saved)
        # Recorded by the stream that carries it out, and waited for at the next one, so that the program does not run
        # ahead of the copies: until then the allocator keeps the tensor's memory.
        self._gone = owner.transfer.activation_out(self._slot.buffer, saved.detach().view(-1))
        self._slot.free_after = self._gone  # nobody may ever ask for it back
        owner.transfer.device.work.saved_bytes += saved.nbytes
        self._back: tuple[torch.Tensor, Event] | None = None

    def wait_gone(self) -> None:
        """Returns once it is on the host."""
        self._gone.synchronize()

    def fetch(self) -> None:
        """Starts on its way back."""
        if self._back is not None:
            return
        self.wait_gone()
        device = self._owner.transfer.device
        target = torch.empty(self._shape.numel(), dtype=self._dtype, device=device.torch_device)
        event = self._owner.transfer.activation_in(target, self._slot.buffer)
        self._slot.free_after = event
        self._back = target, event

    def take(self) -> torch.Tensor:
        """The tensor on the device; the one that was saved before it follows. May be called again."""
        self.fetch()
        if self._back is None:
            raise RuntimeError("a tensor that was fetched is not there")
        (tensor, event), self._back = self._back, None
        self._owner.transfer.device.wait(event)
        self._owner.transfer.device.work.brought_bytes += tensor.nbytes
        before = self._before() if self._before is not None else None
        self._before = None
        if before is not None:
            before.fetch()
        return tensor.view(self._shape)

    def __del__(self) -> None:
        """Nobody will ask for it again."""
        slot = self.__dict__.get("_slot")
        if slot is not None:
            self._owner.give_back(slot)


class Activations:
    """Takes what forward saves.

    Args:
        store: gives host memory, which is kept for the next pass.
        transfer: carries it.
        least_bytes: smaller tensors stay on the device.

    Attributes:
        before: what was saved last, and comes back when what is saved next has been taken; micro-batches that take turns
            have one each.
    """

    def __init__(self, store: Store, transfer: Transfer, least_bytes: int) -> None:
        self._store = store
        self.transfer = transfer
        self._least_bytes = least_bytes
        self._free: dict[tuple[int, torch.dtype], list[_Slot]] = {}
        self._last: weakref.ref[SavedOnHost] | None = None
        self.before: weakref.ref[SavedOnHost] | None = None
        self._num_pass = 0

    def begin_pass(self) -> None:
        """What is saved from now on is wanted by another backward; buffers that the last pass had no use for go."""
        self._last = self.before = None
        self._drop(self._num_pass)
        self._num_pass += 1

    def put(self, saved: torch.Tensor) -> SavedOnHost | None:
        """Sends a tensor to the host; None if it is to stay where it is."""
        if saved.nbytes < self._least_bytes or not saved.is_floating_point() or not saved.is_contiguous():
            return None
        last = self._last() if self._last is not None else None
        if last is not None:
            last.wait_gone()
        on_host = SavedOnHost(self, saved, self.before() if self.before is not None else None)
        self._last = self.before = weakref.ref(on_host)
        return on_host

    def slot(self, saved: torch.Tensor) -> _Slot:
        """A host buffer for a tensor.

        Raises:
            gemini.arena.HostMemoryError: the host has no room.
        """
        known = self._free.get((saved.numel(), saved.dtype))
        if not known:
            buffer = self._store.allocate(Tier.HOST, Kind.ACTIVATIONS, saved.numel(), saved.dtype)
            return _Slot(buffer, None, self._num_pass)
        slot = known.pop()
        slot.num_pass = self._num_pass
        if slot.free_after is not None:
            slot.free_after.synchronize()
            slot.free_after = None
        return slot

    def give_back(self, slot: _Slot) -> None:
        """A buffer that may be filled again."""
        self._free.setdefault((slot.buffer.numel(), slot.buffer.dtype), []).append(slot)

    def clear(self) -> None:
        """Gives all buffers back that nobody uses."""
        self._drop(None)

    def _drop(self, kept_pass: int | None) -> None:
        for key, slots in list(self._free.items()):
            for slot in slots:
                if slot.num_pass == kept_pass:
                    continue
                if slot.free_after is not None:
                    slot.free_after.synchronize()
                self._store.free(Tier.HOST, Kind.ACTIVATIONS, slot.buffer)
            self._free[key] = [slot for slot in slots if slot.num_pass == kept_pass]
