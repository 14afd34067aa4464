"""``zero plan``: the answer in words."""

from __future__ import annotations

import torch

from gemini.plan import ChunkFacts
from gemini.units import format_bytes
from zero.config.schema import Config
from zero.dryrun import CannotWalkError
from zero.models.build import build_tokenizer
from zero.planning import DryRun, PlannedRun, assumed_evaluation_shape, plan_run
from zero.report.tables import values_text
from zero.setup import make_device


def plan_text(config: Config) -> tuple[str, bool]:
    """The report, and whether it fits.

    Raises:
        UserError: model or tokenizer cannot be had.
    """
    device = make_device(config)
    tokenizer = build_tokenizer(config) if config.model.config is not None else None
    # A plan may be for another machine: what memory.host says is then believed. A run looks at what is free.
    evaluation_shape = assumed_evaluation_shape(config)
    try:
        planned = plan_run(config, device, tokenizer, config.memory.host, evaluation_shape)
    except CannotWalkError as error:
        return (
            f"this model cannot be walked through without data, as where its forward depends on values ({error}); "
            "the warm-up step of `zero train` measures it"
        ), True
    title = f"{config.train.per_device_train_batch_size} x {config.data.seq_length} tokens on {device.name}"
    rows = [("parameters", f"{planned.dry.num_parameters:,}"), *_byte_rows(config, planned, device.capacity_bytes)]
    text = values_text(rows, title=title)
    if planned.refusal is not None:
        return f"{text}\n\n{planned.refusal}", False
    return f"{text}\n\nit fits", True


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
        ("device capacity", format_bytes(capacity_bytes)),
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
    rows.append(("disk", "0 B"))
    return rows


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
