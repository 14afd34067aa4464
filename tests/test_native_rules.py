"""SGD and Lion on the native kernel and in torch's own operations, and the Lion of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_helpers import ISAS, assert_same_bits, best_kernel, bits, make_grad
from native_reference import torch_step
from torch import Tensor

from zero.optim.elementwise import require_elementwise
from zero.optim.lion import Lion
from zero.optim.native import load_native
from zero.optim.native_rules import AdamRule, LionRule, Rule, SgdRule

NUMEL, NUM_STEPS = 1003, 100
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    (Lion, {"lr": 1e-3}),
    (Lion, {"lr": 1e-3, "betas": (0.3, 0.4), "weight_decay": 0.1, "maximize": True}),
    (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "maximize": True}),
]


def rule_of(optimizer: torch.optim.Optimizer, step: int, grad_scale: float) -> Rule:
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return SgdRule.of_group(group, first=step == 1, grad_scale=grad_scale)
    if isinstance(optimizer, Lion):
        return LionRule.of_group(group, grad_scale)
    return AdamRule.of_group(group, step, grad_scale)


def zero_states(rule: Rule, weights: Tensor) -> dict[str, Tensor]:
    return {"master": weights.clone(), **{key: torch.zeros_like(weights) for key in rule.moments}}


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), SETTINGS, ids=str)
def test_agrees_with_torch_after_100_steps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], grad_dtype: torch.dtype
) -> None:
    """Kernels, their counterpart in torch, and the optimizer itself."""
    best_kernel()
    kernels = [kernel for isa in ISAS if (kernel := load_native(isa)) is not None]
    generator = torch.Generator().manual_seed(1)
    weights = torch.nn.Parameter(torch.randn(NUMEL, generator=generator))
    optimizer = kind([weights], **options, **({} if kind is Lion else {"foreach": False}))
    makers = [kernel.step for kernel in kernels] + [torch_step]
    states = [zero_states(rule_of(optimizer, 1, 1.0), weights.detach()) for _ in makers]
    outs = [torch.zeros(NUMEL, dtype=FLOATS[1 + n % 2]) for n in range(len(makers))]
    for step in range(1, NUM_STEPS + 1):
        grad = (make_grad(NUMEL, generator) * 4).to(grad_dtype)
        weights.grad = grad.float() * 0.25
        optimizer.step()
        for make, its, out in zip(makers, states, outs, strict=True):
            make(rule_of(optimizer, step, 0.25), its, grad, out)
    for make, its, out in zip(makers, states, outs, strict=True):
        # Without fused multiply-add, a sum that is nearly zero may have another sign.
        loose = kind is Lion and make is not torch_step and make.__self__.isa == "generic"
        far = (its["master"] - weights.detach()).abs() > 1e-6 * (1 + weights.detach().abs())
        assert int(far.sum()) <= (3 if loose else 0)
        assert_same_bits((out, its["master"].to(out.dtype)))
        for key in its.keys() - {"master"}:
            torch.testing.assert_close(its[key], optimizer.state[weights][key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", [SgdRule(0.1), SgdRule(0.1, 0.9, nesterov=True), LionRule(0.1, (0.9, 0.99))], ids=str)
def test_lengths_parts_and_threads_change_no_bit(isa: str, rule: Rule) -> None:
    best_kernel()
    kernel = load_native(isa)
    if kernel is None:
        pytest.skip(f"this machine has no {isa}")
    numel = (1 << 17) + 33
    generator = torch.Generator().manual_seed(0)
    weights, grad = torch.randn(numel, generator=generator), make_grad(numel, generator).bfloat16()
    whole, parts = zero_states(rule, weights), zero_states(rule, weights)
    outs = torch.zeros(2, numel, dtype=torch.bfloat16)
    kernel.step(rule, whole, grad, outs[0], num_threads=2)
    for start, stop in ((0, 1), (1, 37), (37, 70_000), (70_000, numel)):
        kernel.step(rule, parts, grad, outs[1], start=start, stop=stop, num_threads=1)
    assert_same_bits((outs[1], outs[0]), *((parts[key], whole[key]) for key in whole))
    assert not torch.equal(whole["master"], weights)


def test_a_zero_and_a_nan_go_lions_way() -> None:
    """The sign of both is zero: such weights only decay."""
    grad = torch.tensor([0.0, torch.nan, 1.0, -1.0])
    want = torch.tensor([1.0, 1.0, 0.9, 1.1])
    rule = LionRule(0.1, (0.9, 0.99))
    for make in (best_kernel().step, torch_step):
        states = zero_states(rule, torch.ones(4))
        make(rule, states, grad, None)
        assert_same_bits((states["master"], want))
        assert bits(states["exp_avg"]).tolist()[0] == 0


def test_lion_is_an_optimizer_like_torchs() -> None:
    """Groups, closures, state dicts; and it treats every element alone."""
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))]
    optimizer = Lion([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:]}], lr=0.1, weight_decay=0.2)
    require_elementwise(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weights[0].sum() - weights[1].sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert weights[0].tolist() == pytest.approx([1 - 0.5 * 0.2 - 0.5] * 3)
    assert weights[1].tolist() == pytest.approx([1 - 0.1 * 0.2 + 0.1] * 2)
    assert weights[2].tolist() == [1.0]
    assert weights[2] not in optimizer.state
    other = Lion([{"params": weights[:1]}, {"params": weights[1:]}])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5
    assert torch.equal(other.state[weights[1]]["exp_avg"], optimizer.state[weights[1]]["exp_avg"])


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_lion_refuses_bad_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Lion needs"):
        Lion([torch.zeros(1)], **options)
