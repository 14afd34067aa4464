"""Managed parameters: the user's own code keeps seeing and changing gradients, and values.

After backward, autograd holds no gradient any more: it lies with its owner, usually on the host. Managed parameters
therefore get a subclass whose ``grad`` shows the owner's buffer, so that ``torch.nn.utils.clip_grad_norm_``, logging
and ``parameter.grad = None`` in a user's own loop act on the gradient that the optimizer will use. And every operator
that takes such a parameter asks for its values first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from gemini.segment import GRADIENT
from gemini.state import TensorState
from gemini.tensor import ChunkTensor

_ATTRIBUTE = "_zero_chunk_tensor"
_RUN = "_zero_run"
_SHOWN = "_zero_shown_gradient"
# The C property that autograd writes, which the subclass below hides.
_TENSOR: Any = torch.Tensor
_autograd_grad: Any = torch.Tensor.__dict__.get("grad") or torch._C.TensorBase.__dict__["grad"]


Run = Callable[[list[ChunkTensor], Callable[[], Any]], Any]
"""Runs an operator with these tensors' values in place."""

_SET_DATA = _TENSOR.data.__set__
_PROPERTIES = """
    shape ndim dtype device layout itemsize nbytes is_cuda is_cpu is_xpu is_meta is_sparse requires_grad is_leaf grad_fn
    grad retains_grad output_nr _version _backward_hooks _post_accumulate_grad_hooks
"""
_METHODS = """
    size dim ndimension numel nelement element_size get_device __len__ requires_grad_ retain_grad register_hook
    register_post_accumulate_grad_hook is_floating_point is_complex is_signed
"""


def _asks_nothing() -> frozenset[Any]:
    """Operators that tell nothing of the values and change none: asked all the time, they must not fetch anything."""
    properties: list[Any] = [p for name in _PROPERTIES.split() if (p := getattr(torch.Tensor, name, None)) is not None]
    methods = [m for name in _METHODS.split() if (m := getattr(torch.Tensor, name, None)) is not None]
    functions = [torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel, torch.autograd.grad]
    return frozenset([*(p.__get__ for p in properties), *(p.__set__ for p in properties), *methods, *functions])


_WITHOUT_VALUES = _asks_nothing()


