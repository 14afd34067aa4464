"""The scripts of ``benchmarks/`` that measure for long do run, in miniature."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
JOB = {
    "shape": "tiny",
    "num_ranks": 2,
    "batch": 2,
    "seq": 16,
    "lr": 1e-3,
    "warmup": 1,
    "steps": 2,
    "whole_batch": False,
}


def measure_here(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker of the comparison does, in a forked rank."""
    sys.path.insert(0, str(PEERS))
    from worker import measure  # type: ignore[import-not-found]

    result: dict[str, Any] = measure(job)
    return result


@pytest.fixture
def peers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the comparison import one another by their plain names."""
    monkeypatch.syspath_prepend(str(PEERS))


def one_run(system: str, job: dict[str, Any]) -> dict[str, Any]:
    """One system's run, its ranks merged, as the command records it."""
    from running import merge  # type: ignore[import-not-found]

    result: dict[str, Any] = merge(run_ranks(measure_here, job["num_ranks"], job | {"system": system}))
    return result | {"system": system, "shape": "tiny", "num_ranks": JOB["num_ranks"], "round": 0, "tokens": 64}


@pytest.mark.full
@pytest.mark.usefixtures("peers_on_path")
def test_two_ranks_of_each_system_train_alike_and_are_reported(tmp_path: Path) -> None:
    """DDP, FSDP2 with offload and ours see the same batches as the reference, and none runs alone under another's name."""
    from reporting import as_table, draw, summarise, write_csv  # type: ignore[import-not-found]

    reference = one_run("reference", JOB | {"num_ranks": 1, "whole_batch": True, "batch": 4})["losses"]
    runs = [one_run(system, JOB) for system in ("plain", "fsdp2_offload", "ours")]
    rows = summarise(runs, {("tiny", 2): reference}, "plain")
    assert [row["system"] for row in rows] == ["plain", "fsdp2_offload", "ours"]
    for row in rows:
        assert row["max_loss_difference"] < 0.01
        assert row["peak_bytes"] > row["baseline_bytes"] > 0
        assert row["p90_s"] >= row["median_s"] > 0
        assert row["x_first_low"] <= row["x_first"] <= row["x_first_high"]
    assert "DTensor" in rows[1]["engaged"]
    assert "ManagedParameter" in rows[2]["engaged"]
    write_csv(rows, tmp_path / "peers.csv")
    with (tmp_path / "peers.csv").open(encoding="utf-8") as file:
        assert [float(row["x_first"]) for row in csv.DictReader(file)] == pytest.approx(
            [r["x_first"] for r in rows], rel=1e-4
        )
    assert as_table(rows, "plain").count("\n") == 2 + len(rows)
    draw(rows, tmp_path / "peers.png", "plain")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


@pytest.mark.usefixtures("peers_on_path")
def test_a_system_that_trains_alone_is_marked() -> None:
    """A loss that leaves the reference's is marked in the table."""
    from reporting import as_table, summarise

    run = {
        "shape": "tiny",
        "num_ranks": 2,
        "system": "plain",
        "round": 0,
        "step_s": [1.0],
        "cpu_s": [1.0],
        "losses": [6.0, 5.0],
    }
    run |= {"peak_bytes": 2, "baseline_bytes": 1, "num_parameters": 1, "tokens": 1, "settings": {}, "engaged": {}}
    marked = summarise([run], {("tiny", 2): [6.0, 5.5]}, "plain")
    assert "0.500 (!)" in as_table(marked, "plain")
    assert "(!)" not in as_table(summarise([run], {("tiny", 2): [6.0, 5.01]}, "plain"), "plain")


def test_the_command_writes_its_tables(tmp_path: Path) -> None:
    """One command, from options to files."""
    command = [sys.executable, str(PEERS), "--out", str(tmp_path), "--shapes", "tiny", "--ranks", "1", "--rounds", "1"]
    command += ["--no-reference", "--systems", "ours", "--steps", "1", "--warmup", "1", "--batch", "2", "--seq", "16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| tiny | 1 | ours, auto |" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"runs.jsonl", "peers.csv", "peers.md", "peers.png"}


def test_the_grid_for_accelerators_runs_on_the_simulated_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_grid.py"),
        "--device",
        "simulated",
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--steps", "2", "--warmup", "2"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "grid-ours.csv").open(encoding="utf-8"))
    assert not row.get("error"), row
    assert float(row["tokens_per_s"]) > 0
    assert abs(float(row["predicted_peak_bytes"]) / float(row["measured_peak_bytes"]) - 1) < 0.05
