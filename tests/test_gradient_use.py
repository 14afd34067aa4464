"""What a user's own loop does with gradients, optimizer states and loss scales comes out as in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.direct_case import (
    Loop,
    Net,
    Play,
    adamw,
    assert_as_plain,
    each_placement,
    frozen,
    inputs,
    managed,
    mean_square,
    named,
    run_plain,
)


class SometimesUnused(Net):
    """Its second layer takes part on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 16)

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        hidden = self.emb(x) + self.second(x) if use else self.emb(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Moves a parameter on whose gradient is zero, but not one without gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


# -- zero_grad(set_to_none=False) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_optimizer", named(adamw, momentum))
@pytest.mark.parametrize("owner", ["optimizer", "module"])
@pytest.mark.parametrize("set_to_none", [True, False])
@each_placement
def test_zeroed_gradients_update_and_forgotten_ones_do_not(
    set_to_none: bool, owner: str, make_optimizer: Any, placed: str
) -> None:
    def loop(play: Play) -> None:
        for index in range(4):
            (play.optimizer if owner == "optimizer" else play.model).zero_grad(set_to_none=set_to_none)
            play.finish_step(mean_square(play.model(inputs(index), index != 2)))
            play.note(play.model.second.bias.grad)

    assert_as_plain(loop, placed, SometimesUnused, make_optimizer)


def test_a_gradient_that_is_not_there_stays_so() -> None:
    def loop(play: Play) -> None:
        for index in range(3):
            play.optimizer.zero_grad(set_to_none=False)
            play.finish_step(mean_square(play.model(inputs(index), False)))
            play.note(play.model.second.weight.grad)

    assert_as_plain(loop, "cpu", SometimesUnused)


# -- hooks of the user's ---------------------------------------------------------------------------------------------------


def hook_scales_in_place(play: Play) -> None:
    def hook(parameter: Tensor) -> None:
        play.note(parameter.grad)
        parameter.grad.mul_(0.5)  # type: ignore[union-attr]

    for parameter in play.model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    play.train(3)


def hook_replaces(play: Play) -> None:
    def hook(parameter: Tensor) -> None:
        parameter.grad = parameter.grad.sign()  # type: ignore[union-attr]

    for parameter in play.model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    play.train(3)


def hook_drops(play: Play) -> None:
    def hook(parameter: Tensor) -> None:
        parameter.grad = None

    play.model.blocks[1][0].weight.register_post_accumulate_grad_hook(hook)
    play.train(3)


def hook_over_two_backwards(play: Play) -> None:
    play.model.emb.weight.register_post_accumulate_grad_hook(lambda parameter: play.note(parameter.grad))
    for index in range(0, 4, 2):
        play.optimizer.zero_grad()
        play.loss(index).backward()
        play.finish_step(play.loss(index + 1))


@pytest.mark.parametrize("loop", named(hook_scales_in_place, hook_replaces, hook_drops, hook_over_two_backwards))
@each_placement
def test_hooks_on_accumulated_gradients_see_and_change_them(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)


class OwnKind(nn.Parameter):
    """A subclass, as some libraries mark their parameters with."""


class WithOwnKind(Net):
    """Its head is of another class of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = OwnKind(self.head.weight.data)


def test_a_subclass_of_parameter_shows_its_gradient() -> None:
    """Or it is refused; clipping that quietly leaves it out is neither."""

    def loop(play: Play) -> None:
        for index in range(3):
            play.optimizer.zero_grad()
            loss = play.loss(index)
            loss.backward()
            play.note(play.model.head.weight.grad, nn.utils.clip_grad_norm_(play.model.parameters(), 0.01))
            play.optimizer.step()

    want = run_plain(loop, WithOwnKind)
    with managed("cpu", WithOwnKind, closes_to=(nn.Parameter, OwnKind)) as got:
        loop(got)
        got.finish()
        assert isinstance(got.model.head.weight, OwnKind)
    assert got.log == want.log
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)


# -- a model that is wholly frozen -----------------------------------------------------------------------------------------


def prompt_tuning(play: Play) -> None:
    prompt = nn.Parameter(torch.zeros(5, 8))
    optimizer = torch.optim.SGD([prompt], lr=1.0)
    for index in range(4):
        optimizer.zero_grad()
        loss = mean_square(play.model(inputs(index) + prompt))
        loss.backward()
        optimizer.step()
        play.note(loss, prompt)


def adversarial_inputs(play: Play) -> None:
    for index in range(3):
        play.note(play.model(inputs(index)))
        x = inputs(index).requires_grad_()
        mean_square(play.model(x)).backward()
        play.note(x.grad)


@pytest.mark.parametrize("loop", named(prompt_tuning, adversarial_inputs))
@each_placement
def test_a_frozen_model_passes_gradients_to_its_input(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed, make_optimizer=frozen)


# -- optimizer states ------------------------------------------------------------------------------------------------------


def state_cleared(play: Play) -> None:
    play.train(2)
    play.optimizer.state.clear()
    play.train(2, first=2)


def moment_zeroed(play: Play) -> None:
    play.train(2)
    for parameter in play.model.parameters():
        play.note(play.optimizer.state[parameter]["exp_avg"])
        play.optimizer.state[parameter]["exp_avg"].zero_()
    play.train(2, first=2)


def one_state_dropped(play: Play) -> None:
    play.train(2)
    del play.optimizer.state[play.model.head.weight]
    play.note(len(play.optimizer.state), play.model.head.weight in play.optimizer.state)
    play.train(2, first=2)


def group_shrunk(play: Play) -> None:
    play.train(2)
    group = play.optimizer.param_groups[0]
    whole, group["params"] = group["params"], group["params"][:4]
    play.train(2, first=2)
    group["params"] = whole
    play.train(1, first=4)


@pytest.mark.parametrize("loop", named(state_cleared, moment_zeroed, one_state_dropped, group_shrunk))
@each_placement
def test_states_and_groups_that_the_user_changes(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)


# -- fp16 without engine.backward() ----------------------------------------------------------------------------------------


def _half_steps(initial_scale: float, scaled: list[bool]) -> Play:
    precision = {"dtype": "fp16", "initial_scale": initial_scale, "growth_interval": 1000}
    with managed("cpu", precision=precision) as play:
        for index, by_engine in enumerate(scaled):
            play.engine.zero_grad()
            loss = mean_square(play.model(inputs(index).half()))
            play.engine.backward(loss) if by_engine else loss.backward()
            play.engine.step()
            play.check()
            play.note(loss.item(), play.engine.grad_norm)
        assert play.engine.num_skipped_steps == 0
        assert play.engine.loss_scale == initial_scale
        play.finish()
    return play


def test_a_loss_that_was_not_scaled_is_not_unscaled() -> None:
    own, never_scaled = _half_steps(1024.0, [False] * 3), _half_steps(1.0, [False] * 3)
    assert own.log == never_scaled.log
    assert all(torch.equal(own.weights[name], never_scaled.weights[name]) for name in own.weights)
    reference = run_plain(lambda play: (play.loss().backward(), play.note(_norm(play)))[0])
    assert own.log[1] == pytest.approx(reference.log[0], rel=1e-2)


def test_own_and_engine_backward_take_turns() -> None:
    """The scale belongs to the window in which it was applied."""
    norms = [_half_steps(1024.0, turns).log[1::2] for turns in ([True, False, True], [False, True, False])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def _norm(play: Play) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in play.model.parameters()])
