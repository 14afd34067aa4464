"""Lion in plain PyTorch, which has none of its own: the sign of a moving average, one state a parameter.

X. Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2. A learning rate 3 to 10
times smaller than AdamW's and a weight decay as much larger are customary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Lion: ``w -= lr * (sign(lerp(m, g, 1 - beta1)) + weight_decay * w)``, then ``m = lerp(m, g, 1 - beta2)``.

    Every element is treated alone, so it runs on chunks.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: The weight of the past in the step and in the average, each in [0, 1).
        weight_decay: Decoupled weight decay.
        maximize: Step up the gradient rather than down.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if lr < 0.0 or weight_decay < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(
                "Lion needs lr and weight_decay of 0 or more and betas in [0, 1), "
                f"not lr={lr}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; returns what ``closure``, called first with gradients enabled, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    lion_step(parameter, parameter.grad, state["exp_avg"], group)
        return loss


def lion_step(weights: Tensor, grad: Tensor, exp_avg: Tensor, group: dict[str, Any]) -> None:
    """One step in place on tensors of one shape.

    Args:
        weights: Updated.
        grad: Gradient, read.
        exp_avg: Moving average of gradients, updated.
        group: ``lr``, ``betas``, ``weight_decay`` and ``maximize``.
    """
    beta1, beta2 = group["betas"]
    grad = -grad if group["maximize"] else grad
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    weights.add_(exp_avg.lerp(grad, 1 - beta1).sign_(), alpha=-group["lr"])
    exp_avg.lerp_(grad, 1 - beta2)
