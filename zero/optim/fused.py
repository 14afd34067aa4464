"""torch's fused AdamW and Adam on what lies on a device: one kernel reads and writes master, moments and gradient.

It needs no temporaries, where torch's other implementations go over the same memory a dozen times. Its last bits are not
theirs: ``optimizer.kernel = "torch"`` keeps to what the optimizer itself says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemini.segment import MASTER
from zero.optim.formats import MEAN, SQUARE

MOMENTS = (MEAN, SQUARE)
"""States beside the master, in fp32."""
_KINDS = (torch.optim.AdamW, torch.optim.Adam)
_OTHER_KERNELS = ("amsgrad", "capturable", "differentiable")

Group = Mapping[str, Any]


def is_fused(kind: type[torch.optim.Optimizer], group: Group, by_default: bool) -> bool:
    """Whether an update on the device is the fused kernel.

    Args:
        kind: the optimizer's class.
        group: hyperparameters; ``fused`` and ``foreach`` in it are what the user has asked for.
        by_default: where the user has asked for neither.
    """
    numbers = (group.get("lr"), *group.get("betas", ()))
    if kind not in _KINDS or any(group.get(option) for option in _OTHER_KERNELS):
        return False
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    if group.get("fused") is not None:
        return bool(group["fused"])
    return by_default and group.get("foreach") is None


def all_fused(optimizer: torch.optim.Optimizer, by_default: bool) -> bool:
    """Whether every group's update is, as the groups are now."""
    return all(is_fused(type(optimizer), group, by_default) for group in optimizer.param_groups)


@dataclass(frozen=True)
class FusedPiece:
    """Neighbouring elements of one parameter.

    Attributes:
        states: master and moments, fp32, on the device; they are written.
        gradient: fp32, unscaled and clipped.
        group: hyperparameters.
        step: number of this update, from 1.
    """

    states: Mapping[str, Tensor]
    gradient: Tensor
    group: Group
    step: int


@torch.no_grad()
def fused_step(kind: type[torch.optim.Optimizer], pieces: Sequence[FusedPiece]) -> None:
    """Updates pieces on one device, in one launch for each group; to the bit what ``kind(fused=True)`` does there.

    Args:
        kind: ``torch.optim.AdamW`` or ``torch.optim.Adam``.
        pieces: at least one.
    """
    device = pieces[0].gradient.device
    # Made on the device: copied from the host they would make the program wait.
    numbers = {piece.step for piece in pieces}
    steps = {step: torch.full((), float(step), dtype=torch.float32, device=device) for step in numbers}
    for group, of_group in _by_group(pieces):
        decoupled = group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
        operator: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
        beta1, beta2 = group["betas"]
        operator(
            [piece.states[MASTER] for piece in of_group],
            [piece.gradient for piece in of_group],
            *([piece.states[key] for piece in of_group] for key in MOMENTS),
            [],
            [steps[piece.step] for piece in of_group],
            amsgrad=False,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=bool(group["maximize"]),
            grad_scale=None,
            found_inf=None,
        )


def _by_group(pieces: Iterable[FusedPiece]) -> Iterable[tuple[Group, list[FusedPiece]]]:
    groups: dict[int, tuple[Group, list[FusedPiece]]] = {}
    for piece in pieces:
        groups.setdefault(id(piece.group), (piece.group, []))[1].append(piece)
    return groups.values()


def scaled(gradient: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """A gradient in fp32, multiplied by ``factor``: one pass, and none where there is nothing to do.

    An fp32 gradient is scaled where it is, as ``torch.nn.utils.clip_grad_norm_`` does it.

    Args:
        gradient: 1-D.
        factor: that it is multiplied by.
        out: fp32, for one that is not; by default new memory.
    """
    if gradient.dtype == torch.float32:
        return gradient if factor == 1.0 else gradient.mul_(factor)
    out = torch.empty_like(gradient, dtype=torch.float32) if out is None else out
    if factor == 1.0:
        return out.copy_(gradient)
    # As a tensor of one dimension the factor makes the product fp32, without a copy of the gradient before.
    return torch.mul(gradient, torch.full((1,), factor, dtype=torch.float32, device=gradient.device), out=out)
