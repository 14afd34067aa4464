"""How much computation operators ask of a device: floating-point operations, bytes, and how many operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Work:
    """Computation, added up."""

    flops: float = 0.0
    """Of matrix products, attention and convolutions in bf16 and fp16."""
    fp32_flops: float = 0.0
    """The same in fp32 and wider."""
    traffic_bytes: float = 0.0
    """That all other operators read and write."""
    num_ops: int = 0
    """Operators, views not counted."""
    saved_bytes: int = 0
    """Of what forward saved for backward: sent to the host."""
    brought_bytes: int = 0
    """Of the same: asked back."""

    def since(self, before: Work) -> Work:
        """What came after an earlier :meth:`copy`."""
        return Work(
            self.flops - before.flops,
            self.fp32_flops - before.fp32_flops,
            self.traffic_bytes - before.traffic_bytes,
            self.num_ops - before.num_ops,
            self.saved_bytes - before.saved_bytes,
            self.brought_bytes - before.brought_bytes,
        )

    def copy(self) -> Work:
        """As it is now."""
        return replace(self)

    def add(self, other: Work) -> None:
        """And this as well."""
        self.flops += other.flops
        self.fp32_flops += other.fp32_flops
        self.traffic_bytes += other.traffic_bytes
        self.num_ops += other.num_ops
        self.saved_bytes += other.saved_bytes
        self.brought_bytes += other.brought_bytes


_NONE = Work()
_MOVING_NOTHING = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a nest of tuples and lists, which is what operators take and return."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def work_of(func: Any, args: Any, kwargs: Any, result: Any) -> Work:
    """What one call of an operator asks for.

    Args:
        func: the ``OpOverload``.
        args: it was called with.
        kwargs: likewise.
        result: it returned.
    """
    formula = _formulas().get(func.overloadpacket) if isinstance(func, torch._ops.OpOverload) else None
    if formula is not None:
        flops = float(formula(*args, **kwargs, out_val=result))
        return Work(fp32_flops=flops, num_ops=1) if _is_wide(args) else Work(flops=flops, num_ops=1)
    moves_nothing = getattr(func, "is_view", False) or func.__name__.startswith(_MOVING_NOTHING)
    if moves_nothing or next(tensors_in(result), None) is None:
        return _NONE
    traffic_bytes = sum(_touched_bytes(tensor) for tensor in tensors_in((args, tuple(kwargs.values()), result)))
    return Work(traffic_bytes=traffic_bytes, num_ops=1)


def _is_wide(args: Any) -> bool:
    tensor = next(tensors_in(args), None)
    return tensor is not None and tensor.dtype.itemsize >= 4


def _touched_bytes(tensor: torch.Tensor) -> int:
    """An expanded tensor is read where its memory is."""
    if tensor.layout is not torch.strided:
        return 0
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())


@functools.cache
def _formulas() -> dict[Any, Callable[..., Any]]:
    """torch's own, and those of operators that it does not know."""
    aten = torch.ops.aten
    ours: dict[str, Callable[..., Any]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
        "_grouped_mm": _grouped,
        "dot": lambda x, y, out_val=None, **_: 2 * x.numel(),
        "mv": lambda matrix, x, out_val=None, **_: 2 * matrix.numel(),
        "addmv": lambda bias, matrix, x, out_val=None, **_: 2 * matrix.numel(),
    }
    known = {getattr(aten, name): formula for name, formula in ours.items() if hasattr(aten, name)}
    return {**known, **flop_registry}


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Scores, and their product with the values; as torch counts it, what a causal mask leaves out included."""
    rows, inner, outer = query.numel() // query.shape[-1], query.shape[-1], value.shape[-1]
    return int(2 * rows * key.shape[-2] * (inner + outer))


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any
) -> int:
    """Five products where forward has two."""
    return int(_attention(query, key, value) * 5 // 2)


def _grouped(left: Any, right: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Each row of one side meets one matrix of the other."""
    return int(2 * left.numel() * right.shape[-1])


class CountingMode(TorchDispatchMode):
    """Adds up the work of every operator that runs inside.

    Args:
        total: is added to.
    """

    def __init__(self, total: Work) -> None:
        super().__init__()
        self._total = total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts it."""
        result = func(*args, **(kwargs or {}))
        self._total.add(work_of(func, args, kwargs or {}, result))
        return result
