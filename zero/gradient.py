"""``parameter.grad`` for managed parameters: the user's own code keeps seeing and changing gradients.

After backward, autograd holds no gradient any more: it lies with its owner, usually on the host. Managed parameters
therefore get a subclass whose ``grad`` shows the owner's buffer, so that ``torch.nn.utils.clip_grad_norm_``, logging
and ``parameter.grad = None`` in a user's own loop act on the gradient that the optimizer will use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gemini.chunk import ChunkTensor
from gemini.segment import GRADIENT

_ATTRIBUTE = "_zero_chunk_tensor"
# The C property that autograd writes, which the subclass below hides.
_autograd_grad: Any = torch.Tensor.__dict__.get("grad") or torch._C.TensorBase.__dict__["grad"]


def take_autograd_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """What autograd has accumulated in a parameter, which is left without a gradient."""
    gradient: torch.Tensor | None = _autograd_grad.__get__(parameter)
    _autograd_grad.__set__(parameter, None)
    return gradient


class ManagedParameter(nn.Parameter):
    """A parameter whose values and gradient live in a chunk."""

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]
        """The gradient in its owner's buffer (a view, in the parameter's shape), or None."""
        own: torch.Tensor | None = _autograd_grad.__get__(self)
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if own is not None or tensor is None or not tensor.has_gradient:
            return own
        return _owned_gradient(tensor)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        tensor: ChunkTensor | None = getattr(self, _ATTRIBUTE, None)
        if tensor is None:
            _autograd_grad.__set__(self, value)
            return
        _autograd_grad.__set__(self, None)
        tensor.has_gradient = False
        if value is not None:
            tensor.chunk.deliver(tensor, value.detach())


def _owned_gradient(tensor: ChunkTensor) -> torch.Tensor:
    entry = tensor.entry
    pieces = tensor.chunk.pieces(entry.offset, entry.stop)
    if len(pieces) != 1:
        raise RuntimeError(
            f"the gradient of {tensor.name} lies on two tiers (a static fraction ends inside it); use "
            "train.max_grad_norm and engine.grad_norm, or fractions of 0 or 1"
        )
    segment, start, _ = pieces[0]
    buffer = segment.companions[GRADIENT]
    return buffer.as_strided(entry.spec.shape, entry.spec.stride, buffer.storage_offset() + start - segment.start)


def manage(parameter: nn.Parameter, tensor: ChunkTensor) -> None:
    """Turns a parameter into a managed one, in place: every reference to it sees the change."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = ManagedParameter
    setattr(parameter, _ATTRIBUTE, tensor)


def unmanage(parameter: nn.Parameter) -> None:
    """Undoes :func:`manage`."""
    if hasattr(parameter, _ATTRIBUTE):
        delattr(parameter, _ATTRIBUTE)
    if type(parameter) is ManagedParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
