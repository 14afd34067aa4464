"""Hyperparameters of a checkpoint against those of the run that goes on: compared, listed, restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Group = dict[str, Any]

# How an optimizer computes, not what: this run's own choice.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# Config tables and keys that do not change the result: they may differ between runs without a word.
_FREE_TABLES = ("device.", "memory.")
_FREE_KEYS = frozenset(
    f"train.{key}"
    for key in (
        *("output_dir", "resume_from_checkpoint", "report_to", "logging_steps"),
        *("eval_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    )
)
# The groups themselves are compared, key by key.
_IN_GROUPS = frozenset(f"optimizer.{key}" for key in ("lr", "betas", "eps", "weight_decay", "momentum"))


def restore_groups(groups: list[Group], saved: list[Group], obey_config: bool) -> list[str]:
    """Puts a checkpoint's hyperparameters into the optimizer's groups.

    Args:
        groups: the optimizer's, changed in place.
        saved: the checkpoint's, without parameters.
        obey_config: keep this run's values where they differ. A learning rate that a schedule has moved is then the
            checkpoint's, scaled by this run's initial rate over the checkpoint's.

    Returns:
        A line for each difference.
    """
    notes = []
    for position, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        scheduled = "initial_lr" in mine and "initial_lr" in theirs
        changes: Group = {}
        for key, value in theirs.items():
            if key in _IMPLEMENTATION:
                continue
            moved = key == "lr" and scheduled
            if key in mine and not moved and not _same(mine[key], value):
                used = (
                    "this run's is used" if obey_config else "the checkpoint's is used (obey_config=True: this run's)"
                )
                name = "lr" if key == "initial_lr" else key
                notes.append(
                    f"optimizer group {position}: {name} is {_show(value)} in the checkpoint and {_show(mine[key])} in "
                    f"this run; {used}"
                )
            if moved and obey_config:
                changes[key] = _rescaled(value, theirs["initial_lr"], mine["initial_lr"])
            elif not obey_config or key not in mine:
                changes[key] = value
        for key, value in changes.items():
            mine[key] = value.to(mine[key].device) if isinstance(mine.get(key), torch.Tensor) and _is(value) else value
    return notes


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _same(mine: Any, theirs: Any) -> bool:
    if _is(mine) or _is(theirs):
        return _is(mine) and _is(theirs) and torch.equal(mine.cpu(), theirs.cpu())
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return bool(mine == theirs)


def _show(value: Any) -> str:
    return str(value.item()) if _is(value) and value.numel() == 1 else repr(value)


def _rescaled(lr: Any, initial: Any, wanted: Any) -> Any:
    return lr if _same(initial, wanted) or initial == 0 else lr * (wanted / initial)


def obeyed_schedule(state: Any, groups: list[Group]) -> Any:
    """A scheduler's state with the base and last rates of ``groups`` in place of its own, in nested schedulers too."""
    if isinstance(state, list):
        return [obeyed_schedule(item, groups) for item in state]
    if type(state) is not dict:
        return state
    own = {"base_lrs": [group.get("initial_lr", group["lr"]) for group in groups],
           "_last_lr": [group["lr"] for group in groups]}  # fmt: skip
    return {key: own[key] if key in own else obeyed_schedule(value, groups) for key, value in state.items()}


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
