"""How near a step comes to the slowest resource, and `auto` to the best of many static plans, in virtual time.

OPT-6.7B is walked through on fake tensors; its step is then scheduled on published profiles of cards. Beside the busiest
resource stands the limit that exact clipping leaves: an update on the host cannot begin before backward has ended, so the
two cannot hide one another.

    python benchmarks/virtual_limits.py                      OPT-6.7B, RTX 3090 and H100, 2k, 8k and 32k tokens: a minute
    python benchmarks/virtual_limits.py --layers 8 --csv virtual_limits.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import logging
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gemini.clock import COMPUTE, IN, OUT, UPDATE
from gemini.plan import ChunkFacts
from gemini.profile import NAMED, HardwareProfile
from gemini.schedule import moment_costs
from gemini.search import Search, static_placements
from gemini.timeline import required_bytes
from gemini.trace import Trace
from zero.config.loading import for_trainer, load_config
from zero.config.schema import Config
from zero.forecast import scaled_trace
from zero.planning import DryRun, dry_run_of

CARDS = ("rtx3090", "h100")
TOKENS = (2048, 8192, 32768)
_LENGTH = 1024
_WHOLE_LAYERS = 32
_NUM_STATIC = 40
_RESOURCES = (COMPUTE, IN, OUT, UPDATE)


def opt_config(num_layers: int = _WHOLE_LAYERS, activations: str = "device") -> Config:
    """OPT-6.7B, or the first layers of it, with activation checkpointing, two rows at a time."""
    model = {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
    return for_trainer(
        load_config(
            {
                "model": {"config": model},
                "device": {"type": "simulated", "memory": "1GiB"},
                "memory": {"activations": activations},
                "precision": {"dtype": "bf16"},
                "data": {"seq_length": _LENGTH},
                "train": {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "max_grad_norm": 1.0},
            }
        )
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One card and batch."""

    card: str
    num_tokens: int
    fits: bool
    auto_s: float = 0.0
    slowest: str = ""
    slowest_s: float = 0.0
    limit_s: float = 0.0
    best_static_s: float = 0.0
    num_static: int = 0
    peak_bytes: int = 0
    capacity_bytes: int = 0
    resident_share: float = 0.0
    states_share: float = 0.0
    depth: int = 0

    @property
    def over_limit(self) -> float:
        """The step, as a multiple of what nothing could hide."""
        return self.auto_s / self.limit_s

    @property
    def over_slowest(self) -> float:
        """The step, as a multiple of the busiest resource."""
        return self.auto_s / self.slowest_s

    @property
    def over_static(self) -> float:
        """The step, as a multiple of the best static plan's."""
        return self.auto_s / self.best_static_s


def measure(
    facts: list[ChunkFacts], trace: Trace, profile: HardwareProfile, capacity_bytes: int, num_tokens: int, seed: int = 0
) -> Row:
    """``auto`` on one machine, beside its limits and static plans of random fractions, all with their best prefetching.

    Args:
        facts: of the model's chunks.
        trace: of a micro-batch.
        profile: the machine.
        capacity_bytes: of its device.
        num_tokens: of the micro-batch.
        seed: of the static plans.
    """
    search = Search(facts, trace, capacity_bytes, profile)
    if required_bytes(facts, search.placements, trace) > capacity_bytes:
        return Row(profile.name, num_tokens, False)
    search.run()
    found = search.prediction
    busy_s = {lane: found.busy_s[lane] for lane in _RESOURCES}
    slowest = max(_RESOURCES, key=lambda lane: busy_s[lane])
    costs = zip(moment_costs(facts, trace, profile), trace.moments, strict=True)
    backward_s = sum(cost.duration_s for cost, moment in costs if moment.phase == "backward")
    statics = list(_static_times(facts, trace, profile, capacity_bytes, random.Random(seed)))
    numel = sum(fact.numel for fact in facts)
    return Row(
        profile.name,
        num_tokens,
        True,
        found.step_s,
        slowest,
        busy_s[slowest],
        max(busy_s[COMPUTE], busy_s[IN], busy_s[OUT], busy_s[UPDATE] + (backward_s if busy_s[UPDATE] else 0.0)),
        min(statics, default=found.step_s),
        len(statics),
        found.peak_bytes,
        capacity_bytes,
        sum(p.resident_numel for p in search.placements) / numel,
        sum(p.companion_numel for p in search.placements) / numel,
        search.depth,
    )


def _static_times(
    facts: list[ChunkFacts], trace: Trace, profile: HardwareProfile, capacity_bytes: int, draw: random.Random
) -> list[float]:
    """Seconds of static plans that fit; half of them use the device to its edge, as one tuned by hand would."""
    times: list[float] = []
    for number in range(_NUM_STATIC):
        parameters, optimizer = draw.random(), draw.random()
        if number % 2:
            parameters = draw.choice([0.0, 0.25, 0.5, 0.75, 1.0])
            optimizer = _largest(functools.partial(_fits, facts, trace, capacity_bytes, parameters))
        while not _fits(facts, trace, capacity_bytes, parameters, optimizer) and max(parameters, optimizer) > 0.001:
            parameters, optimizer = parameters * 0.7, optimizer * 0.7
        if not _fits(facts, trace, capacity_bytes, parameters, optimizer):
            continue
        search = Search(facts, trace, capacity_bytes, profile)
        search.take(static_placements(facts, parameters, optimizer))
        times.append(search.step_s)
    return times


def _fits(facts: list[ChunkFacts], trace: Trace, capacity_bytes: int, parameters: float, optimizer: float) -> bool:
    placements = static_placements(facts, parameters, optimizer)
    return required_bytes(facts, placements, trace, with_margin=True) <= capacity_bytes


def _largest(fits: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    if fits(high):
        return high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def dry_run(num_layers: int = _WHOLE_LAYERS) -> DryRun:
    """Of two rows, and of four."""
    return dry_run_of(opt_config(num_layers), None, None, 1, variants=True)


def all_rows(dry: DryRun, num_layers: int = _WHOLE_LAYERS) -> list[Row]:
    """Every card and batch; with fewer layers, on cards with as much less memory."""
    rows = []
    for card in CARDS:
        profile = NAMED[card]
        capacity_bytes = profile.capacity_bytes * num_layers // _WHOLE_LAYERS
        for num_tokens in TOKENS:
            trace = scaled_trace(dry.trace, dry.double or dry.trace, num_tokens / (2 * _LENGTH))
            trace.step_peak_bytes = 4 * max(fact.numel for fact in dry.facts)
            rows.append(measure(dry.facts, trace, profile, capacity_bytes, num_tokens))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; writes it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=_WHOLE_LAYERS, help="of the model, and the card's memory with it")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("zero").setLevel(logging.ERROR)
    rows = all_rows(dry_run(asked.layers), asked.layers)
    out = sys.stdout
    out.write(
        "card     tokens   auto s  busiest resource        s    x  limit s    x  best of static    x  resident states\n"
    )
    for row in rows:
        if not row.fits:
            out.write(f"{row.card:8s} {row.num_tokens:6d}   does not fit\n")
            continue
        out.write(
            f"{row.card:8s} {row.num_tokens:6d} {row.auto_s:8.3f}  {row.slowest:15s} {row.slowest_s:9.3f} "
            f"{row.over_slowest:4.2f} {row.limit_s:8.3f} {row.over_limit:4.2f} {row.best_static_s:9.3f} "
            f"of {row.num_static:2d} {row.over_static:4.2f} "
            f"{100 * row.resident_share:7.0f} % {100 * row.states_share:3.0f} %\n"
        )
    if asked.csv is not None:
        with asked.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
