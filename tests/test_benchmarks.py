"""The scripts of ``benchmarks/`` that measure for long do run, in miniature."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from gemini.profile import NAMED

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


@pytest.mark.full
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


@pytest.fixture
def gpu_grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_grid")


def test_the_peers_loss_in_pieces_is_the_models_own(gpu_grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small card the logits alone would decide who fits; gradients, too, pass through the tied head piece by piece."""
    monkeypatch.setattr(gpu_grid, "LOSS_ROWS", 7)
    model = gpu_grid.make_model(gpu_grid.SHAPES["tiny"]).float()
    ids = torch.randint(4, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    seen = []
    for in_pieces in (False, True):
        if in_pieces:
            gpu_grid.use_chunked_loss(model)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*seen)


def test_what_a_point_of_the_grid_is_given(gpu_grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory to every system; to DeepSpeed what else it would ask MPI for, and a folder that the others lack."""
    assert gpu_grid.allocator_bytes({"cap_bytes": 6 << 30, "device": "cuda"}) == 5 << 30
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("PEERS_PATH", "there")
    monkeypatch.delenv("RANK", raising=False)
    assert gpu_grid.environment_of("ours")["PYTHONPATH"] == "here"
    assert "RANK" not in gpu_grid.environment_of("ours")
    given = gpu_grid.environment_of("deepspeed")
    assert given["PYTHONPATH"] == f"there{os.pathsep}here"
    assert {given[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {"0", "1"}
    assert int(given["MASTER_PORT"]) > 0


def test_a_point_that_fails_says_why(gpu_grid: Any) -> None:
    job = {"system": "resident", "shape": "nothing", "cap_bytes": 1 << 30, "device": "simulated"}
    assert gpu_grid.run_point(job, 60.0)["error"] == "exit 1: KeyError: 'nothing'"


@pytest.fixture
def run_gpu_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``benchmarks/gpu.sh`` with a program in Python's place, which notes its arguments and fails where it is told to."""
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\necho "$PYTHONPATH|$PEERS_PATH|$*" >> "$NOTES"\n[ "$1" = -c ] && echo GPU && exit\n'
        'case "$*" in *$FAILS*) echo "no $FAILS"; exit 3;; esac\n'
    )
    stub.chmod(0o755)

    def run(part: str, fails: str = "nothing", **environment: str) -> subprocess.CompletedProcess[str]:
        values = os.environ | {"PYTHON": str(stub), "NOTES": str(tmp_path / "notes"), "FAILS": fails} | environment
        command = [str(ROOT / "benchmarks" / "gpu.sh"), part, "out"]
        return subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("part", "fails", "file"),
    [
        ("correctness", "pytest", "correctness.txt"),
        ("probe", "probe", "probe.json"),
        ("probe", "cpu_adamw", "cpu_adamw.txt"),
        ("grid", "gpu_grid", "grid.txt"),
        ("peers", "deepspeed", "peers.txt"),
        ("generation", "opt-6.7b", "generation-6.7b.txt"),
    ],
)
def test_a_part_that_fails_on_the_gpu_says_so(
    run_gpu_script: Callable[..., Any], tmp_path: Path, part: str, fails: str, file: str
) -> None:
    assert run_gpu_script(part).returncode == 0
    assert (tmp_path / "out" / file).read_text() == ""
    assert run_gpu_script(part, fails).returncode == 3
    assert (tmp_path / "out" / file).read_text() == f"no {fails}\n"


