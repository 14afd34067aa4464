"""Peak resident memory of whole processes, against what the design promises.

Run with ``-s`` to see the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MB = 10**6
ROOT = Path(__file__).resolve().parent.parent


def run_module(*words: str | Path) -> str:
    """``python -m``, in a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_case(*arguments: str | Path) -> dict[str, Any]:
    """A case of :mod:`tests.host_memory_case` in a process of its own."""
    figures: dict[str, Any] = json.loads(run_module("tests.host_memory_case", *arguments).splitlines()[-1])
    return figures


def _show(title: str, figures: dict[str, Any]) -> None:
    lines = [
        f"  {key.removesuffix('_bytes')}: {value / MB:,.0f} MB" if key.endswith("_bytes") else f"  {key}: {value}"
        for key, value in figures.items()
    ]
    sys.stdout.write("\n".join(["", title, *lines, ""]))


def _assert_within_the_promise(figures: dict[str, Any]) -> None:
    state_bytes = 16 * figures["num_parameters"]
    assert figures["host_bytes"] == state_bytes, "values, master, two moments, gradient"
    assert figures["peak_bytes"] <= state_bytes + 600 * MB
    assert figures["losses"][1] < figures["losses"][0]


LAYERS = [4, pytest.param(24, marks=pytest.mark.full)]
"""Layers of opt-350m: 331 M parameters with all 24, for `make test-full`."""


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Figures of a training process, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("opt-350m")
    return run_case("train", str(request.param), "256", folder), folder


@pytest.mark.parametrize("saved", LAYERS, indirect=True)
def test_training_stays_within_16_bytes_a_parameter_and_600_mb(saved: tuple[dict[str, Any], Path]) -> None:
    figures, _ = saved
    _show("two steps in bf16, policy cpu, simulated device of 256 MiB", figures)
    _assert_within_the_promise(figures)


@pytest.mark.full
def test_training_on_a_large_simulated_device_stays_there_too() -> None:
    figures = run_case("train", "24", "1536")
    _show("the same, simulated device of 1536 MiB", figures)
    _assert_within_the_promise(figures)


@pytest.mark.parametrize("saved", LAYERS, indirect=True)
def test_loading_never_holds_a_second_copy(saved: tuple[dict[str, Any], Path]) -> None:
    figures = run_case("load", saved[1])
    _show("the same model from safetensors", figures)
    final_bytes = 6 * figures["num_parameters"]
    assert figures["host_bytes"] == final_bytes, "values and master"
    limit_bytes = figures["baseline_bytes"] + final_bytes + figures["largest_bytes"] + 50 * MB
    assert figures["peak_bytes"] <= limit_bytes


@pytest.mark.full
@pytest.mark.parametrize("saved", [pytest.param(24)], indirect=True)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_load_one_copy_between_them(saved: tuple[dict[str, Any], Path], num_ranks: int) -> None:
    """Above what each process takes anyway, all ranks together hold what one process would, and little more."""
    script = ROOT / "tests" / "host_memory_case.py"
    run_module("zero", "run", "--nprocs", str(num_ranks), script, "load", saved[1])
    ranks = [json.loads((saved[1] / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    final_bytes = 6 * ranks[0]["num_parameters"]
    held_bytes = sum(figures["host_bytes"] for figures in ranks)
    above_bytes = sum(figures["peak_bytes"] - figures["baseline_bytes"] for figures in ranks)
    _show(
        f"{num_ranks} ranks load 331 M parameters in bf16",
        {"final_bytes": final_bytes, "held_bytes": held_bytes, "peak_above_baseline_bytes": above_bytes},
    )
    assert final_bytes <= held_bytes <= 1.01 * final_bytes
    # Each has the largest tensor once more while it is cast, and what the engine and the groups take.
    assert above_bytes <= final_bytes + num_ranks * (ranks[0]["largest_bytes"] + 80 * MB)
