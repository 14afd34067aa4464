"""``zero plan``: the answer in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from gemini.accelerator import AcceleratorDevice
from gemini.plan import ChunkFacts, Plan
from gemini.profile import named_profile, neighbours
from gemini.units import format_bytes
from zero.config.loading import for_trainer
from zero.config.schema import Config
from zero.dryrun import CannotWalkError
from zero.errors import UserError
from zero.forecast import Forecast, Machine, changes, forecast, host_bytes_of, most_rows, schedule_of
from zero.models.build import build_tokenizer
from zero.planning import DryRun, PlannedRun, assumed_evaluation_shape, dry_run_of
from zero.probing import measured_profile, profile_of
from zero.report.tables import text_columns, values_text
from zero.report.timeline import draw_timeline, step_text, write_trace
from zero.setup import make_device


@dataclass(frozen=True)
class Wish:
    """What ``zero plan`` was asked for.

    Attributes:
        on: a card by name, or ``"this"``; None: the device of the config.
        timeline: where to draw the schedule of a step.
        trace: where to write it for Perfetto.
    """

    on: str | None = None
    timeline: Path | None = None
    trace: Path | None = None


def say_plan(config: Config, wish: Wish, say: Callable[[str], None]) -> bool:
    """Says whether it fits part by part, as soon as each is known; returns it.

    Args:
        config: of the run.
        wish: what was asked for.
        say: takes the parts of the report.

    Raises:
        UserError: model or tokenizer cannot be had, there is no such card, or a file cannot be written.
    """
    machine, name = _machine(config, wish)
    tokenizer = build_tokenizer(config) if config.model.config is not None else None
    # A plan may be for another machine: what memory.host says is then believed. A run looks at what is free.
    evaluation_shape = assumed_evaluation_shape(config)
    config = for_trainer(config)
    try:
        dry = dry_run_of(config, tokenizer, evaluation_shape, machine.num_ranks, variants=wish.on is not None)
    except CannotWalkError as error:
        say(
            f"this model cannot be walked through without data, as where its forward depends on values ({error}); "
            "the warm-up step of `zero train` measures it"
        )
        return True
    found = forecast(config, dry, machine)
    planned = found.planned
    title = f"{config.train.per_device_train_batch_size} x {config.data.seq_length} tokens on {name}"
    rows = [("parameters", f"{dry.num_parameters:,}"), *_byte_rows(config, planned, machine.capacity_bytes)]
    has_rates = wish.on is not None or name != "cpu"
    if has_rates:
        rows += _time_rows(machine, found)
    say(values_text(rows, title=title))
    last = [str(planned.refusal)] if planned.refusal is not None else [*_write(machine, found, wish, title), "it fits"]
    for part in chain(_advice(config, dry, machine, found) if wish.on is not None else (), last):
        say(f"\n{part}")
    return planned.refusal is None


def _machine(config: Config, wish: Wish) -> tuple[Machine, str]:
    """What is planned for, and its name."""
    num_ranks = config.parallel.data or 1
    host_bytes = host_bytes_of(config)
    if wish.on not in (None, "this"):
        try:
            profile = named_profile(str(wish.on))
        except ValueError as error:
            raise UserError(f"--on {error}, this (measured)") from error
        capacity_bytes = config.device.memory or profile.capacity_bytes
        return Machine(profile, capacity_bytes, host_bytes, num_ranks, num_ranks), profile.name
    device = make_device(config)
    try:
        profile = measured_profile(device, disk=config.memory.disk) if wish.on == "this" else profile_of(config, device)
        ranks = (num_ranks, num_ranks)
        return Machine(profile, device.capacity_bytes, host_bytes, *ranks, type(device), is_here=True), device.name
    finally:
        device.close()


def _time_rows(machine: Machine, found: Forecast) -> list[tuple[str, str]]:
    profile = machine.profile
    rows = [("rates", f"{profile.name}: {profile.source}")]
    if not found.fits:
        return rows
    (limit, busy_s), *_ = found.limits
    share = 100 * busy_s / found.step_s if found.step_s else 0
    others = ", ".join(
        f"{name} {100 * s / found.step_s:.0f}%" for name, s in found.limits[1:] if s > found.step_s / 100
    )
    return [
        *rows,
        ("step, predicted", f"{step_text(found.step_s)}, {found.tokens_per_s:,.0f} tokens/s"),
        ("limited by", f"{limit}: {share:.0f}% of the step" + (f" ({others})" if others else "")),
    ]


def _advice(config: Config, dry: DryRun, machine: Machine, found: Forecast) -> Iterator[str]:
    most = most_rows(config, dry, machine)
    rows = [("largest micro-batch", f"about {most} x {config.data.seq_length} tokens" if most else "none")]
    yield values_text(rows)
    better = changes(config, dry, machine, found)
    if better:
        title = "what would help" if found.fits else "what would fit"
        lines = [("change", "tokens/s", "gain", "but")]
        for change in better:
            gain = f"x{change.forecast.tokens_per_s / found.tokens_per_s:.2f}" if found.fits else ""
            speed = f"{change.forecast.tokens_per_s:,.0f}"
            lines.append((f"{change.key} = {change.value}", speed, gain, change.note))
        yield f"{title}\n{text_columns(lines, right_aligned=('tokens/s', 'gain'))}"
    smaller, larger = neighbours(replace(machine.profile, capacity_bytes=machine.capacity_bytes))
    table: list[tuple[str, ...]] = [("card", "memory", "fits", "step", "tokens/s", "limited by", "largest micro-batch")]
    for card in (smaller, machine.profile, larger):
        if card is machine.profile:
            table.append(_card_line(config, dry, machine, found))
        elif card is not None:
            there = replace(machine, profile=card, capacity_bytes=card.capacity_bytes, device=AcceleratorDevice)
            table.append(_card_line(config, dry, there, forecast(config, dry, there)))
    yield f"smaller and larger cards\n{text_columns(table, right_aligned=('memory', 'step', 'tokens/s'))}"


def _card_line(config: Config, dry: DryRun, machine: Machine, found: Forecast) -> tuple[str, ...]:
    most = most_rows(config, dry, machine)
    figures = ("no", "", "", "capacity")
    if found.fits:
        figures = ("yes", step_text(found.step_s), f"{found.tokens_per_s:,.0f}", found.limits[0][0])
    return (machine.profile.name, format_bytes(machine.capacity_bytes), *figures, str(most))


def _write(machine: Machine, found: Forecast, wish: Wish, title: str) -> list[str]:
    if wish.timeline is None and wish.trace is None:
        return []
    spans, shown_s = schedule_of(machine, found)
    title = f"{title}: {step_text(found.step_s)} a step, predicted"
    if shown_s < 0.999 * found.step_s:
        title += f"; the first {step_text(shown_s)}"
    said = []
    if wish.timeline is not None:
        draw_timeline(wish.timeline, spans, title, shown_s)
        said.append(f"schedule drawn to {wish.timeline}")
    if wish.trace is not None:
        write_trace(wish.trace, spans, title)
        said.append(f"trace for https://ui.perfetto.dev written to {wish.trace}")
    return ["\n".join(said)]


def _byte_rows(config: Config, planned: PlannedRun, capacity_bytes: int) -> list[tuple[str, str]]:
    dry, facts = planned.dry, planned.dry.facts
    num_ranks = config.parallel.data or 1
    rows = [("ranks", f"{num_ranks}; the figures below are those of each")] if num_ranks > 1 else []
    rows += [
        ("model data", f"{format_bytes(sum(f.value_bytes + f.companion_bytes for f in facts))} {_kinds(facts)}"),
        ("activations and temporaries", format_bytes(dry.trace.non_model_peak_bytes) + " at the highest"),
    ]
    if dry.evaluation is not None:
        rows.append(
            (
                "evaluation",
                f"{dry.evaluation.label} need {format_bytes(_evaluation_bytes(dry))} with everything else on the host",
            )
        )
    rows += [
        (
            "device capacity",
            format_bytes(capacity_bytes) + " given as device.memory" * (config.device.memory is not None),
        ),
        (
            "least device that works",
            f"{format_bytes(dry.tight_device_bytes)} under policy auto; {format_bytes(dry.least_device_bytes)} leaves room "
            "for activations that grow",
        ),
    ]
    if planned.plan is not None:
        plan = planned.plan
        values_bytes = sum(f.value_bytes for f in facts)
        rows += [
            ("policy", config.memory.policy),
            ("parameters that stay on the device", _share(plan.resident_parameter_bytes, values_bytes)),
            (
                "optimizer data on the device",
                _share(plan.device_optimizer_bytes, sum(f.companion_bytes for f in facts)),
            ),
            *_streamed_rows(plan),
            ("device peak, predicted", format_bytes(plan.predicted_device_peak_bytes)),
            ("to the device per micro-batch", format_bytes(plan.predicted_h2d_bytes)),
        ]
    pinned = config.memory.pin and torch.accelerator.is_available()
    host_source = "given as memory.host" if config.memory.host else "available"
    host = f"{format_bytes(planned.host_peak_bytes)} of {format_bytes(planned.host_available_bytes)} {host_source}"
    if planned.plan is not None:
        host += f" at the highest, {format_bytes(planned.host_bytes)} once everything is in its place"
    if num_ranks > 1:
        host += f", which {num_ranks} ranks share"
    rows.append(("host", host + (", pinned" if pinned else "")))
    on_disk = f", in {config.memory.disk}" if planned.disk_bytes else ""
    rows.append(("disk", format_bytes(planned.disk_bytes) + on_disk))
    return rows


def _streamed_rows(plan: Plan) -> list[tuple[str, str]]:
    if not plan.streamed_numel:
        return []
    pieces = f"{plan.streamed_numel:,} parameters, with {format_bytes(plan.streamed_bytes)} for what is on its way"
    return [("updates streamed to the device", pieces)]


def _evaluation_bytes(dry: DryRun) -> int:
    return dry.evaluation.both_peak_bytes if dry.evaluation is not None else 0


def _kinds(facts: list[ChunkFacts]) -> str:
    values = sum(f.value_bytes for f in facts)
    gradients = sum(f.numel * f.gradient_itemsize for f in facts)
    rest = sum(f.companion_bytes for f in facts) - gradients
    kinds = (("parameters", values), ("gradients", gradients), ("master and states", rest))
    return "(" + ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in kinds) + ")"


def _share(part_bytes: int, whole_bytes: int) -> str:
    percent = 100 * part_bytes / whole_bytes if whole_bytes else 0
    return f"{format_bytes(part_bytes)} ({percent:.0f}%)"
