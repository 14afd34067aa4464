"""Reads a checkpoint into an engine: found, verified, matched, and only then put in place.

Of several ranks the first one chooses; the others hear its choice and check that they see the same files. Each stage
ends on all ranks or fails on all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemini.manager import Phase
from zero.checkpoint.codec import JSON, dtype_of
from zero.checkpoint.finding import STATE, choose, file_problems, rank_file, read_json
from zero.checkpoint.hyperparameters import config_differences, restore_groups
from zero.checkpoint.manifest import Manifest, read_manifest, seal_of
from zero.checkpoint.matching import contradictions, mismatches
from zero.checkpoint.problems import CheckpointError, DamagedError
from zero.checkpoint.ranks import SavingRanks
from zero.checkpoint.reading import TensorReader
from zero.checkpoint.restoring import files_to_read, restore_tensors
from zero.checkpoint.rng import derive_rng, restore_rng
from zero.checkpoint.schedule import restore_schedule
from zero.checkpoint.state import Saved, saved_from, trace_from, trace_key

if TYPE_CHECKING:
    from zero.engine import Engine

logger = logging.getLogger("zero")


@dataclass(frozen=True)
class LoadedState:
    """What was loaded.

    Attributes:
        step: optimizer steps taken when the checkpoint was written.
        extra: what the caller gave to ``save_checkpoint``; None if nothing.
        path: the checkpoint's folder.
        warnings: damaged checkpoints passed over, hyperparameters and settings that differ. Also logged, by rank 0.
    """

    step: int
    extra: dict[str, JSON] | None
    path: Path
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A checkpoint as one rank has read it, its tensors excepted."""

    path: Path
    manifest: Manifest
    saved: Saved
    own: dict[str, Any]
    """This rank's file; rank 0's where another number of ranks wrote."""


def load_checkpoint(
    engine: Engine, directory: str | Path, *, lr_scheduler: Any = None, use_saved_hyperparameters: bool = False
) -> LoadedState:
    """Puts a checkpoint's state into an engine; training then goes on bit for bit. Call it on all ranks.

    The engine may have another policy, capacity, chunk length, device or number of ranks than the one that wrote it.
    Everything is checked before anything is changed.

    Args:
        engine: made from the same model and the same class of optimizer.
        directory: a ``step-*`` folder, or a folder that holds some: the newest good one, damaged ones being named.
            Rank 0's counts.
        lr_scheduler: put where it was.
        use_saved_hyperparameters: take the checkpoint's hyperparameters (lr, betas, schedule, ...) where they differ
            from this run's, instead of this run's. Either way the differences are listed.

    Raises:
        CheckpointError: there is no good checkpoint, or it does not belong to this model; every mismatch is named. One
            rank's trouble is raised on all.
    """
    engine._require_open()
    if engine.manager.phase is not Phase.IDLE:
        raise CheckpointError("load_checkpoint() inside a forward or backward pass; call it between steps")
    engine._agreement.meet("load_checkpoint()")
    engine.device.synchronize()
    ranks = SavingRanks.of(engine)
    failed = _end_of_save(engine)
    path, warnings = _chosen(ranks, Path(directory))
    warnings = failed + warnings
    found = _read(engine, ranks, path)
    _require_match(engine, ranks, found, lr_scheduler)
    notes: list[str] = []

    def restore() -> JSON:
        obey = not use_saved_hyperparameters
        notes.extend(_restore(engine, ranks, found, lr_scheduler, obey))
        return trace_key(engine)

    keys = ranks.together(restore, may_last=True)
    _restore_trace(engine, found.saved, keys)
    if lr_scheduler is None and found.saved.scheduler_class is not None:
        notes.append(
            f"the checkpoint holds the state of a {found.saved.scheduler_class}, but no lr_scheduler was given"
        )
    if ranks.is_first:
        for note in notes:
            logger.warning("%s", note)
        logger.info("checkpoint of step %d loaded from %s", found.manifest.step, path)
    return LoadedState(found.manifest.step, found.saved.extra, path, (*warnings, *notes))


def _end_of_save(engine: Engine) -> list[str]:
    """Waits for a save in the background. If it failed, an older checkpoint is what is wanted now."""
    try:
        engine._saves.wait()
    except CheckpointError as error:
        logger.warning("a save in the background had failed: %s", error)
        return [f"a save in the background had failed: {error}"]
    return []


def _chosen(ranks: SavingRanks, directory: Path) -> tuple[Path, list[str]]:
    """The checkpoint that rank 0 has verified."""

    def choose_one() -> JSON:
        if not ranks.is_first:
            return None
        choice = choose(directory)
        return {"path": str(choice.path.absolute() if ranks.size > 1 else choice.path), "warnings": choice.warnings}

    said = ranks.together(choose_one, may_last=True)[0]
    return Path(said["path"]), list(said["warnings"])


