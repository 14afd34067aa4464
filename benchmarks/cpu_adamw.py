"""How fast the CPU update is, side by side: the native AdamW, torch's fused AdamW, DeepSpeed's CPUAdam, a plain copy.

    python benchmarks/cpu_adamw.py [--deepspeed-python VENV/bin/python] [--out FOLDER] [--numel 50000000]
        [--threads 1 2] [--neighbours 0 1] [--rounds 9] [--isa avx2 ...]

For each number of threads, and with so many busy neighbour processes (each loops on one core), the candidates take turns,
so that a change of the machine's speed meets them all. The table shows medians over the rounds and, for each candidate,
the median of its rate over another's *in the same round*. Only those ratios mean something on a machine that others use
too. Aims: ``native_bf16`` at least 0.95x ``fused_fp32``, 1.8x ``cast_fused_cast`` and 1.3x ``deepspeed_cast``.

Candidates, all of AdamW with fp32 master and moments unless they say otherwise:

- ``copy``             a copy of an fp32 array: the machine's bandwidth
- ``fused_fp32``       torch's fused AdamW, fp32 gradient in, no low-precision copy out: the memory-bound yardstick
- ``cast_fused_cast``  what takes a bf16 gradient with torch alone: copy to fp32, fused AdamW, copy to bf16
- ``deepspeed_fp32``   DeepSpeed's CPUAdam, fp32 gradient in, no low-precision copy out
- ``deepspeed_cast``   the same with the copies from and to bf16 around it, as ZeRO-Offload does it
- ``native_bf16``      the native kernel, bf16 gradient in, bf16 weights out, one pass (fp16 likewise: ``native_fp16``)
- ``native_fp32``      the native kernel, fp32 gradient in, no copy out
- ``split``, ``bf16_states``, ``8bit_states``  the native kernel with the other formats of states, bf16 in and out

DeepSpeed lives in a Python of its own, which transformers and the like are better kept from:
``DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install torch deepspeed``; it compiles its kernel on first use, in about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.9, 0.999)
YARDSTICKS = ("fused_fp32", "cast_fused_cast", "deepspeed_cast")
FIELDS = ("threads", "neighbours", "candidate", "numel", "median_s", "gparams_per_s", "gb_per_s",
          *(f"x_{name}" for name in YARDSTICKS))  # fmt: skip
# What must be read and written for each parameter; casts and copies of their own are passes of their own.
TRAFFIC_BYTES = {
    "copy": 8,
    "cast_fused_cast": 40,
    "deepspeed_cast": 40,
    "split": 26,
    "bf16_states": 18,
    "8bit_states": 12,
}
PLAIN_TRAFFIC_BYTES = 28
Run = Callable[[], float]


def timed(function: Callable[[], Any]) -> Run:
    """Return what runs it and returns the seconds that took."""

    def run() -> float:
        start_s = time.perf_counter()
        function()
        return time.perf_counter() - start_s

    return run


# -- candidates --------------------------------------------------------------------------------------------------------


class Arrays:
    """What the candidates work on; made once, outside the clock."""

    def __init__(self, numel: int) -> None:
        self.master, self.exp_avg, self.exp_avg_sq = (
            torch.randn(numel),
            torch.randn(numel) * 1e-3,
            torch.rand(numel) * 1e-4,
        )
        self.grad = torch.randn(numel) * 1e-2
        self.widened = self.grad.clone()
        self.halves = {
            dtype: (self.grad.to(dtype), torch.zeros(numel, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)
        }
        self.steps = [torch.tensor(10.0)]

    def fused(self, gradient: torch.Tensor) -> None:
        """Torch's fused AdamW."""
        lists: Any = [self.master], [gradient], [self.exp_avg], [self.exp_avg_sq], [], self.steps
        torch._fused_adamw_(*lists, amsgrad=False, maximize=False, beta1=BETAS[0], beta2=BETAS[1], **SETTINGS)

    def cast_fused_cast(self) -> None:
        """The same with a bf16 gradient in and bf16 weights out."""
        gradient, out = self.halves[torch.bfloat16]
        self.fused(self.widened.copy_(gradient))
        out.copy_(self.master)

    def torch_candidates(self) -> dict[str, Run]:
        """What needs nothing but torch."""
        return {
            "copy": timed(lambda: self.widened.copy_(self.grad)),
            "fused_fp32": timed(lambda: self.fused(self.grad)),
            "cast_fused_cast": timed(self.cast_fused_cast),
        }

    def native_candidates(self, isas: list[str], num_threads: int) -> dict[str, Run]:
        """The native kernel in its ways."""
        from zero.optim.formats import FORMATS, Noise
        from zero.optim.native import require_native
        from zero.optim.native_rules import AdamRule

        rule = AdamRule(betas=BETAS, step=10, **SETTINGS)
        plain = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

        def native(isa: str | None, gradient: torch.Tensor, out: torch.Tensor | None) -> Run:
            kernel = require_native(isa)
            return timed(lambda: kernel.step(rule, plain, gradient, out, num_threads=num_threads))

        def compact(name: str) -> Run:
            form, kernel = FORMATS[name], require_native()
            gradient, values = self.halves[torch.bfloat16]
            buffers = form.new_buffers(gradient.numel())
            options: Any = {"form": form, "noise": Noise(), "num_threads": num_threads}
            return timed(lambda: kernel.step(rule, buffers, gradient, values, **options))

        candidates = {}
        for label, isa in {"": None, **{f"_{isa}": isa for isa in isas}}.items():
            candidates[f"native_bf16{label}"] = native(isa, *self.halves[torch.bfloat16])
            candidates[f"native_fp16{label}"] = native(isa, *self.halves[torch.float16])
            candidates[f"native_fp32{label}"] = native(isa, self.grad, None)
        return candidates | {"split": compact("split"), "bf16_states": compact("bf16"), "8bit_states": compact("8bit")}


