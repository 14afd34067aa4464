"""The steps of the native kernel written anew in torch, to hold it against: the same states, a few times slower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemini.segment import MASTER
from zero.optim.formats import BLOCK_NUMEL, FP32, MEAN, SQUARE, Noise, StateFormat
from zero.optim.lion import lion_step
from zero.optim.native_rules import AdamRule, LionRule, Rule, SgdRule

_PIECE_NUMEL = 1 << 18  # temporaries of a few MB, which caches hold


@torch.no_grad()
def torch_step(
    rule: Rule,
    states: Mapping[str, Tensor],
    grad: Tensor,
    out: Tensor | None,
    *,
    form: StateFormat = FP32,
    noise: Noise | None = None,
    start: int = 0,
    stop: int | None = None,
) -> None:
    """Make the step that ``NativeKernel.step`` makes; the arguments are the same.

    The arithmetic is that of torch's single-tensor optimizers. Given equal numbers, states are rounded as the kernel does
    it, to the bit.
    """
    stop = grad.numel() if stop is None else stop
    # From a multiple of the block on, whatever the format: a piece holds whole blocks.
    first = start - start % BLOCK_NUMEL
    for left in range(first, stop, _PIECE_NUMEL):
        right = min(left + _PIECE_NUMEL, grad.numel())
        inside = slice(max(start, left) - left, min(stop, right) - left)
        buffers = {key: _part(buffer, left, right, grad.numel()) for key, buffer in states.items()}
        values = None if out is None else out[left:right]
        its_noise = None if noise is None else replace(noise, index=noise.index + left)
        _step_piece(rule, buffers, grad[left:right], values, form, its_noise, inside)


def _part(buffer: Tensor, left: int, right: int, numel: int) -> Tensor:
    if buffer.numel() == numel:
        return buffer[left:right]
    return buffer[left // BLOCK_NUMEL : -(-right // BLOCK_NUMEL)]


def _step_piece(
    rule: Rule,
    buffers: dict[str, Tensor],
    grad: Tensor,
    values: Tensor | None,
    form: StateFormat,
    noise: Noise | None,
    inside: slice,
) -> None:
    grad = grad[inside].float()
    if form is FP32:
        states = {key: buffer[inside] for key, buffer in buffers.items()}
        _obey(rule, states, grad)
        if values is not None:
            values[inside].copy_(states[MASTER])
        return
    if values is None:
        raise ValueError(f"the format {form.name!r} needs the weights: the master's upper half is there")
    states = form.decode(buffers, values)
    low, old = buffers[form.buffers[0].key], values.clone()
    old_low = low.clone()
    _obey(rule, {key: state[inside] for key, state in states.items()}, grad)
    form.encode(states, buffers, values, noise)
    for outside in (slice(0, inside.start), slice(inside.stop, None)):  # weights share nothing with their neighbours
        values[outside].copy_(old[outside])
        low[outside].copy_(old_low[outside])


def _obey(rule: Rule, states: dict[str, Tensor], grad: Tensor) -> None:
    grad = grad * (-rule.grad_scale if rule.maximize else rule.grad_scale)
    if isinstance(rule, AdamRule):
        _adam(rule, states[MASTER], states[MEAN], states[SQUARE], grad)
    elif isinstance(rule, SgdRule):
        _sgd(rule, states[MASTER], states.get("momentum_buffer"), grad)
    elif isinstance(rule, LionRule):
        group: dict[str, Any] = {"lr": rule.lr, "betas": rule.betas, "weight_decay": rule.weight_decay}
        lion_step(states[MASTER], grad, states[MEAN], {**group, "maximize": False})


def _adam(rule: AdamRule, master: Tensor, mean: Tensor, square: Tensor, grad: Tensor) -> None:
    beta1, beta2 = rule.betas
    if rule.decoupled:
        master.mul_(1 - rule.lr * rule.weight_decay)
    elif rule.weight_decay:
        grad = grad.add(master, alpha=rule.weight_decay)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**rule.step) ** 0.5).add_(rule.eps)
    master.addcdiv_(mean, denominator, value=-(rule.lr / (1 - beta1**rule.step)))


def _sgd(rule: SgdRule, master: Tensor, buffer: Tensor | None, grad: Tensor) -> None:
    if rule.weight_decay:
        grad = grad.add(master, alpha=rule.weight_decay)
    if buffer is not None and rule.momentum:
        if rule.first:
            buffer.copy_(grad)
        else:
            buffer.mul_(rule.momentum).add_(grad, alpha=1 - rule.dampening)
        grad = grad.add(buffer, alpha=rule.momentum) if rule.nesterov else buffer
    master.add_(grad, alpha=-rule.lr)
