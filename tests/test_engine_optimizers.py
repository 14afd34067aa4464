"""Every elementwise optimizer on chunk buffers, bit for bit; the others are refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import zero
from tests.engine_models import batches, llama, opt_pre_norm, recipe
from tests.native_helpers import best_kernel
from tests.reference import (
    LARGE_BYTES,
    MakeOptimizer,
    Recipe,
    Reference,
    Run,
    adamw,
    assert_same,
    config_of,
    differences,
    finish,
    make_engine,
    run_engine,
    run_plain,
    states_of,
    trainable,
)
from tests.sampled import sampled

optim = torch.optim
CPU = {"capacity_bytes": LARGE_BYTES, "policy": "cpu"}
CUT = {"capacity_bytes": LARGE_BYTES, "policy": "static", "resident_parameters": 0.5, "resident_optimizer": 0.5,
       "chunk": 7000}  # fmt: skip

VARIANTS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.AdamW, {"lr": 1e-2}),
    (optim.AdamW, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.3}),
    (optim.AdamW, {"lr": 1e-2, "maximize": True, "betas": (0.5, 0.7)}),
    (optim.AdamW, {"lr": 1e-2, "foreach": True}),
    (optim.AdamW, {"lr": torch.tensor(1e-2)}),
    (optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (optim.Adam, {"lr": 1e-2, "eps": 1e-3, "amsgrad": True, "foreach": True}),
    (optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "foreach": True}),
    (optim.RMSprop, {"lr": 1e-3}),
    (optim.RMSprop, {"lr": 1e-3, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.Adagrad, {"lr": 1e-2}),
    (optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.3, "lr_decay": 0.1, "weight_decay": 0.1}),
    (optim.NAdam, {"lr": 1e-3}),
    (optim.NAdam, {"lr": 1e-3, "decoupled_weight_decay": True, "weight_decay": 0.1, "momentum_decay": 1e-2}),
    (optim.RAdam, {"lr": 1e-3}),
    (optim.RAdam, {"lr": 1e-3, "decoupled_weight_decay": True, "weight_decay": 0.1, "foreach": True}),
    (optim.Adamax, {"lr": 1e-3, "weight_decay": 0.1}),
    (optim.Adadelta, {"lr": 1.0, "rho": 0.8}),
    (optim.ASGD, {"lr": 1e-2, "t0": 1.0, "lambd": 1e-2}),
    (optim.Rprop, {"lr": 1e-3}),
]
FUSED: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.AdamW, {"lr": 1e-2, "fused": True}),
    (optim.Adam, {"lr": 1e-2, "fused": True, "amsgrad": True, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "fused": True, "momentum": 0.9, "nesterov": True}),
    (optim.Adagrad, {"lr": 1e-2, "fused": True}),
]


def _label(value: Any) -> str:
    if isinstance(value, (type, str)):
        return getattr(value, "__name__", "reason")
    return ",".join(f"{k}={v}" for k, v in value.items())


def _maker(kind: type[optim.Optimizer], options: dict[str, Any]) -> MakeOptimizer:
    def make(named: Mapping[str, Tensor]) -> optim.Optimizer:
        return kind(list(named.values()), **copy.deepcopy(options))  # type: ignore[call-arg]

    return make


def _check(make: MakeOptimizer, dtype: str = "fp32", num_steps: int = 6, **placed: Any) -> None:
    whole = Recipe(llama, batches(num_steps, tokens=6), optimizer=make, dtype=dtype)
    assert_same(run_engine(whole, **(placed or CUT)), run_plain(whole))


@pytest.mark.parametrize(("kind", "options"), sampled(VARIANTS, 3), ids=_label)
def test_elementwise_optimizer_on_chunks_that_are_cut(kind: type[optim.Optimizer], options: dict[str, Any]) -> None:
    _check(_maker(kind, options))


@pytest.mark.parametrize(("kind", "options"), FUSED, ids=_label)
@pytest.mark.parametrize(
    "placed", [CPU, {"capacity_bytes": LARGE_BYTES, "policy": "cuda"}, CUT], ids=["cpu", "cuda", "cut"]
)
def test_fused_optimizer(kind: type[optim.Optimizer], options: dict[str, Any], placed: dict[str, Any]) -> None:
    _check(_maker(kind, options), **placed)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "options"), VARIANTS + FUSED, ids=_label)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "placed", [CPU, CUT, {"capacity_bytes": 240_000, "policy": "auto"}], ids=["cpu", "cut", "auto"]
)
def test_elementwise_optimizer_everywhere(
    kind: type[optim.Optimizer], options: dict[str, Any], dtype: str, placed: dict[str, Any]
) -> None:
    _check(_maker(kind, options), dtype, **placed)


@pytest.mark.parametrize(("kind", "options"), [VARIANTS[0], VARIANTS[10], VARIANTS[13], VARIANTS[22]], ids=_label)
def test_elementwise_optimizer_with_fp32_masters(kind: type[optim.Optimizer], options: dict[str, Any]) -> None:
    _check(_maker(kind, options), "bf16")


def test_state_bytes_are_known_before_the_first_step() -> None:
    from zero.optim.elementwise import state_bytes_per_numel

    parameter = [torch.zeros(3, requires_grad=True)]
    known = {"AdamW": 8, "SGD": 0, "RMSprop": 4, "Adagrad": 4, "NAdam": 8, "RAdam": 8, "Adamax": 8, "Adadelta": 8,
             "Rprop": 8}  # fmt: skip
    found = {name: state_bytes_per_numel(getattr(optim, name)(parameter, lr=0.1)) for name in known}
    assert found == known
    assert state_bytes_per_numel(optim.AdamW(parameter, amsgrad=True)) == 12
    assert state_bytes_per_numel(optim.SGD(parameter, momentum=0.9)) == 4
    assert parameter[0].grad is None


# -- states that were there before -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [VARIANTS[1], VARIANTS[9], VARIANTS[15], VARIANTS[17]], ids=_label)
@pytest.mark.parametrize("placed", [CPU, CUT], ids=["cpu", "cut"])
def test_optimizer_that_has_made_steps_already(
    kind: type[optim.Optimizer], options: dict[str, Any], placed: dict[str, Any]
) -> None:
    micro = batches(6, tokens=6)
    plain, model = llama(), llama()
    make = _maker(kind, options)
    optimizers = [make(trainable(m)) for m in (plain, model)]
    for each, its in zip((plain, model), optimizers, strict=True):
        _steps(each, its, micro[:3])
    _steps(plain, optimizers[0], micro[3:])
    want = Run(weights=dict(plain.state_dict()), states=states_of(optimizers[0], trainable(plain)))

    engine, *_ = zero.initialize(model, optimizers[1], config=config_of(Recipe(llama, micro), **placed))
    _steps(engine.module, engine.optimizer, micro[3:])
    assert differences(finish(engine, Run()), want) == []


def _steps(model: Any, optimizer: Any, micro: list[dict[str, Tensor]]) -> None:
    for batch in micro:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("via", ["engine.optimizer", "original"])
def test_state_dict_goes_into_a_plain_optimizer_and_back(via: str) -> None:
    whole = recipe("llama")
    model = whole.build()
    original = adamw(trainable(model))
    engine, *_ = zero.initialize(model, original, config=config_of(whole, **CPU))
    _steps(engine.module, engine.optimizer, whole.batches)
    optimizer = engine.optimizer if via == "engine.optimizer" else original
    saved, weights = optimizer.state_dict(), dict(engine.module.state_dict())

    plain = whole.build()
    plain.load_state_dict(weights)
    fresh = adamw(trainable(plain))
    fresh.load_state_dict(copy.deepcopy(saved))
    more = batches(2, seed=9)
    _steps(plain, fresh, more)
    _steps(engine.module, engine.optimizer, more)  # the engine has moved on ...
    with engine.gathered_parameters() as module:
        for name, parameter in module.named_parameters():
            parameter.data.copy_(weights[name])
    optimizer.load_state_dict(saved)  # ... and is put back
    _steps(engine.module, engine.optimizer, more)
    want = Run(weights=dict(plain.state_dict()), states=states_of(fresh, trainable(plain)))
    assert differences(finish(engine, Run()), want) == []


def test_state_dict_with_other_groups_is_refused() -> None:
    engine = make_engine(recipe("llama"), **CPU)
    other = adamw(dict(list(trainable(llama()).items())[:3]))
    with pytest.raises(zero.UserError, match="groups"):
        engine.optimizer.load_state_dict(other.state_dict())
    engine.close()


# -- custom and refused ----------------------------------------------------------------------------------------------


class Lion(optim.Optimizer):
    """An elementwise optimizer of a user's own."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                first, second = group["betas"]
                update = momentum.mul(first).add(parameter.grad, alpha=1 - first).sign_()
                parameter.add_(update, alpha=-group["lr"])
                momentum.mul_(second).add_(parameter.grad, alpha=1 - second)


