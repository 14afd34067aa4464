"""Hyperparameters of a checkpoint against those of the run that goes on: compared, listed, restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Group = dict[str, Any]

# How an optimizer computes, not what: this run's own choice.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# These ask for states that an optimizer without them has not kept.
_NEEDS_STATE = ("amsgrad", "centered")
# Config tables and keys that do not change the result: they may differ between runs without a word.
_FREE_TABLES = ("device.", "memory.", "parallel.")
_FREE_KEYS = frozenset(
    f"train.{key}"
    for key in (
        *("output_dir", "resume_from_checkpoint", "report_to", "logging_steps"),
        *("eval_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    )
)
# The groups themselves are compared, key by key.
_IN_GROUPS = frozenset(f"optimizer.{key}" for key in ("lr", "betas", "eps", "weight_decay", "momentum"))


def restore_groups(groups: list[Group], saved: list[Group], obey: bool) -> list[str]:
    """Puts a checkpoint's hyperparameters into the optimizer's groups.

    Args:
        groups: the optimizer's, changed in place.
        saved: the checkpoint's, without parameters.
        obey: keep this run's values where they differ. What a schedule has moved (a learning rate, a momentum that
            cycles) is the checkpoint's; a rate is scaled by this run's initial rate over the checkpoint's.

    Returns:
        A line for each difference.
    """
    notes = []
    for position, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        changes: Group = {}
        for key, value in theirs.items():
            if key in _IMPLEMENTATION:
                continue
            moved = _moved(key, mine, theirs)
            if key in mine and not moved and not same(mine[key], value):
                used = "this run's is used" if obey else "the checkpoint's is used"
                name = "lr" if key == "initial_lr" else key
                notes.append(
                    f"optimizer group {position}: {name} is {show(value)} in the checkpoint and {show(mine[key])} in "
                    f"this run; {used}"
                )
            if moved and obey:
                changes[key] = _rescaled(value, theirs["initial_lr"], mine["initial_lr"]) if key == "lr" else value
            elif not obey or key not in mine:
                changes[key] = value
        for key, value in changes.items():
            mine[key] = value.to(mine[key].device) if isinstance(mine.get(key), torch.Tensor) and _is(value) else value
    return notes


def _moved(key: str, mine: Group, theirs: Group) -> bool:
    """Whether a schedule has changed the value since the optimizer was made."""
    if key == "lr":
        return "initial_lr" in mine and "initial_lr" in theirs
    if key not in ("momentum", "betas") or "base_momentum" not in mine or "base_momentum" not in theirs:
        return False
    return key == "momentum" or same(mine[key][1:], theirs[key][1:])  # only the first one cycles


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def same(mine: Any, theirs: Any) -> bool:
    """Whether two hyperparameters are equal; a list and a tuple may be."""
    if _is(mine) or _is(theirs):
        return _is(mine) and _is(theirs) and torch.equal(mine.cpu(), theirs.cpu())
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs)


def show(value: Any) -> str:
    """For messages."""
    return str(value.item()) if _is(value) and value.numel() == 1 else repr(value)


def _rescaled(lr: Any, initial: Any, wanted: Any) -> Any:
    return lr if same(initial, wanted) or initial == 0 else lr * (wanted / initial)


def impossible_changes(groups: list[Group], saved: list[Group]) -> list[str]:
    """A line for each hyperparameter that asks for states which the checkpoint does not hold."""
    lines = []
    for position, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        for key in _NEEDS_STATE:
            if key in theirs and mine.get(key) and not theirs[key]:
                lines.append(
                    f"optimizer: {key} is {show(mine[key])} in group {position}, and was {show(theirs[key])}: the "
                    "checkpoint does not hold the states that it needs"
                )
    return lines


def config_differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """A line for each config key that may change the result and differs; this run's value is the one in use."""
    theirs, mine = dict(_flat(saved)), dict(_flat(present))
    notes = []
    for key in dict.fromkeys((*theirs, *mine)):
        free = key.startswith(_FREE_TABLES) or key in _FREE_KEYS or key in _IN_GROUPS
        if free or theirs.get(key) == mine.get(key):
            continue
        notes.append(f"config: {key} was {theirs.get(key)!r} and is {mine.get(key)!r} now; this run's value is used")
    return notes


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
