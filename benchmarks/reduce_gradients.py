"""Summing a chunk's gradients over ranks into their owners' shards: three ways, side by side.

    python benchmarks/reduce_gradients.py [--ranks 2] [--mib 32]

For a bf16 gradient of so many MiB on gloo, in one run, alternating: torch's reduce_scatter in bf16 (sums are rounded at
each addition), the same in fp32 after a cast (twice the bytes), and what ``zero.sharding`` does: all_to_all in bf16 and a
sum in fp32 in the order of ranks. Error is the largest difference from the exact sum, in units of its largest element.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zero.collectives import all_to_all

_ROUNDS = 8


def _reduce_scatter(output: torch.Tensor, whole: torch.Tensor) -> None:
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(output, whole)


def _in_bf16(whole: torch.Tensor, num_ranks: int) -> torch.Tensor:
    output = torch.empty(whole.numel() // num_ranks, dtype=whole.dtype)
    _reduce_scatter(output, whole)
    return output.float()


def _in_fp32(whole: torch.Tensor, num_ranks: int) -> torch.Tensor:
    output = torch.empty(whole.numel() // num_ranks)
    _reduce_scatter(output, whole.float())
    return output


def _ours(whole: torch.Tensor, num_ranks: int) -> torch.Tensor:
    parts = list(whole.chunk(num_ranks))
    received = [torch.empty_like(part) for part in parts]
    all_to_all(received, parts)
    total = torch.zeros(parts[0].numel())
    for part in received:
        total += part
    return total


WAYS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "reduce_scatter in bf16": _in_bf16,
    "cast, reduce_scatter in fp32": _in_fp32,
    "all_to_all in bf16, sum in fp32": _ours,
}


def _work(rank: int, num_ranks: int, mib: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
    numel = (mib << 20) // 2 // num_ranks * num_ranks
    seeds = [torch.Generator().manual_seed(seed) for seed in range(num_ranks)]
    every = [torch.randn(numel, generator=seed).to(torch.bfloat16) for seed in seeds]
    share = numel // num_ranks
    exact = sum(one[rank * share : (rank + 1) * share].double() for one in every)
    times_s: dict[str, list[float]] = {name: [] for name in WAYS}
    errors: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, way in WAYS.items():
            whole = every[rank].clone()
            dist.barrier()
            began_s = time.perf_counter()
            total = way(whole, num_ranks)
            dist.barrier()
            times_s[name].append(time.perf_counter() - began_s)
            errors[name] = float((total.double() - exact).abs().max() / exact.abs().max())
    if rank == 0:
        for name in WAYS:
            best_s = min(times_s[name])
            sys.stdout.write(f"{num_ranks} ranks, {mib} MiB, {name}: {best_s * 1e3:.0f} ms, error {errors[name]:.1e}\n")
    dist.destroy_process_group()


def main() -> None:
    """Prints time and error of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mib", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (given.ranks, given.mib, str(Path(folder) / "meeting")), nprocs=given.ranks)


if __name__ == "__main__":
    main()
