"""The hooks of several forwards that take turns: each micro-batch of a window has a state of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from gemini.manager import Scope
from gemini.sums import GradientSums
from zero.gradient import settle_gradients
from zero.hooks import ModelHooks


@dataclass
class ForwardState:
    """Where the forward of one micro-batch of several stands."""

    running_units: list[str] = field(default_factory=list)
    depth: int = 0
    pass_context: Any = None
    saving: Any = None
    scopes: list[Scope] = field(default_factory=list)
    saved: Any = None
    """Of :class:`gemini.activations.Activations`."""


class WindowHooks(ModelHooks):
    """Hooks of a model whose micro-batches may also go through it layer by layer (:mod:`zero.layerwise`)."""

    def begin_window(self, batch_shape: tuple[int, ...], with_labels: bool, sums: GradientSums) -> None:
        """Several forwards, each in a thread of its own, and their backward are about to run as one pass."""
        self.settle_interrupted_forward()
        settle_gradients(self._tensors.values())
        self._callback_queued = False
        self._planner.pass_begins(True, batch_shape, self.graph_pending)
        self._manager.sums, self._in_window = sums, True
        if self._head is not None:
            self._head.active = with_labels
        if self._activations is not None:
            self._activations.begin_pass()

    def open_forward(self) -> None:
        """In this thread a micro-batch's forward begins, the loss included."""
        self._pass_context = self._manager.device.activity()
        self._pass_context.__enter__()
        self._saving = saved_tensors_hooks(self._pack, self._unpack)
        self._saving.__enter__()
        self._depth = 1
        self._manager.enter("micro-batch")

    def close_forward(self, failed: bool) -> None:
        """It has ended."""
        self._leave_contexts()
        self._depth = 0
        self._running_units.clear()
        if failed:
            self._manager.drop_scopes()
        else:
            self._manager.leave()

    def swap_forward(self, state: ForwardState) -> ForwardState:
        """Another micro-batch's forward goes on; returns where the one so far stands."""
        before = ForwardState(self._running_units, self._depth, self._pass_context, self._saving)
        self._running_units, self._depth = state.running_units, state.depth
        self._pass_context, self._saving = state.pass_context, state.saving
        before.scopes = self._manager.swap_scopes(state.scopes)
        if self._activations is not None:
            self._activations.before, before.saved = state.saved, self._activations.before
        return before

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled: nothing that watches torch functions may be about inside of them."""
        return self._compiled is not None

    def arguments(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with."""
        return batch if self._compiled is None else self._compiled.without_cache(self._root, batch)

    @property
    def saves_here(self) -> bool:
        """Whether what autograd saves now comes to us first: not inside a checkpoint, say."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return torch.is_grad_enabled() and top is not None and top[0] == self._pack

    def end_window(self, error: BaseException | None) -> None:
        """All of them are over, or will not go on because of an error."""
        sums, self._manager.sums = self._manager.sums, None
        self._in_window = False
        if self._head is not None:
            self._head.active = False
        if sums is not None:
            sums.close()
        if error is None:
            self._planner.backward_ends()
            return
        if isinstance(error, torch.OutOfMemoryError):
            self._planner.ran_out()
        self._manager.abort_pass()