def _read(engine: Engine, ranks: SavingRanks, path: Path) -> _Found:
    """Everything but the tensors; ranks must see the same, and each checks the files that it will read."""
    found: list[_Found] = []

    def read() -> JSON:
        try:
            found.append(_read_one(engine, ranks, path))
            return seal_of(found[0].manifest)
        except (DamagedError, OSError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error

    seals = ranks.together(read, may_last=True)
    odd = [rank for rank, seal in enumerate(seals) if seal != seals[0]]
    if odd:
        raise CheckpointError(
            f"checkpoint {path} is not the same for all ranks: rank {odd[0]} sees other contents than rank 0; all ranks "
            "need the same folder of a shared file system"
        )
    return found[0]


def _read_one(engine: Engine, ranks: SavingRanks, path: Path) -> _Found:
    manifest = read_manifest(path)
    own = rank_file(ranks.rank if manifest.world.get("size", 1) == ranks.size else 0)
    if not ranks.is_first:  # which has verified them all
        problems = file_problems(path, manifest, {STATE, own} | files_to_read(engine, manifest))
        if problems:
            raise DamagedError("; ".join(problems))
    saved = saved_from(read_json(path, STATE))
    lines = contradictions(manifest, saved)
    if lines:
        raise DamagedError("; ".join(lines))
    return _Found(path, manifest, saved, read_json(path, own))


def _require_match(engine: Engine, ranks: SavingRanks, found: _Found, lr_scheduler: Any) -> None:
    problems = mismatches(engine, found.saved, lr_scheduler)

    def say() -> JSON:
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"checkpoint {found.path} does not belong to this run:\n{lines}")
        return None

    ranks.together(say)


def _restore(engine: Engine, ranks: SavingRanks, found: _Found, lr_scheduler: Any, obey: bool) -> list[str]:
    try:
        engine.manager.settle_idle_reads()
        engine.manager.make_room_for_step()  # drops gathered copies: they are about to be outdated
        with engine.device.bookkeeping(), torch.no_grad(), TensorReader(found.path) as reader:
            notes = restore_tensors(engine, ranks, found.manifest, reader)
        engine.device.synchronize()
        _restore_counters(engine, found.manifest, found.saved)
        notes += _restore_optimizer(engine, found.saved, lr_scheduler, obey)
        notes += config_differences(found.saved.config, engine.config.model_dump(mode="json"))
        return notes + _restore_rng(engine, ranks, found)
    except (DamagedError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {found.path} could not be loaded: {error!r}. The engine holds a part of it: make a new one"
        ) from error


def _restore_counters(engine: Engine, manifest: Manifest, saved: Saved) -> None:
    counters = saved.counters
    engine.run_id = manifest.run_id
    engine.num_steps = counters["num_steps"]
    engine.num_skipped_steps = counters["num_skipped_steps"]
    engine.skipped_last_step = counters["skipped_last_step"]
    engine.grad_norm = counters["grad_norm"]
    engine._micro_step = counters["micro_step"]
    engine._at_loader_end = counters["at_loader_end"]
    for chunk in engine.manager.chunks:
        chunk.step = engine.num_steps
    scaler = engine.scaler
    if saved.scaler is not None and scaler.enabled:
        scaler.load_state_dict(saved.scaler)
        scaler.scale = min(max(scaler.scale, scaler.min_scale), scaler.max_scale)  # this run's bounds


def _restore_optimizer(engine: Engine, saved: Saved, lr_scheduler: Any, obey: bool) -> list[str]:
    if engine.optimizer is None or saved.optimizer is None:
        return []
    updater = engine.optimizer.updater
    updater.keys.update({key: dtype_of(name) for key, name in saved.optimizer.keys.items()})
    by_name = {tensor.name: tensor for tensor in engine._tensors.values()}
    updater.scalars.update({by_name[name]: values for name, values in saved.optimizer.scalars.items()})
    groups = engine.optimizer.param_groups
    notes = restore_groups(groups, [group.values for group in saved.optimizer.groups], obey)
    if lr_scheduler is not None:
        notes += restore_schedule(lr_scheduler, saved.scheduler, groups, obey)
    return notes


def _restore_rng(engine: Engine, ranks: SavingRanks, found: _Found) -> list[str]:
    num_written = found.manifest.world.get("size", 1)
    if num_written == ranks.size:
        return restore_rng(found.own.get("rng"), engine.device.torch_device)
    derive_rng(found.own.get("rng"), ranks.rank, ranks.size)
    return [
        f"the checkpoint was written by {_count(num_written)}, this run has {ranks.size}: random generators start from "
        "states derived from it, so dropout draws anew"
    ]


def _count(num_ranks: int) -> str:
    return f"{num_ranks} ranks" if num_ranks > 1 else "one process"


def _restore_trace(engine: Engine, saved: Saved, keys: list[JSON]) -> None:
    """A trace is taken over where it is true, and on all ranks or on none: they plan alike."""
    trace = trace_from(saved.trace) if all(key == saved.trace_key for key in keys) else None
    if trace is not None:
        engine.manager.trace, engine._planner.needs_plan = trace, True
