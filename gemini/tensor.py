"""One parameter in a chunk: its state, who holds it, and what it points at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gemini.layout import Entry
from gemini.state import TensorState

if TYPE_CHECKING:
    from gemini.chunk import Chunk


class ChunkTensor:
    """One parameter in a chunk.

    Attributes:
        parameter: the user's tensor; its ``data`` is a view of the gathered buffer, or a NaN placeholder of its shape.
        state: see :class:`TensorState`.
        num_holders: how many running modules or backward scopes read it now; positive only in COMPUTE.
        has_gradient: a gradient has been sent to its owner since the last ``zero_grad``.
        gradient_norm: 2-norm of that gradient as the device had it, a scalar there; None where it is not known, or the
            gradient has become something else since.
        is_shown: between passes: the user reads it, where it lies or as a copy (:mod:`gemini.idle`).
    """

    def __init__(self, chunk: Chunk, position: int, parameter: torch.Tensor) -> None:
        self.chunk = chunk
        self.position = position
        self.entry: Entry = chunk.layout.entries[position]
        self.parameter = parameter
        self.state = TensorState.FREE
        self.num_holders = 0
        self.has_gradient = False
        self.gradient_norm: torch.Tensor | None = None
        self.is_shown = False
        self._seen_version = self.version

    @property
    def name(self) -> str:
        """The parameter's first name in the model."""
        return self.entry.spec.name

    @property
    def bound(self) -> torch.Tensor:
        """What the parameter points at: taken, and set, past what its class does when the user's code does the same."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter.data

    @bound.setter
    def bound(self, data: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self.parameter.data = data

    @property
    def storage(self) -> torch.UntypedStorage:
        """Of what the parameter points at. No operator runs, so nothing is counted."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter.untyped_storage()

    @property
    def address(self) -> int:
        """Of the first element that the parameter points at; likewise."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter.data_ptr()

    @property
    def version(self) -> int:
        """How often the user's code has written the parameter in place."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.parameter._version

    @property
    def written(self) -> bool:
        """Whether it has done so since :meth:`note_written`."""
        return self.version != self._seen_version

    def note_written(self) -> None:
        """What was written up to now has been taken over."""
        self._seen_version = self.version

    def __repr__(self) -> str:
        return f"ChunkTensor({self.name}, {self.state.name}, holders={self.num_holders})"
