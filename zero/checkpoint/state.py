"""Everything of a training state that is not a large tensor: as JSON out of an engine, and as checked data back.

Two kinds of file: ``state.json`` is the same for all ranks, ``rank-00000.json`` is what a rank has of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from gemini.tensor import ChunkTensor
from gemini.trace import Moment, Trace
from zero.checkpoint.codec import JSON, decode, dtype_name, dump, encode
from zero.checkpoint.contents import memory_order, named_buffers, parameter_names, values_sha256
from zero.checkpoint.problems import DamagedError
from zero.checkpoint.rng import rng_state

if TYPE_CHECKING:
    from zero.engine import Engine


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter of the model.

    Attributes:
        name: the name its tensors are stored under.
        aliases: all its names; several where it is tied.
        export: its name in a Hugging Face folder; None if it has no place there.
        shape: in elements.
        order: dimensions from slowest to fastest in memory; None is C order.
        dtype: that computations see it in.
        trainable: it has a gradient, and an fp32 master.
        stored: whether its values are in the checkpoint.
        sha256: of the values in memory order, where they are not.
    """

    name: str
    aliases: tuple[str, ...]
    export: str | None
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    dtype: str
    trainable: bool
    stored: bool
    sha256: str | None


@dataclass(frozen=True)
class BufferRecord:
    """A buffer of the model; only persistent ones belong into a Hugging Face folder, under ``export``."""

    name: str
    export: str | None
    shape: tuple[int, ...]
    dtype: str
    persistent: bool


def records_of(engine: Engine, include_frozen: bool) -> list[ParameterRecord]:
    """The engine's parameters, those without elements among them. ``export`` is left open."""
    records = []
    parameters = dict(engine.module.named_parameters())
    for key, names in parameter_names(engine.module).items():
        tensor = engine._tensors.get(key)
        records.append(_record(tensor, parameters[names[0]], names, include_frozen))
    return records


def _record(
    tensor: ChunkTensor | None, parameter: torch.Tensor, names: list[str], include_frozen: bool
) -> ParameterRecord:
    if tensor is None:  # nothing in it to manage or to store
        shape, dtype = tuple(parameter.shape), dtype_name(parameter.dtype)
        return ParameterRecord(names[0], tuple(names), None, shape, None, dtype, parameter.requires_grad, False, None)
    spec, trainable = tensor.entry.spec, tensor.chunk.layout.trainable
    stored = trainable or include_frozen
    sha256 = None if stored else values_sha256(tensor)
    order, dtype = memory_order(spec), dtype_name(spec.dtype)
    return ParameterRecord(tensor.name, tuple(names), None, tuple(spec.shape), order, dtype, trainable, stored, sha256)


def buffers_of(engine: Engine) -> list[BufferRecord]:
    """The engine's buffers."""
    return [
        BufferRecord(
            full, None, tuple(buffer.shape), dtype_name(buffer.dtype), name not in child._non_persistent_buffers_set
        )
        for full, child, name, buffer in named_buffers(engine.module)
    ]


# -- out -------------------------------------------------------------------------------------------------------------


def optimizer_facts(engine: Engine) -> JSON:
    """Which elementwise states there are, and the other states of each parameter, as far as this rank knows.

    Raises:
        CheckpointError: a state is of a kind that JSON cannot hold.
    """
    if engine.optimizer is None:
        return None
    updater = engine.optimizer.updater
    return {
        "keys": {key: dtype_name(dtype) for key, dtype in updater.keys.items()},
        "scalars": {
            tensor.name: encode(scalars, f"optimizer state of {tensor.name}")
            for tensor, scalars in updater.scalars.items()
        },
    }


