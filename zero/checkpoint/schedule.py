"""A learning-rate scheduler at resume: how far it had come is the checkpoint's, what it does is this run's.

torch's ``load_state_dict`` takes everything from the checkpoint: a run that was given another horizon, another warm-up
or another decay would silently go on with the old one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from zero.checkpoint.hyperparameters import Group, same, show

# How far a schedule has come. Everything else in the state of one of torch's schedulers says what it does.
_PROGRESS = frozenset(
    ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "best", "num_bad_epochs",
     "cooldown_counter", "T_cur", "T_i")
)  # fmt: skip
_INNER = "_schedulers"


def restore_schedule(scheduler: Any, saved: Any, groups: list[Group], obey: bool) -> list[str]:
    """Puts a scheduler where it was; afterwards the groups have the rates of that step.

    Args:
        scheduler: this run's, as it was made.
        saved: the state that the checkpoint holds.
        groups: the optimizer's, restored already.
        obey: keep what this run's scheduler does where it differs.

    Returns:
        A line for each difference.
    """
    if not obey or not isinstance(saved, dict):
        scheduler.load_state_dict(saved)
        return []
    notes: list[str] = []
    bases = [group.get("initial_lr", group["lr"]) for group in groups]
    changed_bases = not same(bases, saved.get("base_lrs", bases))
    state = _merged(scheduler, saved, bases, notes)
    scheduler.load_state_dict(state)
    if notes or changed_bases or _is_lambda(scheduler):
        _set_rates(scheduler, groups)
    return [f"lr_scheduler: {note}; this run's is used" for note in notes]


def _merged(scheduler: Any, saved: dict[str, Any], bases: list[Any], notes: list[str]) -> dict[str, Any]:
    """The saved state with this run's settings in it."""
    mine = scheduler.state_dict()
    merged: dict[str, Any] = {}
    for key, value in saved.items():
        if key == "base_lrs":
            merged[key] = bases
        elif key == _INNER and _same_kind(scheduler, value):
            inner = zip(scheduler._schedulers, value, strict=True)
            merged[key] = [_merged(one, state, bases, notes) for one, state in inner]
        elif key not in mine or not _is_setting(scheduler, key) or same(mine[key], value):
            merged[key] = value
        else:
            merged[key] = mine[key]
            notes.append(f"{key} is {show(value)} in the checkpoint and {show(mine[key])} in this run")
    return merged


def _same_kind(scheduler: Any, value: Any) -> bool:
    inner = getattr(scheduler, _INNER, ())
    return isinstance(value, list) and len(value) == len(inner) and all(isinstance(state, dict) for state in value)


def _is_setting(scheduler: Any, key: str) -> bool:
    """Whether a key of a scheduler's state says what it does; of others than torch's: what their makers are told."""
    if key in _PROGRESS or key == "base_lrs":
        return False
    if type(scheduler).__module__.startswith("torch."):
        return True
    return key in inspect.signature(type(scheduler).__init__).parameters


def _is_lambda(scheduler: Any) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)


def _set_rates(scheduler: Any, groups: list[Group]) -> None:
    """The rates of the step where the schedule stands, where it can say them without having come there."""
    if _is_lambda(scheduler):  # the very product that its step() makes
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * rate(scheduler.last_epoch) for base, rate in pairs]
    elif hasattr(scheduler, "_get_closed_form_lr"):
        rates = scheduler._get_closed_form_lr()
    else:  # the saved ones, scaled to this run's base rates, are in the groups
        rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]
