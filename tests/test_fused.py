"""The update on the device is torch's fused kernel, to the bit, wherever that is what was asked for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.engine_models import recipe
from tests.reference import MakeOptimizer, Recipe, Run, assert_same, make_engine, run_engine, run_plain
from zero.optim.fused import FusedPiece, fused_step, is_fused, scaled

ROOMY = 1 << 30


def _make(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> MakeOptimizer:
    return lambda named: kind(named.values(), lr=1e-2, weight_decay=0.1, **options)


def _recipe(dtype: str = "bf16", clip: float | None = 0.05, name: str = "llama", **options: Any) -> Recipe:
    return recipe(name, dtype=dtype, max_grad_norm=clip, optimizer=_make(**options))


@functools.cache
def _plain(dtype: str, clip: float | None, kind: type[torch.optim.Optimizer], fused: bool | None) -> Run:
    return run_plain(_recipe(dtype, clip, kind=kind, fused=fused))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of each fused step: on this machine its bits may be those of torch's other implementations."""
    seen: list[int] = []

    def counting(kind: type[torch.optim.Optimizer], pieces: list[FusedPiece]) -> None:
        seen.append(len(pieces))
        fused_step(kind, pieces)

    monkeypatch.setattr("zero.optim.update.fused_step", counting)
    return seen


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", pytest.param("native", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize(("dtype", "clip"), [("fp32", None), ("bf16", 0.05), ("fp16", 0.05)])
def test_states_on_the_device_are_updated_by_the_fused_kernel(
    dtype: str, clip: float | None, kind: type[torch.optim.Optimizer], kernel: str, calls: list[int]
) -> None:
    got = run_engine(_recipe(dtype, clip, kind=kind), ROOMY, "cuda", optimizer={"kernel": kernel})
    assert calls
    assert_same(got, _plain(dtype, clip, kind, fused=True))


@pytest.mark.parametrize("fused", [None, True])
def test_with_the_torch_kernel_it_is_what_the_optimizer_says(fused: bool | None, calls: list[int]) -> None:
    got = run_engine(_recipe(fused=fused), ROOMY, "cuda", optimizer={"kernel": "torch"})
    assert_same(got, _plain("bf16", 0.05, torch.optim.AdamW, fused))
    assert bool(calls) == bool(fused)


def test_what_the_user_asks_for_goes_before(calls: list[int]) -> None:
    for foreach in (True, False):
        got = run_engine(_recipe(foreach=foreach), ROOMY, "cuda", optimizer={"kernel": "auto"})
        assert_same(got, _plain("bf16", 0.05, torch.optim.AdamW, None))
    assert not calls


def test_on_the_host_as_device_nothing_changes() -> None:
    got = run_engine(_recipe("fp32"), optimizer={"kernel": "auto"})
    assert_same(got, run_plain(_recipe("fp32")))


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("share", [0.17, 0.51])
def test_no_element_is_left_out_where_a_chunk_is_cut(kernel: str, share: float) -> None:
    """Blocks that the border cuts are joined for torch's kernel; with the native one each side has its part."""
    want = _plain("bf16", 0.05, torch.optim.AdamW, fused=True)
    got = run_engine(_recipe(fused=True), ROOMY, "static", resident_optimizer=share, optimizer={"kernel": kernel})
    if kernel == "torch":
        assert_same(got, want)
    for name, states in want.states.items():
        torch.testing.assert_close(got.states[name]["exp_avg_sq"], states["exp_avg_sq"], rtol=2e-2, atol=1e-9)


def test_pieces_change_no_bit() -> None:
    whole = _recipe()
    engine = make_engine(whole, ROOMY, "cuda", optimizer={"kernel": "auto"})
    engine.optimizer.updater._piece_numel[True] = 128
    engine.backward(engine(**whole.batches[0]).loss)
    engine.step()
    other = make_engine(whole, ROOMY, "cuda", optimizer={"kernel": "auto"})
    other.backward(other(**whole.batches[0]).loss)
    other.step()
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name
    engine.close()
    other.close()


# -- what it takes ---------------------------------------------------------------------------------------------------


def test_temporaries_are_the_gradient_in_fp32_alone() -> None:
    peaks = {}
    for kernel in ("auto", "torch"):
        whole = _recipe()
        engine = make_engine(whole, ROOMY, "cuda", optimizer={"kernel": kernel})
        for batch in whole.batches[:2]:  # the first step makes the states
            loss = engine(**batch).loss
            engine.backward(loss)
            del loss
            engine.step()
            peak_bytes = engine.device.memory().non_model_peak_bytes
            engine.zero_grad()
        largest = max(fact.numel for fact in engine.facts)
        peaks[kernel] = peak_bytes / largest
        engine.close()
    assert peaks["auto"] < 4.5 < peaks["torch"]


# -- the kernel itself -----------------------------------------------------------------------------------------------


def test_which_groups_are_fused() -> None:
    group = torch.optim.AdamW([torch.ones(1)]).param_groups[0]
    assert is_fused(torch.optim.AdamW, group, by_default=True)
    assert not is_fused(torch.optim.AdamW, group, by_default=False)
    assert is_fused(torch.optim.AdamW, {**group, "fused": True}, by_default=False)
    for refused in ({"amsgrad": True}, {"fused": False}, {"lr": torch.tensor(0.1)}, {"foreach": False}):
        assert not is_fused(torch.optim.AdamW, {**group, **refused}, by_default=True)
    assert not is_fused(torch.optim.NAdam, group, by_default=True)


def test_pieces_of_several_groups_and_steps() -> None:
    """As one plain optimizer that has come to different steps with its parameters."""
    first, second = torch.randn(200), torch.randn(70)
    plain = [tensor.clone().requires_grad_() for tensor in (first, second)]
    optimizer = torch.optim.AdamW(
        [{"params": plain[:1]}, {"params": plain[1:], "weight_decay": 0.3, "maximize": True}], lr=0.1, fused=True
    )
    states = [
        {"master": t.clone(), "exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)}
        for t in (first, second)
    ]
    steps = [0, 0]
    for used in ((0,), (0, 1), (0, 1)):
        pieces = []
        optimizer.zero_grad()
        for index in used:
            gradient = torch.randn_like(plain[index])
            plain[index].grad = gradient.clone()
            steps[index] += 1
            pieces.append(FusedPiece(states[index], gradient, optimizer.param_groups[index], steps[index]))
        optimizer.step()
        fused_step(torch.optim.AdamW, pieces)
    for tensor, state in zip(plain, states, strict=True):
        assert torch.equal(tensor.detach(), state["master"])
        assert torch.equal(optimizer.state[tensor]["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    gradient = torch.randn(1000).to(dtype)
    want = gradient.to(torch.float32, copy=True).mul_(0.3)
    assert torch.equal(scaled(gradient.clone(), 0.3), want)
    assert torch.equal(scaled(gradient, 1.0), gradient.to(torch.float32))
