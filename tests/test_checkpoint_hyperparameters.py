"""Hyperparameters that changed between a checkpoint and the run that resumes are listed, and this run's are used.

The OPT-175B run restarted for days with old Adam betas that nobody saw. Each case changes one setting and shows that
the next steps are those of a run that was never stopped and changed it at that moment, and not those of one that did not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import OPTIMIZERS, Setting, Trainer, batches, differences, everything
from zero.checkpoint import CheckpointError

logger = logging.getLogger("tests")
BATCHES = batches(5)
schedules = torch.optim.lr_scheduler


def _trainer(model_setting: Setting, schedule: Callable[[Any], Any] | None) -> Trainer:
    trainer = Trainer(model_setting)
    if schedule is not None:
        trainer.scheduler = schedule(_original(trainer))
    torch.manual_seed(5)
    return trainer


def _original(trainer: Trainer) -> Any:
    for group in trainer.engine.optimizer.param_groups:  # as if no schedule had been built before
        group["lr"] = group.pop("initial_lr", group["lr"])
    trainer.engine.optimizer.mark_stepped()
    return trainer.engine.optimizer


def _group(trainer: Trainer, **values: Any) -> None:
    trainer.engine.optimizer.param_groups[0].update(values)


def _warmup(num_steps: int) -> Callable[[Any], Any]:
    return lambda optimizer: schedules.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / num_steps))


def _linear(optimizer: Any) -> Any:
    return schedules.LambdaLR(optimizer, lambda step: 1 - step / 10)


class Case:
    """One changed setting.

    Args:
        said: what the warnings must say.
        change: makes the setting of the run that resumes, or changes its optimizer once it is made.
        at_once: the same change in a run that goes on.
        before: of the first run.
        schedules: of the first run and of the one that resumes.
    """

    def __init__(
        self,
        said: str,
        change: dict[str, Any] | Callable[[Trainer], None],
        at_once: Callable[[Trainer], None],
        before: dict[str, Any] | None = None,
        schedules: tuple[Any, Any] = (None, None),
    ) -> None:
        self.said, self.change, self.at_once = said, change, at_once
        self.before, self.schedules = before or {}, schedules


def _with_rate(trainer: Trainer, factor: float) -> None:
    for group in trainer.engine.optimizer.param_groups:
        group["lr"], group["initial_lr"] = group["lr"] * factor, group["initial_lr"] * factor
    trainer.scheduler.base_lrs = [rate * factor for rate in trainer.scheduler.base_lrs]


def _with_schedule(make: Callable[[Any], Any]) -> Callable[[Trainer], None]:
    def change(trainer: Trainer) -> None:
        last_epoch = trainer.scheduler.last_epoch
        trainer.scheduler = make(_original(trainer))
        for _ in range(last_epoch):
            trainer.scheduler.step()

    return change


def _scaler(**values: Any) -> Callable[[Trainer], None]:
    def change(trainer: Trainer) -> None:
        for key, value in values.items():
            setattr(trainer.engine.scaler, key, value)
        trainer.engine.scaler.scale = min(trainer.engine.scaler.scale, trainer.engine.scaler.max_scale)

    return change


def _cosine(horizon: int) -> Callable[[Any], Any]:
    return lambda optimizer: schedules.CosineAnnealingLR(optimizer, T_max=horizon)


def _steps(size: int, gamma: float) -> Callable[[Any], Any]:
    return lambda optimizer: schedules.StepLR(optimizer, step_size=size, gamma=gamma)


def _both(**values: Any) -> dict[str, Any]:
    return {"change": lambda trainer: _group(trainer, **values), "at_once": lambda trainer: _group(trainer, **values)}


_FP16 = {"dtype": "fp16", "scale": 2.0**12}
CASES = {
    "lr": Case("lr is 0.001 in the checkpoint and 0.0005", {"lr": 5e-4}, lambda t: _with_rate(t, 0.5)),
    "betas": Case("betas is (0.9, 0.999) in the checkpoint and (0.8, 0.95)", **_both(betas=(0.8, 0.95))),
    "eps": Case("eps is 1e-08 in the checkpoint and 0.001", **_both(eps=1e-3)),
    "weight_decay": Case("weight_decay is 0.1 in the checkpoint and 0.5", **_both(weight_decay=0.5)),
    "maximize": Case("maximize is False in the checkpoint and True", **_both(maximize=True)),
    "momentum": Case(
        "momentum is 0.9 in the checkpoint and 0.5", **_both(momentum=0.5), before={"optimizer": "sgd-momentum"}
    ),
    "clip": Case(
        "train.max_grad_norm was None and is 0.01",
        {"train": {"max_grad_norm": 0.01}},
        lambda t: setattr(t.engine, "max_grad_norm", 0.01),
        before={"optimizer": "sgd"},
    ),
    "warmup": Case("", lambda t: None, _with_schedule(_warmup(8)), schedules=(_warmup(2), _warmup(8))),
    "schedule": Case("", lambda t: None, _with_schedule(_linear), schedules=(_warmup(2), _linear)),
    "horizon": Case(
        "lr_scheduler: T_max is 4 in the checkpoint and 40",
        lambda t: None,
        _with_schedule(_cosine(40)),
        schedules=(_cosine(4), _cosine(40)),
    ),
    "decay": Case(
        "lr_scheduler: gamma is 0.5 in the checkpoint and 0.1",
        lambda t: None,
        _with_schedule(_steps(2, 0.1)),
        schedules=(_steps(2, 0.5), _steps(2, 0.1)),
    ),
    "accumulation": Case(
        "train.gradient_accumulation_steps was 1 and is 2",
        {"accumulation": 2},
        lambda t: setattr(t.engine, "_accumulation", 2),
    ),
    "loss scale": Case("", lambda t: _scaler(max_scale=256.0)(t), _scaler(max_scale=256.0), before=_FP16),
}

_SHORT = ("lr", "betas", "clip", "warmup", "horizon")


def _resumed(case: Case, folder: Path) -> tuple[Trainer, str]:
    setting = {**case.before, **(case.change if isinstance(case.change, dict) else {})}
    trainer = _trainer(Setting("llama", **setting), case.schedules[1])
    if callable(case.change):
        case.change(trainer)
    return trainer, "\n".join(trainer.load(folder).warnings)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SHORT else pytest.mark.full) for name in CASES]
)
def test_a_changed_setting_takes_effect(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    first = _trainer(Setting("llama", **case.before), case.schedules[0]).run(BATCHES[:3])
    first.save(tmp_path)
    resumed, warnings = _resumed(case, tmp_path)
    assert case.said in warnings
    assert not case.said or "this run's" in warnings
    unchanged = Trainer(Setting("llama", **case.before))
    if case.schedules[0] is not None:
        unchanged.scheduler = case.schedules[0](_original(unchanged))
    unchanged.load(tmp_path)
    unchanged.run(BATCHES[3:])
    first.load(tmp_path)  # the generators, too, are where they were
    case.at_once(first)
    first.run(BATCHES[3:])
    resumed.engine.load_checkpoint(tmp_path, lr_scheduler=resumed.scheduler)
    resumed.run(BATCHES[3:])
    skip = {"groups", "counters"}
    states = [{k: v for k, v in everything(t.engine).items() if k not in skip} for t in (first, resumed, unchanged)]
    exact = not name.startswith(("lr", "horizon"))  # a rate times a factor, a closed form: not the same bits
    different = differences(states[0], states[1])
    if not exact:
        different = [d for d in different if not _close(states[0], states[1], d.lstrip("/").partition("/")[0])]
    assert different == []
    assert differences(states[1], states[2]) != []


def _close(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    values = one.get(key), other.get(key)
    return all(isinstance(v, torch.Tensor) for v in values) and torch.allclose(*values, rtol=1e-5, atol=1e-7)


def test_the_checkpoints_own_where_asked(tmp_path: Path) -> None:
    """``use_saved_hyperparameters``: as if the old settings had been given; the differences are listed all the same."""
    first = _trainer(Setting("llama"), _steps(2, 0.5)).run(BATCHES[:3])
    first.save(tmp_path)
    second = _trainer(Setting("llama", lr=7e-4), _steps(3, 0.1))
    _group(second, betas=(0.5, 0.6))
    warnings = "\n".join(second.load(tmp_path, use_saved_hyperparameters=True).warnings)
    assert "betas is (0.9, 0.999) in the checkpoint and (0.5, 0.6) in this run; the checkpoint's is used" in warnings
    assert first.run(BATCHES[3:]).seen[3:] == second.run(BATCHES[3:]).seen


def test_states_that_are_not_there_cannot_be_asked_for(tmp_path: Path) -> None:
    """amsgrad keeps a maximum from the first step on."""
    first = _trainer(Setting("llama"), None).run(BATCHES[:1])
    first.save(tmp_path)
    second = _trainer(Setting("llama", "adamw-amsgrad"), None)
    with pytest.raises(CheckpointError, match="amsgrad is True in group 0, and was False"):
        second.load(tmp_path)


def test_the_count() -> None:
    logger.warning("%d changed hyperparameters", len(CASES))
    assert len(CASES) >= 12
    assert {case.before.get("optimizer", "adamw") for case in CASES.values()} <= OPTIMIZERS.keys()
