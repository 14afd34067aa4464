"""How fast a run will be on a machine that need not be there, what holds it back, and what would help."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from gemini.accelerator import AcceleratorDevice
from gemini.clock import COMPUTE, DISK, EXCHANGE, IN, ISSUE, OUT, UPDATE, Span
from gemini.device import Device
from gemini.hostinfo import host_memory
from gemini.plan import ChunkFacts, host_bytes
from gemini.policy import Policy
from gemini.profile import HardwareProfile
from gemini.segment import Placement
from gemini.timeline import Prediction, replay, required_bytes
from gemini.trace import Moment, Trace
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.dryrun import CannotWalkError
from zero.errors import UserError
from zero.host_room import in_format, other_formats
from zero.optim.formats import FORMATS
from zero.planning import DryRun, PlannedRun, decide, room_for_early_updates
from zero.setup import policy_for

logger = logging.getLogger("zero")

_WORTH = 1.02
"""A change that gains less than this is not worth a line."""
_MOST_CHANGES = 6
_MOST_ROWS = 1 << 14
_LIMITS = {
    COMPUTE: "computing on the device",
    IN: "the link to the device",
    OUT: "the link to the host",
    UPDATE: "updates on the host (memory bandwidth)",
    DISK: "the disk",
    EXCHANGE: "the exchange between ranks",
    ISSUE: "issuing operators (small batches)",
}


@dataclass(frozen=True)
class Machine:
    """What a run is forecast for.

    Attributes:
        profile: its rates.
        capacity_bytes: of each device.
        host_bytes: memory of the host that the run may take.
        num_ranks: processes, each with a device.
        num_local_ranks: of them on one machine.
        device: its kind.
        is_here: whether it is this one, whose disk can be asked for its room.
    """

    profile: HardwareProfile
    capacity_bytes: int
    host_bytes: int
    num_ranks: int = 1
    num_local_ranks: int = 1
    device: type[Device] = AcceleratorDevice
    is_here: bool = False

    @property
    def shared_profile(self) -> HardwareProfile:
        """Rates of one rank, where several share the host's memory, cores and disk; the profile is of one by itself."""
        if self.num_local_ranks == 1:
            return self.profile
        return replace(
            self.profile,
            host_dram_bytes_per_s=self.profile.host_dram_bytes_per_s / self.num_local_ranks,
            host_update_numel_per_s=self.profile.host_update_numel_per_s / self.num_local_ranks,
            disk_read_bytes_per_s=self.profile.disk_read_bytes_per_s / self.num_local_ranks,
            disk_write_bytes_per_s=self.profile.disk_write_bytes_per_s / self.num_local_ranks,
        )


@dataclass(frozen=True)
class Forecast:
    """Of one config on one machine.

    Attributes:
        planned: where everything is; without a plan it does not fit.
        policy: that it was planned with.
        step_s: from one update to the next; 0 if it does not fit.
        num_tokens: of a step, over all ranks.
        limits: what takes time, and how many seconds of a step it works, the busiest first.
    """

    planned: PlannedRun
    policy: Policy
    step_s: float
    num_tokens: int
    limits: list[tuple[str, float]]

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.planned.plan is not None

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks."""
        return self.num_tokens / self.step_s if self.step_s else 0.0


@dataclass(frozen=True)
class Change:
    """Something that could be changed in the config.

    Attributes:
        key: such as ``train.per_device_train_batch_size``.
        value: it would get.
        forecast: with it.
        note: what it means beside the speed.
    """

    key: str
    value: str
    forecast: Forecast
    note: str = ""


def policy_of(config: Config, machine: Machine, dry: DryRun) -> Policy:
    """The config's policy on a machine, for the chunks of a dry run."""
    early_bytes = room_for_early_updates(config, machine.device, dry, machine.host_bytes, machine.num_ranks)
    return policy_for(config, machine.device, machine.shared_profile, early_bytes)


def forecast(config: Config, dry: DryRun, machine: Machine) -> Forecast:
    """What will become of a config on a machine.

    Args:
        config: of the run.
        dry: of it.
        machine: that it is for.
    """
    policy = policy_of(config, machine, dry)
    return _forecast(config, policy, dry, machine, config.train.per_device_train_batch_size)


