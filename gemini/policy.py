"""From facts, trace and capacity to a plan: ``cuda``, ``cpu``, ``static`` and ``auto`` are points of one space."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gemini.plan import ChunkFacts, DoesNotFitError, Plan, offload_all, persistent_bytes
from gemini.segment import Placement
from gemini.timeline import HardwareProfile, Prediction, replay, with_prediction
from gemini.trace import NextUse, Trace
from gemini.units import format_bytes

POLICIES = ("auto", "cuda", "cpu", "static")

Predict = Callable[[list[Placement]], Prediction]


@dataclass(frozen=True)
class Policy:
    """How to place.

    Args:
        name: one of :data:`POLICIES`.
        resident_parameters: for ``static``: fraction of the parameters' bytes that stays on the device.
        resident_optimizer: for ``static``: fraction of the trainable elements whose companions live on the device.
        profile: rates, for ``auto``.
    """

    name: str = "auto"
    resident_parameters: float = 0.0
    resident_optimizer: float = 0.0
    profile: HardwareProfile = field(default_factory=HardwareProfile)

    def initial(self, facts: list[ChunkFacts], capacity_bytes: int) -> Plan:
        """The plan before anything is known of activations: ``auto`` offloads all, the others stand already.

        Raises:
            DoesNotFitError: model data alone is more than the device has.
        """
        plan = self._fixed(facts) if self.name != "auto" else offload_all("auto", facts)
        _describe(plan, facts)
        need_bytes = (
            plan.resident_parameter_bytes + plan.device_optimizer_bytes + _largest_gathered(facts, plan.placements)
        )
        if need_bytes > capacity_bytes:
            raise does_not_fit(facts, plan, Trace(), capacity_bytes)
        return plan

    def decide(self, facts: list[ChunkFacts], trace: Trace, capacity_bytes: int) -> Plan:
        """The plan for a trace.

        Raises:
            DoesNotFitError: not even the placement with the least on the device fits (``auto``), or the fixed one.
        """
        next_use = NextUse(trace)

        def predict(placements: list[Placement]) -> Prediction:
            return replay(facts, placements, trace, capacity_bytes, self.profile, next_use)

        if self.name == "auto":
            plan, prediction = self._search(facts, predict)
        else:
            plan = self._fixed(facts)
            prediction = predict(plan.placements)
        _describe(plan, facts)
        if not prediction.fits:
            raise does_not_fit(facts, plan, trace, capacity_bytes)
        return with_prediction(plan, prediction, trace)

    def _fixed(self, facts: list[ChunkFacts]) -> Plan:
        fractions = {
            "cuda": (1.0, 1.0),
            "cpu": (0.0, 0.0),
            "static": (self.resident_parameters, self.resident_optimizer),
        }
        parameters, optimizer = fractions[self.name]
        resident = _fill(facts, parameters, lambda fact: fact.value_itemsize)
        companions = _fill(facts, optimizer, lambda fact: fact.companion_bytes_per_numel)
        return Plan(self.name, [Placement(r, c) for r, c in zip(resident, companions, strict=True)])

    def _search(self, facts: list[ChunkFacts], predict: Predict) -> tuple[Plan, Prediction]:
        """Tries every number of leading chunks with companions on the device, each with as many resident as fit."""
        best_placements = [Placement() for _ in facts]
        best = predict(best_placements)
        if not best.fits:
            return Plan("auto", best_placements), best
        for num_companions in _candidates(len(facts)):
            most = self._most_resident(facts, num_companions, predict)
            for num_resident in {most, most // 2} if most >= 0 else ():
                placements = _leading(facts, num_resident, num_companions)
                prediction = predict(placements)
                if prediction.fits and prediction.step_s < best.step_s:
                    best, best_placements = prediction, placements
        return Plan("auto", best_placements), best

    @staticmethod
    def _most_resident(facts: list[ChunkFacts], num_companions: int, predict: Predict) -> int:
        """The largest number of leading resident chunks that fits beside the companions; -1 if none does."""
        low, high = -1, len(facts)
        while low < high:
            middle = (low + high + 1) // 2
            if predict(_leading(facts, middle, num_companions)).fits:
                low = middle
            else:
                high = middle - 1
        return low


def _candidates(num_chunks: int) -> list[int]:
    """At most about 40 counts from 0 to all: layouts are nearly homogeneous, neighbours differ little."""
    stride = max(1, num_chunks // 40)
    return sorted({*range(0, num_chunks + 1, stride), num_chunks})


def _leading(facts: list[ChunkFacts], num_resident: int, num_companions: int) -> list[Placement]:
    """Early layers first: last in backward and first in forward, their update is the one hardest to hide."""
    return [
        Placement(
            fact.numel if position < num_resident else 0,
            fact.numel if position < num_companions and fact.companion_bytes_per_numel else 0,
        )
        for position, fact in enumerate(facts)
    ]


def _fill(facts: list[ChunkFacts], fraction: float, bytes_per_numel: Callable[[ChunkFacts], int]) -> list[int]:
    """Leading elements per chunk so that their bytes are ``fraction`` of all, exact to one element."""
    per_numel = [bytes_per_numel(fact) for fact in facts]
    left_bytes = round(fraction * sum(f.numel * b for f, b in zip(facts, per_numel, strict=True)))
    counts = []
    for fact, itemsize in zip(facts, per_numel, strict=True):
        count = min(fact.numel, left_bytes // itemsize) if itemsize else 0
        counts.append(count)
        left_bytes -= count * itemsize
    return counts


def _describe(plan: Plan, facts: list[ChunkFacts]) -> None:
    plan.resident_parameter_bytes, plan.device_optimizer_bytes = persistent_bytes(facts, plan.placements)


def _largest_gathered(facts: list[ChunkFacts], placements: list[Placement]) -> int:
    pairs = zip(facts, placements, strict=True)
    return max((f.value_bytes for f, p in pairs if p.resident_numel < f.numel), default=0)


def least_capacity_bytes(facts: list[ChunkFacts], trace: Trace) -> int:
    """The smallest device on which the pass of this trace runs with everything offloaded."""
    largest = _largest_gathered(facts, [Placement() for _ in facts])
    need = [m.non_model_peak_bytes + m.gathered_peak_bytes for m in trace.moments]
    return max([largest, *need], default=0)


def does_not_fit(facts: list[ChunkFacts], plan: Plan, trace: Trace, capacity_bytes: int) -> DoesNotFitError:
    """The refusal, with who needs what and the smallest change that would fit."""
    rows = [
        ("parameters that stay", "device", plan.resident_parameter_bytes, f"policy {plan.policy}"),
        ("master, optimizer states, gradients", "device", plan.device_optimizer_bytes, f"policy {plan.policy}"),
    ]
    worst = max(trace.moments, key=lambda m: m.non_model_peak_bytes + m.gathered_peak_bytes, default=None)
    if worst is not None:
        rows.append(
            ("parameters gathered at once", "device", worst.gathered_peak_bytes, f"{worst.phase} of {worst.label}")
        )
        rows.append(
            ("activations and temporaries", "device", worst.non_model_peak_bytes, f"{worst.phase} of {worst.label}")
        )
    else:
        largest = max(facts, key=lambda fact: fact.value_bytes)
        rows.append(("largest chunk", "device", _largest_gathered(facts, plan.placements), largest.unit_name))
    need_bytes = sum(num_bytes for _, _, num_bytes, _ in rows)
    rows.append(("needed in all", "device", need_bytes, f"{format_bytes(capacity_bytes)} available"))
    least_bytes = least_capacity_bytes(facts, trace)
    if plan.policy != "auto" and least_bytes <= capacity_bytes:
        advice = 'smallest change that would fit: memory.policy = "auto", which offloads what does not fit'
    else:
        rounded = math.ceil(max(least_bytes, 1) / 1024)
        advice = f"smallest change that would fit: device.memory of at least {rounded}KiB ({format_bytes(least_bytes)})"
        if worst is not None:
            advice += ", or fewer tokens in a micro-batch, or train.gradient_checkpointing = true"
    has, needs = format_bytes(capacity_bytes), format_bytes(need_bytes)
    message = f"it does not fit: policy {plan.policy} needs {needs}, the device has {has}"
    return DoesNotFitError(message, rows, advice)
