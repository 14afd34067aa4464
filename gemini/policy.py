"""From facts, trace and capacity to a plan: ``cuda``, ``cpu``, ``static`` and ``auto`` are points of one space."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gemini.plan import ChunkFacts, DoesNotFitError, Plan, offload_all, persistent_bytes
from gemini.profile import HardwareProfile
from gemini.schedule import Run
from gemini.search import Search, static_placements
from gemini.segment import Placement
from gemini.streamed_search import try_streamed
from gemini.timeline import (
    largest_gathered_bytes,
    needed_bytes,
    required_bytes,
    used_in_place,
    with_prediction,
)
from gemini.trace import EVALUATION, Moment, Trace
from gemini.units import format_bytes

POLICIES = ("auto", "cuda", "cpu", "static")


@dataclass(frozen=True)
class Policy:
    """How to place.

    Args:
        name: one of :data:`POLICIES`.
        resident_parameters: for ``static``: fraction of the parameters' bytes that stays on the device.
        resident_optimizer: for ``static``: fraction of the trainable elements whose companions live on the device.
        profile: rates, for ``auto``.
        prefetch_depth: moments ahead of which chunks are fetched; None: what is predicted to be fastest.
        run: what a step does beside its plan.
        spares_memory: gathered copies get no more room than the passes cannot do without, though there is more: the
            device's memory is the host's, which everybody uses, and a copy costs less than it holds. They fill what
            gradients will take, as long as those have not come.
    """

    name: str = "auto"
    resident_parameters: float = 0.0
    resident_optimizer: float = 0.0
    profile: HardwareProfile = field(default_factory=HardwareProfile)
    prefetch_depth: int | None = None
    run: Run = field(default_factory=Run)
    spares_memory: bool = False

    def initial(self, facts: list[ChunkFacts], capacity_bytes: int) -> Plan:
        """The plan before anything is known of activations: ``auto`` offloads all, the others stand already.

        Raises:
            DoesNotFitError: model data alone is more than the device has.
        """
        plan = self._fixed(facts) if self.name != "auto" else offload_all("auto", facts)
        _describe(plan, facts)
        if required_bytes(facts, plan.placements, Trace()) > capacity_bytes:
            raise does_not_fit(facts, plan, Trace(), capacity_bytes)
        return plan

    def decide(self, facts: list[ChunkFacts], trace: Trace, capacity_bytes: int) -> Plan:
        """The plan for a trace.

        Raises:
            DoesNotFitError: not even the placement with the least on the device fits (``auto``), or the fixed one.
        """
        spared_bytes = self._spared_bytes(facts, trace, capacity_bytes)
        room_bytes = capacity_bytes - spared_bytes
        search = Search(facts, trace, room_bytes, self.profile, self.run, self.prefetch_depth)
        if self.name == "auto":
            search.run()
            try_streamed(search, facts, trace, room_bytes, self.profile, self.run, self.prefetch_depth)
        else:
            search.take(self._fixed(facts).placements)
        plan, prediction = Plan(self.name, search.placements, prefetch_depth=search.depth), search.prediction
        _describe(plan, facts)
        if not prediction.fits:
            raise does_not_fit(facts, plan, trace, capacity_bytes)
        plan.spared_bytes = spared_bytes
        return with_prediction(plan, prediction, trace)

    def _spared_bytes(self, facts: list[ChunkFacts], trace: Trace, capacity_bytes: int) -> int:
        """Of the capacity, what the plan leaves alone."""
        if not self.spares_memory:
            return 0
        placements = offload_all("auto", facts).placements if self.name == "auto" else self._fixed(facts).placements
        return max(0, capacity_bytes - required_bytes(facts, placements, trace, with_margin=True))

    def refusal(self, facts: list[ChunkFacts], trace: Trace, capacity_bytes: int) -> DoesNotFitError:
        """Why a trace does not fit, be it for one that :meth:`decide` does not see, such as an evaluation's."""
        plan = offload_all("auto", facts) if self.name == "auto" else self._fixed(facts)
        _describe(plan, facts)
        return does_not_fit(facts, plan, trace, capacity_bytes)

    def _fixed(self, facts: list[ChunkFacts]) -> Plan:
        fractions = {
            "cuda": (1.0, 1.0),
            "cpu": (0.0, 0.0),
            "static": (self.resident_parameters, self.resident_optimizer),
        }
        return Plan(self.name, static_placements(facts, *fractions[self.name]))