def _forecast(config: Config, policy: Policy, dry: DryRun, machine: Machine, num_rows: int) -> Forecast:
    host = (machine.host_bytes, machine.num_local_ranks, machine.is_here)
    planned = decide(config, policy, dry, machine.capacity_bytes, *host)
    num_tokens = num_rows * config.data.seq_length * policy.run.num_micro_batches * machine.num_ranks
    if planned.plan is None:
        return Forecast(planned, policy, 0.0, num_tokens, [])
    busy_s = planned.plan.predicted_busy_s
    limits = sorted(((name, busy_s[lane]) for lane, name in _LIMITS.items()), key=lambda pair: -pair[1])
    return Forecast(planned, policy, planned.plan.predicted_step_s, num_tokens, limits)


def schedule_of(machine: Machine, found: Forecast) -> tuple[list[Span], float]:
    """When everything happens in one step of a forecast that fits, for a picture.

    Args:
        machine: that it is for.
        found: the forecast.

    Returns:
        What happens, from the step's begin on, and how many seconds of the step it is: of a step of many micro-batches,
        which are alike, only the first are walked through.
    """
    plan, dry = found.planned.require(), found.planned.dry
    prediction: Prediction = replay(
        dry.facts,
        plan.placements,
        dry.trace,
        machine.capacity_bytes,
        found.policy.profile,
        prefetch_depth=plan.prefetch_depth,
        run=found.policy.run,
        draws=True,
    )
    # Where updates begin inside backward a step before it was walked through as well.
    begin_s = max(0.0, prediction.clock.host_s - prediction.step_s)
    spans = [_since(span, begin_s) for span in prediction.clock.spans or () if span.stop_s > begin_s]
    return spans, prediction.clock.host_s - begin_s


def _since(span: Span, begin_s: float) -> Span:
    """The part of a span from some moment on, which is the new zero."""
    start_s, length_s = max(0.0, span.start_s - begin_s), span.stop_s - span.start_s
    stop_s = span.stop_s - begin_s
    return replace(
        span, start_s=start_s, stop_s=stop_s, num_bytes=round(span.num_bytes * (stop_s - start_s) / length_s)
    )


# -- what would help -------------------------------------------------------------------------------------------------


def changes(config: Config, dry: DryRun, machine: Machine, now: Forecast) -> list[Change]:
    """The neighbours of a config that are predicted to be faster, the best first; what makes it fit, if it does not.

    Args:
        config: of the run.
        dry: of it, with its variants.
        machine: that it is for.
        now: its forecast.
    """
    found = [change for change in _neighbours(config, dry, machine) if change.forecast.fits]
    better = [change for change in found if change.forecast.tokens_per_s > now.tokens_per_s * _WORTH]
    return sorted(better, key=lambda change: -change.forecast.tokens_per_s)[:_MOST_CHANGES]


