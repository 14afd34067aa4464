"""A run that loses its way goes back by itself, more carefully, and ends where a run that never did ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli_case import TINY
from zero.config.loading import load_config
from zero.engine import Engine
from zero.progress import TrainingStopped
from zero.report.metrics import read_metrics
from zero.trainer import Trainer

NUM_STEPS = 60
TROUBLE = 30
"""The step in which it begins."""


def _config(folder: Path, **train: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(TINY))
    config["device"] = {"type": "cpu"}
    config["model"]["config"]["dropout"] = 0.0
    config["optimizer"] |= {"lr": 2e-3}
    config["train"] |= {
        "max_steps": NUM_STEPS,
        "save_steps": 10,
        "output_dir": str(folder),
        "report_to": "none",
        "max_skipped_steps": 3,
        "spike_factor": 1.5,
        **train,
    }
    return config


def _run(config: dict[str, Any], trouble: Callable[[Trainer, Engine], None] | None = None) -> Trainer:
    trainer = Trainer(load_config(config))
    original = trainer._step

    def step(engine: Engine, *args: Any) -> Any:
        if trouble is not None:
            trouble(trainer, engine)
        return original(engine, *args)

    trainer._step = step  # type: ignore[method-assign]
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Held-out loss of the run without trouble."""
    folder = tmp_path_factory.mktemp("clean")
    _run(_config(folder))
    return _eval_loss(folder)


def _eval_loss(folder: Path) -> float:
    return [line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line][-1]


def _losses_of_nan() -> Callable[[Trainer, Engine], None]:
    """A stretch of data whose loss is not a number."""
    handles: list[Any] = []

    def trouble(trainer: Trainer, engine: Engine) -> None:
        present = trainer._progress.step + 1
        if present == TROUBLE and not trainer._progress.num_rollbacks and not handles:
            head = engine.module.lm_head
            handles.append(head.register_forward_hook(lambda *out: out[-1] * float("nan")))
        elif trainer._progress.num_rollbacks:
            for handle in handles:
                handle.remove()

    return trouble


def _ruined_weights() -> Callable[[Trainer, Engine], None]:
    """Weights that a bad update has thrown far off: only a checkpoint helps."""
    done = False

    def trouble(trainer: Trainer, engine: Engine) -> None:
        nonlocal done
        if trainer._progress.step + 1 == TROUBLE and not done:
            done = True
            with engine.gathered_parameters(), torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    return trouble


def _rate_far_too_high() -> Callable[[Trainer, Engine], None]:
    """A learning rate that makes the loss explode."""

    def trouble(trainer: Trainer, engine: Engine) -> None:
        if trainer._progress.step + 1 == TROUBLE and not trainer._progress.num_rollbacks:
            for group in engine.optimizer.param_groups:
                group["lr"] = 3.0

    return trouble


TROUBLES = {"losses of nan": _losses_of_nan, "ruined weights": _ruined_weights, "rate far too high": _rate_far_too_high}


@pytest.mark.parametrize(
    "name", ["ruined weights", *(pytest.param(n, marks=pytest.mark.full) for n in TROUBLES if n != "ruined weights")]
)
def test_a_divergence_is_mended(name: str, clean: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _run(_config(tmp_path), TROUBLES[name]())
    assert trainer._progress.num_rollbacks == 1
    assert trainer._progress.lr_factor == 0.5
    assert trainer._progress.step == NUM_STEPS
    assert _eval_loss(tmp_path) <= 1.02 * clean
    said = capsys.readouterr().out
    assert "back to step 20" in said
    assert any("rollback_from" in line for line in read_metrics(tmp_path))
    cost = json.loads((tmp_path / "summary.json").read_text())["cost"]
    lost = {kind["kind"]: kind["num_steps"] for kind in cost["lost"]}
    # A rate does its harm in the update: the step after it is the first that is bad.
    num_good = TROUBLE - 20 - (name != "rate far too high")
    assert lost == {"skipped": 3, "rolled back": num_good, "repeated": 0}


def test_going_back_is_remembered_across_a_restart(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    trouble = _ruined_weights()

    def until_back(trainer: Trainer, engine: Engine) -> None:
        trouble(trainer, engine)
        if trainer._progress.num_rollbacks:
            raise StopError

    with pytest.raises(StopError):
        _run(_config(tmp_path, rollback_max_grad_norm=0.3), until_back)
    engines: list[Engine] = []
    config = _config(tmp_path, rollback_max_grad_norm=0.3, resume_from_checkpoint=True)
    trainer = _run(config, lambda _, engine: engines.append(engine))
    assert trainer._progress.num_rollbacks == 1
    assert trainer._progress.lr_factor == 0.5
    assert engines[0].max_grad_norm == 0.3


def test_it_stops_with_the_reason_when_going_back_does_not_help(tmp_path: Path) -> None:
    def ever(trainer: Trainer, engine: Engine) -> None:
        if trainer._progress.step + 1 == TROUBLE:
            engine.module.lm_head.register_forward_hook(lambda *out: out[-1] * float("nan"))

    with pytest.raises(TrainingStopped, match="gone back train.max_rollbacks = 2 times"):
        _run(_config(tmp_path), ever)


def test_it_stops_where_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    def at_once(trainer: Trainer, engine: Engine) -> None:
        if trainer._progress.step == 0:
            engine.module.lm_head.register_forward_hook(lambda *out: out[-1] * float("nan"))

    with pytest.raises(TrainingStopped, match="no healthy checkpoint"):
        _run(_config(tmp_path), at_once)
