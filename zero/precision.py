"""Numbers that must not go wrong: the dynamic loss scale, the global norm, the finite check."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gemini.heap import prefer_huge_pages
from gemini.tensor import ChunkTensor
from zero.errors import UserError
from zero.gradient import gradient_pieces

_MOST_KEPT_BYTES = 32 << 20
"""Of a gradient's copy in fp32. Where glibc's own threshold is highest, larger blocks have a mapping of their own."""


@dataclass
class LossScaler:
    """The dynamic loss scale of fp16; a constant 1 for other dtypes.

    An overflow skips the step. After ``hysteresis`` overflows without a growth in between the scale is multiplied by
    ``backoff_factor``; after ``growth_interval`` clean steps in a row by ``growth_factor``.
    """

    enabled: bool
    scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    max_scale: float = 2.0**32
    num_clean_steps: int = 0
    num_overflows: int = 0

    def __post_init__(self) -> None:
        """Without fp16 there is nothing to scale."""
        if not self.enabled:
            self.scale = 1.0

    @property
    def at_floor(self) -> bool:
        """Whether backing off further could not help: the scale is as low as it may be, or there is none."""
        return not self.enabled or self.scale <= self.min_scale

    def update(self, overflow: bool) -> None:
        """Takes note of a step that overflowed, or of one that did not."""
        if not self.enabled:
            return
        if overflow:
            self.num_clean_steps = 0
            self.num_overflows += 1
            if self.num_overflows >= self.hysteresis:
                self.scale = max(self.min_scale, self.scale * self.backoff_factor)
            return
        self.num_clean_steps += 1
        if self.num_clean_steps == self.growth_interval:
            self.num_clean_steps = 0
            self.num_overflows = 0
            self.scale = min(self.max_scale, self.scale * self.growth_factor)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"scale": self.scale, "num_clean_steps": self.num_clean_steps, "num_overflows": self.num_overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.scale = float(state["scale"])
        self.num_clean_steps = int(state["num_clean_steps"])
        self.num_overflows = int(state["num_overflows"])


@dataclass(frozen=True)
class GradientStatistics:
    """Of all gradients of a step, unscaled.

    Attributes:
        norm: global 2-norm before clipping; 0 where no parameter had a gradient.
        finite: every element is finite.
    """

    norm: float
    finite: bool


def gradient_statistics(tensors: Iterable[ChunkTensor | torch.Tensor], inverse_scale: float) -> GradientStatistics:
    """The norm as ``torch.nn.utils.clip_grad_norm_`` computes it: per parameter in fp32, then over the norms.

    Args:
        tensors: all parameters in the order of ``model.parameters()``; those without a gradient are passed over. A
            parameter without elements is in no chunk and stands for itself: its norm of 0 has a place in the sum, whose
            rounding depends on places.
        inverse_scale: 1 / loss scale.
    """
    norms, finite = [], True
    scratch: dict[torch.device, torch.Tensor] = {}
    tensors = list(tensors)
    known = _known_norms(tensors, inverse_scale)
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            norms += [torch.zeros((), dtype=torch.float32)] if tensor.grad is not None else []
            continue
        if not tensor.has_gradient:
            continue
        if tensor in known:
            norms.append(known[tensor])
            continue
        pieces = gradient_pieces(tensor)
        flat = pieces[0] if len(pieces) == 1 else torch.cat([piece.cpu() for piece in pieces])
        gradient = unscaled(flat, inverse_scale, scratch)
        norm = torch.linalg.vector_norm(gradient)
        # A norm can overflow where no element did: only then look at the elements.
        finite = finite and bool(torch.isfinite(norm) or torch.isfinite(gradient).all())
        norms.append(norm.cpu())
    if not norms:
        return GradientStatistics(0.0, True)
    return GradientStatistics(float(torch.linalg.vector_norm(torch.stack(norms))), finite)


def norm_on_arrival(
    tensor: ChunkTensor, gradient: torch.Tensor, scratch: dict[torch.device, torch.Tensor] | None = None
) -> torch.Tensor | None:
    """The 2-norm in fp32, on the device, of a gradient that backward has just made; None where more belongs to it.

    With it nobody has to read the gradient once more on the host, after it has left and before the update can begin.

    Args:
        tensor: whose gradient it is.
        gradient: in its own dtype.
        scratch: see :func:`unscaled`; of use where the device has no reduction from 16 bits without a copy in fp32.
    """
    alone = tensor.chunk.shard.is_whole and not tensor.has_gradient
    if not alone or gradient.stride() != tensor.entry.spec.stride:
        return None
    with torch.no_grad():
        flat = gradient.as_strided((gradient.numel(),), (1,))
        if scratch is not None:
            flat = unscaled(flat, 1.0, scratch)
        norm: torch.Tensor = torch.linalg.vector_norm(flat, dtype=torch.float32)
    return norm


def _known_norms(tensors: list[ChunkTensor | torch.Tensor], inverse_scale: float) -> dict[Any, torch.Tensor]:
    """Norms that are known already and finite, unscaled: to the bit what the gradients themselves would give."""
    if math.frexp(inverse_scale)[0] != 0.5:  # no power of 2: to scale a norm would round otherwise
        return {}
    known = [t for t in tensors if isinstance(t, ChunkTensor) and t.has_gradient and t.gradient_norm is not None]
    if not known:
        return {}
    norms = torch.stack([tensor.gradient_norm for tensor in known]).cpu() * inverse_scale  # type: ignore[misc]
    finite = torch.isfinite(norms).tolist()
    return {tensor: norm for tensor, norm, fine in zip(known, norms.unbind(), finite, strict=True) if fine}


def unscaled(flat: torch.Tensor, inverse_scale: float, scratch: dict[torch.device, torch.Tensor]) -> torch.Tensor:
    """A gradient in fp32, unscaled; in a buffer that the next one overwrites, unless it is that already.

    One buffer for all: fresh temporaries would leave the C library's heap full of holes (see :mod:`gemini.heap`). The
    largest, an embedding's as a rule, would be half as large as all gradients: they have mappings of their own, which go.
    """
    if flat.dtype == torch.float32 and inverse_scale == 1.0:
        return flat
    buffer = scratch.get(flat.device)
    if buffer is None or buffer.numel() < flat.numel():
        buffer = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
        if buffer.nbytes > _MOST_KEPT_BYTES and flat.device.type == "cpu":
            prefer_huge_pages(buffer.data_ptr(), buffer.nbytes)
        else:
            scratch[flat.device] = buffer
    gradient = buffer[: flat.numel()].copy_(flat)
    return gradient if inverse_scale == 1.0 else gradient.mul_(inverse_scale)


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What gradients are multiplied by; computed in fp32 like torch's, and 1 without clipping."""
    if max_norm is None:
        return 1.0
    coefficient = max_norm / (torch.tensor(norm, dtype=torch.float32) + 1e-6)
    return float(torch.clamp(coefficient, max=1.0))


def require_loss(loss: object) -> None:
    """Raises UserError unless the loss is a tensor."""
    if not isinstance(loss, torch.Tensor):
        raise UserError(
            f"engine.backward(loss): loss is {loss!r}, but must be a tensor with one element; a Hugging Face model "
            "returns a loss only for a batch with labels"
        )
