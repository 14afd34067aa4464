"""Reads a checkpoint into an engine: found, verified, matched, and only then put in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemini.chunk import ChunkTensor
from gemini.manager import Phase
from gemini.segment import GRADIENT as GRADIENT_KEY
from gemini.segment import MASTER
from zero.checkpoint.codec import JSON, dtype_of
from zero.checkpoint.contents import memory_order, named_buffers
from zero.checkpoint.finding import STATE, choose, rank_file, read_json
from zero.checkpoint.hyperparameters import config_differences, obeyed_schedule, restore_groups
from zero.checkpoint.manifest import BUFFER, GRADIENT, OPTIMIZER, PARAMETER, Manifest, Slice, read_manifest
from zero.checkpoint.matching import contradictions, mismatches
from zero.checkpoint.problems import CheckpointError, DamagedError
from zero.checkpoint.reading import TensorReader
from zero.checkpoint.rng import restore_rng
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
        warnings: damaged checkpoints passed over, hyperparameters and settings that differ. Also logged.
    """

    step: int
    extra: dict[str, JSON] | None
    path: Path
    warnings: tuple[str, ...] = ()


def load_checkpoint(
    engine: Engine, directory: str | Path, *, lr_scheduler: Any = None, obey_config: bool = False
) -> LoadedState:
    """Puts a checkpoint's state into an engine; training then goes on bit for bit.

    The engine may have another policy, capacity, chunk length or device than the one that wrote it. Everything is
    checked before anything is changed.

    Args:
        engine: made from the same model and the same class of optimizer.
        directory: a ``step-*`` folder, or a folder that holds some: the newest good one, damaged ones being named.
        lr_scheduler: put where it was.
        obey_config: keep this run's hyperparameters (lr, betas, ...) where they differ from the checkpoint's. Either
            way the differences are listed.

    Raises:
        CheckpointError: there is no good checkpoint, or it does not belong to this model; every mismatch is named.
    """
    engine._require_open()
    if engine.manager.phase is not Phase.IDLE:
        raise CheckpointError("load_checkpoint() inside a forward or backward pass; call it between steps")
    choice = choose(Path(directory))
    manifest, saved, own = _read(choice.path)
    problems = mismatches(engine, saved, lr_scheduler)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"checkpoint {choice.path} does not belong to this run:\n{lines}")
    try:
        notes = _restore(engine, choice.path, manifest, saved, own, lr_scheduler, obey_config)
    except (DamagedError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {choice.path} could not be loaded: {error!r}. The engine holds a part of it: make a new one"
        ) from error
    if lr_scheduler is None and saved.scheduler_class is not None:
        notes.append(f"the checkpoint holds the state of a {saved.scheduler_class}, but no lr_scheduler was given")
    for note in notes:
        logger.warning("%s", note)
    logger.info("checkpoint of step %d loaded from %s", manifest.step, choice.path)
    return LoadedState(manifest.step, saved.extra, choice.path, (*choice.warnings, *notes))


