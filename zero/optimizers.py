"""The torch optimizer and the schedule that ``[optimizer]`` and ``[scheduler]`` name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zero.config.schema import Config
from zero.errors import UserError
from zero.optim.lion import Lion

_CLASSES = {
    name.lower(): getattr(torch.optim, name)
    for name in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")
}
_CLASSES["lion"] = Lion
_NO_DECAY = ("bias", "norm", "ln_", "layernorm")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    With a weight decay, biases and norms form a group without it, as transformers' Trainer has it.

    Raises:
        UserError: nothing is trainable.
    """
    arguments = config.optimizer.arguments()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("nothing to train: no parameter of the model requires a gradient")
    if not config.optimizer.weight_decay:
        groups: list[Any] = [{"params": [p for _, p in named]}]
    else:
        plain = [p for name, p in named if p.dim() < 2 or any(word in name.lower() for word in _NO_DECAY)]
        plain_ids = {id(p) for p in plain}
        decayed = [p for _, p in named if id(p) not in plain_ids]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = _CLASSES[config.optimizer.name]([g for g in groups if g["params"]], **arguments)
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, num_steps: int) -> Any:
    """The learning-rate schedule over ``num_steps`` optimizer steps, by transformers' names."""
    from transformers import get_scheduler

    return get_scheduler(
        config.scheduler.name,
        optimizer=optimizer,
        num_warmup_steps=config.scheduler.num_warmup_steps(num_steps),
        num_training_steps=num_steps,
    )


def set_rates(scheduler: Any) -> None:
    """The rates of the step where a schedule stands: the saved ones are of a schedule that may have been shorter."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        rates = [
            base * rate(scheduler.last_epoch)
            for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