def shared_state(
    engine: Engine,
    parameters: list[ParameterRecord],
    buffers: list[BufferRecord],
    lr_scheduler: Any,
    extra: Any,
    facts: list[JSON],
) -> JSON:
    """What ``state.json`` holds.

    Args:
        engine: whose.
        parameters: its parameters.
        buffers: its buffers.
        lr_scheduler: the user's, or None.
        extra: the caller's own.
        facts: :func:`optimizer_facts` of every rank. Where two know of a parameter they say the same.

    Raises:
        CheckpointError: a scheduler's or optimizer's state, or ``extra``, holds what JSON cannot.
    """
    return {
        "parameters": [asdict(record) for record in parameters],
        "buffers": [asdict(record) for record in buffers],
        "counters": encode(_counters(engine), "counters"),
        "scaler": {"enabled": engine.scaler.enabled, "state": encode(engine.scaler.state_dict(), "loss scaler")},
        "optimizer": _optimizer(engine, facts),
        "lr_scheduler": None if lr_scheduler is None else _scheduler(lr_scheduler),
        "config": engine.config.model_dump(mode="json"),
        "trace": _trace(engine),
        "plan": encode(asdict(engine.plan), "plan"),
        "extra": encode(extra, "extra"),
    }


def rank_state(engine: Engine, rank: int) -> JSON:
    """What ``rank-00000.json`` holds."""
    return {"rank": rank, "rng": rng_state(engine.device.torch_device)}


def _counters(engine: Engine) -> dict[str, Any]:
    return {
        "num_steps": engine.num_steps,
        "num_skipped_steps": engine.num_skipped_steps,
        "skipped_last_step": engine.skipped_last_step,
        "grad_norm": engine.grad_norm,
        "micro_step": engine._micro_step,
        "at_loader_end": engine._at_loader_end,
    }


def _optimizer(engine: Engine, facts: list[JSON]) -> JSON:
    if engine.optimizer is None:
        return None
    return {
        "class": optimizer_class(engine),
        "groups": [
            {
                "parameters": names,
                "values": encode({key: value for key, value in group.items() if key != "params"}, "param_groups"),
            }
            for names, group in zip(group_names(engine), engine.optimizer.param_groups, strict=True)
        ],
        "keys": {key: name for fact in reversed(facts) for key, name in fact["keys"].items()},
        "scalars": {name: scalars for fact in reversed(facts) for name, scalars in fact["scalars"].items()},
    }


def optimizer_class(engine: Engine) -> str:
    """Class of the user's optimizer."""
    if engine.optimizer is None:
        return "none"
    return type(engine.optimizer.updater._shadow).__name__


