"""Wherever the plan puts parameters and states, the numbers are plain PyTorch's, and the bytes are the stated ones."""

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch

from gemini.plan import DoesNotFitError
from tests import engine_models
from tests.engine_models import MODELS, batches, recipe
from tests.reference import (
    LARGE_BYTES,
    Recipe,
    Run,
    assert_same,
    least_capacity,
    make_engine,
    run_engine,
    run_plain,
)

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID = tuple(itertools.product(FRACTIONS, FRACTIONS))
SAMPLE = ((0.0, 1.0), (0.5, 0.25), (0.25, 0.75), (1.0, 0.5))
ADAM_BYTES = 8


@functools.cache
def _plain(name: str, dtype: str = "fp32") -> Run:
    return run_plain(recipe(name, dtype=dtype))


@functools.cache
def _least_bytes(name: str) -> int:
    return least_capacity(recipe(name))


def _params_bytes(name: str, itemsize: int = 4) -> int:
    return sum(p.numel() * itemsize for p in MODELS[name]().parameters())


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cuda", "cpu", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_policy_changes_no_bit(name: str, policy: str) -> None:
    assert_same(run_engine(recipe(name), LARGE_BYTES, policy), _plain(name))


@pytest.mark.parametrize("name", MODELS)
def test_host_as_device_changes_no_bit(name: str) -> None:
    assert_same(run_engine(recipe(name)), _plain(name))


def _check_static(name: str, parameters: float, optimizer: float, dtype: str = "fp32", chunk: int = 1 << 26) -> None:
    memory = {"resident_parameters": parameters, "resident_optimizer": optimizer, "chunk": chunk}
    run = run_engine(recipe(name, dtype=dtype), LARGE_BYTES, "static", **memory)
    assert_same(run, _plain(name, dtype))
    itemsize = 4 if dtype == "fp32" else 2
    total_bytes = _params_bytes(name, itemsize)
    stayed = run.extra["report"].device_bytes_by_kind
    assert abs(run.extra["plan"].resident_parameter_bytes - parameters * total_bytes) < itemsize
    assert stayed.get("parameters", 0) == run.extra["plan"].resident_parameter_bytes
    state_bytes = optimizer * total_bytes // itemsize * ADAM_BYTES
    assert abs(stayed.get("optimizer", 0) - state_bytes) <= ADAM_BYTES


@pytest.mark.parametrize(("parameters", "optimizer"), SAMPLE)
@pytest.mark.parametrize("name", ["opt-post-norm", "mixtral"])
def test_sampled_static_fractions_are_exact_in_bits_and_bytes(name: str, parameters: float, optimizer: float) -> None:
    _check_static(name, parameters, optimizer)


@pytest.mark.parametrize(("parameters", "optimizer"), SAMPLE)
def test_static_fractions_with_low_precision_and_small_chunks(parameters: float, optimizer: float) -> None:
    _check_static("llama", parameters, optimizer, dtype="bf16", chunk=4096)


@pytest.mark.full
@pytest.mark.parametrize(("parameters", "optimizer"), GRID)
@pytest.mark.parametrize("name", MODELS)
def test_static_fractions_are_exact_in_bits_and_bytes(name: str, parameters: float, optimizer: float) -> None:
    _check_static(name, parameters, optimizer)


@pytest.mark.full
@pytest.mark.parametrize(("parameters", "optimizer"), GRID)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_static_fractions_in_low_precision(dtype: str, parameters: float, optimizer: float) -> None:
    _check_static("opt-pre-norm", parameters, optimizer, dtype)


@pytest.mark.parametrize("chunk", [1, pytest.param(1000, marks=pytest.mark.full), 9999])
@pytest.mark.parametrize("streams", ["procrastinating", "random", pytest.param("immediate", marks=pytest.mark.full)])
def test_neither_chunk_bytes_nor_stream_order_change_a_bit(chunk: int, streams: str) -> None:
    device = {"streams": streams, "stream_seed": 5}
    run = run_engine(recipe("gpt2"), int(_least_bytes("gpt2") * 1.1), device=device, chunk=chunk)
    assert_same(run, _plain("gpt2"))


# -- capacities ------------------------------------------------------------------------------------------------------

_CAPACITIES = (1.0, 1.1, 1.5, 2.5, 6.0)


def _check_capacity(name: str, ratio: float, dtype: str = "fp32") -> Run:
    capacity_bytes = int(_least_bytes(name) * ratio)
    run = run_engine(recipe(name, dtype=dtype), capacity_bytes)
    assert_same(run, _plain(name, dtype))
    report = run.extra["report"]
    assert 0 < report.device_peak_bytes <= capacity_bytes == report.device_capacity_bytes
    assert report.model_data_peak_bytes <= report.device_peak_bytes
    return run


@pytest.mark.parametrize("ratio", _CAPACITIES)
def test_auto_keeps_within_five_capacities(ratio: float) -> None:
    _check_capacity("llama", ratio)


@pytest.mark.full
@pytest.mark.parametrize("ratio", _CAPACITIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_auto_keeps_within_capacity(name: str, dtype: str, ratio: float) -> None:
    _check_capacity(name, ratio, dtype)


def test_more_capacity_means_fewer_fetches() -> None:
    fetches = [_check_capacity("llama", ratio).extra["report"].num_fetches for ratio in _CAPACITIES]
    assert fetches == sorted(fetches, reverse=True)
    assert fetches[0] > 0 == fetches[-1]


def test_prediction_is_near_the_measured_peak() -> None:
    for ratio in _CAPACITIES:
        report = _check_capacity("opt-pre-norm", ratio).extra["report"]
        assert report.predicted_device_peak_bytes == pytest.approx(report.device_peak_bytes, rel=0.05)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "cuda", "cpu", "static"])
