"""Formats of master and moments in training: split changes no bit, the smaller ones repeat theirs everywhere."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import TINY, train
from torch import Tensor, nn

import zero
from gemini.plan import host_bytes
from gemini.store import Tier
from tests.engine_models import MODELS, batches, recipe
from tests.ranks import run_ranks
from tests.reference import (
    Recipe,
    Run,
    assert_same,
    differences,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
    trainable,
)
from tests.sampled import sampled
from zero.config.loading import load_config
from zero.config.overrides import parse_overrides
from zero.planning import assumed_evaluation_shape, plan_run
from zero.setup import make_device

ROOMY = 1 << 30
BYTES = {"fp32": 16, "split": 14, "bf16": 10, "8bit": 7 + 8 / 256}
"""Of weights, gradient, master and moments, per parameter; in whole blocks."""
COMPACT = ("bf16", "8bit")
WHERE: dict[str, dict[str, Any]] = {
    "cpu": {"policy": "cpu"},
    "auto": {"policy": "auto"},
    "static": {"policy": "static", "resident_parameters": 0.3, "resident_optimizer": 0.5},
    "crossing": {"policy": "static", "resident_parameters": 1.0, "resident_optimizer": 0.0},
    "crossing-back": {"policy": "static", "resident_parameters": 0.0, "resident_optimizer": 1.0},
    "resident": {"policy": "static", "resident_parameters": 1.0, "resident_optimizer": 1.0},
}


@functools.cache
def _recipe(name: str, clip: float | None = 0.05) -> Recipe:
    return recipe(name, dtype="bf16", max_grad_norm=clip)


@functools.cache
def _tiny_device(name: str) -> int:
    return int(least_capacity(_recipe(name)) * 1.6)


def _run(state: str, name: str, where: str, kernel: str = "torch", clip: float | None = 0.05, **changes: Any) -> Run:
    capacity_bytes = _tiny_device(name) if where == "auto" else ROOMY
    options = {**WHERE[where], **changes}
    options["optimizer"] = {"kernel": kernel} | changes.get("optimizer", {})
    return run_engine(_recipe(name, clip), capacity_bytes, precision={"optimizer_state": state}, **options)


@functools.cache
def _fp32(name: str, where: str, kernel: str, clip: float | None = 0.05) -> Run:
    return _run("fp32", name, where, kernel, clip)


@functools.cache
def _first(state: str, kernel: str) -> Run:
    """A run that others are compared with."""
    return _run(state, "llama", "cpu", kernel)


# -- split -----------------------------------------------------------------------------------------------------------

_QUICK = (("llama", "cpu", "native"), ("opt-pre-norm", "static", "torch"), ("llama", "auto", "torch"),
          ("opt-pre-norm", "crossing", "native"), ("llama", "resident", "torch"))  # fmt: skip
_ALL = itertools.product(MODELS, WHERE, ("native", "torch"))
_CASES = [*_QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in _ALL if case not in _QUICK)]


@pytest.mark.parametrize(("name", "where", "kernel"), _CASES)
def test_split_changes_no_bit(name: str, where: str, kernel: str) -> None:
    got = _run("split", name, where, kernel)
    assert_same(got, _fp32(name, where, kernel))
    if kernel == "torch":
        assert_same(got, run_plain(_recipe(name)))


@pytest.mark.parametrize("fused", [True, False])
def test_split_under_torchs_own_kernels(fused: bool) -> None:
    def optimizer(named: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(named.values(), lr=1e-3, weight_decay=0.1, fused=fused, foreach=not fused)

    whole = _recipe("opt-pre-norm").but(optimizer=optimizer)
    where = {**WHERE["static"], "resident_parameters": 0.77}
    assert_same(run_engine(whole, ROOMY, **where, precision={"optimizer_state": "split"}), run_plain(whole))


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_the_host_as_device(state: str) -> None:
    native = {"optimizer": {"kernel": "native"}}
    got = run_engine(_recipe("llama"), precision={"optimizer_state": state}, **native)
    assert_same(got, _fp32("llama", "cpu", "native") if state == "split" else _first(state, "native"))


def test_accumulation_and_overlap() -> None:
    whole = _recipe("llama").but(accumulation=2, batches=batches(4))
    got = run_engine(whole, ROOMY, "cpu", precision={"optimizer_state": "split"}, optimizer={"workers": 3})
    assert_same(got, run_plain(whole))


@pytest.mark.parametrize("state", ["split", "bf16", pytest.param("8bit", marks=pytest.mark.full)])
def test_updates_inside_backward(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zero.optim.early import EarlyUpdates

    confirmed: list[bool] = []
    confirm = EarlyUpdates.confirm

    def seen(early: EarlyUpdates, *args: Any) -> bool:
        confirmed.append(confirm(early, *args))
        return confirmed[-1]

    monkeypatch.setattr(EarlyUpdates, "confirm", seen)
    late = _run(state, "llama", "cpu", "native", None, optimizer={"early": False})
    assert not any(confirmed)
    assert_same(_run(state, "llama", "cpu", "native", None, optimizer={"early": True}), late)
    assert any(confirmed)


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_an_early_update_is_taken_back(state: str) -> None:
    """A gradient that is not finite comes after updates have begun: the step is skipped as if they had not."""
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = _recipe("llama", None).but(spoil={1: (name, float("inf"))})
    got = [
        run_engine(whole, ROOMY, "cpu", precision={"optimizer_state": state}, optimizer={"early": early})
        for early in (True, False)
    ]
    assert got[0].num_skipped == 1
    assert_same(got[0], got[1])


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_on_disk(state: str, tmp_path: Path) -> None:
    got = _run(state, "llama", "cpu", "native", disk=str(tmp_path), host="160KiB", chunk="8KiB")
    assert got.extra["report"].disk_bytes > 0
    assert_same(got, _first(state, "native"))


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", sampled(["cpu", "crossing", "static", "crossing-back"], 2))
@pytest.mark.parametrize(
    "state", ["split", "8bit", *(pytest.param(s, marks=pytest.mark.full) for s in ("fp32", "bf16"))]
)
def test_bytes_are_those_of_the_plan(state: str, where: str) -> None:
    whole = _recipe("opt-pre-norm")
    engine = make_engine(whole, ROOMY, **WHERE[where], chunk="8KiB", precision={"optimizer_state": state})
    for batch in whole.batches[:2]:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.check_integrity()
    engine.synchronize()
    store, chunks = engine.manager.store, engine.manager.chunks
    numel = sum(chunk.numel for chunk in chunks)
    assert store.tier_bytes(Tier.HOST) == host_bytes(engine.facts, [chunk.placement for chunk in chunks])
    assert engine.memory_report().host_bytes == store.tier_bytes(Tier.HOST)
    if where == "cpu":
        assert store.tier_bytes(Tier.HOST) == BYTES[state] * numel
    plan = engine.plan
    placed = store.tier_bytes(Tier.DEVICE) - sum(chunk.gathered_bytes for chunk in chunks)
    assert placed == plan.resident_parameter_bytes + plan.device_optimizer_bytes
    engine.close()


@pytest.mark.parametrize("state", ["8bit", *(pytest.param(s, marks=pytest.mark.full) for s in ("split", "bf16"))])
def test_what_is_planned_is_what_a_run_ends_with(state: str, tmp_path: Path) -> None:
    import json

    overrides = ("--precision.dtype", "bf16", "--precision.optimizer_state", state, "--device.memory", "8MiB")
    overrides = (*overrides, "--memory.policy", "static", "--memory.resident_optimizer", "0.4")
    overrides = (*overrides, "--train.max_steps", "2", "--train.max_grad_norm", "1")
    config = load_config(TINY, parse_overrides(overrides))
    planned = plan_run(config, make_device(config), evaluation_shape=assumed_evaluation_shape(config))
    assert train(tmp_path, tmp_path / "out", *overrides) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["host_bytes"] == planned.host_bytes
    assert summary["device_peak_bytes"] <= planned.require().predicted_device_peak_bytes


@pytest.mark.parametrize("state", ["split", pytest.param("bf16", marks=pytest.mark.full), "8bit"])
def test_auto_uses_a_tight_device_and_stays_within(state: str) -> None:
    capacity_bytes = _tiny_device("llama")
    got = _run(state, "llama", "auto")
    assert got.extra["report"].device_peak_bytes <= capacity_bytes
    assert got.extra["plan"].device_optimizer_bytes + got.extra["plan"].resident_parameter_bytes > 0


# -- bf16 and 8bit ---------------------------------------------------------------------------------------------------

_CHANGES: dict[str, dict[str, Any]] = {
    "again": {},
    "chunks": {"chunk": "6KiB"},
    "static": WHERE["static"],
    "crossing": WHERE["crossing"],
    "crossing-back": WHERE["crossing-back"],
    "resident": WHERE["resident"],
    "workers": {"optimizer": {"workers": 3}},
    "inline": {"optimizer": {"workers": 0}},
}
_OFTEN = ("static", "workers")


@pytest.mark.parametrize("kernel", ["torch", pytest.param("native", marks=pytest.mark.full)])
@pytest.mark.parametrize("change", [c if c in _OFTEN else pytest.param(c, marks=pytest.mark.full) for c in _CHANGES])
@pytest.mark.parametrize("state", COMPACT)
def test_results_depend_on_nothing_but_numbers(state: str, change: str, kernel: str) -> None:
    got = _run(state, "llama", "cpu", kernel, **{"policy": "cpu", **_CHANGES[change]})
    want = _first(state, kernel)
    if kernel == "torch" or not got.extra["plan"].device_optimizer_bytes:
        assert_same(got, want)
        return
    assert got.losses == pytest.approx(want.losses, rel=1e-3)  # the device's arithmetic is torch's


def test_the_seed_is_the_runs() -> None:
    other = _run("8bit", "llama", "cpu", train={"seed": 7})
    assert differences(other, _first("8bit", "torch")) != []
    assert other.losses == pytest.approx(_first("8bit", "torch").losses, rel=1e-2)


@pytest.mark.parametrize("state", [pytest.param("bf16", marks=pytest.mark.full), "8bit"])
def test_training_is_close_to_that_with_fp32_states(state: str) -> None:
    """40 steps on 4 batches: the loss falls as far as with fp32 states, within a twentieth of the way."""

    def optimizer(named: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(named.values(), lr=3e-3)

    whole = _recipe("llama", 1.0).but(batches=batches(4) * 10, optimizer=optimizer)
    losses: dict[str, list[float]] = {}
    for kind in ("fp32", state):
        options = {"precision": {"optimizer_state": kind}, "optimizer": {"kernel": "native"}}
        losses[kind] = run_engine(whole, ROOMY, "cpu", **options).losses
    first, last = losses["fp32"][0], sum(losses["fp32"][-4:]) / 4
    assert last < first - 1
    assert abs(sum(losses[state][-4:]) / 4 - last) < 0.05 * (first - last)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def _train(engine: Any, steps: range) -> list[float]:
    losses = []
    for batch in batches(6)[steps.start : steps.stop]:
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _results(engine: Any, losses: list[float]) -> Run:
    run = Run(losses=losses, weights=dict(engine.module.state_dict()))
    names = {id(p): name for name, p in engine.module.named_parameters()}
    run.states = {names[id(p)]: state for p, state in engine.optimizer.state.items()}
    engine.close()
    return run


def _engine(state: str, where: str = "cpu", kernel: str = "torch", **changes: Any) -> Any:
    options = {**WHERE[where], **changes}
    return make_engine(
        _recipe("llama"), ROOMY, **options, precision={"optimizer_state": state}, optimizer={"kernel": kernel}
    )


_RESUMES = [("split", "fp32", "static"), ("fp32", "split", "cpu"), ("8bit", "8bit", "static"), ("bf16", "bf16", "cpu")]


@pytest.mark.parametrize(("saved", "loaded", "where"), _RESUMES)
def test_a_resumed_run_goes_on_to_the_bit(saved: str, loaded: str, where: str, tmp_path: Path) -> None:
    whole = _engine(loaded)
    want = _results(whole, _train(whole, range(6))[3:])
    first = _engine(saved)
    _train(first, range(3))
    first.save_checkpoint(tmp_path)
    first.close()
    second = _engine(loaded, where, chunk="6KiB")
    _train(second, range(4, 6))  # what it has done before is forgotten
    second.load_checkpoint(tmp_path)
    assert_same(_results(second, _train(second, range(3, 6))), want)


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_a_save_in_the_background_is_of_its_moment(state: str, tmp_path: Path) -> None:
    engine = _engine(state, "static")
    _train(engine, range(2))
    engine.save_checkpoint(tmp_path / "beside", asynchronous=True)
    want = _train(engine, range(2, 4))
    engine.close()
    other = _engine(state)
    other.load_checkpoint(tmp_path / "beside")
    assert _train(other, range(2, 4)) == want
    other.close()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("state", ["split", "8bit"])
def test_a_model_streamed_from_files(state: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    MODELS["llama"]().to(dtype).save_pretrained(tmp_path)
    runs = []
    for context in (contextlib.nullcontext(), zero.ZeroInitContext()):
        with context:
            model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        config = {"device": {"type": "cpu"}, "precision": {"dtype": "bf16", "optimizer_state": state}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine = zero.initialize(model, optimizer, config=config)[0]
        if not runs:
            for name, parameter in LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters():
                tensor = engine._tensors[id(dict(engine.module.named_parameters())[name])]
                master = tensor.chunk.companion_of(tensor, "master")
                torch.testing.assert_close(
                    master, parameter.detach().float(), rtol=2**-16 if state == "8bit" else 0, atol=0
                )
        runs.append(_results(engine, _train(engine, range(2))))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_states_go_out_and_come_back_to_the_bit(state: str) -> None:
    engine, other = _engine(state), _engine(state, "static")
    _train(engine, range(3))
    _train(other, range(3, 5))
    other.module.load_state_dict(engine.module.state_dict())
    other.optimizer.load_state_dict(engine.optimizer.state_dict())
    for mine, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        for key, value in engine.optimizer.state[mine].items():
            assert torch.equal(value, other.optimizer.state[theirs][key]), key
    engine.close()
    other.close()


# -- what users do ---------------------------------------------------------------------------------------------------


def _look(engine: Any) -> None:
    assert all(float(p.detach().float().norm()) >= 0 for p in engine.module.parameters())
    assert engine.optimizer.state_dict()["state"]
    with engine.gathered_parameters():
        pass


def _write(engine: Any) -> None:
    with torch.no_grad():
        engine.module.model.norm.weight[3:5] = 0.3
        with engine.gathered_parameters():
            engine.module.lm_head.weight[2, :7] = 0.1


def _change_states(engine: Any) -> None:
    for parameter in itertools.islice(engine.module.parameters(), 4):
        engine.optimizer.state[parameter]["exp_avg"].mul_(0.5)
    del engine.optimizer.state[engine.module.lm_head.weight]


def _between(state: str, where: str, act: Callable[[Any], None]) -> Run:
    engine = _engine(state, where)
    losses = _train(engine, range(2))
    act(engine)
    losses += _train(engine, range(2, 4))
    engine.check_integrity()
    return _results(engine, losses)


@pytest.mark.parametrize("where", ["cpu", "resident", pytest.param("crossing", marks=pytest.mark.full)])
@pytest.mark.parametrize("state", ["split", pytest.param("bf16", marks=pytest.mark.full), "8bit"])
def test_looking_changes_nothing(state: str, where: str) -> None:
    assert_same(_between(state, where, _look), _between(state, "cpu", lambda engine: None))


@pytest.mark.parametrize("where", sampled(["crossing", "cpu", "static", "resident"], 2))
@pytest.mark.parametrize("act", [_write, _change_states])
def test_what_is_written_counts_as_with_fp32_states(act: Callable[[Any], None], where: str) -> None:
    assert_same(_between("split", where, act), _between("fp32", "cpu", act))


def _partly_frozen() -> nn.Module:
    model = MODELS["opt-pre-norm"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "layer_norm" in name)
    return model


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_frozen_parameters_take_no_states(state: str) -> None:
    whole = _recipe("opt-pre-norm").but(build=_partly_frozen)
    got = run_engine(whole, ROOMY, "cpu", precision={"optimizer_state": state})
    plain = run_plain(whole)
    if state == "split":
        assert_same(got, plain)
    frozen = {name for name, p in _partly_frozen().named_parameters() if not p.requires_grad}
    assert all(torch.equal(got.weights[name], plain.weights[name]) for name in frozen if name in got.weights)


def test_experts_that_no_token_chose() -> None:
    whole = _recipe("mixtral").but(batches=batches(3, rows=1, tokens=2))
    assert_same(run_engine(whole, ROOMY, "cpu", precision={"optimizer_state": "split"}), run_plain(whole))


# -- ranks -----------------------------------------------------------------------------------------------------------


def train_on_rank(state: str, kernel: str, folder: str | None = None, load: bool = False) -> Any:
    """Three steps; every rank has the same batches, so that their mean gradient is that of one process."""
    whole = _recipe("llama", None)
    model = whole.build()
    config = {
        "device": {"type": "simulated", "memory": ROOMY},
        "memory": {"policy": "static", "resident_parameters": 0.3, "resident_optimizer": 0.4},
        "parallel": {"replicate": "1KiB"},
        "precision": {"dtype": "bf16", "optimizer_state": state},
        "optimizer": {"kernel": kernel},
    }
    engine, *_ = zero.initialize(model, whole.optimizer(trainable(model)), config=config)
    if load:
        engine.load_checkpoint(folder)
    run = _results_of_rank(engine, _train(engine, range(3, 6) if load else range(3)), None if load else folder)
    engine.close()
    return run


def _results_of_rank(engine: Any, losses: list[float], folder: str | None) -> Any:
    if folder is not None:
        engine.save_checkpoint(folder)
    engine.check_integrity()
    states = engine.optimizer.state_dict()["state"]
    flat = [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
    return losses, [*(value.clone() for value in engine.module.state_dict().values()), *flat]


def _equal(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("kernel", ["torch", pytest.param("native", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "state", ["split", *(pytest.param(state, marks=pytest.mark.full) for state in ("bf16", "8bit"))]
)
def test_ranks_do_as_one_process(state: str, kernel: str, tmp_path: Path) -> None:
    reference = "fp32" if state == "split" else state
    alone = run_ranks(train_on_rank, 1, reference, kernel, str(tmp_path / "one"), own_group=False)[0]
    ranks = run_ranks(train_on_rank, 2, state, kernel, str(tmp_path / "two"))
    assert all(_equal(rank, ranks[0]) for rank in ranks)
    if kernel == "torch":
        assert _equal(ranks[0], alone)
    # Saved by two, continued by one.
    args = (state, kernel, str(tmp_path / "two"), True)
    again = run_ranks(train_on_rank, 1, *args, own_group=False)[0]
    other = run_ranks(train_on_rank, 1, reference, kernel, str(tmp_path / "one"), True, own_group=False)[0]
    if kernel == "torch":
        assert _equal(again, other)
