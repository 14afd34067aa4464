"""Tokens a second and bytes a token of a model that is larger than its device: this project beside accelerate's
``device_map="auto"``, offloaded to the host and to disk, with one row and with the batch that is best.

    python benchmarks/generation.py --out FOLDER [--shapes opt-125m] [--tiers host disk] [--rounds 3] [--seconds 3000]
    python benchmarks/generation.py --out FOLDER --parts computed       published cards and large models: two minutes
    python benchmarks/generation.py --out FOLDER --device cuda --seconds 480

Both have the same weights (random), prompts, greedy choices and capacity of the device, whose other bytes count too. All
batches of a system run in one fresh process; systems take turns in rounds, and ratios are computed within rounds. Without
an accelerator the device is a simulated one, made of host memory: nothing is faster there than the host, and what is
compared is what each system brings to the device and what it adds of its own; beside it stands the virtual time that the
same passes would take on a published card. What is ``computed`` was not run at all.

Written to FOLDER: ``generation.csv`` (every run), ``generation.md``, ``generation.png``, ``generation-computed.csv``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SYSTEMS = ("ours", "accelerate")
LABELS = {"ours": "this project", "accelerate": "accelerate"}
MIB = 1 << 20
PLACES = {  # shape, capacity of the device, dtype, prompt, new tokens, batches
    "simulated": [
        ("opt-125m", 320 * MIB, "fp32", 32, 16, (1, 32)),
        ("opt-350m", 512 * MIB, "fp32", 32, 16, (1, 32)),
        ("tiny", 640 << 10, "fp32", 12, 4, (1, 2)),
    ],
    "cuda": [
        ("opt-1.3b", 3 << 30, "bf16", 64, 16, (1, 32)),
        ("opt-6.7b", 8 << 30, "bf16", 64, 8, (1, 64)),
        ("opt-13b", 24 << 30, "bf16", 64, 8, (1, 64)),
    ],
}
DEFAULT = {"simulated": ["opt-125m"], "cuda": ["opt-1.3b", "opt-6.7b"]}
RESULT = "result: "
"""Before the line that a process was started for: systems print others."""
_LEAST_S = 20.0

Row = dict[str, Any]


# -- runs ----------------------------------------------------------------------------------------------------------------


def run_job(job: Row, limit_s: float) -> list[Row]:
    """All batches of one system in a fresh process; what went wrong is in ``error``."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    about = {key: value for key, value in job.items() if key not in ("batches", "folder")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return [about | {"batch": batch, "error": f"not done after {limit_s:.0f} s"} for batch in job["batches"]]
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if results:
        return [about | row for row in json.loads(results[-1])]
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
    telling = [line for line in said if "Error" in line] or said
    return [about | {"batch": b, "error": f"exit {done.returncode}: {telling[-1][:300]}"} for b in job["batches"]]


def run_all(options: argparse.Namespace, folder: str) -> list[Row]:
    """Every place and tier in every round, systems in turn, until the time is over."""
    until_s = time.monotonic() + options.seconds
    places = {place[0]: place for place in PLACES[options.device]}
    rows: list[Row] = []
    for number in range(options.rounds):
        for shape, tier in [(shape, tier) for shape in options.shapes for tier in options.tiers]:
            _, capacity_bytes, dtype, prompt, new, batches = places[shape]
            for system in SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]:
                job = {"round": number, "system": system, "shape": shape, "tier": tier, "device": options.device}
                job |= {"capacity_bytes": capacity_bytes, "dtype": dtype, "prompt": prompt, "new": new}
                job |= {"batches": batches, "repeats": options.repeats, "folder": folder}
                left_s = until_s - time.monotonic()
                if left_s < _LEAST_S:
                    say(f"left out, the time was over: {shape}, {tier}, round {number + 1}, {system}")
                    continue
                found = run_job(job, left_s)
                rows += found
                for row in found:
                    say(f"{shape}, {tier}, round {number + 1}, {system}, {row['batch']} rows: {told(row)}")
    return rows


def told(row: Row) -> str:
    """One run in words."""
    if row.get("error"):
        return str(row["error"])[:200]
    return f"{row['tokens_per_s']:.2f} tokens/s, {row['link_bytes_per_pass'] / 1e6:.1f} MB a pass"


