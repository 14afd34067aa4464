"""``parameter.grad`` for managed parameters: the user's own code keeps seeing and changing gradients.

After backward, autograd holds no gradient any more: it lies with its owner, usually on the host. Managed parameters
therefore get a subclass whose ``grad`` shows the owner's buffer, so that ``torch.nn.utils.clip_grad_norm_``, logging
and ``parameter.grad = None`` in a user's own loop act on the gradient that the optimizer will use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gemini.chunk import ChunkTensor
from gemini.segment import GRADIENT

_ATTRIBUTE = "_zero_chunk_tensor"
_SHOWN = "_zero_shown_gradient"
# The C property that autograd writes, which the subclass below hides.
_autograd_grad: Any = torch.Tensor.__dict__.get("grad") or torch._C.TensorBase.__dict__["grad"]


class ManagedParameter(nn.Parameter):
    """A parameter whose values and gradient live in a chunk."""

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient in its owner's buffer (a view, in the parameter's shape), or None.

        Where a plan cuts the parameter between two tiers it is a copy, taken over before the next backward or step.
        """
        own = autograd_gradient(self)
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if own is not None or tensor is None or not tensor.has_gradient:
            return own
        pieces = gradient_pieces(tensor)
        spec = tensor.entry.spec
        if len(pieces) == 1:
            return pieces[0].as_strided(spec.shape, spec.stride)
        if getattr(self, _SHOWN, None) is None:
            whole = torch.cat([piece.cpu() for piece in pieces])
            setattr(self, _SHOWN, whole.as_strided(spec.shape, spec.stride))
        shown: torch.Tensor = getattr(self, _SHOWN)
        return shown

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if tensor is None:
            _autograd_grad.__set__(self, value)
            return
        if value is not None and value.shape != self.shape:
            raise RuntimeError(
                f"the gradient of {tensor.name} must have its shape {tuple(self.shape)}, not {tuple(value.shape)}"
            )
        forget_gradient(tensor)
        if value is not None:
            tensor.chunk.deliver(tensor, value.detach())


def autograd_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd itself holds as the gradient, past :class:`ManagedParameter`."""
    gradient: torch.Tensor | None = _autograd_grad.__get__(parameter)
    return gradient


def take_autograd_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd has accumulated in a parameter, which is left without a gradient."""
    gradient = autograd_gradient(parameter)
    _autograd_grad.__set__(parameter, None)
    return gradient


def forget_gradient(tensor: ChunkTensor) -> None:
    """The parameter has no gradient from now on; buffers stay for the next one."""
    _autograd_grad.__set__(tensor.parameter, None)
    tensor.parameter.__dict__.pop(_SHOWN, None)
    tensor.has_gradient = False


def settle_gradient(tensor: ChunkTensor) -> None:
    """Takes over what the user wrote into a gradient that was shown as a copy."""
    shown = tensor.parameter.__dict__.pop(_SHOWN, None)
    if shown is None or not tensor.has_gradient:
        return
    flat = shown.as_strided((shown.numel(),), (1,))
    pieces = gradient_pieces(tensor)
    for piece, written in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
        piece.copy_(written)


def settle_gradients(tensors: Iterable[ChunkTensor]) -> None:
    """:func:`settle_gradient` for all."""
    for tensor in tensors:
        settle_gradient(tensor)


def gradient_pieces(tensor: ChunkTensor) -> list[torch.Tensor]:
    """1-D gradient buffers of one parameter, in order; several where a segment border runs through it."""
    entry = tensor.entry
    return [
        segment.companions[GRADIENT][left - segment.start : right - segment.start]
        for segment, left, right in tensor.chunk.pieces(entry.offset, entry.stop)
    ]


def manage(parameter: nn.Parameter, tensor: ChunkTensor) -> None:
    """Turns a parameter into a managed one, in place: every reference to it sees the change.

    A gradient that it has already goes to its owner.
    """
    gradient = take_autograd_gradient(parameter) if tensor.chunk.layout.trainable else None
    if type(parameter) is nn.Parameter:
        parameter.__class__ = ManagedParameter
    setattr(parameter, _ATTRIBUTE, tensor)
    if gradient is not None:
        tensor.chunk.deliver(tensor, gradient)


def unmanage(parameter: nn.Parameter) -> None:
    """Undoes :func:`manage`."""
    parameter.__dict__.pop(_ATTRIBUTE, None)
    parameter.__dict__.pop(_SHOWN, None)
    if type(parameter) is ManagedParameter:
        # mypy takes the class of an instance for fixed.
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
