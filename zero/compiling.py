"""``torch.compile`` for each block of a model, with the memory manager outside of what is compiled.

A compiled function cannot call back to have a parameter fetched. So before a block runs, all its parameters are fetched
and held as ever, and handed to one compiled function as arguments; a copy of the block without parameters or hooks
(:func:`_skeleton`) tells what to compute. Blocks that differ in nothing but their number share it, and are compiled once.
What is inside of a block then never runs itself, so a block with somebody's hooks in it computes as it is.
"""

from __future__ import annotations

import copy
import inspect
import logging
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gemini.tensor import ChunkTensor
from zero.units import Unit

logger = logging.getLogger("zero")

_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _Handed(torch.autograd.Function):
    """A parameter's values in the gathered buffer, as a tensor whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The values, without a copy."""
        return values.view(values.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Unchanged."""
        return gradient, None


class CompiledBlocks:
    """Compiles a model's blocks, for training passes.

    Args:
        units: of the model; only blocks are compiled.
        tensors: managed parameters by ``id``.
        read: fetches a parameter and holds it for the module that runs.
    """

    def __init__(
        self, units: Iterable[Unit], tensors: dict[int, ChunkTensor], read: Callable[[torch.Tensor], None]
    ) -> None:
        self._tensors = tensors
        self._read = read
        self._modules: list[nn.Module] = []
        shared: dict[Any, _Compiled] = {}
        for unit in units:
            reason = _why_not(unit, tensors)
            if reason is not None:
                logger.info("%s is not compiled: %s", unit.label, reason)
            elif unit.is_block:
                kind = _kind(unit.module)
                if kind not in shared:
                    shared[kind] = _Compiled(unit.module)
                self._install(unit.module, shared[kind])

    def _install(self, module: nn.Module, compiled: _Compiled) -> None:
        parameters, parts = dict(module.named_parameters()), list(module.modules())

        def forward(*args: Any, **kwargs: Any) -> Any:
            # In evaluation and generation lengths change all the time; a cache goes by the number of the block.
            as_it_is = not torch.is_grad_enabled() or any(kwargs.get(name) is not None for name in _CACHES)
            if as_it_is or any(map(_has_hooks_of_others, parts[1:])):
                return type(module).forward(module, *args, **kwargs)
            given = {name: self._values(parameter) for name, parameter in parameters.items()}
            return compiled(parts, given | dict(module.named_buffers()), args, kwargs)

        module.forward = forward
        self._modules.append(module)

    def _values(self, parameter: torch.Tensor) -> torch.Tensor:
        self._read(parameter)
        tensor = self._tensors[id(parameter)]
        handed: torch.Tensor = _Handed.apply(parameter, tensor.chunk.view_of(tensor))
        return handed

    def without_cache(self, root: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a training pass: transformers' models fill a cache there too, which nobody reads."""
        if not torch.is_grad_enabled() or not _takes_use_cache(root):
            return kwargs
        return {"use_cache": False} | kwargs

    def remove(self) -> None:
        """Blocks compute by themselves again."""
        for module in self._modules:
            module.__dict__.pop("forward", None)


def _why_not(unit: Unit, tensors: dict[int, ChunkTensor]) -> str | None:
    """Why a block computes as it is; None for one that can be compiled, and for what is no block."""
    if not unit.is_block:
        return None
    if not all(id(parameter) in tensors for parameter in unit.module.parameters()):
        return "it has parameters that are not managed"
    if "forward" in unit.module.__dict__:
        return "somebody has replaced its forward"
    if any(map(_has_hooks_of_others, list(unit.module.modules())[1:])):
        return "there are hooks on modules inside of it, which would not run"
    return None


def _has_hooks_of_others(part: nn.Module) -> bool:
    """Whether a module has more than the two hooks that :class:`zero.hooks.ModelHooks` gives each."""
    after_backward = part._backward_hooks or part._backward_pre_hooks
    return bool(after_backward) or len(part._forward_hooks) > 1 or len(part._forward_pre_hooks) > 1


def _takes_use_cache(root: nn.Module) -> bool:
    """By name; or, as an adapter's wrapper does, whatever it is given for a model whose config knows the word."""
    parameters = inspect.signature(root.forward).parameters
    if "use_cache" in parameters:
        return True
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_all and hasattr(getattr(root, "config", None), "use_cache")


class _Compiled:
    """One function for all blocks of a kind.

    Args:
        module: one of them.
    """

    def __init__(self, module: nn.Module) -> None:
        skeleton = _skeleton(module)

        def run(tensors: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
            return torch.func.functional_call(skeleton, tensors, args, kwargs)

        self._parts = list(skeleton.modules())
        # A code object of its own: torch gives up after so many compilations of one, and there may be many kinds.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
        self._function = torch.compile(own)

    def __call__(self, parts: list[nn.Module], tensors: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        """Computes one block.

        Args:
            parts: its modules, whose modes of this moment count (dropout): compiled once for each.
            tensors: its parameters and buffers by name.
            args: of its forward.
            kwargs: likewise.
        """
        for mine, theirs in zip(self._parts, parts, strict=True):
            if mine.training is not theirs.training:
                mine.training = theirs.training
        return self._function(tensors, args, kwargs)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy with empty parameters, none of our hooks, and without a checkpoint around it: the block itself has that."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    skeleton = copy.deepcopy(module, empty)
    for part in skeleton.modules():
        part.__dict__["_parameters"] = dict(part._parameters.items())
        for hooks in _HOOKS:
            getattr(part, hooks).clear()
    if any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(skeleton).__mro__):  # transformers'
        skeleton.__dict__["gradient_checkpointing"] = False
    return skeleton


def _kind(module: nn.Module) -> Any:
    """Equal for blocks that compute the same with other parameters."""
    parts = []
    for name, part in module.named_modules():
        # Blocks of transformers use their number for caches alone; what others do with theirs nobody knows.
        ignored = _OWN_NUMBER if type(part).__module__.startswith("transformers.") else ()
        own = {key: value for key, value in vars(part).items() if key[:1] != "_" and key not in (*ignored, "training")}
        plain = {key: _told(value, part) for key, value in own.items()}
        shapes = [(key, value.shape, value.dtype) for key, value in part.named_parameters(recurse=False)]
        parts.append((name, type(part), repr(sorted(plain.items())), repr(shapes)))
    return tuple(parts)


def _told(value: Any, part: nn.Module) -> Any:
    """An attribute by its value where it has one that can be compared, else by which object it is."""
    if isinstance(value, types.MethodType) and value.__self__ is part:  # as Liger replaces a forward
        return id(value.__func__)
    return value if isinstance(value, bool | int | float | str | type(None)) else id(value)
