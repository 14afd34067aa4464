"""Several forwards through a model, layer by layer: what is fetched for one is there for all.

The counterpart of :mod:`zero.layerwise` for passes without gradients. Each forward runs in a thread of its own, one at a
time; it stops where the first block begins and where each block ends, until the others have come there. What the first
of them fetches on the way is held until the last has passed. To the manager it is one pass.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemini.manager import Scope
from gemini.tensor import ChunkTensor
from zero.errors import UserError
from zero.gradient import settle_gradients
from zero.turns import Turns
from zero.window_hooks import ForwardState

if TYPE_CHECKING:
    from zero.engine import Engine

_HERE = threading.local()
Call = Callable[[], torch.Tensor]


class _Forward:
    """One of several forwards on its way."""

    def __init__(self, sweep: Sweep, call: Call) -> None:
        self._sweep = sweep
        self._call = call
        self._state = ForwardState()
        self._inside = self._began = False
        self.result: torch.Tensor | None = None
        self.turns = Turns(self._run, self._swap, self._swap)

    def _swap(self) -> None:
        self._state = self._sweep.hooks.swap_forward(self._state)

    def _run(self) -> None:
        failed = True
        self._sweep.hooks.open_forward()
        try:
            _HERE.forward = self
            self.result = self._call()
            failed = False
        finally:
            self._sweep.hooks.close_forward(failed)

    def through(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Runs a module whose parameters are fetched once for all; after a block the others come to the same place."""
        is_block = module in self._sweep.blocks
        if self._inside:
            return call()
        if is_block and not self._began:
            self._began = True
            self.turns.stop()
        self._sweep.hold(module)
        self._inside = True
        try:
            output = call()
        finally:
            self._inside = False
        if is_block:
            self.turns.stop()
        return output


@functools.cache
def _with_borders(kind: Any) -> Any:
    """A class of modules whose calls go through :meth:`_Forward.through`."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here: _Forward | None = getattr(_HERE, "forward", None)
        call = functools.partial(kind.__call__, self, *args, **kwargs)
        return call() if here is None else here.through(self, call)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__, "__doc__": kind.__doc__})


class Sweep:
    """Runs forwards through the model of an engine together.

    Args:
        engine: whose model it is.

    Attributes:
        hooks: of the engine.
        blocks: of the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.hooks = engine._hooks
        self.blocks = {unit.module: None for unit in engine._units if unit.is_block}
        self._manager = engine.manager
        self._tensors = self._fetched_with(engine)
        self._scopes: list[Scope] = []
        self._held: set[nn.Module] = set()
        self._forwards: list[_Forward] = []
        self._running: _Forward | None = None

    def _fetched_with(self, engine: Engine) -> dict[nn.Module, list[ChunkTensor]]:
        """Parameters of each block, and of each other module that has some of its own, tied ones among them."""
        inside = {module for block in self.blocks for module in block.modules()}
        tensors: dict[nn.Module, list[ChunkTensor]] = {}
        for module in engine.module.modules():
            if module in self.blocks:
                parameters = list(module.parameters())
            elif module in inside or module is engine.module:
                continue
            else:
                parameters = [p for _, p in module._parameters.items() if p is not None]
            managed = [engine._tensors[id(p)] for p in parameters if id(p) in engine._tensors]
            if managed or module in self.blocks:
                tensors[module] = managed
        return tensors

    def run(self, calls: Sequence[Call], batch_shape: tuple[int, ...]) -> list[torch.Tensor]:
        """What each of the calls gives, which run the model once each.

        Args:
            calls: run in threads of their own.
            batch_shape: of their largest input.

        Raises:
            UserError: the model's blocks cannot be stopped at.
            BaseException: what a call raised; none of them counts then.
        """
        self._engine._require_placed()
        self._engine._doing("forward")
        failure: BaseException | None = None
        self._begin(batch_shape)
        try:
            with self._borders():
                self._forwards = [_Forward(self, call) for call in calls]
                self._go()
            return [forward.result for forward in self._forwards if forward.result is not None]
        except BaseException as error:
            failure = error
            raise
        finally:
            was_interrupted = self._end_threads()
            self._end(failure)
            failure = None  # whose traceback refers to this frame
            if was_interrupted:
                raise KeyboardInterrupt

    def _begin(self, batch_shape: tuple[int, ...]) -> None:
        hooks = self.hooks
        hooks.settle_interrupted_forward()
        settle_gradients(self._engine._tensors.values())
        hooks._planner.pass_begins(False, batch_shape, hooks.graph_pending)
        hooks._in_window = True

    def _go(self) -> None:
        waiting = list(self._forwards)
        while waiting:
            for forward in list(waiting):
                self._running = forward
                if forward.turns.take():
                    waiting.remove(forward)
            self._let_go()

    def _end_threads(self) -> bool:
        """All of them, the one that may be in the middle of a turn first; whether somebody pressed Ctrl-C meanwhile."""
        was_interrupted = False
        for forward in sorted(self._forwards, key=lambda forward: forward is not self._running):
            try:
                forward.turns.end()
            except KeyboardInterrupt:
                was_interrupted = True
        self._forwards, self._running = [], None
        return was_interrupted

    def _end(self, failure: BaseException | None) -> None:
        self._let_go()
        self.hooks._in_window = False
        if failure is None:
            self.hooks._planner.forward_ends()
            return
        if isinstance(failure, torch.OutOfMemoryError):
            self.hooks._planner.ran_out()
        self._manager.abort_pass()

    # -- what is held for all ----------------------------------------------------------------------------------------

    def hold(self, module: nn.Module) -> None:
        """Fetches what a module computes with, until the last forward has passed it."""
        if module in self._held:
            return
        self._held.add(module)
        forwards_scopes = self._manager.swap_scopes(self._scopes)
        try:
            if not self._scopes:
                self._manager.enter("sweep")
            for tensor in self._tensors[module]:
                self._manager.read(tensor)
        finally:
            self._scopes = self._manager.swap_scopes(forwards_scopes)

    def _let_go(self) -> None:
        self._held.clear()
        if self._scopes:
            others = self._manager.swap_scopes(self._scopes)
            try:
                self._manager.leave()
            finally:
                self._scopes = self._manager.swap_scopes(others)

    @contextlib.contextmanager
    def _borders(self) -> Iterator[None]:
        kinds: list[tuple[nn.Module, Any]] = [(module, type(module)) for module in self._tensors]
        try:
            for module, kind in kinds:
                try:
                    module.__class__ = _with_borders(kind)
                except TypeError as error:
                    raise UserError(f"modules of class {kind.__name__} cannot be stopped at ({error})") from error
            yield
        finally:
            for module, kind in kinds:
                module.__class__ = kind