def group_names(engine: Engine) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups."""
    if engine.optimizer is None:
        return []
    first = {key: names[0] for key, names in parameter_names(engine.module).items()}
    return [[_name(engine, p, first) for p in group["params"]] for group in engine.optimizer.param_groups]


def _name(engine: Engine, parameter: torch.Tensor, first: dict[int, str]) -> str:
    tensor = engine._tensors.get(id(parameter))
    return tensor.name if tensor is not None else first[id(parameter)]


def _scheduler(lr_scheduler: Any) -> JSON:
    name = type(lr_scheduler).__name__
    return {"class": name, "state": encode(lr_scheduler.state_dict(), f"state of {name}")}


# -- trace -----------------------------------------------------------------------------------------------------------


def trace_key(engine: Engine) -> str:
    """Hash of everything that a recorded trace is true for: where it differs, warming up anew is the safe way."""
    layouts = [
        [chunk.numel, str(chunk.layout.dtype), chunk.layout.trainable, chunk.layout.unit_name]
        for chunk in engine.manager.chunks
    ]
    device, train = engine.device, engine.config.train
    name = torch.cuda.get_device_name(device.torch_device) if device.torch_device.type == "cuda" else device.name
    about = [layouts, torch.__version__, type(device).__name__, name, train.gradient_checkpointing]
    shards = [chunk.num_bytes for chunk in engine.manager.chunks if not chunk.shard.is_whole]
    return hashlib.sha256(dump([*about, train.gradient_accumulation_steps, *shards])).hexdigest()


def _trace(engine: Engine) -> JSON:
    trace = engine.manager.trace
    if trace is None:
        return None
    return {"key": trace_key(engine), "value": encode(asdict(trace), "trace")}


def trace_from(value: JSON) -> Trace | None:
    """A trace as it was stored; None where it is of another form, which costs one warm-up and nothing else."""
    content = decode(value)
    try:
        trace = Trace(**content)
        trace.moments = [Moment(**moment) for moment in content["moments"]]
    except (TypeError, KeyError):
        return None
    known = {field.name for field in fields(Trace)}
    return trace if known == set(content) else None


# -- back ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupRecord:
    """A parameter group: names of its parameters, and its hyperparameters."""

    parameters: list[str]
    values: dict[str, Any]


@dataclass(frozen=True)
class OptimizerRecord:
    """What ``state.json`` says of the optimizer; ``scalars`` by parameter, ``keys`` are the elementwise states."""

    class_name: str
    groups: list[GroupRecord]
    keys: dict[str, str]
    scalars: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """``state.json``, decoded."""

    parameters: dict[str, ParameterRecord]
    buffers: dict[str, BufferRecord]
    counters: dict[str, Any]
    scaler: dict[str, Any] | None
    """None where the run had none (no fp16)."""
    optimizer: OptimizerRecord | None
    scheduler_class: str | None
    scheduler: Any
    config: dict[str, Any]
    trace_key: str | None
    trace: JSON
    extra: Any


def saved_from(state: dict[str, Any]) -> Saved:
    """Reads ``state.json``.

    Raises:
        DamagedError: it is not what this version writes.
    """
    try:
        scheduler, trace, scaler = state["lr_scheduler"] or {}, state["trace"] or {}, state["scaler"]
        return Saved(
            parameters={entry["name"]: _parameter(entry) for entry in state["parameters"]},
            buffers={entry["name"]: _buffer(entry) for entry in state["buffers"]},
            counters=_checked_counters(decode(state["counters"])),
            scaler=decode(scaler["state"]) if scaler["enabled"] else None,
            optimizer=_optimizer_from(state["optimizer"]),
            scheduler_class=scheduler.get("class"),
            scheduler=decode(scheduler.get("state")),
            config=dict(state["config"]),
            trace_key=trace.get("key"),
            trace=trace.get("value"),
            extra=decode(state["extra"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"state.json is not what this version writes ({error!r})") from error


def _parameter(entry: dict[str, Any]) -> ParameterRecord:
    order = entry["order"]
    values = {**entry, "aliases": tuple(entry["aliases"]), "shape": tuple(entry["shape"])}
    return ParameterRecord(**{**values, "order": None if order is None else tuple(order)})


def _buffer(entry: dict[str, Any]) -> BufferRecord:
    return BufferRecord(**{**entry, "shape": tuple(entry["shape"])})


def _checked_counters(counters: dict[str, Any]) -> dict[str, Any]:
    for key in ("num_steps", "num_skipped_steps", "micro_step"):
        if type(counters[key]) is not int or counters[key] < 0:
            raise ValueError(f"{key} = {counters[key]!r}")
    for key in ("skipped_last_step", "at_loader_end"):
        if type(counters[key]) is not bool:
            raise ValueError(f"{key} = {counters[key]!r}")
    if counters["grad_norm"] is not None:
        counters["grad_norm"] = float(counters["grad_norm"])
    return counters


def _optimizer_from(entry: dict[str, Any] | None) -> OptimizerRecord | None:
    if entry is None:
        return None
    groups = [GroupRecord(list(group["parameters"]), dict(decode(group["values"]))) for group in entry["groups"]]
    scalars = {name: dict(decode(value)) for name, value in entry["scalars"].items()}
    return OptimizerRecord(entry["class"], groups, dict(entry["keys"]), scalars)
