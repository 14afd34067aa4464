"""A training step of ours, of plain PyTorch and of the systems that people use instead, side by side on this machine.

    python benchmarks/peers --out DIR [--shapes opt-125m opt-350m] [--ranks 1 2] [--rounds 3] [--systems ...]

For CPUs and gloo: nothing crosses a bus, so what is compared is the overhead of the frameworks and the host memory they
take. Systems take turns in rounds, each in fresh processes; ratios are computed within rounds and their median is shown,
so that a machine others use too does not decide. What cannot be installed or fails is said and left out.

Written to DIR: ``runs.jsonl`` (every run as it ends), ``peers.csv``, ``peers.md``, ``peers.png``. DeepSpeed is installed
into an environment of its own, ``--venv`` (default: DIR/venv), and kept there with its compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch
from installing import peers_python
from reporting import as_table, draw, summarise, write_csv
from running import RunFailedError, Runner
from systems import SYSTEMS
from worker import SHAPES

RUNS = "runs.jsonl"
DEFAULT = ["plain", "plain_master", "ours", "ours_lean", "ours_cpu", "fsdp2_offload", "deepspeed"]
ROOT = Path(__file__).resolve().parent.parent.parent


def say(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_all(options: argparse.Namespace, runner: Runner) -> bool:
    """Every system of every configuration in every round, the reference first; whether none has failed."""
    went_well = True
    for shape, num_ranks in [(shape, num_ranks) for shape in options.shapes for num_ranks in options.ranks]:
        if options.reference:
            went_well &= _run(options, runner, "reference", shape, num_ranks, 0)
        for number in range(options.rounds):
            for name in options.systems:
                if not SYSTEMS[name].max_ranks or num_ranks <= SYSTEMS[name].max_ranks:
                    went_well &= _run(options, runner, name, shape, num_ranks, number)
    return went_well


def _run(options: argparse.Namespace, runner: Runner, name: str, shape: str, num_ranks: int, number: int) -> bool:
    is_reference = name == "reference"
    job = {"system": name, "shape": shape, "num_ranks": num_ranks, "whole_batch": is_reference}
    job |= {key: getattr(options, key) for key in ("batch", "seq", "lr", "warmup", "steps")}
    what = f"{shape}, {num_ranks} processes, round {number + 1}, {name}"
    try:
        result = runner.run(job, 1 if is_reference else num_ranks, SYSTEMS[name].in_venv)
    except RunFailedError as error:
        say(f"{what}: FAILED, {error}")
        return False
    tokens = num_ranks * options.batch * options.seq
    result |= {"shape": shape, "num_ranks": num_ranks, "system": name, "round": number, "tokens": tokens}
    with (options.out / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    middle_s = statistics.median(result["step_s"])
    say(f"{what}: {middle_s:.3f} s, {result['peak_bytes'] / 1e9:.2f} GB, loss {result['losses'][-1]:.4f}")
    return True


def report(folder: Path, first: str) -> bool:
    """Makes table, CSV and plot of the runs in a folder; False if there are none."""
    lines = (folder / RUNS).read_text(encoding="utf-8").splitlines()
    everything = [json.loads(line) for line in lines]
    references = {(r["shape"], r["num_ranks"]): r["losses"] for r in everything if r["system"] == "reference"}
    runs = [run for run in everything if run["system"] != "reference"]
    if not runs:
        return False
    rows = summarise(runs, references, first)
    write_csv(rows, folder / "peers.csv")
    table = as_table(rows, first)
    (folder / "peers.md").write_text(table, encoding="utf-8")
    draw(rows, folder / "peers.png", first)
    sys.stdout.write(table)
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/peers", description="A training step beside the peers', on CPUs.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--shapes", nargs="+", default=["opt-125m", "opt-350m"], choices=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument(
        "--systems", nargs="+", default=DEFAULT, choices=[name for name in SYSTEMS if name != "reference"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that every system is started (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each start (default 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--threads", type=int, help="threads of each process (default: its share of the cores)")
    parser.add_argument("--batch", type=int, default=2, help="sequences per process (default 2)")
    parser.add_argument("--seq", type=int, default=128, help="tokens per sequence (default 128)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--venv", type=Path, help="environment of the peers, made if it is not there (default: OUT/venv)"
    )
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree whose zero is measured (default: this one)")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="compare no losses")
    parser.add_argument("--report", action="store_true", help="run nothing; tables of the runs that are in OUT")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one start may take (default 600)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures, and writes everything into the folder; 1 if a system failed."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    went_well = True
    if not options.report:
        (options.out / RUNS).write_text("", encoding="utf-8")
        needs_venv = any(SYSTEMS[name].in_venv for name in options.systems)
        venv_python = peers_python((options.venv or options.out / "venv").resolve()) if needs_venv else None
        capability = torch.backends.cpu.get_cpu_capability()
        say(f"torch {torch.__version__}, {platform.machine()}, {capability}, {len(os.sched_getaffinity(0))} cores")
        went_well = run_all(options, Runner(venv_python, options.threads, options.timeout, options.source.resolve()))
    return int(not (report(options.out, options.systems[0]) and went_well))


if __name__ == "__main__":
    sys.exit(main())