class DeepSpeed:
    """CPUAdam in another Python, told through a pipe when it is its turn."""

    names = ("deepspeed_fp32", "deepspeed_cast")

    def __init__(self, python: Path, numel: int) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
        environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', '')}"  # ninja is beside it
        command = [str(python), str(Path(__file__).resolve()), "--numel", str(numel), "--serve-deepspeed"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.version = self._ask("version 0")

    def _ask(self, request: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        stdin.write(request + "\n")
        stdin.flush()
        while answer := stdout.readline():
            if answer.startswith("answer "):  # it prints other things, too
                return answer.removeprefix("answer ").strip()
        raise SystemExit("DeepSpeed ended early; its message is above")

    def candidates(self, num_threads: int) -> dict[str, Run]:
        """CPUAdam alone, and with casts."""
        return {name: lambda name=name: float(self._ask(f"{name} {num_threads}")) for name in self.names}

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def serve_deepspeed(numel: int) -> None:
    """Answer requests from the pipe: what runs in the other Python."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weights = torch.nn.Parameter(torch.randn(numel))
    grad, widened = torch.randn(numel) * 1e-2, torch.zeros(numel)
    half, out = grad.bfloat16(), torch.zeros(numel, dtype=torch.bfloat16)
    optimizer = DeepSpeedCPUAdam([weights], betas=BETAS, adamw_mode=True, **SETTINGS)

    def step(gradient: torch.Tensor) -> None:
        weights.grad = gradient
        optimizer.step()

    def cast() -> None:
        step(widened.copy_(half))
        out.copy_(weights.detach())

    runs = {"deepspeed_fp32": timed(lambda: step(grad)), "deepspeed_cast": timed(cast)}
    for request in sys.stdin:
        name, num_threads = request.split()
        if name == "version":
            sys.stdout.write(f"answer {deepspeed.__version__}\n")
        else:
            torch.set_num_threads(int(num_threads))
            sys.stdout.write(f"answer {runs[name]()}\n")
        sys.stdout.flush()


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(candidates: dict[str, Run], num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round by candidate, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for current in range(num_rounds + 1):
        for name, run in candidates.items():
            taken_s = run()
            if current > 0:
                seconds[name].append(taken_s)
    return seconds


def summarise(seconds: dict[str, list[float]], numel: int, num_threads: int, neighbours: int) -> list[dict[str, Any]]:
    """Return one row of FIELDS for each candidate."""

    def ratio(name: str, other: str) -> float | None:
        if other not in seconds:
            return None
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    rows = []
    for name, values in seconds.items():
        median_s = statistics.median(values)
        traffic_bytes = numel * TRAFFIC_BYTES.get(name, PLAIN_TRAFFIC_BYTES)
        figures = numel, median_s, numel / median_s / 1e9, traffic_bytes / median_s / 1e9
        ratios = (None if name == "copy" else ratio(name, other) for other in YARDSTICKS)
        rows.append(dict(zip(FIELDS, (num_threads, neighbours, name, *figures, *ratios), strict=True)))
    return rows


# -- output ------------------------------------------------------------------------------------------------------------


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for a person."""
    heads = ("x fused fp32", "x cast+fused+cast", "x DeepSpeed cast")
    lines = [f"{'threads':>7} {'busy':>4}  {'candidate':<20} {'ms':>7} {'Gparam/s':>8} {'GB/s':>6}"
             + "".join(f" {head:>17}" for head in heads)]  # fmt: skip
    for row in rows:
        ratios = ("" if row[f"x_{name}"] is None else f"{row[f'x_{name}']:.2f}" for name in YARDSTICKS)
        lines.append(
            f"{row['threads']:>7} {row['neighbours']:>4}  {row['candidate']:<20} {row['median_s'] * 1e3:>7.1f} "
            f"{row['gparams_per_s']:>8.2f} {row['gb_per_s']:>6.1f}" + "".join(f" {ratio:>17}" for ratio in ratios)
        )
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


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a chart of rates over the fused yardstick's, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = sorted({(row["threads"], row["neighbours"]) for row in rows})
    shown = {(row["threads"], row["neighbours"], row["candidate"]): row["x_fused_fp32"] for row in rows}
    names = [name for name in dict.fromkeys(row["candidate"] for row in rows) if name != "copy"]
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    height = 0.8 / len(conditions)
    for number, (threads, busy) in enumerate(conditions):
        places = [place + number * height for place in range(len(names))]
        label = f"{threads} thread{'s' * (threads != 1)}, {busy} busy neighbour{'s' * (busy != 1)}"
        axes.barh(places, [shown[threads, busy, name] for name in names], height, label=label)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("rate over torch's fused AdamW in fp32, same round (higher is better)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="The native AdamW against torch's, DeepSpeed's, and a copy, on the CPU."
    )
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters (default 50 million; 45 bytes each)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default 1 2)")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1], help="busy processes (default 0 1)")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--isa", nargs="+", default=[], help="also time these: avx512, avx2, generic")
    parser.add_argument("--deepspeed-python", type=Path, help="a Python that has DeepSpeed: time its CPUAdam, too")
    parser.add_argument("--out", type=Path, help="write cpu_adamw.csv, .txt and .png into this folder")
    parser.add_argument("--serve-deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace, deepspeed: DeepSpeed | None) -> list[dict[str, Any]]:
    """Return the rows of all numbers of threads and of neighbours."""
    arrays, rows = Arrays(options.numel), []
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        candidates = arrays.torch_candidates() | arrays.native_candidates(options.isa, num_threads)
        if deepspeed is not None:
            candidates |= deepspeed.candidates(num_threads)
        for count in options.neighbours:
            with busy_neighbours(count):
                rows += summarise(measure(candidates, options.rounds), options.numel, num_threads, count)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write table, CSV and chart."""
    options = parse(arguments)
    if options.serve_deepspeed:
        serve_deepspeed(options.numel)
        return
    from zero.optim.native import native_status

    deepspeed = DeepSpeed(options.deepspeed_python, options.numel) if options.deepspeed_python else None
    head = f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {platform.machine()}, "
    head += f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\nnative: {native_status().rsplit(', ', 1)[0]}\n"
    try:
        head += f"deepspeed: {deepspeed.version if deepspeed else 'not measured (--deepspeed-python)'}\n"
        rows = compare(options, deepspeed)
    finally:
        if deepspeed is not None:
            deepspeed.close()
    sys.stdout.write(head + as_table(rows))
    if options.out is None:
        sys.stdout.write("\n" + as_csv(rows))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cpu_adamw.txt").write_text(head + as_table(rows), encoding="utf-8")
    (options.out / "cpu_adamw.csv").write_text(as_csv(rows), encoding="utf-8")
    draw(rows, options.out / "cpu_adamw.png")


if __name__ == "__main__":
    main()
