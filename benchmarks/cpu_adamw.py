"""How fast the CPU update is: native AdamW with bf16 in and out against torch's fused AdamW, side by side.

    python benchmarks/cpu_adamw.py [--numel 50000000] [--threads 1 2] [--rounds 9] [--out cpu_adamw.csv]

The candidates take turns, so that a change of the machine's speed meets them all; the table shows medians over the
rounds and, for each candidate, the median of its rate over another's *in the same round*. Only those ratios mean
something on a machine that others use too. Aims: ``native_bf16`` at least 0.95x ``fused_fp32``, at least 1.8x
``cast_fused_cast``.

Candidates, all on the same fp32 master and moments:

- ``fused_fp32``       torch's fused AdamW, fp32 gradient in, no low-precision copy out: the memory-bound yardstick
- ``cast_fused_cast``  what takes a bf16 gradient with torch alone: copy to fp32, fused AdamW, copy to bf16
- ``native_bf16``      the native kernel, bf16 gradient in, bf16 weights out, one pass (fp16 likewise: ``native_fp16``)
- ``native_fp32``      the native kernel, fp32 gradient in, no copy out
"""

from __future__ import annotations

import argparse
import csv
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zero.optim.native import NativeKernel, native_status, require_native

SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.9, 0.999)
FIELDS = ("threads", "candidate", "numel", "median_s", "gparams_per_s", "x_fused_fp32", "x_cast_fused_cast")


def make_candidates(numel: int, kernels: dict[str, NativeKernel], num_threads: int) -> dict[str, Callable[[], None]]:
    """Return the candidates by name; every buffer they need is made here, outside the clock."""
    master, exp_avg, exp_avg_sq = torch.randn(numel), torch.randn(numel) * 1e-3, torch.rand(numel) * 1e-4
    grad = torch.randn(numel) * 1e-2
    widened = grad.clone()
    halves = {dtype: (grad.to(dtype), torch.zeros(numel, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)}
    steps = [torch.tensor(10.0)]
    lists = [master], [exp_avg], [exp_avg_sq]

    def fused(gradient: torch.Tensor) -> None:
        parameters, means, squares = lists
        betas = {"beta1": BETAS[0], "beta2": BETAS[1]}
        torch._fused_adamw_(
            parameters, [gradient], means, squares, [], steps, amsgrad=False, maximize=False, **betas, **SETTINGS
        )

    def cast_fused_cast() -> None:
        gradient, out = halves[torch.bfloat16]
        fused(widened.copy_(gradient))
        out.copy_(master)

    def native(kernel: NativeKernel, gradient: torch.Tensor, out: torch.Tensor | None) -> Callable[[], None]:
        call = {"betas": BETAS, "step": 10, "num_threads": num_threads, **SETTINGS}
        return lambda: kernel.adamw(master, exp_avg, exp_avg_sq, gradient, out, **call)

    candidates: dict[str, Callable[[], None]] = {
        "fused_fp32": lambda: fused(grad),
        "cast_fused_cast": cast_fused_cast,
    }
    for label, kernel in kernels.items():
        candidates[f"native_bf16{label}"] = native(kernel, *halves[torch.bfloat16])
        candidates[f"native_fp16{label}"] = native(kernel, *halves[torch.float16])
        candidates[f"native_fp32{label}"] = native(kernel, grad, None)
    return candidates


def measure(candidates: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round by candidate, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for current in range(num_rounds + 1):
        for name, run in candidates.items():
            start_s = time.perf_counter()
            run()
            if current > 0:
                seconds[name].append(time.perf_counter() - start_s)
    return seconds


def summarise(seconds: dict[str, list[float]], numel: int, num_threads: int) -> list[dict[str, Any]]:
    """Return one row of FIELDS for each candidate."""

    def ratio(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    rows = []
    for name, values in seconds.items():
        median_s = statistics.median(values)
        rate = numel / median_s / 1e9
        ratios = ratio(name, "fused_fp32"), ratio(name, "cast_fused_cast")
        rows.append(dict(zip(FIELDS, (num_threads, name, numel, median_s, rate, *ratios), strict=True)))
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for a person."""
    lines = [
        f"{'threads':>7}  {'candidate':<22} {'ms':>8} {'Gparam/s':>9} {'x fused fp32':>13} {'x cast+fused+cast':>18}"
    ]
    lines += [
        f"{row['threads']:>7}  {row['candidate']:<22} {row['median_s'] * 1e3:>8.1f} {row['gparams_per_s']:>9.2f} "
        f"{row['x_fused_fp32']:>13.2f} {row['x_cast_fused_cast']:>18.2f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Return the rows for a program."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    return text.getvalue()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Native AdamW against torch's fused AdamW on the CPU.")
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters (default 50 million; 24 bytes each)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default 1 2)")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--isa", nargs="+", help="also time these: avx512, avx2, generic")
    parser.add_argument("--out", type=Path, help="write the CSV there (default: print it after the table)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the table and the CSV."""
    options = parse(arguments)
    kernels = {"": require_native()} | {f"_{isa}": require_native(isa) for isa in options.isa or []}
    sys.stdout.write(f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {platform.machine()}\n")
    sys.stdout.write(f"native: {native_status().rsplit(', ', 1)[0]}\n")
    rows = []
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        candidates = make_candidates(options.numel, kernels, num_threads)
        rows += summarise(measure(candidates, options.rounds), options.numel, num_threads)
    sys.stdout.write(as_table(rows))
    if options.out is None:
        sys.stdout.write("\n" + as_csv(rows))
    else:
        options.out.write_text(as_csv(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
