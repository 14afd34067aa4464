"""When a module runs, a parameter is read, a backward starts: tell the manager.

What stands where:

- ``module._parameters`` is watched, so a parameter read *anywhere* (``F.linear(x, self.embed.weight)``) is fetched and
  held for the module that runs at that moment;
- forward pre and post hooks on every module keep the stack of running modules; what a module returns of its
  parameters stays held by its caller;
- saved-tensor hooks replace what autograd saves of a released-able parameter by a note, and fetch when it is unpacked;
- ``register_multi_grad_hook`` on a unit's outputs says its backward begins, hooks on its inputs that it is over;
- ``register_post_accumulate_grad_hook`` hands each finished gradient over.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils import _pytree as pytree

from gemini.activations import Activations, SavedOnHost
from gemini.manager import Manager, Phase
from gemini.tensor import ChunkTensor
from zero.compiling import CompiledBlocks
from zero.direct import DirectUse, SavedNote, inside_backward, written_between
from zero.errors import UserError
from zero.gradient import settle_gradient, settle_gradients, take_autograd_gradient, watch_use
from zero.lazy_logits import LazyHead
from zero.one_at_a_time import OneAtATime
from zero.passes import PassPlanner
from zero.precision import norm_on_arrival
from zero.units import Unit

_CALL = nn.Module._call_impl.__code__


class WatchedParameters(dict[str, Any]):
    """A module's ``_parameters`` that says when one of them is read by name.

    Walks over ``items()`` and ``values()`` (``named_parameters``, ``state_dict``) are not reads.
    """

    def __init__(self, parameters: dict[str, Any], on_read: Callable[[torch.Tensor], None]) -> None:
        super().__init__(parameters)
        self._on_read = on_read

    def __getitem__(self, name: str) -> Any:
        """The parameter, on the device and held."""
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._on_read(parameter)
        return parameter

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are ordinary dictionaries."""
        return dict, (dict(self.items()),)


class SavedView(SavedNote):
    """Of a parameter that a module computed with; ``offset`` is in elements from the chunk's first."""


class PendingGraph:
    """A training forward whose backward has not run; lives as long as the graph, whose hooks refer to it."""

    def __init__(self) -> None:
        self.entered = False
        self.done = False


