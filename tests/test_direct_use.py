"""What a user's own code does with parameters outside of modules comes out as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.direct_case import (
    ROOMY_BYTES,
    Loop,
    Play,
    assert_as_plain,
    each_placement,
    inputs,
    managed,
    mean_square,
    named,
)

# -- over model.parameters(), outside of a pass --------------------------------------------------------------------------


def penalty_after_forward(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        play.finish_step(play.loss(index) + 1e-3 * sum(p.pow(2).sum() for p in play.model.parameters()))


def penalty_before_forward(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        penalty = 1e-3 * sum((p * p).sum() for p in play.model.parameters())
        play.finish_step(play.loss(index) + penalty)


def penalty_alone(play: Play) -> None:
    play.train(2)
    play.optimizer.zero_grad()
    play.finish_step(sum(p.abs().sum() for p in play.model.parameters()))  # type: ignore[arg-type]
    play.train(1)


def norms_are_logged(play: Play) -> None:
    for index in range(2):
        play.train(1, index)
        play.note(*(p.norm() for p in play.model.parameters()))
        play.note(torch.nn.utils.get_total_norm(list(play.model.parameters())))


def norms_are_logged_before_backward(play: Play) -> None:
    for index in range(2):
        play.optimizer.zero_grad()
        loss = play.loss(index)
        play.note(*(p.detach().norm() for p in play.model.parameters()))
        play.finish_step(loss)


def moving_average(play: Play) -> None:
    average = {name: p.detach().clone() for name, p in play.model.named_parameters()}
    for index in range(3):
        play.train(1, index)
        for name, parameter in play.model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.1)
    play.note(*average.values())


def clamped(play: Play) -> None:
    for index in range(3):
        play.train(1, index)
        with torch.no_grad():
            for parameter in play.model.parameters():
                parameter.clamp_(-0.2, 0.2)


def copied_into(play: Play) -> None:
    for index in range(3):
        play.train(1, index)
        with torch.no_grad():
            for parameter in play.model.parameters():
                parameter.copy_(parameter.detach().clone() * 0.9)


def data_replaced(play: Play) -> None:
    for index in range(3):
        play.train(1, index)
        for parameter in play.model.parameters():
            parameter.data = torch.full_like(parameter, 0.01 * (index + 1))


def vector_written(play: Play) -> None:
    for index in range(3):
        play.train(1, index)
        vector = nn.utils.parameters_to_vector(play.model.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 0.9, play.model.parameters())


def written_in_one_call(play: Play) -> None:
    play.train(1)
    with torch.no_grad():
        torch._foreach_mul_(list(play.model.parameters()), 0.9)
    play.note(play.eval())
    play.train(1)


def initialised_anew(play: Play) -> None:
    play.train(1)
    for parameter in play.model.parameters():
        nn.init.constant_(parameter, 0.02)
    play.note(play.eval())
    play.train(1)


def written_as_attributes(play: Play) -> None:
    for index in range(2):
        play.train(1, index)
        play.model.emb.weight.data.mul_(0.5)
        play.model.norm.weight.data = torch.full_like(play.model.norm.weight, 0.7)
        nn.init.zeros_(play.model.head.bias)


@pytest.mark.parametrize(
    "loop",
    named(
        penalty_after_forward,
        penalty_before_forward,
        penalty_alone,
        norms_are_logged,
        norms_are_logged_before_backward,
        moving_average,
        clamped,
        copied_into,
        data_replaced,
        vector_written,
        written_in_one_call,
        initialised_anew,
        written_as_attributes,
    ),
)
@each_placement
def test_parameters_in_the_users_hands(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)


# -- read before the forward, in the same loss ---------------------------------------------------------------------------


def attribute_before_forward(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        penalty = 1e-3 * play.model.head.weight.pow(2).sum()
        loss = play.loss(index) + penalty
        play.finish_step(loss)
        play.note(play.model.head.weight.grad)


def submodule_before_forward(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        extra = play.model.head(torch.ones(1, 16, requires_grad=True)).sum()
        play.finish_step(play.loss(index) + extra)
        play.note(play.model.head.weight.grad)


def view_before_forward(play: Play) -> None:
    """Autograd keeps a transposed piece of the parameter, not the parameter."""
    for index in range(3):
        play.optimizer.zero_grad()
        extra = (torch.ones(2, 16, requires_grad=True) @ play.model.head.weight[1:3].t()).square().sum()
        play.finish_step(play.loss(index) + extra)


def evaluation_between(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        penalty = play.model.emb.weight.square().sum()
        play.note(play.eval(index + 1))
        play.finish_step(play.loss(index) + penalty)


@pytest.mark.parametrize(
    "loop", named(attribute_before_forward, submodule_before_forward, view_before_forward, evaluation_between)
)
@each_placement
def test_what_was_read_before_the_forward_has_its_gradient(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)


@pytest.mark.parametrize("change", ["write", "step"])
@each_placement
def test_changed_after_it_was_read_is_refused_as_torch_refuses_it(change: str, placed: str) -> None:
    """Silence would be a gradient at values that are gone."""
    with managed(placed, capacity_bytes=ROOMY_BYTES) as play:
        play.finish_step(play.loss())
        penalty = play.model.head.weight.pow(2).sum()
        if change == "write":
            with torch.no_grad():
                play.model.head.weight.mul_(0.5)
        else:
            play.optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (play.loss() + penalty).backward()
        play.train(2)


@pytest.mark.parametrize("way", ["attribute", "parameters"])
@each_placement
def test_written_between_forward_and_backward_is_refused(way: str, placed: str) -> None:
    with managed(placed, capacity_bytes=ROOMY_BYTES) as play:
        play.train(1)
        loss = play.loss()
        head = play.model.head.weight if way == "attribute" else list(play.model.parameters())[-2]
        assert head.shape == (4, 16)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"), torch.no_grad():  # noqa: PT012
            head.mul_(0.5)
            loss.backward()
        play.train(2)


# -- double backward -----------------------------------------------------------------------------------------------------


def penalty_of_input_gradient(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        x = inputs(index).requires_grad_()
        output = play.model(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        play.finish_step(mean_square(output) + gradient.pow(2).sum())


def penalty_of_gradients(play: Play) -> None:
    for index in range(3):
        play.optimizer.zero_grad()
        loss = play.loss(index)
        gradients = torch.autograd.grad(loss, list(play.model.parameters()), create_graph=True)
        play.finish_step(loss + 1e-2 * sum(g.pow(2).sum() for g in gradients))


@pytest.mark.parametrize("loop", named(penalty_of_input_gradient, penalty_of_gradients))
@each_placement
def test_double_backward(loop: Loop, placed: str) -> None:
    assert_as_plain(loop, placed)
