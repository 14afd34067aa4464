"""A window of micro-batches that goes through the model layer by layer: each unit is fetched once for all of them.

Forward: every micro-batch's forward runs in a thread of its own, one at a time (:mod:`zero.turns`). It stops where the
first block begins and where each block ends, until all others have come there. Then, micro-batch by micro-batch, what
comes after the last block, the loss, and the backward of that. Then the blocks from last to first, each for all
micro-batches, on graphs that were cut at the borders (:mod:`zero.cutting`). For manager, recorder and plan it is one pass.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gemini.manager import Manager
from gemini.sums import GradientSums
from zero.cutting import CutGraph, Cutting, run_backward, run_block
from zero.errors import UserError
from zero.turns import Turns
from zero.units import Unit
from zero.window_hooks import ForwardState, WindowHooks

_HERE = threading.local()


class MicroBatch:
    """One micro-batch on its way through the model.

    Args:
        hooks: of the model.
        forward: runs the model and gives the loss; called in a thread.
    """

    def __init__(self, hooks: WindowHooks, forward: Callable[[], torch.Tensor]) -> None:
        self._hooks = hooks
        self._forward = forward
        self._state = ForwardState()
        self._inside = self._began = False
        self.graph = CutGraph()
        self._cutting = Cutting(self.graph)
        self.loss: torch.Tensor | None = None
        self.turns = Turns(self._run, self._swap, self._swap)

    def _swap(self) -> None:
        self._state = self._hooks.swap_forward(self._state)

    def _run(self) -> None:
        failed = True
        self._hooks.open_forward()
        try:
            _HERE.micro_batch = self
            with self._cutting:
                self.loss = self._forward()
            failed = False
        finally:
            self._hooks.close_forward(failed)

    def through(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a block, and lets the others come to the same place before and after."""
        if self._inside or not self._hooks.saves_here:
            return call(*args, **kwargs)
        if not self._began:
            self._began = True
            self.turns.stop()
        self._inside = True
        try:
            with self._cutting.paused() if self._hooks.is_compiled else contextlib.nullcontext():
                output = run_block(self.graph, call, args, kwargs)
        finally:
            self._inside = False
        self.turns.stop()
        return output


@functools.cache
def _with_borders(kind: Any) -> Any:
    """A class of blocks whose calls go through :meth:`MicroBatch.through`.

    Its ``__call__`` stands outside of everything: module hooks, and in some models activation checkpointing.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here: MicroBatch | None = getattr(_HERE, "micro_batch", None)
        call = functools.partial(kind.__call__, self)
        return call(*args, **kwargs) if here is None else here.through(call, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__, "__doc__": kind.__doc__})


@contextlib.contextmanager
def _borders(blocks: Sequence[nn.Module]) -> Iterator[None]:
    kinds: list[tuple[nn.Module, Any]] = [(block, type(block)) for block in blocks]
    try:
        for block, kind in kinds:
            try:
                block.__class__ = _with_borders(kind)
            except TypeError as error:
                raise UserError(
                    f'train.accumulation_order = "layer": blocks of class {kind.__name__} cannot be stopped at ({error}); '
                    'use "batch"'
                ) from error
        yield
    finally:
        for block, kind in kinds:
            block.__class__ = kind


class Window:
    """Forward and backward of several micro-batches, unit by unit.

    Args:
        units: of the model.
        hooks: on the model.
        manager: of its chunks.
        forwards: of each micro-batch: runs the model and gives the weighted loss.
    """

    def __init__(
        self, units: list[Unit], hooks: WindowHooks, manager: Manager, forwards: Sequence[Callable[[], torch.Tensor]]
    ) -> None:
        self._blocks = [unit.module for unit in units if unit.is_block]
        self._hooks = hooks
        self._manager = manager
        self._forwards = forwards
        self._micro: list[MicroBatch] = []
        self._running: MicroBatch | None = None

    def run(self, batch_shape: tuple[int, ...], with_labels: bool, sums: GradientSums) -> None:
        """Leaves gradients with their owners.

        Args:
            batch_shape: of the window's largest tensors.
            with_labels: the model computes a loss.
            sums: of the gradients.
        """
        failure: BaseException | None = None
        self._hooks.begin_window(batch_shape, with_labels, sums)
        try:
            with _borders(self._blocks):
                for forward in self._forwards:
                    self._micro.append(MicroBatch(self._hooks, forward))
                self._forward()
                self._backward()
        except BaseException as error:
            failure = error
            raise
        finally:
            was_interrupted = self._end_threads()
            self._hooks.end_window(failure)
            failure = None  # whose traceback refers to this frame
            if was_interrupted:
                raise KeyboardInterrupt

    def _end_threads(self) -> bool:
        """All of them, the one that may be in the middle of a turn first; whether somebody pressed Ctrl-C meanwhile."""
        was_interrupted = False
        for micro in sorted(self._micro, key=lambda micro: micro is not self._running):
            try:
                micro.turns.end()
            except KeyboardInterrupt:
                was_interrupted = True
        return was_interrupted

    def _forward(self) -> None:
        waiting = list(self._micro)
        while waiting:
            for micro in list(waiting):
                self._running = micro
                if micro.turns.take():
                    waiting.remove(micro)
                    self._tail(micro, last=not waiting)

    def _tail(self, micro: MicroBatch, last: bool) -> None:
        """Backward of what comes after the last block, while it is there."""
        loss, micro.loss = micro.loss, None
        with self._manager.device.activity():
            run_backward(loss)
        self._manager.end_part(last)

    def _backward(self) -> None:
        for part in reversed(range(max(micro.graph.num_parts for micro in self._micro))):
            for micro in self._micro:
                with self._manager.device.activity():
                    micro.graph.backward(part)
                self._manager.end_part(last=micro is self._micro[-1])