class MyAdamW(optim.AdamW):
    """A subclass that changes nothing."""


class Lamb(optim.Optimizer):
    """Scales each parameter's update by a ratio of norms."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ratio = parameter.norm() / (parameter.grad.norm() + 1e-6)
                    parameter.add_(parameter.grad * ratio, alpha=-group["lr"])


class SAM(optim.Optimizer):
    """Two steps with a closure and a global norm in between, around another optimizer."""

    def __init__(self, params: Any, base: type[optim.Optimizer] = optim.SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)  # type: ignore[call-arg]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad * (group["rho"] / norm))
        closure()
        self.base.step()


class RowNormalised(optim.Optimizer):
    """Looks at rows: needs the shape."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    scale = parameter.grad.abs().mean(dim=-1, keepdim=True)
                    parameter.sub_(parameter.grad / scale, alpha=group["lr"])


@pytest.mark.parametrize("kind", [Lion, MyAdamW])
@pytest.mark.parametrize("placed", [CPU, CUT], ids=["cpu", "cut"])
def test_custom_elementwise_optimizer_is_taken(kind: type[optim.Optimizer], placed: dict[str, Any]) -> None:
    _check(_maker(kind, {"lr": 1e-3}), **placed)


def _refused() -> list[tuple[Any, dict[str, Any], str]]:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Lamb, {}, "not elementwise"),
        (SAM, {"lr": 0.1}, "not elementwise"),
        (RowNormalised, {}, "not elementwise"),
        (optim.LBFGS, {}, "closure"),
        (optim.Adafactor, {}, "row and column"),
        (optim.SparseAdam, {}, "sparse"),
        (optim.Muon, {}, "orthogonal"),
    ]
    return cases


