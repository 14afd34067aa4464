"""A value that is not finite, wherever it comes from, reaches no weight, no optimizer state and no file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zero
from tests.rank_case import digest, make_model, share
from tests.ranks import run_ranks

SOURCES = ("loss", "one gradient", "infinite gradient", "norm")
DTYPES = ("fp32", "bf16", "fp16")
TIERS = ("host", "device")
CASES = list(itertools.product(SOURCES, DTYPES, TIERS))


def _engine(dtype: str, tier: str, **parallel: Any) -> Any:
    model = make_model("opt")
    policy = {"policy": "cpu" if tier == "host" else "cuda"}
    config = {
        "device": {"type": "simulated", "memory": "16MiB"},
        "memory": policy,
        "precision": {"dtype": dtype},
        "parallel": parallel,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return zero.initialize(model, optimizer, config=config)[0]


def _poisoned(gradient: torch.Tensor, value: float) -> torch.Tensor:
    poisoned = gradient.clone()
    poisoned.view(-1)[3] = value
    return poisoned


def _step(engine: Any, step: int, source: str | None, rank: int = 0, num_ranks: int = 1) -> None:
    engine.zero_grad()
    weight = engine.module.model.decoder.layers[1].fc1.weight
    values = {"one gradient": float("nan"), "infinite gradient": float("inf"), "norm": 3e38}
    handle = weight.register_hook(lambda g: _poisoned(g, values[source])) if source in values else None
    loss = engine(**share(step, 0, rank, num_ranks)).loss
    engine.backward(loss * float("nan") if source == "loss" else loss)
    engine.step()
    if handle is not None:
        handle.remove()


def _everything(engine: Any) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for number, state in engine.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


@pytest.mark.parametrize(
    ("source", "dtype", "tier"),
    [case if number % 3 == 0 else pytest.param(*case, marks=pytest.mark.full) for number, case in enumerate(CASES)],
)
def test_nothing_is_touched(source: str, dtype: str, tier: str, tmp_path: Path) -> None:
    engine = _engine(dtype, tier)
    _step(engine, 0, None)
    before = _everything(engine)
    _step(engine, 1, source)
    after = _everything(engine)
    assert engine.skipped_last_step
    assert digest(before) == digest(after)
    for file in engine.save_checkpoint(tmp_path).glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point())
    _step(engine, 2, None)
    assert not engine.skipped_last_step or dtype == "fp16"
    assert all(value.isfinite().all() for value in _everything(engine).values())
    engine.close()


def test_the_count_of_injections() -> None:
    assert len(CASES) + len(DTYPES) * len(TIERS) >= 24


def on_one_rank(source: str, dtype: str, tier: str) -> tuple[bool, bool, str, str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    engine = _engine(dtype, tier, replicate="1KiB")
    _step(engine, 0, None, rank, 2)
    before = digest(_everything(engine))
    _step(engine, 1, source if rank == 1 else None, rank, 2)
    skipped, after = engine.skipped_last_step, _everything(engine)
    finite = all(value.isfinite().all() for value in after.values())
    return skipped, finite, before, digest(after)


@pytest.mark.parametrize(
    ("source", "dtype", "tier"),
    [
        ("one gradient", "fp32", "host"),
        ("loss", "fp16", "device"),
        *(
            pytest.param(source, dtype, tier, marks=pytest.mark.full)
            for source, dtype, tier in CASES
            if source in ("one gradient", "loss")
        ),
    ],
)
def test_what_goes_wrong_on_one_rank_is_skipped_on_all(source: str, dtype: str, tier: str) -> None:
    for skipped, finite, before, after in run_ranks(on_one_rank, 2, source, dtype, tier):
        assert skipped
        assert finite
        assert before == after
