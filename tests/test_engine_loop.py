"""The user's own loop, schedulers, groups, frozen and unused parameters, adapters: as in plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import zero
from tests.engine_models import MODELS, batches, llama, opt_pre_norm, recipe
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    Reference,
    Run,
    adamw,
    assert_same,
    config_of,
    differences,
    finish,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
    states_of,
    trainable,
)

CPU = {"capacity_bytes": LARGE_BYTES, "policy": "cpu"}
LIMIT = 0.05


def _plain_end(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> Run:
    return Run(losses, weights=dict(model.state_dict()), states=states_of(optimizer, trainable(model)))


# -- the user's own loop ---------------------------------------------------------------------------------------------


def _own_loop(model: nn.Module, optimizer: Any, micro: list[dict[str, Tensor]], clip: bool) -> list[float]:
    losses = []
    torch.manual_seed(1)
    for batch in micro:
        loss = model(**batch).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("which", ["original", "engine's"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_unchanged_loop(name: str, clip: bool, which: str) -> None:
    whole = recipe(name)
    plain = whole.build()
    optimizer = adamw(trainable(plain))
    want = _plain_end(plain, optimizer, _own_loop(plain, optimizer, whole.batches, clip))

    model = whole.build()
    original = adamw(trainable(model))
    capacity_bytes = int(least_capacity(whole) * 1.1)
    engine, *_ = zero.initialize(model, original, config=config_of(whole, capacity_bytes))
    losses = _own_loop(engine.module, original if which == "original" else engine.optimizer, whole.batches, clip)
    engine.check_integrity()
    assert_same(finish(engine, Run(losses)), want)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_unchanged_loop_reads_gradients_that_lie_on_two_tiers(fraction: float) -> None:
    whole = recipe("llama")
    plain = whole.build()
    optimizer = adamw(trainable(plain))
    want = _plain_end(plain, optimizer, _own_loop(plain, optimizer, whole.batches, True))
    engine = make_engine(whole, LARGE_BYTES, "static", resident_parameters=0.4, resident_optimizer=fraction)
    losses = _own_loop(engine.module, engine.optimizer, whole.batches, True)
    assert_same(finish(engine, Run(losses)), want)


def test_own_clipping_in_bf16_is_that_of_a_bf16_model() -> None:
    """``clip_grad_norm_`` over bf16 gradients rounds to bf16, in plain PyTorch and here."""
    whole = recipe("llama", dtype="bf16")
    reference, engine = Reference(whole), make_engine(whole, **CPU)
    for batch in whole.batches:
        for model, optimizer in ((reference.model, reference), (engine.module, engine.optimizer)):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
            if optimizer is reference:
                reference.collect()
            optimizer.step()
        engine.optimizer.zero_grad()
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


def test_gradients_are_readable_and_writable() -> None:
    whole = recipe("opt-pre-norm")
    plain = whole.build()
    engine = make_engine(whole, **CPU)
    for model in (plain, engine.module):
        torch.manual_seed(0)
        model(**whole.batches[0]).loss.backward()
    mine, theirs = dict(engine.module.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        assert torch.equal(mine[name].grad, parameter.grad)
        assert mine[name].grad.shape == mine[name].shape
    for named in (mine, theirs):
        names = list(named)
        named[names[2]].grad.mul_(2)
        named[names[3]].grad[0] = 1.0
        named[names[4]].grad = None
        named[names[5]].grad = torch.full_like(theirs[names[5]], 0.5)
        named[names[6]].grad = named[names[6]].grad + 1
    assert mine[list(mine)[4]].grad is None
    optimizer = adamw(trainable(plain))
    optimizer.step()
    engine.step()
    assert differences(finish(engine, Run()), _plain_end(plain, optimizer, [])) == []


def test_gradient_set_by_hand_without_any_pass() -> None:
    engine = make_engine(recipe("llama"), **CPU)
    plain = llama()
    for model in (plain, engine.module):
        for parameter in model.parameters():
            parameter.grad = torch.ones(parameter.shape)
    optimizer = adamw(trainable(plain))
    optimizer.step()
    engine.optimizer.step()
    assert differences(finish(engine, Run()), _plain_end(plain, optimizer, [])) == []


def test_step_with_a_closure() -> None:
    whole = recipe("llama")
    engine = make_engine(whole, **CPU)
    losses = []
    for batch in whole.batches:

        def closure(batch: dict[str, Tensor] = batch) -> Tensor:
            engine.optimizer.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)
            return loss

        losses.append(engine.optimizer.step(closure).item())
    assert differences(finish(engine, Run(losses)), _without_norms(run_plain(whole))) == []


def _without_norms(run: Run) -> Run:
    run.norms, run.scales = [], []
    return run


def test_zero_grad_on_the_module() -> None:
    engine = make_engine(recipe("llama"), **CPU)
    engine.backward(engine(**batches(1)[0]).loss)
    assert all(p.grad is not None for p in engine.module.parameters())
    engine.module.zero_grad()
    assert all(p.grad is None for p in engine.module.parameters())
    engine.close()


# -- schedulers and groups -------------------------------------------------------------------------------------------


def _lambda_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def _one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=True)


def _sgd(named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named.values(), lr=0.1, momentum=0.9)


def _two_groups(named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """Decay for matrices only, as everybody does; the second group has betas of its own."""
    decayed = [t for t in named.values() if t.dim() >= 2]
    others = [t for t in named.values() if t.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 5e-3, "betas": (0.5, 0.9)}],
        lr=1e-3, weight_decay=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("scheduler", [_lambda_lr, _one_cycle])
@pytest.mark.parametrize("optimizer", [adamw, _sgd, _two_groups])
def test_scheduler_built_on_the_original_optimizer(optimizer: Any, scheduler: Any) -> None:
    whole = recipe("opt-pre-norm", batches=batches(5), optimizer=optimizer, scheduler=scheduler)
    assert_same(run_engine(whole, **CPU), run_plain(whole))


@pytest.mark.parametrize("scheduler", [_lambda_lr, _one_cycle])
@pytest.mark.parametrize("optimizer", [adamw, _sgd])
def test_scheduler_built_on_the_engines_optimizer(optimizer: Any, scheduler: Any) -> None:
    whole = recipe("llama", batches=batches(5), optimizer=optimizer)
    engine = make_engine(whole, **CPU)
    schedule = scheduler(engine.optimizer)
    for batch in whole.batches:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
        schedule.step()
    want = run_plain(whole.but(scheduler=scheduler))
    want.losses, want.norms, want.scales = [], [], []
    assert differences(finish(engine, Run()), want) == []


@pytest.mark.parametrize("verb", ["engine.step", "original.step", "optimizer.step"])
def test_schedulers_do_not_warn_about_the_order_of_calls(verb: str) -> None:
    model = llama()
    original = adamw(trainable(model))
    schedule = _lambda_lr(original)
    engine, _, _, schedule = zero.initialize(
        model, original, lr_scheduler=schedule, config=config_of(recipe("llama"), **CPU)
    )
    step = {"engine.step": engine.step, "original.step": original.step, "optimizer.step": engine.optimizer.step}[verb]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(2):
            engine.backward(engine(**batch).loss)
            step()
            schedule.step()
            engine.zero_grad()
    assert original.param_groups[0]["lr"] == pytest.approx(1e-3 / 3)
    engine.close()


def test_step_hooks_run_once_a_step() -> None:
    """Whoever registered them, wherever: not once for each piece of a chunk."""
    model = llama()
    original = adamw(trainable(model))
    calls: list[str] = []
    original.register_step_pre_hook(lambda *_: calls.append("before"))
    engine, *_ = zero.initialize(model, original, config=config_of(recipe("llama", accumulation=2), **CPU))
    engine.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    for batch in batches(4):
        engine.backward(engine(**batch).loss)
        engine.step()
    everywhere.remove()
    assert calls == ["before", "after", "global"] * 2
    engine.close()


def test_lr_set_by_hand() -> None:
    def by_hand(optimizer: torch.optim.Optimizer) -> Any:
        class Schedule:
            def step(self) -> None:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5

        return Schedule()

    whole = recipe("llama", batches=batches(4), scheduler=by_hand)
    assert_same(run_engine(whole, **CPU), run_plain(whole))


def test_groups_over_low_precision_and_cut_parameters() -> None:
    whole = recipe("gpt2", optimizer=_two_groups, dtype="bf16", max_grad_norm=LIMIT)
    static = {"resident_parameters": 0.3, "resident_optimizer": 0.55, "chunk": 6000}
    assert_same(run_engine(whole, LARGE_BYTES, "static", **static), run_plain(whole))


def test_optimizer_over_some_of_the_parameters() -> None:
    """The others require gradients and get them, but nobody updates them."""

    def some(named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([t for name, t in named.items() if "layers.1" in name], lr=1e-2)

    whole = recipe("llama", optimizer=some)
    want = run_plain(whole)
    assert len(want.states) == 9
    for memory in ({}, {"resident_optimizer": 0.5}):
        assert_same(run_engine(whole, LARGE_BYTES, "static" if memory else "cpu", **memory), want)


def test_group_added_later() -> None:
    def build(named: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([t for name, t in named.items() if "layers.1" in name], lr=1e-2)

    whole = recipe("llama", optimizer=build)
    plain = whole.build()
    engine = make_engine(whole, **CPU)
    optimizer = build(trainable(plain))
    for index, batch in enumerate(whole.batches):
        for model, its in ((plain, optimizer), (engine.module, engine.optimizer)):
            if index == 1:
                late = [p for name, p in model.named_parameters() if "layers.0" in name]
                its.add_param_group({"params": late, "lr": 5e-3})
            model.zero_grad()
            model(**batch).loss.backward()
            its.step()
    assert differences(finish(engine, Run()), _plain_end(plain, optimizer, [])) == []


# -- frozen, tied, unused --------------------------------------------------------------------------------------------


def _frozen(build: Any, *parts: str) -> Any:
    def frozen() -> nn.Module:
        model = build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in parts))
        return model

    return frozen


@pytest.mark.parametrize("parts", [("embed",), ("layers.0", "layers.2"), ("q_proj", "norm"), ("layers", "embed_pos")])
@pytest.mark.parametrize("name", ["opt-pre-norm", "llama"])
def test_frozen_parameters(name: str, parts: tuple[str, ...]) -> None:
    build = _frozen(MODELS[name], *parts)
    for dtype in ("fp32", "bf16"):
        whole = Recipe(build, batches(), dtype=dtype, max_grad_norm=LIMIT)
        want = run_plain(whole)
        run = run_engine(whole, int(least_capacity(whole) * 1.1))
        assert_same(run, want)
        start = build().state_dict()
        assert all(torch.equal(run.weights[n].float(), start[n].to(run.weights[n].dtype).float())
                   for n, p in build().named_parameters() if not p.requires_grad)  # fmt: skip


def test_model_frozen_altogether_runs_forward() -> None:
    whole = Recipe(_frozen(llama, ""), batches(1))
    engine = zero.initialize(whole.build(), config=config_of(whole, **CPU))[0]
    assert torch.equal(engine(**whole.batches[0]).logits, whole.build()(**whole.batches[0]).logits)
    engine.check_integrity()
    engine.close()


class SometimesUsed(nn.Module):
    """A block that only some batches go through, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.always, self.sometimes, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, extra: Tensor) -> Any:
        x = self.always(x)
        if extra.sum() > 0:
            x = x + self.sometimes(x)
        return type("Output", (), {"loss": x.square().mean()})()