def say(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# -- tables --------------------------------------------------------------------------------------------------------------


def summarise(rows: list[Row]) -> list[Row]:
    """One row for each shape, tier and system: with a batch of one, and with the batch that is fastest.

    Ratios are to accelerate, each within its round; ``same_tokens`` is the share of new tokens that both chose alike.
    """
    good = [row for row in rows if not row.get("error")]
    found = []
    for shape, tier in dict.fromkeys((row["shape"], row["tier"]) for row in good):
        mine = {s: [r for r in good if (r["shape"], r["tier"], r["system"]) == (shape, tier, s)] for s in SYSTEMS}
        for kind in ("batch 1", "tuned"):
            chosen = {system: _chosen(runs, kind) for system, runs in mine.items()}
            found += [_summary(kind, system, chosen) for system in SYSTEMS if chosen[system]]
    return found


def _chosen(runs: list[Row], kind: str) -> dict[int, Row]:
    """By round: the runs of one row, or of the batch that is fastest, in virtual time where there is one."""
    batches = sorted({run["batch"] for run in runs})
    if not batches:
        return {}
    by_batch = {
        batch: [run["virtual_tokens_per_s"] or run["tokens_per_s"] for run in runs if run["batch"] == batch]
        for batch in batches
    }
    wanted = 1 if kind == "batch 1" else max(batches, key=lambda batch: statistics.median(by_batch[batch]))
    return {run["round"]: run for run in runs if run["batch"] == wanted}


def _summary(kind: str, system: str, chosen: dict[str, dict[int, Row]]) -> Row:
    mine, others = chosen[system], chosen["accelerate"]
    common = sorted(mine.keys() & others.keys())
    ratios = [mine[number]["tokens_per_s"] / others[number]["tokens_per_s"] for number in common]
    virtual = [
        mine[number]["virtual_tokens_per_s"] / others[number]["virtual_tokens_per_s"]
        for number in common
        if mine[number]["virtual_tokens_per_s"]
    ]
    last = mine[max(mine)]
    return {
        **{key: last[key] for key in ("shape", "tier", "device", "dtype", "capacity_bytes", "prompt", "new")},
        "kind": kind,
        "system": system,
        "batch": last["batch"],
        "num_runs": len(mine),
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in mine.values()),
        "cpu_s_per_pass": statistics.median(run["cpu_s_per_pass"] for run in mine.values()),
        "virtual_tokens_per_s": last["virtual_tokens_per_s"],
        "x": statistics.median(ratios) if ratios else None,
        "x_virtual": statistics.median(virtual) if virtual else None,
        "x_low": min(ratios, default=None),
        "x_high": max(ratios, default=None),
        **{key: last[key] for key in ("link_bytes_per_pass", "link_bytes_per_token", "resident_bytes")},
        **{key: max(run[key] for run in mine.values()) for key in ("device_peak_bytes", "host_peak_bytes")},
        "same_tokens": same_tokens(last["tokens"], others[max(others)]["tokens"]) if others else None,
    }


def same_tokens(mine: list[list[int]], others: list[list[int]]) -> float:
    """Of the rows that both have, the share of new tokens that are the same."""
    pairs = [a == b for left, right in zip(mine, others, strict=False) for a, b in zip(left, right, strict=True)]
    return sum(pairs) / len(pairs)


