"""Parameters that the user's own code computes with directly: weight norms, averages, penalties, clamping.

Inside a module a parameter is read as an attribute, which :mod:`zero.hooks` watches. ``model.parameters()`` hands out the
objects themselves, so each operator that takes one comes here first (:class:`zero.gradient.ManagedParameter`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from gemini.manager import Manager, Phase
from gemini.tensor import ChunkTensor


@dataclass(frozen=True)
class SavedNote:
    """What autograd keeps in place of a parameter or a view of it."""

    tensor: ChunkTensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Of the view's first element; from where is for the kind of note to say."""
    version: int
    """How often the user had written the parameter in place."""


@dataclass(frozen=True)
class SavedValues(SavedNote):
    """Of a parameter that the user's own code computed with; ``offset`` is in elements from the parameter's first."""

    step: int
    """Of the chunk: how often it had been updated."""

    def values(self, manager: Manager) -> torch.Tensor:
        """A copy of its own: nobody tells us when the operator that asks for it is over.

        Raises:
            RuntimeError: the parameter has changed since.
        """
        tensor = self.tensor
        if (self.version, self.step) != (tensor.parameter._version, tensor.chunk.step):
            raise written_between(tensor)
        return manager.copy(tensor).as_strided(self.shape, self.stride, self.offset)


class DirectUse:
    """Runs operators of the user's own code on parameters.

    Args:
        manager: shows, fetches and holds.
        inside_module: whether a module of the model runs now.
        read: as for an attribute that is read.
        is_held: whether the module that runs, in a forward, holds the tensor already.
        enter_backward: called when a backward pass asks for what was saved here.
        settle: called first: ends a forward whose graph is gone.
        make_way: called before so many bytes are used between forward and backward.
    """

    def __init__(
        self,
        manager: Manager,
        inside_module: Callable[[], bool],
        read: Callable[[torch.Tensor], None],
        is_held: Callable[[ChunkTensor], bool],
        enter_backward: Callable[[], None],
        settle: Callable[[], None],
        make_way: Callable[[int], None],
    ) -> None:
        self._manager = manager
        self._inside_module = inside_module
        self._read = read
        self._is_held = is_held
        self._enter_backward = enter_backward
        self._settle = settle
        self._make_way = make_way

    def run(self, tensors: list[ChunkTensor], operator: Callable[[], Any]) -> Any:
        """Runs an operator with the tensors' values in place.

        Raises:
            torch.OutOfMemoryError: the device has no room for all of them at once.
        """
        if all(map(self._is_held, tensors)):  # the running module has read it as an attribute a moment ago
            return operator()
        self._settle()
        if self._inside_module() or self._manager.phase is Phase.BACKWARD:
            for tensor in tensors:
                self._read(tensor.parameter)
            return operator()
        self._show(tensors)
        with self._saving(tensors):
            return operator()

    def _show(self, tensors: list[ChunkTensor]) -> None:
        if self._manager.phase is Phase.FORWARD and not all(tensor.is_shown for tensor in tensors):
            self._manager.settle_idle_reads()  # backward is near: copies must not pile up beside the graph
            self._make_way(sum(t.entry.spec.numel * t.entry.spec.dtype.itemsize for t in tensors))
        for tensor in tensors:
            self._read(tensor.parameter)
        if not all(tensor.is_shown for tensor in tensors) and not self._manager.all_shown:
            raise torch.OutOfMemoryError(
                f"the device has no room for these {len(tensors)} parameters at once: {', '.join(t.name for t in tensors)}"
            )

    def _saving(self, tensors: list[ChunkTensor]) -> contextlib.AbstractContextManager[Any]:
        if not torch.is_grad_enabled() or self._manager.all_shown:
            return contextlib.nullcontext()
        shown = [(tensor, tensor.bound) for tensor in tensors]  # alive for as long as addresses are compared
        return saved_tensors_hooks(lambda saved: _pack(saved, shown), self._unpack)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, SavedValues):
            return packed  # type: ignore[no-any-return]
        if inside_backward():
            self._enter_backward()
        return packed.values(self._manager)


def written_between(tensor: ChunkTensor) -> RuntimeError:
    """The error for a parameter whose values backward needs, and which has changed since forward."""
    return RuntimeError(
        f"parameter {tensor.name} has been modified by an inplace operation between forward and backward; a managed "
        "parameter keeps what is written before a forward or after a backward, so write it there"
    )


def inside_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def _pack(saved: torch.Tensor, shown: list[tuple[ChunkTensor, torch.Tensor]]) -> Any:
    """A note in place of a view of a parameter, as far as the parameter was shown when the operator began."""
    address = saved.data_ptr()
    for tensor, values in shown:
        offset = (address - values.data_ptr()) // saved.dtype.itemsize
        if saved.dtype == values.dtype and 0 <= offset < values.numel():
            version, step = tensor.parameter._version, tensor.chunk.step
            return SavedValues(tensor, saved.shape, saved.stride(), offset, version, step)
    return saved.detach() if saved.grad_fn is not None else saved
