"""``torch.compile`` for each block of a model, with the memory manager outside of what is compiled.

A compiled function cannot call back to have a parameter fetched. So before a block runs, all its parameters are fetched
and held as ever, and handed to one compiled function as arguments; a copy of the block without parameters or hooks
(:func:`_skeleton`) tells what to compute. Blocks that differ in nothing but their number share it, and are compiled once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gemini.tensor import ChunkTensor
from zero.units import Unit

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
        compiled: dict[Any, Callable[..., Any]] = {}
        for unit in units:
            module = unit.module
            managed = all(id(parameter) in tensors for parameter in module.parameters())
            if unit.is_block and managed and "forward" not in module.__dict__:
                kind = _kind(module)
                if kind not in compiled:
                    compiled[kind] = _compile(module)
                self._install(module, compiled[kind])

    def _install(self, module: nn.Module, function: Callable[..., Any]) -> None:
        parameters = dict(module.named_parameters())

        def forward(*args: Any, **kwargs: Any) -> Any:
            # In evaluation and generation lengths change all the time; a cache goes by the number of the block.
            if not torch.is_grad_enabled() or any(kwargs.get(name) is not None for name in _CACHES):
                return type(module).forward(module, *args, **kwargs)
            given = {name: self._values(parameter) for name, parameter in parameters.items()}
            return function(given | dict(module.named_buffers()), args, kwargs)

        module.forward = forward
        self._modules.append(module)

    def _values(self, parameter: torch.Tensor) -> torch.Tensor:
        self._read(parameter)
        tensor = self._tensors[id(parameter)]
        handed: torch.Tensor = _Handed.apply(parameter, tensor.chunk.view_of(tensor))
        return handed

    def without_cache(self, root: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a training pass: transformers' models fill a cache there too, which nobody reads."""
        if not torch.is_grad_enabled() or "use_cache" not in inspect.signature(root.forward).parameters:
            return kwargs
        return {"use_cache": False} | kwargs

    def remove(self) -> None:
        """Blocks compute by themselves again."""
        for module in self._modules:
            module.__dict__.pop("forward", None)


def _compile(module: nn.Module) -> Callable[..., Any]:
    skeleton = _skeleton(module)

    def run(tensors: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
        return torch.func.functional_call(skeleton, tensors, args, kwargs)

    return torch.compile(run)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy with empty parameters and none of our hooks."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    skeleton = copy.deepcopy(module, empty)
    for part in skeleton.modules():
        part.__dict__["_parameters"] = dict(part._parameters.items())
        for hooks in _HOOKS:
            getattr(part, hooks).clear()
    return skeleton


def _kind(module: nn.Module) -> Any:
    """Equal for blocks that compute the same with other parameters."""
    parts = []
    for name, part in module.named_modules():
        plain = {key: _told(value) for key, value in vars(part).items() if key[:1] != "_" and key not in _OWN_NUMBER}
        shapes = [(key, value.shape, value.dtype) for key, value in part.named_parameters(recurse=False)]
        parts.append((name, type(part), repr(sorted(plain.items())), repr(shapes)))
    return tuple(parts)


def _told(value: Any) -> Any:
    """An attribute by its value where it has one that can be compared, else by which object it is."""
    return value if isinstance(value, bool | int | float | str | type(None)) else id(value)