def as_table(rows: list[Row]) -> str:
    """The summary as Markdown."""
    heads = [
        "shape, device, offloaded to",
        "",
        "system",
        "rows",
        "tokens/s",
        "x accelerate (rounds)",
        "CPU s a pass",
        "tokens/s in virtual time",
        "x accelerate there",
        "MB to the device a pass",
    ]
    heads += ["MB a new token", "device peak, MB", "process peak, MB", "same tokens"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        ratio = "" if row["x"] is None else f"{row['x']:.2f} ({row['x_low']:.2f}-{row['x_high']:.2f})"
        cells = [f"{row['shape']}, {row['capacity_bytes'] / 1e6:.3g} MB, {row['tier']}", row["kind"]]
        cells += [LABELS[row["system"]], str(row["batch"]), f"{row['tokens_per_s']:.3g}", ratio]
        cells += [f"{row['cpu_s_per_pass']:.3f}"]
        virtual = row["virtual_tokens_per_s"]
        cells += [f"{virtual:.3g}" if virtual else ""]
        cells += [f"{row['x_virtual']:.2f}" if row["x_virtual"] else ""]
        cells += [f"{row[key] / 1e6:.4g}" for key in ("link_bytes_per_pass", "link_bytes_per_token")]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("device_peak_bytes", "host_peak_bytes")]
        cells += ["" if row["same_tokens"] is None else f"{100 * row['same_tokens']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Bars of tokens a second, by shape, tier and kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    places = list(dict.fromkeys((row["shape"], row["tier"], row["kind"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(3 + 1.5 * len(places), 4), layout="constrained")
    for index, system in enumerate(SYSTEMS):
        mine = {
            (row["shape"], row["tier"], row["kind"]): row["tokens_per_s"] for row in rows if row["system"] == system
        }
        at = [number + 0.4 * index - 0.2 for number, place in enumerate(places) if place in mine]
        axes.bar(at, [mine[place] for place in places if place in mine], 0.4, label=LABELS[system])
    axes.set_xticks(range(len(places)), [f"{shape}\n{tier}, {kind}" for shape, tier, kind in places])
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows, tokens left out."""
    fields = list(dict.fromkeys(key for row in rows for key in row if key != "tokens"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# -- what is computed ----------------------------------------------------------------------------------------------------


def compute(options: argparse.Namespace) -> None:
    """Writes and prints the figures of published cards."""
    from generation_limits import NEW, PLACES, PROMPT, limits_of

    limits = [limit for shape, card in PLACES for limit in limits_of(shape, card)]
    write_csv([dataclasses.asdict(limit) for limit in limits], options.out / "generation-computed.csv")
    lines = [f"computed, not measured; bf16, {PROMPT} + {NEW} tokens a row", ""]
    lines += ["| model, card | | this project, tokens/s | accelerate, tokens/s | x |", "|---|---|---|---|---|"]
    for shape, card in PLACES:
        here = [limit for limit in limits if (limit.shape, limit.card) == (shape, card)]
        for kind in ("batch 1", "tuned"):
            best = {}
            for system in SYSTEMS:
                mine = [one for one in here if one.system == system and (kind == "tuned" or one.batch == 1)]
                best[system] = max(mine, key=lambda one: one.tokens_per_s, default=None)
            if best["ours"] is None or best["accelerate"] is None:
                lines.append(f"| {shape}, {card} | {kind} | does not fit | | |")
                continue
            cells = [
                f"{one.tokens_per_s:.3g} ({one.batch} rows, {one.link_bytes_per_pass / 1e9:.1f} GB a pass)"
                for one in best.values()
            ]
            ratio = best["ours"].tokens_per_s / best["accelerate"].tokens_per_s
            lines.append(f"| {shape}, {card} | {kind} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    text = "\n".join(lines) + "\n"
    (options.out / "generation-computed.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("generation"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=("measured", "computed"), default=["measured"])
    parser.add_argument("--device", choices=tuple(PLACES), default="simulated")
    parser.add_argument("--shapes", nargs="+", help="of those that the device has a place for")
    parser.add_argument("--tiers", nargs="+", choices=("host", "disk"), default=["host", "disk"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs in each process, after one that is not")
    parser.add_argument("--seconds", type=float, default=3000.0, help="for all runs together")
    parser.add_argument("--folder", help="where weights on disk lie; default: that of temporary files")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or DEFAULT[options.device]
    known = [place[0] for place in PLACES[options.device]]
    for shape in options.shapes:
        if shape not in known:
            parser.error(f"--shapes {shape}: on this device there are {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, computes, and writes everything into the folder; 1 if a system could not be measured at all."""
    options = parse(arguments)
    if options.job:
        from generation_systems import measure

        sys.stdout.write(RESULT + json.dumps(measure(json.loads(options.job))) + "\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if "computed" in options.parts:
        compute(options)
    if "measured" not in options.parts:
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run_all(options, folder)
    write_csv(rows, options.out / "generation.csv")
    summary = summarise(rows)
    table = as_table(summary)
    (options.out / "generation.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    if summary:
        draw(summary, options.out / "generation.png")
    return int({row["system"] for row in summary} != set(SYSTEMS))


if __name__ == "__main__":
    sys.exit(main())
