"""Predicted against simulated step time, over random plans.

A small model is trained on the simulated device under random placements, capacities, prefetch depths and machines. The
simulated device reckons in virtual time when each copy, update and operator of the real manager, hooks and optimizer
would have happened; `gemini.timeline` predicts the same step from the trace alone. This prints how far they are apart.
In bf16 every fifth plan has something beside it: saved activations on the host, updates inside backward, states or values
on disk, or states in another format.

    python benchmarks/virtual_time.py                       50 plans, about a minute
    python benchmarks/virtual_time.py --plans 200 --csv virtual_time.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemini.clock import COMPUTE, DISK, IN, OUT, UPDATE
from gemini.homes import spill
from gemini.plan import ChunkFacts, host_bytes
from gemini.profile import HardwareProfile
from gemini.search import static_placements
from gemini.segment import Placement
from gemini.simulated import SimulatedDevice
from gemini.timeline import required_bytes
from gemini.trace import Trace
from zero.config.loading import load_config
from zero.engine import Engine

_TOKENS = (4, 32)
_STEPS = 4  # warm-up; first updates; under the plan; the same once more, which is measured
_RESOURCES = (COMPUTE, IN, OUT, UPDATE, DISK)
PLAIN = "plain"
BESIDE = ("activations", "early", "disk", "values on disk", "split", "8bit")
"""What a plan may have beside it."""


def tiny_model() -> torch.nn.Module:
    """Six blocks, and a vocabulary as large as two of them."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
    )
    torch.manual_seed(0)
    return OPTForCausalLM(config)


