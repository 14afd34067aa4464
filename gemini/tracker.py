"""Follows storages: how many bytes computation holds at any instant, in real or fake tensors.

The simulated device uses it to make activations and temporaries count against its capacity; the dry run uses the same
code on fake tensors to predict them.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.work import Work, tensors_in, work_of


class StorageTracker(TorchDispatchMode):
    """A dispatch mode that counts each storage from the operator that makes it to the death of its last tensor.

    Args:
        admit: called with the bytes of a new storage *before* they are counted; may raise to refuse them.
        guard_reads: raise when an operator is given a tensor whose storage has been given back. On a CPU that read
            would end the process, on an accelerator return garbage.

    Attributes:
        live_bytes: counted now.
        peak_bytes: highest since :meth:`reset_peak`.
        refused_bytes: what ``live_bytes`` would have been had no request since then been refused; 0 if none was.
        on_work: told what each operator has asked for; None while nobody wants to know.
    """

    def __init__(self, admit: Callable[[int], None], guard_reads: bool = False) -> None:
        super().__init__()
        self._admit = admit
        self._guard_reads = guard_reads
        self._storages: dict[int, Any] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.refused_bytes = 0
        self.on_work: Callable[[Work], None] | None = None
        self._nested = threading.local()  # how deep; dispatch modes are per thread, too

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this thread's operators are followed, each once, however deep it is nested."""
        depth = getattr(self._nested, "depth", 0)
        self._nested.depth = depth + 1
        try:
            with contextlib.nullcontext() if depth else self:
                yield
        finally:
            self._nested.depth = depth

    def exempt(self, tensor: torch.Tensor) -> None:
        """Never counts this tensor's storage: it is model data and counted by its owner."""
        self._remember(tensor.untyped_storage(), 0)

    def adopt(self, tensor: torch.Tensor) -> None:
        """Counts an exempt storage from now on: its owner has given it up, but others may still hold it."""
        storage = tensor.untyped_storage()
        self._storages.pop(id(storage), None)
        self._remember(storage, storage.nbytes())

    def reset_peak(self) -> None:
        """Starts a new window for ``peak_bytes``."""
        self.peak_bytes = self.live_bytes
        self.refused_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, then counts storages that are new in its outputs."""
        if self._guard_reads:
            _refuse_released(func, (*args, *(kwargs or {}).values()))
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._note(tensor)
        if self.on_work is not None:
            self.on_work(work_of(func, args, kwargs or {}, result))
        return result

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is counted, or exempt: it is on the device."""
        return id(tensor.untyped_storage()) in self._storages

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            self._ask(storage.nbytes())
            self._remember(storage, storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _ask(self, num_bytes: int) -> None:
        try:
            self._admit(num_bytes)
        except torch.OutOfMemoryError:
            self.refused_bytes = max(self.refused_bytes, self.live_bytes + num_bytes)
            raise

    def _remember(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        self_reference = weakref.ref(self)

        def forget(_: Any) -> None:
            try:
                tracker = self_reference()
                if tracker is not None and tracker._storages.pop(key, None) is not None:
                    tracker.live_bytes -= num_bytes
            except KeyboardInterrupt:  # a Ctrl-C that fell into this callback would be lost
                _thread.interrupt_main()

        # PyTorch keeps one Python object per storage as long as the storage lives, so its death is the storage's.
        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes


def _refuse_released(func: Any, args: Any) -> None:
    for tensor in tensors_in(args):
        if tensor.numel() and tensor.layout is torch.strided and tensor.untyped_storage().nbytes() == 0:
            if tensor.device.type == "meta":
                continue
            raise RuntimeError(
                f"{func} reads a tensor of shape {tuple(tensor.shape)} whose memory was given back: a view of a "
                "released parameter was used outside the module that read it"
            )
