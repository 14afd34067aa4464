"""Whether a checkpoint belongs to the engine that is to load it: every mismatch, by name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from zero.checkpoint.contents import values_sha256
from zero.checkpoint.hyperparameters import impossible_changes
from zero.checkpoint.manifest import BUFFER, GRADIENT, OPTIMIZER, PARAMETER, Manifest, rank_gradient
from zero.checkpoint.state import (
    BufferRecord,
    ParameterRecord,
    Saved,
    buffers_of,
    group_names,
    optimizer_class,
    records_of,
)

if TYPE_CHECKING:
    from zero.engine import Engine


def mismatches(engine: Engine, saved: Saved, lr_scheduler: Any) -> list[str]:
    """What keeps this checkpoint from being loaded into this engine, a line each; empty if nothing does."""
    present = {record.name: record for record in records_of(engine, include_frozen=True)}
    lines = _parameters(present, saved.parameters)
    lines += _buffers({record.name: record for record in buffers_of(engine)}, saved.buffers)
    if not lines:
        lines += _frozen(engine, saved)
    lines += _optimizer(engine, saved)
    if lr_scheduler is not None and saved.scheduler_class is None:
        lines.append(
            "lr_scheduler: one was given, but the checkpoint was written without; leave it out or pass it at saving"
        )
    elif lr_scheduler is not None and type(lr_scheduler).__name__ != saved.scheduler_class:
        lines.append(f"lr_scheduler: {saved.scheduler_class} in the checkpoint, {type(lr_scheduler).__name__} here")
    return lines


def _parameters(present: dict[str, ParameterRecord], saved: dict[str, ParameterRecord]) -> list[str]:
    lines = [f"parameter {name}: in the model, not in the checkpoint" for name in present if name not in saved]
    lines += [f"parameter {name}: in the checkpoint, not in the model" for name in saved if name not in present]
    for name in present.keys() & saved.keys():
        mine, theirs = present[name], saved[name]
        if mine.shape != theirs.shape:
            lines.append(
                f"parameter {name}: shape {list(theirs.shape)} in the checkpoint, {list(mine.shape)} in the model"
            )
        if mine.trainable != theirs.trainable:
            words = {True: "trained", False: "frozen"}
            lines.append(
                f"parameter {name}: {words[theirs.trainable]} in the checkpoint, {words[mine.trainable]} in the model"
            )
        if set(mine.aliases) != set(theirs.aliases):
            lines.append(
                f"parameter {name}: tied as {list(theirs.aliases)} in the checkpoint, {list(mine.aliases)} in the model"
            )
    return sorted(lines)


def _buffers(present: dict[str, BufferRecord], saved: dict[str, BufferRecord]) -> list[str]:
    """Only persistent buffers must agree; others are caches that a model makes, and remakes, by itself."""
    lines = []
    for name in sorted({r.name for r in (*present.values(), *saved.values()) if r.persistent}):
        if name not in saved:
            lines.append(f"buffer {name}: in the model, not in the checkpoint")
        elif name not in present:
            lines.append(f"buffer {name}: in the checkpoint, not in the model")
        elif present[name].shape != saved[name].shape:
            shapes = f"shape {list(saved[name].shape)} in the checkpoint, {list(present[name].shape)} in the model"
            lines.append(f"buffer {name}: {shapes}")
    return lines


def _frozen(engine: Engine, saved: Saved) -> list[str]:
    """Frozen values that are not stored must be those the model has."""
    lines = []
    for tensor in engine._tensors.values():
        record = saved.parameters[tensor.name]
        if record.sha256 is not None and record.sha256 != values_sha256(tensor):
            lines.append(f"parameter {tensor.name}: frozen and not stored, and the model has other values than it had")
    return lines


def _optimizer(engine: Engine, saved: Saved) -> list[str]:
    if engine.optimizer is None:
        return []
    if saved.optimizer is None:
        return ["optimizer: the checkpoint was written without one"]
    mine, theirs = optimizer_class(engine), saved.optimizer.class_name
    if mine != theirs:
        return [f"optimizer: {theirs} in the checkpoint, {mine} here"]
    present, stored = group_names(engine), [group.parameters for group in saved.optimizer.groups]
    if len(present) != len(stored):
        return [f"optimizer: {len(stored)} parameter groups in the checkpoint, {len(present)} here"]
    lines = []
    for position, (have, had) in enumerate(zip(present, stored, strict=True)):
        if have != had:
            moved = sorted(set(have) ^ set(had))
            what = f"differ in {', '.join(moved)}" if moved else "hold the same parameters in another order"
            lines.append(f"optimizer: parameter groups {position} of checkpoint and run {what}")
    return lines + impossible_changes(engine.optimizer.param_groups, [g.values for g in saved.optimizer.groups])


def contradictions(manifest: Manifest, saved: Saved) -> list[str]:
    """Where state.json and the manifest disagree: no program of ours writes that, so nothing of it can be trusted."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    gradients = [GRADIENT, *map(rank_gradient, range(min(manifest.world.get("size", 1), len(manifest.files))))]
    for record in saved.parameters.values():
        roles = [PARAMETER] if record.stored else []
        if record.trainable:
            roles += [*gradients, *(OPTIMIZER + key for key in (saved.optimizer.keys if saved.optimizer else ()))]
        shapes.update({(role, record.name): record.shape for role in roles})
    shapes.update({(BUFFER, record.name): record.shape for record in saved.buffers.values()})
    tensors = manifest.by_tensor()
    lines = [f"{role} of {name} is stored but unknown" for role, name in tensors if (role, name) not in shapes]
    for (role, name), shape in shapes.items():
        parts = tensors.get((role, name))
        if parts is None and role in (PARAMETER, BUFFER):
            lines.append(f"{role} of {name} is missing")
        elif parts is not None and parts[0].shape != shape:
            lines.append(f"{role} of {name} has shape {parts[0].shape}, not {shape}")
    step = saved.counters["num_steps"] + saved.counters["num_skipped_steps"]
    if manifest.step != step:
        lines.append(f"step {manifest.step} in the manifest, {step} in the state")
    lines += _bad_records(saved)
    if saved.optimizer is not None:
        trained = {name for name, record in saved.parameters.items() if record.trainable}
        lines += [
            f"optimizer state of {name}, which is not trained" for name in saved.optimizer.scalars.keys() - trained
        ]
    return lines


def _bad_records(saved: Saved) -> list[str]:
    """Fields of a wrong type, which could make loading fail half way."""
    lines = []
    wanted = {"name": str, "dtype": str, "trainable": bool, "stored": bool, "persistent": bool}
    records: list[ParameterRecord | BufferRecord] = [*saved.parameters.values(), *saved.buffers.values()]
    for record in records:
        for key, value in dataclasses.asdict(record).items():
            if key in wanted and type(value) is not wanted[key]:
                lines.append(f"{key} of {record.name} is {value!r}")
    return lines