@pytest.mark.parametrize(("kind", "options", "reason"), _refused(), ids=_label)
def test_optimizer_that_is_not_elementwise_is_refused_with_the_reason(
    kind: Any, options: dict[str, Any], reason: str
) -> None:
    model = llama()
    matrices = [p for p in model.parameters() if p.dim() == 2]  # Muon takes nothing else
    optimizer = kind(matrices, **options)
    with pytest.raises(zero.UserError, match=reason) as refusal:
        zero.initialize(model, optimizer, config=config_of(recipe("llama"), **CPU))
    assert kind.__name__ in str(refusal.value)
    assert "AdamW" in str(refusal.value)
    # Nothing was taken over: the model is as it was.
    assert torch.isfinite(model(**batches(1)[0]).loss)
    assert type(next(model.parameters())) is torch.nn.Parameter


def test_optimizer_of_another_kind_is_refused() -> None:
    with pytest.raises(zero.UserError, match=r"not a torch\.optim\.Optimizer"):
        zero.initialize(llama(), "adamw", config=config_of(recipe("llama"), **CPU))  # type: ignore[arg-type]


def test_optimizer_over_foreign_parameters_is_refused() -> None:
    model = llama()
    with pytest.raises(zero.UserError, match=r"not one of\s+the model's"):
        zero.initialize(model, optim.AdamW(llama().parameters()), config=config_of(recipe("llama"), **CPU))
    assert torch.isfinite(model(**batches(1)[0]).loss)


def test_parameter_given_twice() -> None:
    """torch warns of it and updates twice; a chunk cannot, so it must not pass silently."""
    model = llama()
    first = next(model.parameters())
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = optim.SGD([first, first, *list(model.parameters())[1:]], lr=0.1)
    with pytest.raises(zero.UserError, match="twice"):
        zero.initialize(model, optimizer, config=config_of(recipe("llama"), **CPU))


# -- the native kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placed", [pytest.param(CPU, marks=pytest.mark.full), CUT], ids=["cpu", "cut"])
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.full), "bf16", "fp16"])
@pytest.mark.parametrize("kind", [optim.AdamW, pytest.param(optim.Adam, marks=pytest.mark.full)])
def test_native_kernel_agrees_with_torch(kind: type[optim.Optimizer], dtype: str, placed: dict[str, Any]) -> None:
    """After 100 steps over the same gradients, masters agree to 1e-6 relative."""
    best_kernel()

    def two_groups(named: Mapping[str, Tensor]) -> optim.Optimizer:
        half = len(named) // 2
        tensors = list(named.values())
        return kind([{"params": tensors[:half], "weight_decay": 0.1}, {"params": tensors[half:], "lr": 3e-4}],
                    lr=1e-3, weight_decay=0.0)  # type: ignore[call-arg]  # fmt: skip

    whole = Recipe(opt_pre_norm, batches(1), optimizer=two_groups, dtype=dtype, max_grad_norm=0.5, scale=1.0)
    reference = Reference(whole)
    engine = make_engine(whole, optimizer={"kernel": "native"}, **placed)
    generator = torch.Generator().manual_seed(0)
    mine = trainable(engine.module)
    for step in range(100):
        for name, master in reference.masters.items():
            if step % 10 == 3 and "fc1" in name:
                continue  # unused now and then: step counts part
            gradient = (torch.randn(master.shape, generator=generator) * 0.01).to(mine[name].dtype)
            master.grad = gradient.float()
            mine[name].grad = gradient
        reference.step()
        engine.step()
        engine.zero_grad()
    for name, master in reference.masters.items():
        tensor = engine._tensors[id(mine[name])]
        key = "master" if dtype != "fp32" or tensor.chunk.segments[0].companions.get("master") is not None else None
        got = tensor.chunk.companion_of(tensor, key) if key else tensor.chunk.values_of(tensor)
        torch.testing.assert_close(got, master.detach(), rtol=1e-6, atol=1e-7)
    engine.close()


def test_kernel_is_chosen_by_what_it_can_do() -> None:
    best_kernel()
    model = llama()
    for optimizer, native in ((optim.AdamW(model.parameters()), True), (optim.Adam(model.parameters()), True),
                              (optim.AdamW(model.parameters(), amsgrad=True), False),
                              (optim.RMSprop(model.parameters()), False)):  # fmt: skip
        config = config_of(recipe("llama"), **CPU, optimizer={"kernel": "auto"})
        engine, *_ = zero.initialize(model, optimizer, config=config)
        assert (engine.optimizer.updater._kernel is not None) == native
        engine.close()
        if not native:
            config["optimizer"]["kernel"] = "native"
            with pytest.raises(zero.UserError, match="native"):
                zero.initialize(model, optimizer, config=config)
