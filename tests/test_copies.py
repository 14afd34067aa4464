"""Gathering parameters and copying a managed model: as in plain PyTorch, or refused."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.direct_case import Loop, Play, adamw, assert_as_plain, each_placement, inputs, managed, mean_square, named
from zero.errors import UserError

Act = Callable[[Play], Any]


def nested(play: Play) -> None:
    play.train(1)
    with play.gathered() as outer, torch.no_grad():
        outer.head.weight.fill_(0.1)
        with play.gathered() as inner:
            inner.head.bias.fill_(0.2)
            inner.head.weight.mul_(2)
        outer.norm.weight.fill_(0.3)
        play.note(*play.model.state_dict().values())
    play.train(2, first=1)


@each_placement
def test_gathering_may_be_nested(placed: str) -> None:
    assert_as_plain(nested, placed)


@pytest.mark.parametrize("name", ["forward", "engine", "backward", "step", "optimizer", "close", "save", "checkpoint"])
@pytest.mark.parametrize("placed", ["cpu", "cut"])
def test_what_cannot_be_done_inside_is_refused_and_all_goes_on(name: str, placed: str, tmp_path: Path) -> None:
    acts: dict[str, Act] = {
        "forward": lambda play: play.model(inputs()),
        "engine": lambda play: play.engine(inputs()),
        "backward": lambda play: play.engine.backward(torch.ones((), requires_grad=True)),
        "step": lambda play: play.engine.step(),
        "optimizer": lambda play: play.optimizer.step(),
        "close": lambda play: play.engine.close(),
        "save": lambda play: play.engine.save_pretrained(tmp_path / "weights"),
        "checkpoint": lambda play: play.engine.save_checkpoint(tmp_path / "checkpoint"),
    }

    def loop(play: Play) -> None:
        play.train(1)
        play.optimizer.zero_grad()
        play.loss(1).backward()
        with play.gathered() as model:
            if play.engine:
                with pytest.raises(UserError, match=r"gathered_parameters\(\)"):
                    acts[name](play)
            model.head.bias.data.fill_(0.4)
        play.optimizer.step()
        play.train(2, first=2)

    assert_as_plain(loop, placed)


# -- copies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["idle", "gathered", "before backward"])
@each_placement
def test_a_deep_copy_is_an_ordinary_model(when: str, placed: str) -> None:
    def loop(play: Play) -> None:
        play.train(2)
        play.optimizer.zero_grad()
        loss = play.loss(2)
        if when != "before backward":
            play.finish_step(loss)
        with play.gathered() if when == "gathered" else contextlib.nullcontext():
            copied, head = copy.deepcopy(play.model), copy.deepcopy(play.model.head)
        if when == "before backward":
            play.finish_step(loss)
        assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
        play.note(copied(inputs(3)), head(torch.ones(1, 16)))
        own = adamw(copied)
        for index in range(2):
            mean_square(copied(inputs(index))).backward()
            own.step()
        play.note(*copied.state_dict().values())
        play.train(2, first=3)

    assert_as_plain(loop, placed)


def averaged_model(play: Play) -> None:
    average = torch.optim.swa_utils.AveragedModel(play.model)
    for index in range(3):
        play.train(1, first=index)
        average.update_parameters(play.model)
    play.note(*average.module.state_dict().values(), average(inputs()))


def child_loaded(play: Play) -> None:
    play.train(1)
    play.model.head.load_state_dict({"weight": torch.full((4, 16), 0.1), "bias": torch.zeros(4)})
    play.note(play.eval(2))
    play.train(2, first=1)


@pytest.mark.parametrize("loop", named(averaged_model, child_loaded))
@each_placement
def test_average_models_and_children(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)


@each_placement
def test_pickling_a_managed_model_is_refused(placed: str) -> None:
    with managed(placed) as play:
        with pytest.raises(UserError, match="state_dict"):
            torch.save(play.model, io.BytesIO())
        play.train(2)
