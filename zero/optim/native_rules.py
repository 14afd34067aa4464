"""The steps a kernel can make: an optimizer's hyperparameters at one step, and the scalars the kernel takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from zero.optim.native_args import RULE_ADAM, RULE_LION, RULE_MOMENTUM, RULE_SGD, Scalars


@dataclass(frozen=True)
class AdamRule:
    """A step of ``torch.optim.AdamW`` or ``torch.optim.Adam`` without amsgrad.

    Attributes:
        lr: Learning rate of this step.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decay coefficient.
        step: Number of this step, counted from 1; gives the bias corrections.
        grad_scale: The gradient is multiplied by this in fp32 first: 1 / loss scale times the clip factor.
        decoupled: True decays the weights (AdamW), False adds the decay to the gradient (Adam).
        maximize: Step up the gradient rather than down.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    number: ClassVar[int] = RULE_ADAM

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0
    decoupled: bool = True
    maximize: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of its range."""
        _check_betas(self.betas)
        if self.step < 1:
            raise ValueError(f"step counts from 1, not {self.step}")

    @classmethod
    def of_group(cls, group: dict[str, Any], step: int, grad_scale: float = 1.0) -> AdamRule:
        """The rule of a parameter group of ``torch.optim.AdamW`` or ``torch.optim.Adam``."""
        return cls(
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=step,
            grad_scale=grad_scale,
            decoupled=bool(group.get("decoupled_weight_decay", False)),
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self) -> Scalars:
        """Double precision, rounded to fp32 once, when the struct is filled: what torch's scalar operations do."""
        beta1, beta2 = self.betas
        return Scalars(
            grad_scale=-self.grad_scale if self.maximize else self.grad_scale,
            decay=1 - self.lr * self.weight_decay if self.decoupled else 1.0,
            l2=0.0 if self.decoupled else self.weight_decay,
            mean_weight=1 - beta1,
            decay2=beta2,
            square_weight=1 - beta2,
            bias2_root=math.sqrt(1 - beta2**self.step),
            eps=self.eps,
            neg_step=-(self.lr / (1 - beta1**self.step)),
        )


@dataclass(frozen=True)
class SgdRule:
    """A step of ``torch.optim.SGD``.

    Attributes:
        lr: Learning rate of this step.
        momentum: 0 keeps no state.
        dampening: The gradient enters the momentum times 1 - dampening.
        weight_decay: This much of the weights is added to the gradient.
        nesterov: Nesterov's momentum.
        first: Whether this is the parameter's first step, in which the momentum becomes the gradient.
        grad_scale: See :class:`AdamRule`.
        maximize: See :class:`AdamRule`.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first: bool = False
    grad_scale: float = 1.0
    maximize: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the states."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def number(self) -> int:
        """As the kernel counts rules."""
        return RULE_MOMENTUM if self.momentum else RULE_SGD

    @classmethod
    def of_group(cls, group: dict[str, Any], first: bool, grad_scale: float = 1.0) -> SgdRule:
        """The rule of a parameter group of ``torch.optim.SGD``."""
        return cls(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            first=first,
            grad_scale=grad_scale,
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self) -> Scalars:
        """See :meth:`AdamRule.scalars`."""
        return Scalars(
            grad_scale=-self.grad_scale if self.maximize else self.grad_scale,
            decay=1.0,
            l2=self.weight_decay,
            mean_weight=1 - self.dampening,
            decay2=self.momentum,
            neg_step=-self.lr,
            first=self.first,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True)
class LionRule:
    """A step of :class:`zero.optim.lion.Lion`; the attributes are those of :class:`AdamRule`."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg",)
    number: ClassVar[int] = RULE_LION

    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    grad_scale: float = 1.0
    maximize: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of its range."""
        _check_betas(self.betas)

    @classmethod
    def of_group(cls, group: dict[str, Any], grad_scale: float = 1.0) -> LionRule:
        """The rule of a parameter group of :class:`zero.optim.lion.Lion`."""
        return cls(
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            weight_decay=float(group["weight_decay"]),
            grad_scale=grad_scale,
            maximize=bool(group.get("maximize", False)),
        )

    def scalars(self) -> Scalars:
        """See :meth:`AdamRule.scalars`."""
        return Scalars(
            grad_scale=-self.grad_scale if self.maximize else self.grad_scale,
            decay=1 - self.lr * self.weight_decay,
            mean_weight=1 - self.betas[0],
            square_weight=1 - self.betas[1],
            neg_step=-self.lr,
        )


Rule = AdamRule | SgdRule | LionRule


def _check_betas(betas: tuple[float, float]) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must each lie in [0, 1), not {betas}")
