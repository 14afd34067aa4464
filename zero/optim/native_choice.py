"""Which optimizers the native kernel makes steps of, and what such a step is in its words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from zero.errors import UserError
from zero.optim.lion import Lion
from zero.optim.native_rules import AdamRule, LionRule, Rule, SgdRule

BY_ITSELF = (torch.optim.AdamW, torch.optim.Adam, Lion)
"""Optimizers that take the native kernel where nobody says otherwise. Of SGD torch's own arithmetic is as fast."""
_KINDS = (*BY_ITSELF, torch.optim.SGD)


def why_not_native(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the native kernel does not do what this optimizer does; None if it does."""
    if type(optimizer) not in _KINDS:
        names = ", ".join(kind.__name__ for kind in _KINDS)
        return f"the native kernel is one of {names}, the optimizer is {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        if option := _unknown_option(group):
            return f"the native kernel has no {option}"
        if isinstance(group["lr"], torch.Tensor):
            return "the native kernel takes lr as a number, not a tensor"
    return None


def check_still_native(groups: Iterable[dict[str, Any]]) -> None:
    """Hyperparameters may change between steps, but not to what the kernel would leave out.

    Raises:
        UserError: a group asks for such a thing now.
    """
    for group in groups:
        if option := _unknown_option(group):
            raise UserError(
                f"{option} was turned on after initialize(): the native kernel, which makes the steps, has no such thing. "
                f'Turn it on before, or set optimizer.kernel = "torch"'
            )


def _unknown_option(group: dict[str, Any]) -> str | None:
    return next((option for option in ("amsgrad", "capturable", "differentiable") if group.get(option)), None)


def rule_of(kind: type[torch.optim.Optimizer], group: dict[str, Any], step: int, first: bool, factor: float) -> Rule:
    """A step of an optimizer.

    Args:
        kind: its class.
        group: hyperparameters.
        step: number of the step, from 1.
        first: whether the parameters have no states yet.
        factor: gradients are multiplied by it.
    """
    if kind is Lion:
        return LionRule.of_group(group, factor)
    if kind is torch.optim.SGD:
        return SgdRule.of_group(group, first, factor)
    return AdamRule.of_group(group, step, factor)


def scalars_after(kind: type[torch.optim.Optimizer], step: int) -> dict[str, Any]:
    """What the optimizer keeps of a parameter after that step beside states of its length.

    Like torch's optimizers it counts in fp32 whatever the default dtype: bf16 would come to a stand at 256.
    """
    return {} if kind in (Lion, torch.optim.SGD) else {"step": torch.tensor(float(step), dtype=torch.float32)}
