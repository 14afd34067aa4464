"""What is easily left behind: gradients on their way into a checkpoint, old snapshots, momentum that begins late, room
behind a parameter, the default dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zero
from gemini.plan import Plan
from gemini.segment import Placement
from zero.engine import Engine
from zero.errors import UserError
from zero.optim.early import EarlyUpdates
from zero.optim.elementwise import state_bytes_per_numel, temporary_bytes_per_numel
from zero.optim.fused import MOMENTS, FusedPiece, fused_step
from zero.optim.native_choice import scalars_after
from zero.probing import host_update

SIMULATED = {"type": "simulated", "memory": "8MiB"}


def _engine(make: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW, **tables: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 3))
    config = {"device": SIMULATED, "memory": {"policy": "cpu"}, **tables}
    return zero.initialize(model, make(model.parameters()), config=config)[0]


def _backward(engine: Engine, index: int) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(index))
    x = x.to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().square().sum())


def _weights(engine: Engine) -> torch.Tensor:
    values = torch.cat([value.flatten().clone() for value in engine.module.state_dict().values()])
    engine.close()
    return values


@pytest.mark.parametrize("device", [SIMULATED, {"type": "cpu"}])
def test_a_checkpoint_in_the_first_window_has_all_its_gradients(tmp_path: Path, device: dict[str, Any]) -> None:
    seen = []
    for saves in (False, True):
        engine = _engine(torch.optim.SGD, device=device, train={"gradient_accumulation_steps": 3})
        for index in range(3):
            _backward(engine, index)
            engine.step()
            if saves and index == 1:
                engine.load_checkpoint(engine.save_checkpoint(tmp_path))
        seen.append(_weights(engine))
    assert torch.equal(*seen)


def test_updates_are_early_again_when_a_plan_has_cut_the_chunks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed = []
    original = EarlyUpdates.confirm

    def confirm(early: EarlyUpdates, *args: Any) -> bool:
        confirmed.append(original(early, *args))
        return confirmed[-1]

    monkeypatch.setattr(EarlyUpdates, "confirm", confirm)
    early = {"early": True, "kernel": "torch"}
    engine = _engine(precision={"dtype": "bf16"}, train={"max_grad_norm": None}, optimizer=early)
    for numel in (0, 5, 7):
        engine.manager.apply(Plan("cpu", [Placement(numel) for _ in engine.facts]))
        for index in range(3):
            engine.zero_grad()
            _backward(engine, index)
            confirmed.clear()
            engine.step()
        assert any(confirmed), numel
    engine.close()


def test_momentum_that_begins_late_begins_with_the_whole_gradient() -> None:
    seen = []
    for kernel in ("torch", "native"):
        engine = _engine(lambda p: torch.optim.SGD(p, lr=0.01, dampening=0.5), optimizer={"kernel": kernel})
        for index in range(4):
            engine.optimizer.param_groups[0]["momentum"] = 0.9 * (index > 1)  # type: ignore[union-attr]
            engine.zero_grad()
            _backward(engine, index)
            engine.step()
        seen.append(_weights(engine))
    torch.testing.assert_close(*seen)


def test_amsgrad_that_is_turned_on_late_is_refused_by_the_kernel_and_nothing_has_changed() -> None:
    engine = _engine(optimizer={"kernel": "native"})
    _backward(engine, 0)
    engine.step()
    before = [value.clone() for value in engine.module.state_dict().values()]
    engine.optimizer.param_groups[0]["amsgrad"] = True  # type: ignore[union-attr]
    _backward(engine, 1)
    with pytest.raises(UserError, match=r"amsgrad was turned on after initialize.*Turn it on before"):
        engine.step()
    now = engine.module.state_dict().values()
    assert all(torch.equal(value, old) for value, old in zip(now, before, strict=True))
    engine.close()


def test_room_behind_a_parameter_has_no_say_in_the_scale_of_its_block() -> None:
    """The second moments fall to a millionth, which is more than codes of 8 bits reach beside what stands still."""
    seen = []
    for kernel in ("torch", "native"):
        engine = _engine(
            lambda p: torch.optim.AdamW(p, lr=0.0, betas=(0.9, 0.5)),
            precision={"dtype": "bf16", "optimizer_state": "8bit"},
            optimizer={"kernel": kernel},
        )
        for index in range(24):
            engine.zero_grad()
            x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
            engine.backward(engine(x).float().square().sum() * (1.0 if index == 0 else 2.0**-10))
            engine.step()
        squares = [state["exp_avg_sq"].flatten() for state in engine.optimizer.state.values()]  # type: ignore[union-attr]
        assert any(square.numel() % 256 for square in squares)
        seen.append(torch.cat(squares))
        engine.close()
    torch.testing.assert_close(*seen, rtol=0.5, atol=0.0)


@pytest.mark.parametrize("scale", [float("nan"), 2.0**20])
def test_states_in_8_bits_can_be_had_back_after_ones_that_are_no_good(scale: float) -> None:
    engine = _engine(precision={"dtype": "bf16", "optimizer_state": "8bit"})
    _backward(engine, 0)
    engine.step()
    good = engine.optimizer.state_dict()  # type: ignore[union-attr]
    bad = copy.deepcopy(good)
    for state in bad["state"].values():
        state["exp_avg_sq"] *= scale
        state["exp_avg"] *= scale
    for wanted in (bad, good):
        engine.optimizer.load_state_dict(wanted)  # type: ignore[union-attr]
    again = engine.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    for index, state in good["state"].items():
        assert all(torch.equal(again[index][key], value) for key, value in state.items()), index
    engine.close()


@pytest.fixture
def _bf16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_bf16_by_default")
def test_updates_count_and_reckon_in_fp32_whatever_the_default_dtype() -> None:
    """257 is no number of bf16: the count would stand still at 256."""
    kind = torch.optim.AdamW
    optimizer = kind([torch.zeros(3)])
    assert scalars_after(kind, 257)["step"].item() == 257
    assert state_bytes_per_numel(optimizer) == 8
    assert temporary_bytes_per_numel(optimizer) >= 4
    host_update(64)()
    states = {key: torch.ones(3, dtype=torch.float32) for key in ("master", *MOMENTS)}
    plain = torch.ones(3, dtype=torch.float32).requires_grad_()
    optimizer = kind([plain], lr=0.1, fused=True)
    moments = {key: torch.ones(3, dtype=torch.float32) for key in MOMENTS}
    optimizer.state[plain] = {"step": torch.tensor(256.0, dtype=torch.float32), **moments}
    plain.grad = torch.full((3,), 0.5, dtype=torch.float32)
    fused_step(kind, [FusedPiece(states, plain.grad.clone(), optimizer.param_groups[0], 257)])
    optimizer.step()
    assert torch.equal(states["master"], plain.detach())
