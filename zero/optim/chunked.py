"""The user's optimizer over chunks: a ``torch.optim.Optimizer`` to the eye, a chunk-by-chunk update inside."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gemini.manager import Manager
from gemini.tensor import ChunkTensor
from zero.errors import UserError
from zero.optim.elementwise import require_elementwise
from zero.optim.shown import ShownStates
from zero.optim.update import ChunkUpdater


class ZeroOptimizer(torch.optim.Optimizer):
    """What ``engine.optimizer`` is.

    It shares ``param_groups`` with the user's optimizer (the same list), so schedulers built on either drive it, and
    the user's own object forwards ``step`` to it.

    Args:
        optimizer: the user's.
        manager: owns the chunks.
        tensors: chunk tensors by ``id`` of their parameter.
        updater: does the arithmetic.
        on_step: the engine's step.
        on_zero_grad: the engine's zero_grad.
        on_look: called before states are looked at.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        manager: Manager,
        tensors: dict[int, ChunkTensor],
        updater: ChunkUpdater,
        on_step: Callable[[], None],
        on_zero_grad: Callable[[bool], None],
        on_look: Callable[[], None],
    ) -> None:
        # Not Optimizer.__init__: groups, defaults and hooks are the user's optimizer's own.
        self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("step", "state")})
        self._tensors = tensors
        self._manager = manager
        self.updater = updater
        self._on_step = on_step
        self._on_zero_grad = on_zero_grad
        self._on_look = on_look
        self._handed_back: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        self._import_state(optimizer)
        self._original = optimizer
        self._states = ShownStates(self._state_of, self._write_state, self._trained)
        optimizer.__dict__["state"] = self._states
        self.settle()
        self._forward_verbs(optimizer)

    def _forward_verbs(self, optimizer: torch.optim.Optimizer) -> None:
        """The user's own optimizer object does through this one what concerns parameters and states."""

        def step(_: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
            return self.step(closure)

        def zero_grad(_: torch.optim.Optimizer, set_to_none: bool = True) -> None:
            self.zero_grad(set_to_none)

        def state_dict(_: torch.optim.Optimizer) -> dict[str, Any]:
            return self.state_dict()

        def load_state_dict(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self.load_state_dict(state_dict)

        def add_param_group(_: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
            self.add_param_group(param_group)

        # A scheduler built before marks the step it has wrapped, and warns when the mark is gone.
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        verbs = (step, zero_grad, state_dict, load_state_dict, add_param_group)
        self._replaced = {f.__name__: optimizer.__dict__.get(f.__name__) for f in verbs}
        for function in verbs:
            optimizer.__dict__[function.__name__] = types.MethodType(function, optimizer)

    def release(self) -> None:
        """The user's own optimizer object is an ordinary one again, but for its states: :meth:`hand_back`."""
        self._original.__dict__["state"] = self._handed_back
        for name, before in self._replaced.items():
            self._original.__dict__.pop(name, None)
            if before is not None:
                self._original.__dict__[name] = before

    def hand_back(self, tensors: Iterable[ChunkTensor]) -> None:
        """Copies states to the user's own optimizer, in the dtype of the parameter as ``load_state_dict`` has it."""
        self._states.settle()
        for tensor in tensors:
            state = self._state_of(tensor)
            dtype = tensor.entry.spec.dtype
            if state:
                self._handed_back[tensor.parameter] = {
                    key: value.to(dtype) if isinstance(value, torch.Tensor) and value.dim() > 0 else value
                    for key, value in state.items()
                }

    def call_step_hooks(self, before: bool) -> None:
        """Runs the step hooks that the user has registered, on this optimizer, the original or all optimizers."""
        hooks: list[Any] = [*_global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values()]
        if not before:
            hooks = [*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()]
        for hook in hooks:
            hook(self, (self,), {})

    def mark_stepped(self) -> None:
        """Tells schedulers on either object that the optimizer has stepped, whoever called for it."""
        for optimizer in (self, self._original):
            optimizer.__dict__["_opt_called"] = True

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, or nothing inside an accumulation window.

        Args:
            closure: re-evaluates the model and returns the loss; run once before the update, as torch's optimizers do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._on_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, or sets those there are to zero, at the border of an accumulation window."""
        self._on_zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Begins to train more of the model's parameters.

        Raises:
            UserError: one of them is not the model's, or was frozen when the engine was made.
        """
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        for parameter in parameters:
            tensor = self._tensors.get(id(parameter[1] if isinstance(parameter, tuple) else parameter))
            if tensor is None or not tensor.chunk.layout.trainable:
                raise UserError(
                    "add_param_group: a parameter is not the model's, or did not require gradients when "
                    "zero.initialize() took it over; close() the engine and initialize again"
                )
        super().add_param_group({**param_group, "params": parameters})

    def settle(self) -> None:
        """Takes over what the user has changed: the groups, and states that were shown."""
        self.updater.use_groups(map_groups(self.param_groups, self._tensors))
        self._states.settle()

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ShownStates:  # type: ignore[override]
        """Each parameter's states, as torch's optimizers name them; what is written to them is taken over."""
        self._look()
        return self._states

    def _look(self) -> None:
        if self._original.__dict__.get("state") is not self._states:
            raise UserError(
                "the engine was closed: the optimizer that was given to zero.initialize() holds the states now"
            )
        self._on_look()

    def _trained(self) -> dict[torch.Tensor, ChunkTensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {p: self._tensors[id(p)] for p in parameters if id(p) in self._tensors}

    def _state_of(self, tensor: ChunkTensor) -> dict[str, Any]:
        scalars = self.updater.scalars.get(tensor)
        if scalars is None:
            return {}
        state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in scalars.items()}
        for key in self.updater.keys:
            if all(key in segment.keys for segment, _, _ in self._pieces(tensor)):
                state[key] = tensor.chunk.companion_of(tensor, key)
        return state

    @staticmethod
    def _pieces(tensor: ChunkTensor) -> Any:
        return tensor.chunk.pieces(tensor.entry.offset, tensor.entry.stop)

    def state_dict(self) -> dict[str, Any]:
        """The format of ``torch.optim.Optimizer.state_dict``, with whole states of each parameter on the host."""
        self._look()
        self._states.settle()
        index = 0
        groups, state = [], {}
        for group in self.param_groups:
            numbers = []
            for parameter in group["params"]:
                tensor = self._tensors.get(id(parameter))
                if tensor is not None and (values := self._state_of(tensor)):
                    state[index] = values
                numbers.append(index)
                index += 1
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, of this optimizer or of a plain torch one over the same parameters.

        Raises:
            UserError: the groups do not match.
        """
        self._look()
        self._states.settle()
        groups = state_dict["param_groups"]
        lengths = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if lengths[0] != lengths[1]:
            raise UserError(f"optimizer state has groups of {lengths[0]} parameters, the optimizer has {lengths[1]}")
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
            for parameter, number in zip(mine["params"], theirs["params"], strict=True):
                tensor = self._tensors.get(id(parameter))
                if tensor is not None:
                    self._write_state(tensor, state_dict["state"].get(number))

    def _write_state(self, tensor: ChunkTensor, state: dict[str, Any] | None) -> None:
        coded = any(segment.codec is not None for segment, _, _ in self._pieces(tensor))
        if coded or not state:
            self.updater.forget(tensor)  # a NaN would stay: writing a part of coded states reads the rest
        if not state:
            return
        scalars: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                self.updater.keys.setdefault(key, torch.float32 if coded else value.dtype)
                tensor.chunk.write_companion(tensor, key, value.detach())
            else:
                scalars[key] = value.clone() if isinstance(value, torch.Tensor) else value
        self.updater.scalars[tensor] = scalars

    def _import_state(self, optimizer: torch.optim.Optimizer) -> None:
        """States that the user's optimizer holds already (Adagrad's from the start, others after steps) move in."""
        for parameter, state in list(optimizer.state.items()):
            tensor = self._tensors.get(id(parameter))
            if tensor is not None and state:
                self._write_state(tensor, state)
        optimizer.state.clear()

    def __repr__(self) -> str:
        return f"ZeroOptimizer({len(self.param_groups)} groups, {len(self._trained())} parameters)"


def require_ours(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises UserError unless the optimizer can be run over chunks of this model; nothing is touched."""
    require_elementwise(optimizer)
    known = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    for position, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UserError(
                    f"optimizer: group {position} holds a parameter of shape {tuple(parameter.shape)} that is not one "
                    "of the model's; build the optimizer over model.parameters() of the model given to initialize()"
                )
            if id(parameter) in seen:
                raise UserError(
                    f"optimizer: group {position} holds a parameter of shape {tuple(parameter.shape)} twice, or in two "
                    "groups; give each parameter once"
                )
            seen.add(id(parameter))


def map_groups(groups: list[dict[str, Any]], tensors: dict[int, ChunkTensor]) -> dict[ChunkTensor, dict[str, Any]]:
    """The parameter group of each trainable chunk tensor. Parameters without elements have none."""
    mapped: dict[ChunkTensor, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            tensor = tensors.get(id(parameter))
            if tensor is not None and tensor.chunk.layout.trainable:
                mapped[tensor] = group
    return mapped
