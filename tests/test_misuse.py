"""Failures in the middle of a pass, forwards that lead nowhere, copies, gathering: as in plain PyTorch, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.direct_case import (
    Play,
    assert_as_plain,
    each_placement,
    inputs,
    managed,
    mean_square,
    named,
)

Act = Callable[[Play], Any]


class _UsersError(Exception):
    pass


def _fail(*_: Any) -> None:
    raise _UsersError


def _press_ctrl_c(*_: Any) -> None:
    raise KeyboardInterrupt


# -- how a pass can end in the middle --------------------------------------------------------------------------------------


def backward_fails_in_tensor_hook(play: Play) -> None:
    loss = play.loss(5)
    handle = play.model.blocks[1][0].weight.register_hook(_fail)
    with contextlib.suppress(_UsersError):
        loss.backward()
    handle.remove()


def backward_fails_in_gradient_hook(play: Play) -> None:
    handle = play.model.blocks[1][0].weight.register_post_accumulate_grad_hook(_fail)
    with contextlib.suppress(_UsersError):
        play.loss(5).backward()
    handle.remove()


def _breaks_off(play: Play, register: str, hook: Callable[..., None], run: Act) -> None:
    handle = getattr(play.model.blocks[1], register)(hook)
    with contextlib.suppress(_UsersError, KeyboardInterrupt):
        run(play)
    handle.remove()


def forward_fails(play: Play) -> None:
    _breaks_off(play, "register_forward_pre_hook", _fail, lambda play: play.loss(5))


def ctrl_c_in_forward(play: Play) -> None:
    _breaks_off(play, "register_forward_pre_hook", _press_ctrl_c, lambda play: play.model(inputs(5)))


def ctrl_c_in_evaluation(play: Play) -> None:
    _breaks_off(play, "register_forward_hook", _press_ctrl_c, lambda play: play.eval(5))


def forward_dropped(play: Play) -> None:
    play.model(inputs(5))


def forward_kept(play: Play) -> None:
    play.kept = play.loss(5)  # type: ignore[attr-defined]


def read_between(play: Play) -> None:
    play.kept = play.loss(5)  # type: ignore[attr-defined]
    play.kept_weight = play.model.head.weight.detach()  # type: ignore[attr-defined]


ENDS = named(
    backward_fails_in_tensor_hook,
    backward_fails_in_gradient_hook,
    forward_fails,
    ctrl_c_in_forward,
    ctrl_c_in_evaluation,
    forward_dropped,
    forward_kept,
    read_between,
)
FAILURES = ENDS[:-2]


@pytest.mark.parametrize("end", ENDS)
@each_placement
def test_close_after_anything_leaves_the_weights(end: Act, placed: str) -> None:
    with managed(placed) as play:
        play.train(2)
        want = {name: value.clone() for name, value in play.model.state_dict().items()}
        end(play)
        play.engine.close()
        assert all(torch.equal(value, want[name]) for name, value in play.model.state_dict().items())
        assert all(type(parameter) is nn.Parameter for parameter in play.model.parameters())
        assert _get_current_dispatch_mode() is None, "plain PyTorch after it would count against the device"
        play.engine.close()
        mean_square(play.model(inputs())).backward()


@pytest.mark.parametrize("placed", ["cpu", "cut"])
def test_close_in_finally_does_not_hide_the_users_own_error(placed: str) -> None:
    def run(play: Play) -> None:
        try:
            play.loss().backward()
        finally:
            play.engine.close()

    with managed(placed) as play:
        play.model.head.weight.register_hook(_fail)
        with pytest.raises(_UsersError):
            run(play)
    assert all(parameter.isfinite().all() for parameter in play.model.parameters())


# -- what people do then ---------------------------------------------------------------------------------------------------


def attribute_written(play: Play) -> None:
    with torch.no_grad():
        play.model.head.weight.fill_(0.3)


def parameters_written(play: Play) -> None:
    with torch.no_grad():
        for parameter in play.model.parameters():
            parameter.mul_(0.9)


def gathered_written(play: Play) -> None:
    with play.gathered() as model, torch.no_grad():
        model.head.weight.mul_(1.5)
        model.emb.bias.fill_(0.1)


def values_read(play: Play) -> None:
    play.note(play.model.head.weight, *(p.norm() for p in play.model.parameters()))
    play.note(*play.model.state_dict().values())
    with play.gathered() as model:
        play.note(*(p for p in model.parameters()))


def optimizer_looked_at(play: Play) -> None:
    play.note(*(value for state in play.optimizer.state_dict()["state"].values() for value in state.values()))


def gradients_dropped_and_written(play: Play) -> None:
    play.optimizer.zero_grad()
    gathered_written(play)


THEN = named(
    attribute_written,
    parameters_written,
    gathered_written,
    values_read,
    optimizer_looked_at,
    gradients_dropped_and_written,
)


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("end", FAILURES)
@pytest.mark.parametrize("placed", ["cut", "auto"])
def test_after_a_pass_that_led_nowhere_all_goes_on(end: Act, then: Act, placed: str) -> None:
    def loop(play: Play) -> None:
        play.train(2)
        play.optimizer.zero_grad()
        end(play)
        then(play)
        play.note(play.eval(4))
        play.train(2, first=2)

    assert_as_plain(loop, placed)


@pytest.mark.parametrize("end", FAILURES)
def test_a_checkpoint_can_be_written_after_a_failed_pass(end: Act, tmp_path: Path) -> None:
    with managed("cut") as play:
        play.train(2)
        end(play)
        play.engine.save_checkpoint(tmp_path)
        want = play.model.state_dict()
        play.train(1, first=2)
        play.engine.load_checkpoint(tmp_path)
        assert all(torch.equal(value, want[name]) for name, value in play.model.state_dict().items())