def _describe(plan: Plan, facts: list[ChunkFacts]) -> None:
    plan.resident_parameter_bytes, plan.device_optimizer_bytes = persistent_bytes(facts, plan.placements)
    plan.streamed_numel = sum(f.numel for f, p in zip(facts, plan.placements, strict=True) if p.streams_update)


def least_capacity_bytes(facts: list[ChunkFacts], trace: Trace) -> int:
    """The smallest device on which passes like this trace's run with everything offloaded, with some margin.

    The margin is for activations that grow from pass to pass; :func:`gemini.timeline.required_bytes` is without.
    """
    return required_bytes(facts, [Placement() for _ in facts], trace, with_margin=True)


def does_not_fit(facts: list[ChunkFacts], plan: Plan, trace: Trace, capacity_bytes: int) -> DoesNotFitError:
    """The refusal, with who needs what and the smallest change that would fit.

    Args:
        facts: of all chunks.
        plan: what was to be done.
        trace: of a pass: a complete one, or as far as one came before the device was full.
        capacity_bytes: of the device.
    """
    rows = [
        ("parameters that stay", "device", plan.resident_parameter_bytes, f"policy {plan.policy}"),
        ("master, optimizer states, gradients", "device", plan.device_optimizer_bytes, f"policy {plan.policy}"),
    ]
    worst, worst_bytes = _worst(facts, plan, trace)
    if worst is not None:
        note = f"{worst.phase} of {worst.label}"
        # What was gathered when the two together were highest: the most of each may fall on different instants.
        rows.append(("parameters gathered then", "device", max(0, worst_bytes - worst.non_model_peak_bytes), note))
        rows.append(("activations and temporaries", "device", worst.non_model_peak_bytes, note))
    else:
        gathered = [f for f, p in zip(facts, plan.placements, strict=True) if not used_in_place(f, p)]
        note = max(gathered, key=lambda fact: fact.gathered_bytes).unit_name if gathered else "all parameters stay"
        rows.append(("largest chunk", "device", largest_gathered_bytes(facts, plan.placements), note))
    known_bytes = max(sum(num_bytes for _, _, num_bytes, _ in rows), required_bytes(facts, plan.placements, trace))
    need_bytes = max(known_bytes, capacity_bytes + 1)  # a pass that broke off has not seen all that it needs
    rows.append(("needed in all", "device", need_bytes, f"{format_bytes(capacity_bytes)} available"))
    message = (
        f"it does not fit: policy {plan.policy} needs {format_bytes(need_bytes)}, "
        f"the device has {format_bytes(capacity_bytes)}"
    )
    return DoesNotFitError(message, rows, _advice(facts, plan, trace, capacity_bytes))


def _worst(facts: list[ChunkFacts], plan: Plan, trace: Trace) -> tuple[Moment | None, int]:
    """The moment that needs most beside what stays, and how much."""
    needs = zip(trace.moments, needed_bytes(facts, plan.placements, trace), strict=True)
    return max(needs, key=lambda pair: pair[1], default=(None, 0))


def _advice(facts: list[ChunkFacts], plan: Plan, trace: Trace, capacity_bytes: int) -> str:
    least_bytes = least_capacity_bytes(facts, trace)
    if plan.policy != "auto" and least_bytes <= capacity_bytes:
        return 'smallest change that would fit: memory.policy = "auto", which offloads what does not fit'
    least_bytes = max(least_bytes, capacity_bytes + 1)
    rounded = math.ceil(least_bytes / 1024)
    advice = f"smallest change that would fit: device.memory of at least {rounded}KiB ({format_bytes(least_bytes)}"
    tight_bytes = required_bytes(facts, [Placement() for _ in facts], trace)
    if capacity_bytes < tight_bytes < least_bytes:
        more_bytes = least_bytes - tight_bytes
        advice += f": {format_bytes(tight_bytes)}, and {format_bytes(more_bytes)} for activations that may grow"
    advice += ")"
    if plan.policy != "auto":
        advice += ' with memory.policy = "auto"'
    worst, _ = _worst(facts, plan, trace)
    if worst is not None and worst.phase == EVALUATION:
        advice += ", or a lower train.per_device_eval_batch_size"
    elif worst is not None and not any(fact.companion_bytes_per_numel for fact in facts):  # nothing is trained
        advice += ", or fewer rows or tokens at a time"
    elif worst is not None:
        advice += ", or fewer tokens in a micro-batch, or train.gradient_checkpointing = true"
        advice += ', or train.accumulation_order = "batch"' * trace.is_window
    return advice
