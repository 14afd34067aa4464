"""A run that is stopped and goes on, however often, is the run that was never stopped, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli_case import TINY, comparable_metrics
from tests.ranks import run_ranks

NUM_MICRO_STEPS = 40
FEW = 12


def _text(folder: Path) -> str:
    """79 short texts: 20 micro-batches of 4 an epoch, the last one shorter."""
    file = folder / "text.jsonl"
    if not file.exists():
        words = ("to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "in", "mind")
        lines = [{"text": " ".join(words[(i * j) % len(words)] for j in range(1, 6 + i % 9))} for i in range(79)]
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        aside.rename(file)
    return str(file)


def _config(
    folder: Path, accumulation: int, num_workers: int, num_ranks: int, micro_steps: int = NUM_MICRO_STEPS, **train: Any
) -> dict[str, Any]:
    """40 micro-steps over two epochs of the same global batches, with dropout."""
    config: dict[str, Any] = json.loads(json.dumps(TINY))
    config["device"] = {"type": "simulated", "memory": "4MiB"}
    config["data"] = {"train": _text(folder.parent), "seq_length": 32, "packing": False, "eval_fraction": 0.0}
    config["data"]["num_workers"] = num_workers
    config["parallel"] = {"replicate": "1KiB"}
    config["train"] = {
        "per_device_train_batch_size": 4 // num_ranks,
        "gradient_accumulation_steps": accumulation,
        "max_steps": micro_steps // accumulation,
        "save_steps": 1,
        "output_dir": str(folder),
        "resume_from_checkpoint": True,
        "max_grad_norm": 1.0,
        "report_to": "none",
        **train,
    }
    return config


def _train(config: dict[str, Any], stop_after: int | None, rank: int, num_ranks: int) -> int:
    """One run, asked to stop after so many micro-steps of its own; returns the step it came to."""
    import torch

    from gemini.dryrun import DryDevice
    from zero.config.loading import load_config
    from zero.engine import Engine
    from zero.trainer import Trainer

    num_seen = 0
    original = Engine.backward

    def backward(self: Engine, *args: Any, **kwargs: Any) -> None:
        nonlocal num_seen
        original(self, *args, **kwargs)
        num_seen += not isinstance(self.device, DryDevice)
        if stop_after is not None and num_seen == stop_after and rank == stop_after % num_ranks:
            os.kill(os.getpid(), signal.SIGTERM)

    Engine.backward = backward  # type: ignore[method-assign]
    torch.manual_seed(12345 + num_seen)  # what the process did before must not matter
    try:
        trainer = Trainer(load_config(config))
        trainer.run()
    finally:
        Engine.backward = original  # type: ignore[method-assign]
    return trainer._progress.step


def chain(
    whole: str, broken: str, accumulation: int, num_workers: int, micro_steps: int, stops: list[int] | None
) -> int:
    """An unbroken run, and one stopped after each number of micro-steps in turn; returns how often it was."""
    import torch.distributed as dist

    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shape = (accumulation, num_workers, num_ranks, micro_steps)
    _train(_config(Path(whole), *shape), None, rank, num_ranks)
    config = _config(Path(broken), *shape, save_steps=1000)
    num_stops, last = 0, micro_steps // accumulation
    while _train(config, 1 + num_stops % accumulation if stops is None else stops[num_stops], rank, num_ranks) < last:
        num_stops += 1
        if stops is not None and num_stops == len(stops):
            _train(config, None, rank, num_ranks)
            break
    return num_stops


def _content(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of weights, moments, generators, scaler, rates, place in the data and losses."""
    content: dict[str, Any] = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors" or file.name.startswith("rank-"):
            content[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    state = json.loads((checkpoint / "state.json").read_text())
    return content | {key: state[key] for key in ("counters", "scaler", "optimizer", "lr_scheduler", "extra")}


def _compare(whole: Path, broken: Path) -> int:
    num_compared = 0
    for checkpoint in sorted((broken / "checkpoints").iterdir()):
        if checkpoint.name.startswith("step-"):
            assert _content(checkpoint) == _content(whole / "checkpoints" / checkpoint.name), checkpoint.name
            num_compared += 1
    losses = [[(line["step"], line.get("loss"), line.get("lr"), line.get("grad_norm")) for line in comparable_metrics(run)]
              for run in (whole, broken)]  # fmt: skip
    assert losses[0] == losses[1]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    return num_compared


MATRIX = [
    pytest.param(num_ranks, accumulation, num_workers, NUM_MICRO_STEPS, None, marks=pytest.mark.full)
    for num_ranks in (1, 2, 4)
    for accumulation in (1, 2)
    for num_workers in (0, 2)
]


@pytest.mark.parametrize(
    ("num_ranks", "accumulation", "num_workers", "micro_steps", "stops"),
    [pytest.param(1, 2, 0, FEW, [3, 4], marks=pytest.mark.full), (2, 2, 0, FEW, [1, 6]), *MATRIX],
)
def test_stopped_and_gone_on_is_never_stopped(
    num_ranks: int, accumulation: int, num_workers: int, micro_steps: int, stops: list[int] | None, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = (str(whole), str(broken), accumulation, num_workers, micro_steps, stops)
    num_stops = run_ranks(chain, num_ranks, *arguments, timeout_s=800, own_group=num_ranks > 1)[0]
    assert num_stops >= (len(stops) if stops is not None else micro_steps // accumulation - 1)
    assert _compare(whole, broken) >= num_stops