def _neighbours(config: Config, dry: DryRun, machine: Machine) -> Iterator[Change]:
    train, policy = config.train, policy_of(config, machine, dry)
    rows = train.per_device_train_batch_size
    if dry.double is not None:
        doubled = _forecast(config, policy, replace(dry, trace=dry.double), machine, 2 * rows)
        yield Change(
            "train.per_device_train_batch_size", str(2 * rows), doubled, "another batch, unless you accumulate less"
        )
    if dry.double is not None and rows > 1:
        halved = replace(dry, trace=scaled_trace(dry.trace, dry.double, 0.5))
        less = _forecast(config, policy, halved, machine, rows // 2)
        yield Change("train.per_device_train_batch_size", str(rows // 2), less, "smaller batch")
    if not dry.trace.is_window:
        steps = train.gradient_accumulation_steps
        accumulating = replace(policy, run=replace(policy.run, num_micro_batches=2 * steps))
        summed = replace(dry, facts=[_with_sums(fact) for fact in dry.facts])
        more = _forecast(config, accumulating, summed, machine, rows)
        yield Change("train.gradient_accumulation_steps", str(2 * steps), more, "twice the tokens a step")
    if dry.other_checkpointing is not None:
        is_off = train.checkpointing == "off"
        other = _forecast(config, policy, replace(dry, trace=dry.other_checkpointing), machine, rows)
        note = "computes the forward twice, to save memory" if is_off else "keeps more activations on the device"
        yield Change("train.gradient_checkpointing", "true" if is_off else "false", other, note)
    yield from _other_states(config, dry, machine)
    yield from _other_walks(config, dry, machine)
    if config.memory.policy != "auto":
        yield Change("memory.policy", '"auto"', _forecast(config, replace(policy, name="auto"), dry, machine, rows))
    if policy.prefetch_depth is not None:
        chosen = _forecast(config, replace(policy, prefetch_depth=None), dry, machine, rows)
        yield Change("memory.prefetch", '"auto"', chosen)


def _other_states(config: Config, dry: DryRun, machine: Machine) -> Iterator[Change]:
    """Other formats of the optimizer's states, where they can be had; and the disk, where the host has no room."""
    rows = config.train.per_device_train_batch_size
    for name in other_formats(config):
        coded = replace(dry, facts=[in_format(fact, name) for fact in dry.facts])
        policy = policy_of(config, machine, coded)
        note = "exact" if FORMATS[name].is_exact else "rounds states at random"
        found = _forecast(config, policy, coded, machine, rows)
        yield Change("precision.optimizer_state", f'"{name}"', found, note)
    if config.memory.disk is None and host_bytes(dry.facts, [Placement() for _ in dry.facts]) > _share_bytes(machine):
        spilling = load_config(config, {"memory": {"disk": tempfile.gettempdir()}})
        roomy = replace(machine, is_here=False)  # whatever folder it will be
        found = _forecast(spilling, policy_of(spilling, roomy, dry), dry, roomy, rows)
        yield Change("memory.disk", "a folder", found, "at the speed of the disk")


def _share_bytes(machine: Machine) -> int:
    return machine.host_bytes // machine.num_local_ranks


def _other_walks(config: Config, dry: DryRun, machine: Machine) -> Iterator[Change]:
    """What changes the passes themselves, so that they are walked through anew."""
    wishes = []
    if config.memory.activations == "device" and config.train.checkpointing != "off":
        wishes.append(("memory", "activations", "host", "what blocks save crosses the link"))
    if config.train.gradient_accumulation_steps > 1 and config.train.accumulation_order == "batch":
        wishes.append(("train", "accumulation_order", "layer", "borders' activations of all micro-batches"))
    for table, key, value, note in wishes:
        if dry.again is None:
            return
        try:
            changed = load_config(config, {table: {key: value}})
            walked = dry.again(changed)
        except (CannotWalkError, UserError) as error:  # it does not go together with the rest
            logger.debug("no dry run with %s.%s = %s: %s", table, key, value, error)
            continue
        rows = changed.train.per_device_train_batch_size
        found = _forecast(changed, policy_of(changed, machine, walked), walked, machine, rows)
        yield Change(f"{table}.{key}", f'"{value}"', found, note)


def _with_sums(fact: ChunkFacts) -> ChunkFacts:
    """The same chunk where gradients are summed over micro-batches, in fp32."""
    if not fact.companion_bytes_per_numel or fact.gradient_itemsize == 4:
        return fact
    more = 4 - fact.gradient_itemsize
    return replace(fact, gradient_itemsize=4, companion_bytes_per_numel=fact.companion_bytes_per_numel + more)


# -- how many rows ---------------------------------------------------------------------------------------------------

_LINEAR = (
    "non_model_peak_bytes",
    "gathered_peak_bytes",
    "both_peak_bytes",
    "flops",
    "fp32_flops",
    "traffic_bytes",
    "saved_bytes",
    "brought_bytes",
)
"""Figures of a moment that grow with the rows of a micro-batch by the same amount for each."""


def scaled_trace(trace: Trace, double: Trace, factor: float) -> Trace:
    """The trace of ``factor`` times the rows, by the line through one and two times."""
    if not trace.same_shape(double):
        return trace
    moments = [_scaled_moment(one, two, factor) for one, two in zip(trace.moments, double.moments, strict=True)]
    return replace(trace, moments=moments)


def _scaled_moment(one: Moment, two: Moment, factor: float) -> Moment:
    kinds = {field.name: field.type for field in fields(Moment)}
    figures = {}
    for name in _LINEAR:
        first, second = getattr(one, name), getattr(two, name)
        value = max(0.0, first + (factor - 1) * (second - first))
        figures[name] = value if kinds[name] == "float" else round(value)
    return replace(one, **figures)


def most_rows(config: Config, dry: DryRun, machine: Machine) -> int:
    """The largest micro-batch that the device has room for under policy ``auto``; 0 if not even one row.

    By a line through the config's own micro-batch and one of twice the rows: the true figure is this or next to it.
    """
    if dry.double is None:
        return 0
    rows = config.train.per_device_train_batch_size
    offloaded = [Placement() for _ in dry.facts]

    def fits(num_rows: int) -> bool:
        trace = scaled_trace(dry.trace, dry.double or dry.trace, num_rows / rows)
        return required_bytes(dry.facts, offloaded, trace, with_margin=True) <= machine.capacity_bytes

    low, high = 0, 1
    while high <= _MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def host_bytes_of(config: Config) -> int:
    """Memory of the host that a forecast may use: what the config says, else what is free here."""
    return config.memory.host or host_memory().available_bytes