def _read(path: Path) -> tuple[Manifest, Saved, dict[str, Any]]:
    try:
        manifest = read_manifest(path)
        saved = saved_from(read_json(path, STATE))
        lines = contradictions(manifest, saved)
        if lines:
            raise DamagedError("; ".join(lines))
        return manifest, saved, read_json(path, rank_file(0))
    except (DamagedError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _restore(
    engine: Engine,
    path: Path,
    manifest: Manifest,
    saved: Saved,
    own: dict[str, Any],
    lr_scheduler: Any,
    obey_config: bool,
) -> list[str]:
    engine.synchronize()
    engine.manager.settle_idle_reads()
    engine.manager.make_room_for_step()  # drops gathered copies: they are about to be outdated
    with engine.device.bookkeeping(), torch.no_grad(), TensorReader(path) as reader:
        notes = _restore_tensors(engine, manifest, saved, reader)
    engine.synchronize()
    _restore_counters(engine, manifest, saved)
    notes += _restore_optimizer(engine, saved, lr_scheduler, obey_config)
    notes += config_differences(saved.config, engine.config.model_dump(mode="json"))
    if saved.trace_key == trace_key(engine):
        trace = trace_from(saved.trace)
        if trace is not None:
            engine.manager.trace, engine._needs_plan = trace, True
    return notes + restore_rng(own.get("rng"), engine.device.torch_device)


# -- tensors ---------------------------------------------------------------------------------------------------------


def _restore_tensors(engine: Engine, manifest: Manifest, saved: Saved, reader: TensorReader) -> list[str]:
    _forget_states(engine)
    by_name = {tensor.name: tensor for tensor in engine._tensors.values()}
    buffers = {name: (child, own, buffer) for name, child, own, buffer in named_buffers(engine.module)}
    notes = []
    for (role, name), parts in manifest.by_tensor().items():
        if role == BUFFER:
            if name in buffers:
                _restore_buffer(*buffers[name], reader.whole(parts))
            continue
        if role not in (PARAMETER, GRADIENT) and engine.optimizer is None:
            continue
        tensor = by_name[name]
        _restore_tensor(engine, tensor, role, parts, reader)
        dtype = tensor.chunk.layout.dtype
        if role == PARAMETER and not tensor.chunk.layout.trainable and dtype_of(parts[0].dtype) != dtype:
            notes.append(f"parameter {name} is frozen and was {parts[0].dtype}: it is {dtype} here, so results differ")
    return notes


def _forget_states(engine: Engine) -> None:
    """Optimizer states and gradients of the engine's own past."""
    store = engine.manager.store
    for chunk in engine.manager.chunks:
        for segment in chunk.segments:
            for key in [key for key in segment.companions if key != MASTER]:
                segment.drop(store, key)
        for tensor in chunk.tensors:
            tensor.has_gradient = False
    if engine.optimizer is not None:
        engine.optimizer.updater.scalars.clear()
        engine.optimizer.updater.keys.clear()


def _restore_buffer(module: torch.nn.Module, name: str, buffer: torch.Tensor, values: torch.Tensor) -> None:
    if buffer.shape == values.shape:
        buffer.copy_(values)
    else:  # a cache that had grown: only buffers that no file of a model holds may have another shape
        module._buffers[name] = values.to(device=buffer.device, dtype=buffer.dtype)


def _restore_tensor(engine: Engine, tensor: ChunkTensor, role: str, parts: list[Slice], reader: TensorReader) -> None:
    order = memory_order(tensor.entry.spec)
    if parts[0].order == order:
        for part in parts:
            for start, block in reader.blocks(part):
                _put(engine, tensor, role, start, block)
        return
    whole = reader.whole(parts)
    flat = whole.permute(order) if order is not None else whole
    _put(engine, tensor, role, 0, flat.reshape(-1))


def _put(engine: Engine, tensor: ChunkTensor, role: str, start: int, block: torch.Tensor) -> None:
    """Writes elements of a parameter, in memory order from ``start`` on, to wherever they live."""
    chunk, first = tensor.chunk, tensor.entry.offset + start
    for segment, left, right in chunk.pieces(first, first + block.numel()):
        source = block[left - first : right - first]
        inside = slice(left - segment.start, right - segment.start)
        if role == PARAMETER:
            if MASTER in segment.companions:
                segment.companions[MASTER][inside].copy_(source)
            if not segment.master_is_values:
                segment.values[inside].copy_(source)
        elif role == GRADIENT:
            segment.companion(engine.manager.store, GRADIENT_KEY, block.dtype)[inside].copy_(source)
            tensor.has_gradient = True
        else:
            key = role.removeprefix(OPTIMIZER)
            segment.companion(engine.manager.store, key, block.dtype)[inside].copy_(source)


# -- everything else -------------------------------------------------------------------------------------------------


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
    if saved.scaler is not None and engine.scaler.enabled:
        engine.scaler.load_state_dict(saved.scaler)


def _restore_optimizer(engine: Engine, saved: Saved, lr_scheduler: Any, obey_config: bool) -> list[str]:
    if engine.optimizer is None or saved.optimizer is None:
        return []
    updater = engine.optimizer.updater
    updater.keys.update({key: dtype_of(name) for key, name in saved.optimizer.keys.items()})
    by_name = {tensor.name: tensor for tensor in engine._tensors.values()}
    updater.scalars.update({by_name[name]: values for name, values in saved.optimizer.scalars.items()})
    groups = engine.optimizer.param_groups
    notes = restore_groups(groups, [group.values for group in saved.optimizer.groups], obey_config)
    if lr_scheduler is not None:
        state = obeyed_schedule(saved.scheduler, groups) if obey_config else saved.scheduler
        lr_scheduler.load_state_dict(state)
    return notes