class ManagedParameter(nn.Parameter):
    """A parameter whose values and gradient live in a chunk."""

    plain_class: ClassVar[type[nn.Parameter]] = nn.Parameter
    """What it was, and will be again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator that takes a managed parameter, with its values in place."""
        kwargs = kwargs or {}
        if types != (cls,) and not all(issubclass(cls, kind) for kind in types):
            return NotImplemented  # an argument of another class, which calls us again
        with torch._C.DisableTorchFunctionSubclass():
            if func in _WITHOUT_VALUES:
                return func(*args, **kwargs)
            used = [p for p in _managed((*args, *kwargs.values())) if getattr(p, _RUN, None) is not None]
            if not used:
                return func(*args, **kwargs)
            tensors = list({id(p): getattr(p, _ATTRIBUTE) for p in used}.values())
            if func == _SET_DATA and used[0] is args[0]:
                _require_shape(used[0], args[1], "values")
                func, args = _set_values, (tensors[0], args[1])
            return getattr(used[0], _RUN)(tensors, functools.partial(func, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter with these values."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary parameter with these values."""
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient in its owner's buffer (a view, in the parameter's shape), or None.

        Where a plan cuts the parameter between two tiers, or other ranks own a part of it, it is a copy, taken over
        before the next backward or step.
        """
        own = autograd_gradient(self)
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if tensor is not None and tensor.state is TensorState.READY_FOR_REDUCE:
            tensor.chunk.restore(tensor)  # a hook of the user's asks while backward runs: to its owner with it
        if own is not None or tensor is None:
            return own
        tensor.chunk.settle_gradients()
        if not tensor.has_gradient:
            return None
        tensor.gradient_norm = None  # whoever looks may write
        pieces = gradient_pieces(tensor)
        spec = tensor.entry.spec
        if len(pieces) == 1 and tensor.chunk.shard.is_whole:
            return pieces[0].as_strided(spec.shape, spec.stride)
        if getattr(self, _SHOWN, None) is None:
            setattr(self, _SHOWN, tensor.chunk.companion_of(tensor, GRADIENT))
        shown: torch.Tensor = getattr(self, _SHOWN)
        return shown

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if tensor is None:
            _autograd_grad.__set__(self, value)
            return
        if value is not None:
            _require_shape(self, value, "gradient")
        forget_gradient(tensor)
        if value is not None:
            tensor.chunk.deliver(tensor, value.detach())


def _require_shape(parameter: torch.Tensor, value: torch.Tensor, what: str) -> None:
    if value.shape != parameter.shape:
        name = getattr(parameter, _ATTRIBUTE).name
        raise RuntimeError(
            f"the {what} of parameter {name} must have its shape {tuple(parameter.shape)}, not {tuple(value.shape)}"
        )


def _set_values(tensor: ChunkTensor, values: torch.Tensor) -> None:
    """``parameter.data = values``. While a pass reads the chunk, the parameter must go on to lie in it."""
    if tensor.state is not TensorState.COMPUTE:
        tensor.bound = values
        return
    with torch.no_grad():
        tensor.parameter.copy_(values)


def _managed(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Managed parameters among an operator's arguments, which may be lists."""
    for value in values:
        if isinstance(value, ManagedParameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _managed(value)


def autograd_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd itself holds as the gradient, past :class:`ManagedParameter`."""
    with torch._C.DisableTorchFunctionSubclass():
        gradient: torch.Tensor | None = _autograd_grad.__get__(parameter)
    return gradient


def take_autograd_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd has accumulated in a parameter, which is left without a gradient."""
    with torch._C.DisableTorchFunctionSubclass():
        gradient: torch.Tensor | None = _autograd_grad.__get__(parameter)
        if gradient is not None:
            _autograd_grad.__set__(parameter, None)
    return gradient


def forget_gradient(tensor: ChunkTensor) -> None:
    """The parameter has no gradient from now on; buffers stay for the next one."""
    take_autograd_gradient(tensor.parameter)
    tensor.parameter.__dict__.pop(_SHOWN, None)
    if not tensor.has_gradient:
        return  # what others may have sent already stays
    tensor.chunk.before_forgetting()
    tensor.has_gradient = False
    tensor.gradient_norm = None
    if tensor.chunk.has_sums:  # what comes next is added there
        _fill_zero(tensor)


def zero_gradient(tensor: ChunkTensor) -> None:
    """The parameter's gradient, if it has one, is zero from now on."""
    tensor.parameter.__dict__.pop(_SHOWN, None)
    if tensor.has_gradient:
        tensor.gradient_norm = None
        tensor.chunk.before_forgetting()
        _fill_zero(tensor)


def _fill_zero(tensor: ChunkTensor) -> None:
    for piece in gradient_pieces(tensor):
        piece.zero_()


def settle_gradient(tensor: ChunkTensor) -> None:
    """Takes over what the user wrote into a gradient that was shown as a copy."""
    shown = tensor.parameter.__dict__.pop(_SHOWN, None)
    if shown is None or not tensor.has_gradient:
        return
    tensor.chunk.write_companion(tensor, GRADIENT, shown)


def settle_gradients(tensors: Iterable[ChunkTensor]) -> None:
    """:func:`settle_gradient` for all."""
    for tensor in tensors:
        settle_gradient(tensor)


def gradient_pieces(tensor: ChunkTensor) -> list[torch.Tensor]:
    """1-D gradient buffers of what is owned of one parameter, in order; several where a segment border runs through it."""
    entry = tensor.entry
    return [
        segment.companions[GRADIENT][left - segment.start : right - segment.start]
        for segment, left, right in tensor.chunk.pieces(entry.offset, entry.stop)
    ]


@functools.cache
def _managed_class(kind: type[nn.Parameter]) -> type[ManagedParameter]:
    """The managed kind of a class of parameters."""
    if kind is nn.Parameter:
        return ManagedParameter
    return type(f"Managed{kind.__name__}", (ManagedParameter, kind), {"plain_class": kind})


def _has_own_operators(kind: type) -> bool:
    return kind.__torch_function__ is not nn.Parameter.__torch_function__  # type: ignore[attr-defined]


def manage(parameter: nn.Parameter, tensor: ChunkTensor) -> None:
    """Turns a parameter into a managed one, in place: every reference to it sees the change.

    A gradient that it has already goes to its owner.
    """
    gradient = take_autograd_gradient(parameter) if tensor.chunk.layout.trainable else None
    if isinstance(parameter, nn.Parameter) and not _has_own_operators(type(parameter)):
        parameter.__class__ = _managed_class(type(parameter))
    setattr(parameter, _ATTRIBUTE, tensor)
    if gradient is not None:
        tensor.chunk.deliver(tensor, gradient)


def watch_use(tensor: ChunkTensor, run: Run) -> None:
    """From now on ``run`` carries out operators that take the tensor's parameter."""
    setattr(tensor.parameter, _RUN, run)


def unmanage(parameter: nn.Parameter) -> None:
    """Undoes :func:`manage`."""
    parameter.__dict__.pop(_ATTRIBUTE, None)
    parameter.__dict__.pop(_RUN, None)
    parameter.__dict__.pop(_SHOWN, None)
    if isinstance(parameter, ManagedParameter):
        parameter.__class__ = parameter.plain_class  # type: ignore[assignment]