def test_wheels_come_along_and_deepspeed_is_seen_by_its_own_runs_alone(
    run_gpu_script: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    for name in ("pydantic-2-py3-none-any.whl", "deepspeed-1-py3-none-any.whl"):
        (tmp_path / "wheels" / name).write_text("")
    assert run_gpu_script("grid", WHEELS="wheels").returncode == 0
    notes = [line.split("|") for line in (tmp_path / "notes").read_text().splitlines()]
    installs = [words.split("--target ")[1].split() for _, _, words in notes if "pip install" in words]
    assert [[Path(wheel).name[:5] for wheel in wheels] for _, *wheels in installs] == [["pydan"], ["deeps"]]
    path, peers, words = notes[-1]
    assert "gpu_grid" in words
    assert path.split(":")[-1] == installs[0][0]
    assert peers == installs[1][0]
    assert not Path(peers).parent.exists()
    assert run_gpu_script("grid", "pip", WHEELS="wheels").returncode == 3


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts of the comparison with accelerate, as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("generation", "generation_systems", "generation_limits")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def generation_job(system: str, tier: str, folder: Path) -> dict[str, Any]:
    """A tiny model on a device for two thirds of it."""
    job = {"round": 0, "system": system, "shape": "tiny", "tier": tier, "device": "simulated", "dtype": "fp32"}
    return job | {
        "capacity_bytes": 640 << 10,
        "prompt": 12,
        "new": 4,
        "batches": [1, 2, 64],
        "repeats": 1,
        "folder": str(folder),
    }


@pytest.mark.parametrize("tier", ["host", pytest.param("disk", marks=pytest.mark.full)])
def test_accelerate_generates_on_the_simulated_device_what_ours_does(
    generation: Any, tmp_path: Path, tier: str
) -> None:
    """Its hooks bring what its map leaves out, within the same capacity; what does not fit is a row that says so."""
    rows = []
    for system in ("ours", "accelerate"):
        job = generation_job(system, tier, tmp_path)
        rows += [job | row for row in generation.generation_systems.measure(job)]
    assert [bool(row.get("error")) for row in rows] == [False, False, True] * 2
    model = generation.generation_systems.make_model("tiny", "fp32")
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    for row in rows[3:5]:
        assert row["link_bytes_per_pass"] == model_bytes - row["resident_bytes"] > 0
    for row in (*rows[:2], *rows[3:5]):
        assert row["resident_bytes"] < row["device_peak_bytes"] <= row["capacity_bytes"]
        assert row["virtual_tokens_per_s"] > 0
        assert len(row["tokens"]) == row["batch"]
    summary = generation.generation.summarise(rows)
    assert [(row["kind"], row["system"]) for row in summary[::2]] == [("batch 1", "ours"), ("tuned", "ours")]
    assert {row["same_tokens"] for row in summary} == {1.0}
    assert len({token for row in rows[3:5] for tokens in row["tokens"] for token in tokens}) > 1
    assert generation.generation.as_table(summary).count("\n") == 2 + len(summary)


def test_what_is_computed_of_generation_holds_offloaded_bytes_against_the_link(generation: Any) -> None:
    from transformers import OPTForCausalLM

    systems, limits = generation.generation_systems, generation.generation_limits
    facts, (need,) = systems.walk_through("tiny", "bf16", [systems.generation_of(2, 12, 4)])
    with torch.device("meta"):
        model = OPTForCausalLM(systems.opt_config("tiny")).to(torch.bfloat16)
    profile = dataclasses.replace(NAMED["rtx3090"], capacity_bytes=360 << 10)
    ours = limits.ours("tiny", profile, facts, need)
    peers = limits.peers("tiny", profile, facts, need, model)
    assert peers.resident_bytes + peers.link_bytes_per_pass == sum(parameter.nbytes for parameter in model.parameters())
    assert 2 / peers.tokens_per_s > peers.link_bytes_per_pass / (limits.PAGEABLE * profile.h2d_bytes_per_s)
    assert ours.resident_bytes > 0
    assert limits.ours("tiny", dataclasses.replace(profile, capacity_bytes=4 << 10), facts, need) is None


@pytest.mark.full
def test_the_command_beside_accelerate_writes_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--shapes", "tiny", "--rounds", "1", "--tiers", "host"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"generation.csv", "generation.md", "generation.png"}
    rows = list(csv.DictReader((tmp_path / "generation.csv").open(encoding="utf-8")))
    assert [(row["system"], row["batch"], row.get("error", "")) for row in rows] == [
        (system, batch, "") for system in ("ours", "accelerate") for batch in ("1", "2")
    ]
