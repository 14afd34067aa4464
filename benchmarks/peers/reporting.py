"""From runs to rows, and rows to a CSV, a table and a plot."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from systems import SYSTEMS

FIELDS = (
    "shape", "num_ranks", "system", "num_runs", "median_s", "p90_s", "best_s", "cpu_s", "tokens_per_s", "x_first",
    "x_first_low", "x_first_high", "x_first_cpu", "peak_bytes", "baseline_bytes", "bytes_per_parameter", "last_loss",
    "max_loss_difference", "settings", "engaged",
)  # fmt: skip
SUSPICIOUS = 0.1
"""A loss further from the fp32 reference than this is marked: bf16 alone stays well below."""

Run = dict[str, Any]


def summarise(runs: list[Run], references: dict[tuple[str, int], list[float]], first: str) -> list[dict[str, Any]]:
    """One row of FIELDS per configuration and system.

    ``x_first`` is the median over rounds of a system's median step over that of the system ``first`` in the same round,
    with the lowest and highest round; ``x_first_cpu`` the same of CPU seconds, which a busy machine changes less.
    """
    keys = list(dict.fromkeys((run["shape"], run["num_ranks"], run["system"]) for run in runs))
    return [_row(runs, key, references, first) for key in keys]


def _row(runs: list[Run], key: tuple[str, int, str], references: Any, first: str) -> dict[str, Any]:
    shape, num_ranks, system = key
    mine = _by_round(runs, key)
    others = _by_round(runs, (shape, num_ranks, first))
    seconds = sorted(second for run in mine.values() for second in run["step_s"])
    median_s = statistics.median(seconds)
    ratios = _ratios(mine, others, "step_s")
    last = next(reversed(mine.values()))
    peak_bytes = max(run["peak_bytes"] for run in mine.values())
    wanted = references.get((shape, num_ranks), [])
    differences = [abs(a - b) for r in mine.values() for a, b in zip(r["losses"], wanted, strict=False)]
    row = {
        "shape": shape,
        "num_ranks": num_ranks,
        "system": system,
        "num_runs": len(mine),
        "median_s": median_s,
        "p90_s": seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))],
        "best_s": seconds[0],
        "cpu_s": statistics.median(second for run in mine.values() for second in run["cpu_s"]),
        "tokens_per_s": last["tokens"] / median_s,
        "x_first": statistics.median(ratios) if ratios else None,
        "x_first_low": min(ratios, default=None),
        "x_first_high": max(ratios, default=None),
        "x_first_cpu": statistics.median(_ratios(mine, others, "cpu_s")) if ratios else None,
        "peak_bytes": peak_bytes,
        "baseline_bytes": last["baseline_bytes"],
        "bytes_per_parameter": peak_bytes / last["num_parameters"],
        "last_loss": last["losses"][-1],
        "max_loss_difference": max(differences, default=None),
        "settings": json.dumps(last["settings"]),
        "engaged": json.dumps(last["engaged"]),
    }
    return {field: row[field] for field in FIELDS}


def _by_round(runs: list[Run], key: tuple[str, int, str]) -> dict[int, Run]:
    return {run["round"]: run for run in runs if (run["shape"], run["num_ranks"], run["system"]) == key}


def _ratios(mine: dict[int, Run], others: dict[int, Run], field: str) -> list[float]:
    """Of medians, within each round that both have."""
    common = sorted(mine.keys() & others.keys())
    return [statistics.median(mine[n][field]) / statistics.median(others[n][field]) for n in common]


def as_table(rows: list[dict[str, Any]], first: str) -> str:
    """The rows as Markdown, for people."""
    heads = ["shape", "processes", "system", "step, s", "p90, s", "best, s", "CPU s a step", "tokens/s"]
    heads += [f"x {SYSTEMS[first].label} (rounds)", "peak host, GB", "before the model, GB", "last loss", "from fp32"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    ratio, difference = "", row["max_loss_difference"]
    if row["x_first"] is not None:
        ratio = f"{row['x_first']:.2f} ({row['x_first_low']:.2f}-{row['x_first_high']:.2f})"
    away = "" if difference is None else f"{difference:.3f}{' (!)' if difference > SUSPICIOUS else ''}"
    seconds = [f"{row[field]:.3f}" for field in ("median_s", "p90_s", "best_s", "cpu_s")]
    places = [row["shape"], str(row["num_ranks"]), SYSTEMS[row["system"]].label]
    gigabytes = [f"{row[field] / 1e9:.2f}" for field in ("peak_bytes", "baseline_bytes")]
    return [*places, *seconds, f"{row['tokens_per_s']:.0f}", ratio, *gigabytes, f"{row['last_loss']:.3f}", away]


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows for a program."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def draw(rows: list[dict[str, Any]], path: Path, first: str) -> None:
    """Bars: step time over the first system's, and peak host bytes, per configuration."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    places = list(dict.fromkeys((row["shape"], row["num_ranks"]) for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    width = 0.8 / len(systems)
    figure, (times, peaks) = pyplot.subplots(1, 2, figsize=(3 + 2.5 * len(places), 4.5), layout="constrained")
    for index, system in enumerate(systems):
        mine = {(row["shape"], row["num_ranks"]): row for row in rows if row["system"] == system}
        at = [number + (index - len(systems) / 2 + 0.5) * width for number, place in enumerate(places) if place in mine]
        present = [mine[place] for place in places if place in mine]
        times.bar(at, [row["x_first"] or 0.0 for row in present], width, label=SYSTEMS[system].label)
        peaks.bar(at, [row["peak_bytes"] / 1e9 for row in present], width)
    names = [f"{shape}\n{n} process{'es' if n > 1 else ''}" for shape, n in places]
    for axes, title in (
        (times, f"step time / {SYSTEMS[first].label}"),
        (peaks, "peak host memory of all processes, GB"),
    ):
        axes.set_xticks(range(len(places)), names)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    times.axhline(1.0, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