@pytest.mark.parametrize("max_grad_norm", [None, LIMIT])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_unused_parameters_are_passed_over_not_decayed(
    dtype: str, accumulation: int, max_grad_norm: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    micro = [
        {"x": torch.randn(4, 8, generator=generator).to(dtypes[dtype]), "extra": torch.tensor([used])}
        for used in (1, 0, 0, 0, 1, 1, 0, 1)
    ]
    whole = Recipe(SometimesUsed, micro, dtype=dtype, accumulation=accumulation, max_grad_norm=max_grad_norm)
    want = run_plain(whole)
    run = run_engine(whole, LARGE_BYTES, "static", resident_optimizer=0.4)
    assert_same(run, want)
    assert "never.weight" not in run.states
    assert want.states["sometimes.weight"]["step"] < want.states["always.weight"]["step"]
    start = SometimesUsed().to(dtypes[dtype]).state_dict()
    assert torch.equal(run.weights["never.weight"], start["never.weight"])


def test_experts_no_token_chose_keep_their_weights() -> None:
    micro = batches(4, rows=1, tokens=2)  # fewer tokens than experts
    whole = recipe("mixtral", batches=micro)
    assert_same(run_engine(whole, int(least_capacity(whole) * 1.1)), run_plain(whole))


# -- adapters --------------------------------------------------------------------------------------------------------


def _with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1,
                                 init_lora_weights=False)  # fmt: skip
        return peft.get_peft_model(llama(), config).train()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lora_trains_the_adapter_alone(dtype: str) -> None:
    whole = Recipe(_with_lora, batches(4), dtype=dtype, max_grad_norm=LIMIT)
    want = run_plain(whole)
    run = run_engine(whole, int(least_capacity(whole) * 1.1))
    assert_same(run, want)
    assert len(run.states) == 12
    changed = [
        n for n, v in _with_lora().state_dict().items() if not torch.equal(v.to(run.weights[n].dtype), run.weights[n])
    ]
    assert changed
    assert all("lora_" in name for name in changed)


def test_lora_adapter_is_saved_as_peft_would(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = Recipe(_with_lora, batches(2))
    engine = make_engine(whole, **CPU)
    for batch in whole.batches:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
    engine.save_pretrained(tmp_path)
    engine.eval()
    want = engine(**whole.batches[0]).logits
    engine.close()
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 50_000
    assert not (tmp_path / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(loaded(**whole.batches[0]).logits, want)


def test_tied_heads_get_both_gradients() -> None:
    whole = Recipe(opt_pre_norm, batches(), max_grad_norm=LIMIT)
    model = whole.build()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    for policy in ("cpu", "auto"):
        run = run_engine(whole, int(least_capacity(whole) * 1.1), policy)
        assert_same(run, run_plain(whole))
        assert torch.equal(run.weights["lm_head.weight"], run.weights["model.decoder.embed_tokens.weight"])
