"""Loss scale, overflow, NaN, clipping, accumulation: equal to plain PyTorch with the same fp32 masters."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine_models import batches, llama, recipe
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    assert_same,
    differences,
    make_engine,
    run_engine,
    run_plain,
    trainable,
)

DTYPES = ("fp32", "bf16", "fp16")
SPOILED = "model.layers.1.mlp.up_proj.weight"
CPU = {"capacity_bytes": LARGE_BYTES, "policy": "cpu"}


@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt-post-norm", "llama"])
def test_clipping(name: str, dtype: str, max_grad_norm: float | None) -> None:
    whole = recipe(name, dtype=dtype, max_grad_norm=max_grad_norm, scale=1024.0)
    want = run_plain(whole)
    assert want.num_skipped == 0
    assert min(want.norms) > 0.05
    assert_same(run_engine(whole, **CPU), want)


def test_clipping_matters() -> None:
    clipped, free = (run_plain(recipe("llama", max_grad_norm=limit)) for limit in (0.05, None))
    assert differences(clipped, free) != []


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "dtype", "max_grad_norm", "accumulation"),
    itertools.product(["opt-pre-norm", "gpt2", "mixtral"], DTYPES, [None, 0.05], [1, 4]),
)
def test_dtype_clipping_and_accumulation(name: str, dtype: str, max_grad_norm: float | None, accumulation: int) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "max_grad_norm": max_grad_norm, "accumulation": accumulation}
    whole = recipe(name, batches=batches(6), scale=256.0, **changes)
    want = run_plain(whole)
    for policy in ("cpu", "cuda", "auto"):
        assert_same(run_engine(whole, LARGE_BYTES, policy), want)


# -- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_batches", [4, 8, 6, 1, 9])
def test_last_group_of_an_accumulation_may_be_uneven(num_batches: int) -> None:
    whole = recipe("opt-pre-norm", batches=batches(num_batches), accumulation=4)
    want = run_plain(whole)
    assert len(want.norms) == math.ceil(num_batches / 4)
    assert_same(run_engine(whole, **CPU), want)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulation_sums_in_fp32_wherever_gradients_lie(dtype: str, fraction: float) -> None:
    whole = recipe("llama", batches=batches(6), accumulation=4, dtype=dtype, max_grad_norm=0.05, scale=64.0)
    memory = {"resident_parameters": 0.6, "resident_optimizer": fraction}
    assert_same(run_engine(whole, LARGE_BYTES, "static", **memory), run_plain(whole))


def test_two_epochs_step_at_the_end_of_each() -> None:
    whole = recipe("llama", batches=batches(3), accumulation=2)
    import zero
    from tests.reference import Reference, Run, config_of, finish

    reference = Reference(whole)
    torch.manual_seed(0)
    for batch, acts in zip(whole.batches * 2, [False, True, True] * 2, strict=True):
        reference.backward(whole.loss(reference.model, batch))
        if acts:
            reference.step()
    model = whole.build()
    engine, loader, *_ = zero.initialize(
        model, whole.optimizer(trainable(model)), train_dataloader=whole.batches, config=config_of(whole, **CPU)
    )
    torch.manual_seed(0)
    acted = []
    for _ in range(2):
        for batch in loader:
            engine.zero_grad()
            engine.backward(engine(**batch).loss)
            acted.append(engine.is_boundary)
            engine.step()
    assert acted == [False, True, True] * 2
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


def test_reading_the_loader_to_its_end_without_training_steps_nothing_early() -> None:
    whole = recipe("llama", batches=batches(4), accumulation=4)
    import zero
    from tests.reference import config_of

    model = whole.build()
    engine, loader, *_ = zero.initialize(
        model, whole.optimizer(trainable(model)), train_dataloader=whole.batches, config=config_of(whole, **CPU)
    )
    assert len(list(loader)) == 4  # a user looks at the data first
    acted = []
    for batch in loader:
        engine.backward(engine(**batch).loss)
        acted.append(engine.is_boundary)
        engine.step()
        engine.zero_grad()
    assert acted == [False, False, False, True]
    engine.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_user_accumulates_by_calling_backward_several_times(dtype: str) -> None:
    """Without ``gradient_accumulation_steps``: three backward passes, then one step."""
    from tests.reference import Reference, Run, finish

    whole = recipe("llama", batches=batches(6), dtype=dtype, scale=256.0)
    reference, engine = Reference(whole), make_engine(whole, **CPU)
    for start in (0, 3):
        for batch in whole.batches[start : start + 3]:
            reference.backward(reference.model(**batch).loss / 3)
            reference.collect()
            engine.backward(engine(**batch).loss / 3)
        reference.step()
        engine.step()
        engine.zero_grad()
    run = finish(engine, Run())
    assert differences(run, Run(weights=dict(reference.model.state_dict()), states=reference.states())) == []


# -- what is not finite ----------------------------------------------------------------------------------------------


def test_overflow_backs_off_with_hysteresis_and_grows_again() -> None:
    inf = (SPOILED, math.inf)
    spoiled = {2: inf, 4: inf, 5: inf, 9: inf}
    whole = recipe("llama", batches=batches(14), dtype="fp16", scale=64.0, interval=3, spoil=spoiled)
    want = run_plain(whole)
    assert want.num_skipped == 4
    #                      0   1   2!  3   4!  5!  6   7   8   9!  10  11  12   13
    assert want.scales == [64, 64, 64, 64, 32, 16, 16, 16, 32, 32, 32, 32, 64, 64]
    assert_same(run_engine(whole, **CPU), want)


def test_real_overflow_of_a_scale_too_high_finds_its_way() -> None:
    whole = recipe("llama", batches=batches(12), dtype="fp16", scale=2.0**24)
    want = run_plain(whole)
    assert 3 <= want.num_skipped < 12
    assert_same(run_engine(whole, **CPU), want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_with_a_gradient_that_is_not_finite_is_skipped(dtype: str, value: float, accumulation: int) -> None:
    spoiled = {2: (SPOILED, value)}
    changes: dict[str, Any] = {"dtype": dtype, "accumulation": accumulation, "scale": 64.0, "max_grad_norm": 1.0}
    whole = recipe("llama", batches=batches(6), spoil=spoiled, **changes)
    want = run_plain(whole)
    assert want.num_skipped == 1
    run = run_engine(whole, **CPU)
    assert_same(run, want)
    assert run.num_skipped == 1


def test_skipped_step_touches_nothing() -> None:
    whole = recipe("llama", dtype="bf16")
    engine = make_engine(whole, **CPU)
    for index, batch in enumerate(whole.batches):
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        before = dict(engine.module.state_dict()), engine.optimizer.state_dict()
        if index == 1:
            trainable(engine.module)[SPOILED].grad[0, 0] = math.nan
        engine.step()
        after = dict(engine.module.state_dict()), engine.optimizer.state_dict()
        assert engine.skipped_last_step == (index == 1)
        assert _same(before, after) == (index == 1)
    assert (engine.num_steps, engine.num_skipped_steps) == (2, 1)
    engine.close()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


def test_norm_that_overflows_where_no_element_does_is_no_skip() -> None:
    """1e30 squared is beyond fp32: torch clips such gradients to zero, and so must we."""

    def big(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss * 1e30

    whole = Recipe(llama, batches(2), loss=big, max_grad_norm=1.0)
    want = run_plain(whole)
    assert math.isinf(want.norms[0])
    assert_same(run_engine(whole, **CPU), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_scale_is_one_unless_fp16(dtype: str) -> None:
    engine = make_engine(recipe("llama", dtype=dtype), **CPU)
    assert engine.loss_scale == (65536.0 if dtype == "fp16" else 1.0)
    engine.close()


def test_scale_that_is_no_power_of_two() -> None:
    """Unscaling then rounds; it is one multiplication together with the clip factor here, and two in plain PyTorch."""
    whole = recipe("llama", dtype="fp16", scale=1000.0, max_grad_norm=0.05)
    run, want = run_engine(whole, **CPU), run_plain(whole)
    assert run.losses == pytest.approx(want.losses, rel=1e-4)
    assert run.norms == pytest.approx(want.norms, rel=1e-4)


def test_a_scaled_backward_that_was_forgotten_does_not_count_for_one_of_the_users_own() -> None:
    whole = recipe("llama", dtype="fp16", scale=1024.0)
    engine = make_engine(whole, **CPU)
    engine.backward(engine(**whole.batches[0]).loss)
    engine.zero_grad()
    engine(**whole.batches[0]).loss.backward()
    engine.step()
    own_norm = engine.grad_norm
    engine.close()
    engine = make_engine(whole, **CPU)
    engine(**whole.batches[0]).loss.backward()
    engine.step()
    assert own_norm == engine.grad_norm
    engine.close()