class ModelHooks:
    """Installs and removes every hook on a model.

    Args:
        root: the user's model.
        units: from :func:`zero.units.find_units`.
        manager: told of everything.
        tensors: chunk tensors by ``id`` of their parameter.
        planner: told when a pass begins, before anything runs, when a backward is over, and when memory ran out.
    """

    def __init__(
        self,
        root: nn.Module,
        units: list[Unit],
        manager: Manager,
        tensors: dict[int, ChunkTensor],
        planner: PassPlanner,
        most_logits: int | None = None,
        activations: Activations | None = None,
        compiles: bool = False,
    ) -> None:
        self._root = root
        self._manager = manager
        self._tensors = tensors
        self._planner = planner
        self._unit_labels = {id(unit.module): unit.label for unit in units}
        self._names = {id(module): name or "model" for name, module in root.named_modules()}
        self._running_units: list[str] = []
        self._depth = 0
        self._pass_context: Any = None
        self._outer_error: BaseException | None = None
        self._handles: list[Any] = []
        self._callback_queued = False
        self._saving: Any = None
        self._graphs: list[weakref.ref[PendingGraph]] = []
        # Several forwards take turns, in a scope of their own that is depth 1 (zero.window_hooks).
        self._in_window = False
        self._turn = OneAtATime(root, waits=manager.only_infers)
        self._install()
        self._activations = activations
        # On the host a whole gradient in fp32 would be made anew for each norm.
        self._scratch: dict[torch.device, torch.Tensor] | None = {} if manager.device.is_host else None
        self._compiled = CompiledBlocks(units, tensors, self._on_read) if compiles else None
        self._head = None if most_logits is None else LazyHead(root, most_logits, self._head_backward_begins)

    # -- installing --------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        for module in self._root.modules():
            if module._parameters:
                module.__dict__["_parameters"] = WatchedParameters(module._parameters, self._on_read)
            self._handles += [
                module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            ]
        direct = DirectUse(
            self._manager,
            inside_module=lambda: self._depth > 0,
            read=self._on_read,
            is_held=self._manager.is_held,
            enter_backward=self._enter_backward,
            settle=self.settle_outside,
            make_way=self._planner.make_way,
        )
        for tensor in self._tensors.values():
            watch_use(tensor, direct.run)
            if tensor.chunk.layout.trainable:
                self._handles.append(tensor.parameter.register_post_accumulate_grad_hook(self._gradient_ready))

    def remove(self) -> None:
        """Leaves the model without any of our hooks; parameters stay where they are."""
        if self._compiled is not None:
            self._compiled.remove()
        if self._head is not None:
            self._head.remove()
        if self._activations is not None:
            self._activations.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._root.modules():
            if isinstance(module._parameters, WatchedParameters):
                module.__dict__["_parameters"] = dict(module._parameters.items())

    # -- reads -------------------------------------------------------------------------------------------------------

    def _on_read(self, parameter: torch.Tensor) -> None:
        tensor = self._tensors.get(id(parameter))
        if tensor is not None:
            self.settle_outside()
            with _ordinary_tensors():
                self._manager.read(tensor, self._running_units[-1] if self._running_units else None)

    # -- forward -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHooks:
        """A copy of the model carries the same hooks, which do nothing for modules that are not the model's."""
        return self

    def __reduce__(self) -> Any:
        """Raises UserError: a pickle would carry the engine along."""
        raise UserError(
            "a managed model cannot be pickled: save model.state_dict() or engine.save_pretrained(), or close() the "
            "engine first"
        )

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise UserError(
                "torch.compile cannot see when a managed model's parameters are fetched; use the model uncompiled"
            )
        if id(module) not in self._names:
            return None
        moved = None
        if self._begins_alone(module):
            self._turn.take()
        if module is self._root and self._depth > self._in_window and not inside_backward():
            self.settle_interrupted_forward()
        if self._depth == 0:
            moved = self._begin(args, kwargs)
            args, kwargs = moved
        self._depth += 1
        self._manager.enter(self._names[id(module)])
        label = self._unit_labels.get(id(module))
        if label is not None:
            self._running_units.append(label)
            if self._manager.phase is Phase.FORWARD:
                with _ordinary_tensors():
                    self._manager.begin_moment(label, "forward")
            self._watch_backward_end(label, args, kwargs)
        return moved

    def _begin(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The outermost module of a pass starts. A forward inside a backward is a recomputation, not a pass."""
        if inside_backward():
            self._enter_backward()
            return args, kwargs
        if self._manager.all_shown:
            raise UserError("the model cannot run inside engine.gathered_parameters(): leave it first")
        settle_gradients(self._tensors.values())  # copies of gradients that the user looked at would be in the way
        device = self._manager.device
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device.torch_device), (args, kwargs))
        training = torch.is_grad_enabled() and (
            any(t.chunk.layout.trainable for t in self._tensors.values())
            or any(t.requires_grad for t in _tensors((args, kwargs)))
        )
        self._callback_queued = False  # a backward pass that failed never told us of its end
        self._outer_error = sys.exc_info()[1]
        with _ordinary_tensors():
            tokens = kwargs.get("input_ids") if self._manager.only_infers else None  # a mask grows with what is cached
            shape = _largest_shape((args, kwargs) if tokens is None else tokens)
            self._planner.pass_begins(training, shape, self.graph_pending)
        self._pass_context = device.activity()
        self._pass_context.__enter__()
        if self._head is not None:
            self._head.active = kwargs.get("labels") is not None
        if self._compiled is not None:
            kwargs = self._compiled.without_cache(self._root, kwargs)
        if training and self._activations is not None:
            self._activations.begin_pass()
        self._saving = self._saved(training)
        self._saving.__enter__()
        return args, kwargs

    def _saved(self, training: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a pass: what autograd saves. Where no pass has a backward nothing is, whatever the caller's mode."""
        if training:
            return saved_tensors_hooks(self._pack, self._unpack)
        return torch.no_grad() if self._manager.only_infers else contextlib.nullcontext()

    def _begins_alone(self, module: nn.Module) -> bool:
        """Whether it is the whole model, in a pass that is neither one of several together nor a recomputation."""
        return module is self._root and not self._in_window and not inside_backward()

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        del args, kwargs
        refused = self._begins_alone(module) and not self._turn.is_ours
        if refused or self._depth == 0 or id(module) not in self._names:
            return  # the pass could not begin; torch calls us all the same
        returned = list(_tensors(output))
        with _ordinary_tensors():
            self._manager.leave(returned)
        self._depth -= 1
        label = self._unit_labels.get(id(module))
        if label is not None:
            self._running_units.pop()
            self._watch_backward_begin(label, returned)
        if self._depth == 0 and self._pass_context is not None:
            self._end(returned)

    def _end(self, returned: list[torch.Tensor]) -> None:
        """The outermost module has ended, well or by an exception."""
        self._leave_contexts()
        error = sys.exc_info()[1]
        if error is not None and error is not self._outer_error:
            self._running_units.clear()
            self._manager.abort_pass()
            if isinstance(error, torch.OutOfMemoryError):
                self._planner.ran_out()
            return
        with _ordinary_tensors():
            self._planner.forward_ends()
        if self._manager.training_pass:
            self._manager.device.expects_backward = True
            self._expect_backward([tensor for tensor in returned if tensor.requires_grad])

    def _leave_contexts(self) -> None:
        for context in (self._saving, self._pass_context):
            if context is not None:
                context.__exit__(None, None, None)
        self._saving = self._pass_context = None
        if self._head is not None and not self._in_window:
            self._head.active = False

    def settle_interrupted_forward(self) -> None:
        """Clears up after a forward that ended in what torch runs no hooks for (Ctrl-C); nothing if there was none."""
        if self._depth == 0 or inside_backward():
            return
        self._leave_contexts()
        self._depth = 0
        self._running_units.clear()
        self._manager.abort_pass()

    # -- graphs that wait for their backward -------------------------------------------------------------------------

    def _expect_backward(self, wanted: list[torch.Tensor]) -> None:
        if not wanted:
            return
        graph = PendingGraph()

        def begins(_: torch.Tensor) -> None:
            graph.entered = True
            self._enter_backward()

        register_multi_grad_hook(wanted, begins, mode="any")
        self._graphs.append(weakref.ref(graph))

    @property
    def graph_pending(self) -> bool:
        """Whether a forward's graph is alive and waits for its backward: what it saved must stay where it is."""
        graphs = [(reference, reference()) for reference in self._graphs]
        self._graphs = [reference for reference, graph in graphs if graph is not None and not graph.done]
        return bool(self._graphs)

    # -- what autograd saves -----------------------------------------------------------------------------------------

    def _pack(self, saved: torch.Tensor) -> Any:
        tensor = self._manager.owner(saved)
        if tensor is None or saved.dtype != tensor.chunk.layout.dtype:
            if self._activations is not None:
                on_host = self._activations.put(saved)
                if on_host is not None:
                    return on_host
            # Never the tensor itself: where a node saves its own output, that is a cycle which only backward breaks,
            # and a branch that gets no gradient would leak it every step.
            return saved.detach() if saved.grad_fn is not None else saved
        version = tensor.version
        return SavedView(tensor, saved.shape, saved.stride(), int(saved.storage_offset()), version)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, SavedOnHost):
            return packed.take()
        if not isinstance(packed, SavedView):
            return packed  # type: ignore[no-any-return]
        if packed.version != packed.tensor.version:
            raise written_between(packed.tensor)
        if inside_backward():
            self._enter_backward()
        self._manager.unpack(packed.tensor)
        values = packed.tensor.chunk.buffer.as_strided(packed.shape, packed.stride, packed.offset)
        # With create_graph the backward pass saves them once more, and the buffer will have been given back by then.
        return values.clone() if torch.is_grad_enabled() else values

    # -- backward ----------------------------------------------------------------------------------------------------

    def _watch_backward_begin(self, label: str, returned: list[torch.Tensor]) -> None:
        wanted = [tensor for tensor in returned if tensor.requires_grad and not tensor.is_leaf]
        if wanted and torch.is_grad_enabled():
            register_multi_grad_hook(wanted, lambda _: self._unit_backward_begins(label), mode="any")

    def _watch_backward_end(self, label: str, args: Any, kwargs: Any) -> None:
        """Ends the unit's holds when all its inputs have their gradients.

        Not ``register_multi_grad_hook(mode="all")``: its hooks refer to the graph nodes they hang on, a cycle that
        nothing collects.
        """
        wanted = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        if not wanted or not torch.is_grad_enabled():
            return
        num_wanted, num_seen = len(wanted), 0

        def one_more(_: torch.Tensor) -> None:
            nonlocal num_seen
            num_seen += 1
            if num_seen % num_wanted == 0:
                self._manager.end_unit_backward(label)

        for tensor in wanted:
            tensor.register_hook(one_more)

    def _head_backward_begins(self) -> None:
        self._unit_backward_begins("loss")

    def _unit_backward_begins(self, label: str) -> None:
        self._enter_backward()
        self._manager.begin_unit_backward(label)

    def _enter_backward(self) -> None:
        """The first sign of a backward pass: be told of its end, too."""
        if self._manager.phase is not Phase.BACKWARD:
            self._manager.begin_backward()
        if not self._callback_queued and not self._in_window:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._callback_queued = False
        for graph in [reference() for reference in self._graphs]:
            if graph is not None:
                graph.done |= graph.entered
        self._manager.device.expects_backward = self.graph_pending
        self._planner.backward_ends()

    def settle_outside(self) -> None:
        """Ends what no module runs for any more: an interrupted forward, one whose graph is gone, a failed backward."""
        if self._in_window:
            return
        if self._depth and not _forward_runs():
            self.settle_interrupted_forward()
        if self._depth or self._manager.phase is Phase.IDLE:
            return
        if self._manager.phase is Phase.FORWARD:
            if not self.graph_pending:
                self._manager.abort_pass()
        elif not inside_backward():
            self.backward_failed()
            self._manager.abort_pass()

    def settle_failed_pass(self) -> None:
        """Clears up after a forward or a backward of the user's that ended in an exception; nothing if none did."""
        self.settle_interrupted_forward()
        self.settle_outside()

    def backward_failed(self) -> None:
        """A backward pass ended in an exception: autograd ran no callback."""
        self._planner.ran_out()
        self._callback_queued = False
        self._manager.device.expects_backward = False

    def _gradient_ready(self, parameter: torch.Tensor) -> None:
        # Ours now: the slot or the owner's buffer holds it, and autograd starts afresh next time.
        gradient = take_autograd_gradient(parameter)
        if gradient is None:
            return
        if inside_backward():
            self._enter_backward()
        tensor = self._tensors[id(parameter)]
        settle_gradient(tensor)
        with self._manager.device.bookkeeping():
            tensor.gradient_norm = None if self._in_window else norm_on_arrival(tensor, gradient, self._scratch)
        self._manager.take_gradient(tensor, gradient)


def _ordinary_tensors() -> contextlib.AbstractContextManager[Any]:
    """Buffers made while the user is in inference mode must still be fit for training."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _forward_runs() -> bool:
    """Whether some module's forward is on the stack: torch runs no hooks after a Ctrl-C. Usually a few frames away."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors anywhere in a module's arguments or result: nests, dataclasses' dictionaries, Hugging Face outputs."""
    if isinstance(value, torch.Tensor):  # what most modules return
        yield value
        return
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)) and not callable(leaf):
            yield from (item for item in vars(leaf).values() if isinstance(item, torch.Tensor))


def _largest_shape(value: Any) -> tuple[int, ...]:
    largest = max(_tensors(value), key=torch.Tensor.numel, default=None)
    return () if largest is None else tuple(largest.shape)
