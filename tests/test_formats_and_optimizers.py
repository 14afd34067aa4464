"""Which optimizers go with which format of states and which kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import train

import zero
from tests.engine_models import MODELS, recipe
from tests.reference import assert_same, run_engine, run_plain
from zero.config.loading import load_config
from zero.optim.lion import Lion

ROOMY = 1 << 30


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "adamw"), ("fp16", "adamw"), ("bf16", "sgd"), ("bf16", "lion")])
@pytest.mark.parametrize("state", ["split", "bf16", "8bit"])
def test_a_config_that_cannot_be_is_refused(state: str, dtype: str, name: str) -> None:
    config = {"precision": {"dtype": dtype, "optimizer_state": state}, "optimizer": {"name": name}}
    with pytest.raises(zero.ConfigError, match="precision.optimizer_state"):
        load_config(config)


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {}), (Lion, {}), (torch.optim.AdamW, {"amsgrad": True})]
)
def test_an_optimizer_with_other_states_is_refused_before_anything_is_touched(kind: Any, options: Any) -> None:
    model = MODELS["llama"]()
    before = [p.detach().clone() for p in model.parameters()]
    config = {"device": {"type": "cpu"}, "precision": {"dtype": "bf16", "optimizer_state": "split"}}
    with pytest.raises(zero.UserError, match="holds the states of AdamW and Adam"):
        zero.initialize(model, kind(model.parameters(), lr=1e-3, **options), config=config)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


_OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lion": lambda named: Lion(named.values(), lr=1e-4, weight_decay=0.1),
    "sgd": lambda named: torch.optim.SGD(named.values(), lr=1e-2, momentum=0.9, nesterov=True),
    "plain-sgd": lambda named: torch.optim.SGD(named.values(), lr=1e-2),
}


@pytest.mark.parametrize("kernel", ["torch", "native", "auto"])
@pytest.mark.parametrize("name", _OTHERS)
def test_lion_and_sgd(name: str, kernel: str) -> None:
    whole = recipe("llama", dtype="bf16", max_grad_norm=0.05).but(optimizer=_OTHERS[name])
    got, want = run_engine(whole, ROOMY, "cpu", optimizer={"kernel": kernel}), run_plain(whole)
    if kernel == "torch" or (kernel == "auto" and name != "lion"):
        assert_same(got, want)
        return
    assert got.losses == pytest.approx(want.losses, rel=1e-3)
    assert {n: set(s) for n, s in got.states.items()} == {n: set(s) for n, s in want.states.items()}
    for parameter, state in want.states.items():
        for key, value in state.items():
            torch.testing.assert_close(got.states[parameter][key], value, rtol=2e-2, atol=1e-4)


def test_lion_by_its_name(tmp_path: Path) -> None:
    assert train(tmp_path, tmp_path / "out", "--optimizer.name", "lion", "--train.max_steps", "2") == 0