def test_capacity_below_the_largest_chunk_is_refused_before_training(policy: str) -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        make_engine(recipe("llama"), 8192, policy)
    _check_refusal(refusal.value, 8192)


def _check_refusal(error: DoesNotFitError, capacity_bytes: int) -> None:
    assert {tier for _, tier, _, _ in error.rows} == {"device"}
    assert len(error.rows) >= 4
    assert all(num_bytes >= 0 for _, _, num_bytes, _ in error.rows)
    needed = next(num_bytes for what, _, num_bytes, _ in error.rows if what == "needed in all")
    assert needed > capacity_bytes
    assert "smallest change that would fit" in error.advice
    assert all(what in str(error) for what, _, _, _ in error.rows)
    assert error.advice in str(error)


def test_policy_that_cannot_keep_all_is_refused_and_auto_advised() -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        make_engine(recipe("llama"), int(_least_bytes("llama") * 1.1), "cuda")
    _check_refusal(refusal.value, int(_least_bytes("llama") * 1.1))
    assert 'memory.policy = "auto"' in refusal.value.advice


def test_batch_that_no_placement_can_run_is_refused_with_the_table() -> None:
    engine = make_engine(recipe("llama"), int(_least_bytes("llama") * 0.7))
    with pytest.raises(DoesNotFitError) as refusal:
        engine.backward(engine(**batches(1)[0]).loss)
    _check_refusal(refusal.value, int(_least_bytes("llama") * 0.7))
    assert any("activations" in what for what, _, _, _ in refusal.value.rows)
    engine.close()


@pytest.mark.parametrize("name", ["opt-post-norm", "llama", pytest.param("mixtral", marks=pytest.mark.full)])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_advised_capacity_works(name: str, ratio: float) -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        run_engine(recipe(name), int(_least_bytes(name) * ratio))
    advised = re.search(r"at least (\d+)KiB", refusal.value.advice)
    assert advised is not None
    capacity_bytes = int(advised[1]) * 1024
    assert _least_bytes(name) * 0.95 < capacity_bytes < _least_bytes(name) * 1.15
    assert_same(run_engine(recipe(name), capacity_bytes), _plain(name))


# -- longer batches --------------------------------------------------------------------------------------------------

_SHAPES = {
    "longer": [(2, 8), (2, 8), (2, 24), (2, 8)],
    "more rows": [(1, 12), (1, 12), (3, 12), (1, 12)],
    "longer rows of as many tokens": [(4, 6), (4, 6), (1, 24), (4, 6)],
    "shorter": [(2, 24), (2, 8), (2, 16), (2, 24)],
}


def _shaped(shapes: list[tuple[int, int]]) -> Recipe:
    micro = [batches(1, rows, tokens, seed=i)[0] for i, (rows, tokens) in enumerate(shapes)]
    return Recipe(engine_models.llama, micro)


@pytest.mark.parametrize("case", _SHAPES)
def test_longer_batch_after_warm_up_replans_instead_of_failing(case: str) -> None:
    whole = _shaped(_SHAPES[case])
    need = max(least_capacity(whole.but(batches=[batch])) for batch in whole.batches)
    run = run_engine(whole, int(need * 1.02))
    assert_same(run, run_plain(whole))


def test_longer_batch_really_changes_the_plan() -> None:
    whole = _shaped(_SHAPES["longer"])
    capacity_bytes = int(least_capacity(whole) * 1.02)
    engine = make_engine(whole, capacity_bytes)
    resident = []
    for batch in whole.batches:
        engine.zero_grad()
        engine.backward(engine(**batch).loss)
        resident.append(engine.plan.resident_parameter_bytes + engine.plan.device_optimizer_bytes)
        engine.step()
    assert resident[1] > resident[2]
    assert engine.memory_report().device_peak_bytes <= capacity_bytes
    engine.close()


def test_another_process_takes_memory_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next pass the plan makes room: no pass runs out of memory, and later everything comes back."""
    whole = recipe("llama", batches=batches(9))
    engine = make_engine(whole, int(least_capacity(whole) * 2.5))
    ran_out: list[int] = []
    monkeypatch.setattr(engine._planner, "ran_out", lambda: ran_out.append(1))
    losses, resident = [], []
    for number, batch in enumerate(whole.batches):
        engine.zero_grad()
        if number == 3:  # nearly all that is not needed
            engine.device.others_bytes = engine.device.capacity_bytes - int(least_capacity(whole) * 1.2)
        if number == 6:
            engine.device.others_bytes = 0
        loss = engine(**batch).loss
        losses.append(loss.item())
        engine.backward(loss)
        del loss
        engine.step()
        engine.check_integrity()
        resident.append(engine.plan.resident_parameter_bytes + engine.plan.device_optimizer_bytes)
    assert resident[2] == resident[8] > resident[4]
    assert ran_out == []
    want = run_plain(whole)
    assert losses == want.losses
    assert all(torch.equal(value, want.weights[name]) for name, value in engine.module.state_dict().items())
    engine.close()


def test_dropout_draws_the_same_numbers_when_a_batch_is_run_again() -> None:
    """OPT draws dropout: a forward that is started over must not draw on from where it failed."""
    micro = [batches(1, 2, tokens, seed=tokens)[0] for tokens in (6, 6, 30, 6)]
    whole = recipe("opt-pre-norm", batches=micro)
    need = least_capacity(whole)
    assert_same(run_engine(whole, int(need * 1.02)), run_plain(whole))
    assert torch.is_grad_enabled()