def random_profile(draw: random.Random) -> HardwareProfile:
    """A machine on which a step of the tiny model takes seconds, limited now by this and now by that."""
    link = 10 ** draw.uniform(5.2, 6.4)
    return HardwareProfile(
        name="random",
        h2d_bytes_per_s=link,
        d2h_bytes_per_s=link * draw.uniform(0.8, 1.0),
        both_bytes_per_s=link * draw.uniform(0.5, 0.8),
        host_dram_bytes_per_s=link * draw.uniform(2.0, 8.0),
        host_update_numel_per_s=10 ** draw.uniform(5.0, 6.3),
        device_update_numel_per_s=10 ** draw.uniform(6.3, 7.5),
        device_flops_per_s=10 ** draw.uniform(7.8, 9.2),
        device_fp32_flops_per_s=10 ** draw.uniform(7.8, 9.2),
        device_bytes_per_s=10 ** draw.uniform(7.5, 9.0),
        launch_s=draw.choice([0.0, 1e-5, 1e-4]),
        disk_read_bytes_per_s=link * draw.uniform(0.5, 2.0),
        disk_write_bytes_per_s=link * draw.uniform(0.3, 1.0),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan on one machine, and what became of it."""

    beside: str
    parameters: float
    optimizer: float
    depth: int
    capacity_bytes: int
    predicted_s: float
    simulated_s: float
    slowest: str
    slowest_s: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted_s / self.simulated_s - 1


def batch() -> dict[str, torch.Tensor]:
    """The same tokens again and again: only time matters."""
    tokens = torch.ones(_TOKENS, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


def make_engine(device: SimulatedDevice, dtype: str, memory: dict[str, Any], beside: str = PLAIN) -> Engine:
    """An engine on a device, with clipping unless updates are to begin inside backward."""
    config = load_config(
        {
            "device": {"type": "simulated", "memory": device.capacity_bytes},
            "memory": {"chunk": "64KiB", **memory} | ({"activations": "host"} if beside == "activations" else {}),
            "precision": {"dtype": dtype, "optimizer_state": beside if beside in ("split", "8bit") else "fp32"},
            "optimizer": {"kernel": "torch", "early": beside == "early"},
            "train": {"max_grad_norm": None if beside == "early" else 1.0},
        }
    )
    model = tiny_model()
    if beside == "activations":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), None, config, device, None)


def steps_s(engine: Engine, num_steps: int) -> float:
    """Trains; returns the virtual seconds of the last step."""
    device = engine.device
    if not isinstance(device, SimulatedDevice):
        raise TypeError("only the simulated device has virtual time")
    before_s = after_s = device.virtual_time_s
    for _ in range(num_steps):
        engine.zero_grad()
        engine.backward(engine(**batch()).loss)
        engine.step()
        before_s, after_s = after_s, device.virtual_time_s
    return after_s - before_s


class Laboratory:
    """Tries plans on machines.

    Args:
        dtype: of ``[precision]``.
    """

    def __init__(self, dtype: str = "bf16") -> None:
        torch.set_num_threads(1)
        self._dtype = dtype
        self._known: dict[str, tuple[list[ChunkFacts], Trace]] = {}

    def _pass(self, beside: str) -> tuple[list[ChunkFacts], Trace]:
        """Facts and trace of the model."""
        if beside not in self._known:
            engine = make_engine(SimulatedDevice(1 << 30, poison=False), self._dtype, {"policy": "cpu"}, beside)
            engine.backward(engine(**batch()).loss)
            trace = engine.manager.trace
            if trace is None:
                raise RuntimeError("nothing was recorded")
            self._known[beside] = engine.facts, trace
            engine.close()
        return self._known[beside]

    def try_plan(
        self,
        parameters: float,
        optimizer: float,
        depth: int,
        room: float,
        profile: HardwareProfile,
        beside: str = PLAIN,
    ) -> Case:
        """Trains under a plan on a machine.

        Args:
            parameters: fraction of the parameters that stays on the device.
            optimizer: fraction of the optimizer states there.
            depth: of prefetching.
            room: 0: as little as the plan needs; 1: room for all parameters beside it.
            profile: the machine.
            beside: one of :data:`BESIDE`, or nothing.
        """
        facts, trace = self._pass(beside)
        placements = static_placements(facts, parameters, optimizer)
        least_bytes = required_bytes(facts, placements, trace, with_margin=True) * 21 // 20
        capacity_bytes = least_bytes + int(room * sum(fact.gathered_bytes for fact in facts))
        memory: dict[str, Any] = {
            "policy": "static",
            "resident_parameters": parameters,
            "resident_optimizer": optimizer,
            "prefetch": depth,
        }
        device = SimulatedDevice(capacity_bytes, poison=False, profile=profile)
        with tempfile.TemporaryDirectory() as folder:
            if "disk" in beside:
                memory |= {"disk": folder, "host": _host_bytes(facts, beside), "pin": False}
            engine = make_engine(device, self._dtype, memory, beside)
            simulated_s = steps_s(engine, _STEPS)
            plan = engine.plan
            engine.close()
        slowest = max(_RESOURCES, key=lambda lane: plan.predicted_busy_s[lane])
        busy_s = plan.predicted_busy_s[slowest]
        found = plan.predicted_step_s, simulated_s, slowest, busy_s
        return Case(beside, parameters, optimizer, depth, capacity_bytes, *found)


def _host_bytes(facts: list[ChunkFacts], beside: str) -> int:
    """So much memory that a half of the states, or all of them and a half of the values, go to disk."""
    everything = host_bytes(facts, [Placement() for _ in facts])
    states = sum(int(fact.numel * (fact.companion_bytes_per_numel - fact.gradient_itemsize)) for fact in facts)
    values = sum(fact.value_bytes for fact in facts)
    limit_bytes = everything - (states // 2 if beside == "disk" else states + values // 2)
    if not any(fact.companions_on_disk for fact in spill(facts, limit_bytes)):
        raise RuntimeError("nothing goes to disk")
    return limit_bytes


def random_cases(num_plans: int, seed: int = 0, dtype: str = "bf16") -> list[Case]:
    """So many plans, each on a machine of its own."""
    draw, laboratory = random.Random(seed), Laboratory(dtype)
    cases = []
    for number in range(num_plans):
        beside = BESIDE[number // 5 % len(BESIDE)] if number % 5 == 4 and dtype == "bf16" else PLAIN
        fractions = [draw.choice([0.0, 1.0, draw.random(), draw.random()]) for _ in range(2)]
        depth, room = draw.randrange(5), draw.choice([0.0, 0.1, 0.3, 1.0])
        cases.append(laboratory.try_plan(*fractions, depth, room, random_profile(draw), beside))
    return cases


def summary(cases: Sequence[Case]) -> str:
    """The table's last line."""
    errors = sorted(abs(case.error) for case in cases)
    within = sum(error <= 0.15 for error in errors)
    return (
        f"{len(cases)} plans: median error {100 * statistics.median(errors):.1f} %, worst {100 * errors[-1]:.1f} %, "
        f"{within} within 15 %"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; writes it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=50, help="number of random plans (50)")
    parser.add_argument("--seed", type=int, default=0, help="of plans and machines (0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the model (bf16)")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    asked = parser.parse_args(arguments)
    logging.getLogger("zero").setLevel(logging.ERROR)
    cases = random_cases(asked.plans, asked.seed, asked.dtype)
    out = sys.stdout
    out.write("beside          resident  states  depth  capacity  predicted s  simulated s    error  slowest\n")
    for case in cases:
        out.write(
            f"{case.beside:15s} {case.parameters:8.2f} {case.optimizer:7.2f} {case.depth:6d} {case.capacity_bytes:9d} "
            f"{case.predicted_s:12.3f} {case.simulated_s:12.3f} {100 * case.error:+7.1f}%  {case.slowest}\n"
        )
    out.write(summary(cases) + "\n")
    if asked.csv is not None:
        rows: list[dict[str, Any]] = [dataclasses.asdict(case) | {"error": case.error} for case in cases]
        with asked.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
