"""The Python config of Colossal-AI, the system this project re-creates, in the words of today's schema.

``zero = dict(model_config=..., optimizer_config=...)``, ``fp16``, ``parallel``, ``clip_grad_norm`` and
``gradient_accumulation`` keep their meaning. Options that this engine has no use for are accepted with one line each
that says what took their place. ``zero`` always trained in fp16, so it does here, unless ``model_config`` has
``bf16=True`` or the config sets ``precision`` itself; without ``tensor_placement_policy`` it kept all on the device,
which is policy ``cuda``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from zero.config.draft import Draft
from zero.config.words import name_text, nearest, show


class TensorShardStrategy:
    """Each tensor sharded by itself. Accepted for old configs: chunks always shard whole chunks over the ranks."""


class BucketTensorShardStrategy(TensorShardStrategy):
    """Tensors sharded in buckets. Accepted for old configs: chunks always shard whole chunks over the ranks."""


class AMP_TYPE(Enum):
    """Kinds of mixed precision of old configs; here each of them means precision.dtype = "fp16"."""

    APEX = "apex"
    TORCH = "torch"
    NAIVE = "naive"


_SCALE_KEYS = {
    key: f"precision.{key}"
    for key in ("initial_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis")
} | {"min_scale": "precision.min_scale", "max_scale": "precision.max_scale", "init_scale": "precision.initial_scale"}

# Old options without effect, and what does their work here.
_UNUSED: dict[str, dict[str, str]] = {
    "zero": {
        "verbose": "the log level decides",
    },
    "zero.model_config": {
        "shard_strategy": "every chunk is divided over the ranks",
        "reuse_fp16_shard": "a gradient takes over its parameter's memory whenever it can",
        "process_group": "[parallel] forms the groups",
        "reduce_scatter_process_group": "[parallel] forms the groups",
        "reduce_scatter_bucket_size_mb": "whole chunks are reduced; memory.chunk sets their largest size",
        "fp32_reduce_scatter": "gradients are summed in fp32 wherever several are",
        "gradient_predivide_factor": "gradients are summed in fp32 and cannot overflow on the way",
        "warmup_non_model_data_ratio": "the first step runs with everything offloaded and needs no ratio",
    },
    "zero.optimizer_config": {
        "gpu_margin_mem_ratio": "policy auto measures the spare device memory and uses all of it",
        "verbose": "the log level decides",
        "dp_process_group": "[parallel] forms the groups",
        "mp_process_group": "[parallel] forms the groups",
    },
    "fp16": {
        "enabled": "",
        "verbose": "the log level decides",
        "log_num_zeros_in_grad": "nothing reads it",
        "opt_level": "there is one kind of fp16: fp16 computing, fp32 master weights",
        "clip_grad_norm": "set clip_grad_norm at the top or train.max_grad_norm",
    },
    "": {
        "gradient_handler": "the engine always combines the gradients of all ranks",
        "cudnn_benchmark": "set torch.backends.cudnn.benchmark in your own script",
        "torch_ddp": "the engine takes the place of DistributedDataParallel",
        "log_path": "the run folder of train.output_dir holds the logs",
        "logging": "the run folder of train.output_dir holds the logs",
        "verbose": "the log level decides",
    },
}
_TOP = {
    "clip_grad_norm": "train.max_grad_norm",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "cudnn_deterministic": "train.deterministic",
    "seed": "train.seed",
}
_VARIABLES = {
    "BATCH_SIZE": "train.per_device_train_batch_size",
    "NUM_EPOCHS": "train.num_train_epochs",
    "SEQ_LEN": "data.seq_length",
    "SEQ_LENGTH": "data.seq_length",
    "LEARNING_RATE": "optimizer.lr",
    "LR": "optimizer.lr",
    "WEIGHT_DECAY": "optimizer.weight_decay",
    "WARMUP_STEPS": "scheduler.warmup_steps",
    "SEED": "train.seed",
}
_POLICIES = ("auto", "cuda", "cpu")


def take_old_parallel(raw: Any) -> Any:
    """The ``parallel`` dict with the old spellings replaced: ``pipeline=dict(size=2)`` and ``mode=None``."""
    if not isinstance(raw, Mapping):
        return raw
    table = dict(raw)
    for key in ("data", "pipeline"):
        value = table.get(key)
        if isinstance(value, Mapping) and set(value) == {"size"}:
            table[key] = value["size"]
    tensor = table.get("tensor")
    if isinstance(tensor, Mapping) and "mode" in tensor and tensor["mode"] is None:
        table["tensor"] = {**tensor, "mode": "none"}
    return table


def split_old(raw: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Divides the names of a Python config into tables of the schema and what only the old form has."""
    old_names = {"zero", "fp16", *_TOP, *_UNUSED[""]}
    old = {name: value for name, value in raw.items() if isinstance(name, str) and (name in old_names or _free(name))}
    rest = {name: value for name, value in raw.items() if name not in old}
    if "parallel" in rest:
        rest["parallel"] = take_old_parallel(rest["parallel"])
    return rest, old


def _free(name: str) -> bool:
    return name.isupper()


def take_old(draft: Draft, old: Mapping[str, Any]) -> None:
    """Moves the old form's options into a draft that already holds the tables of the schema.

    Args:
        draft: Gets the values, a note for each option without effect, and the problems.
        old: What ``split_old`` found.
    """
    for name, value in old.items():
        if name in _TOP:
            draft.put(_TOP[name], value, name)
        elif name in _UNUSED[""]:
            _note_unused(draft, name, _UNUSED[""][name])
    if old.get("zero") is not None:
        _take_zero(draft, old["zero"])
    if old.get("fp16") is not None:
        _take_fp16(draft, old["fp16"])
    if old.get("zero") is not None and not draft.has("precision.dtype"):
        draft.put("precision.dtype", "fp16", "zero")
    for name, value in old.items():
        if _free(name):
            _take_variable(draft, name, value)


def _take_variable(draft: Draft, name: str, value: Any) -> None:
    """Keeps a free variable for the user's script, and reads the well-known ones."""
    draft.variables[name] = value
    dotted = _VARIABLES.get(name)
    if dotted is not None and not draft.has(dotted):
        draft.put(dotted, value, name)
        draft.notes.append(f"{name} = {show(value)} is read as {dotted}")


def _take_zero(draft: Draft, zero: Any) -> None:
    tables = {"model_config": _take_model_config, "optimizer_config": _take_optimizer_config}
    if not isinstance(zero, Mapping):
        draft.problems.append(f"zero = {show(zero)}: must be a dict with model_config and optimizer_config")
        return
    for key, value in zero.items():
        if key in _UNUSED["zero"]:
            _note_unused(draft, f"zero.{key}", _UNUSED["zero"][key])
        elif key not in tables:
            draft.problems.append(_unknown_old("zero", key, value, [*tables, *_UNUSED["zero"]]))
        elif value is not None and not isinstance(value, Mapping):
            draft.problems.append(f"zero.{key} = {show(value)}: must be a dict")
    for key, take in tables.items():
        table = zero.get(key)
        take(draft, table if isinstance(table, Mapping) else {})


def _take_model_config(draft: Draft, table: Mapping[Any, Any]) -> None:
    known = {"tensor_placement_policy": _take_policy, "shard_strategy": _check_strategy, "bf16": _take_bf16}
    unused = _UNUSED["zero.model_config"]
    for key, value in table.items():
        if key in known:
            known[key](draft, value)
        elif key not in unused:
            draft.problems.append(_unknown_old("zero.model_config", key, value, [*known, *unused]))
        if key in unused:
            _note_unused(draft, f"zero.model_config.{key}", unused[key])
    _check_ratio(draft, "zero.model_config.warmup_non_model_data_ratio", table)
    if "tensor_placement_policy" not in table and not draft.has("memory.policy"):
        draft.put("memory.policy", "cuda", "zero.model_config without tensor_placement_policy")
        draft.notes.append(
            "zero.model_config without tensor_placement_policy keeps everything on the device, as it always did; "
            'tensor_placement_policy="auto" places by what fits'
        )


def _take_policy(draft: Draft, value: Any) -> None:
    dotted = "zero.model_config.tensor_placement_policy"
    if value in _POLICIES and isinstance(value, str):
        draft.put("memory.policy", value, dotted)
        return
    meant = nearest(value, _POLICIES) if isinstance(value, str) else None
    hint = f'; did you mean "{meant}"?' if meant else ""
    if value in ("const", "static"):
        hint = '; for fixed fractions write memory = dict(policy="static", resident_parameters=..., ...)'
    draft.problems.append(f"{dotted} = {show(value)}: must be one of {', '.join(_POLICIES)}{hint}")


def _check_strategy(draft: Draft, value: Any) -> None:
    """The strategy changes nothing, yet a wrong one is a mistake that its author should hear of."""
    kind = value if isinstance(value, type) else type(value)
    if value is not None and not issubclass(kind, TensorShardStrategy):
        draft.problems.append(
            f"zero.model_config.shard_strategy = {show(value)}: must be TensorShardStrategy() or "
            "BucketTensorShardStrategy(), imported from zero"
        )


def _take_bf16(draft: Draft, value: Any) -> None:
    if not isinstance(value, bool):
        draft.problems.append(f"zero.model_config.bf16 = {show(value)}: must be True or False")
    elif value:
        draft.put("precision.dtype", "bf16", "zero.model_config.bf16")


def _take_optimizer_config(draft: Draft, table: Mapping[Any, Any]) -> None:
    unused = _UNUSED["zero.optimizer_config"]
    for key, value in table.items():
        dotted = f"zero.optimizer_config.{key}"
        if key in _SCALE_KEYS:
            draft.put(_SCALE_KEYS[key], value, dotted)
        elif key in unused:
            _note_unused(draft, dotted, unused[key])
        else:
            draft.problems.append(_unknown_old("zero.optimizer_config", key, value, [*_SCALE_KEYS, *unused]))
    _check_ratio(draft, "zero.optimizer_config.gpu_margin_mem_ratio", table)


def _take_fp16(draft: Draft, fp16: Any) -> None:
    if isinstance(fp16, bool):
        fp16 = {"enabled": fp16}
    if not isinstance(fp16, Mapping):
        draft.problems.append(f"fp16 = {show(fp16)}: must be a dict such as dict(mode=AMP_TYPE.TORCH)")
        return
    if fp16.get("enabled") is False or ("mode" in fp16 and fp16["mode"] is None):
        return
    _check_mode(draft, fp16.get("mode", AMP_TYPE.NAIVE))
    draft.put("precision.dtype", "fp16", "fp16")
    unused = _UNUSED["fp16"]
    for key, value in fp16.items():
        if key in _SCALE_KEYS:
            draft.put(_SCALE_KEYS[key], value, f"fp16.{key}")
        elif key not in unused and key != "mode":
            draft.problems.append(_unknown_old("fp16", key, value, ["mode", *_SCALE_KEYS, *unused]))
        elif unused.get(key):
            _note_unused(draft, f"fp16.{key}", unused[key])


def _check_mode(draft: Draft, mode: Any) -> None:
    names = [kind.value for kind in AMP_TYPE]
    given = mode.value if isinstance(mode, Enum) else mode
    if not isinstance(given, str) or given.lower() not in names:
        meant = nearest(given, names) if isinstance(given, str) else None
        hint = f'; did you mean "{meant}"?' if meant else ""
        draft.problems.append(f"fp16.mode = {show(given)}: must be one of {', '.join(names)}{hint}")


def _check_ratio(draft: Draft, dotted: str, table: Mapping[Any, Any]) -> None:
    value = table.get(dotted.rpartition(".")[2], 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        draft.problems.append(f"{dotted} = {show(value)}: must be a fraction from 0 to 1")


def _note_unused(draft: Draft, dotted: str, instead: str) -> None:
    draft.notes.append(f"{dotted} has no effect: {instead}")


_HINTS = {
    "level": "the level is always 3: parameters, gradients and optimizer states are divided",
    "offload_config": 'write tensor_placement_policy="cpu"',
    "cpu_offload": 'write tensor_placement_policy="cpu" in model_config',
    "placement_policy": "write tensor_placement_policy",
    "lr": "the optimizer is built by your script, or by a table optimizer = dict(lr=...)",
    "max_norm": "write clip_grad_norm at the top",
    "clip_grad_norm": "write it at the top of the file",
}


def _unknown_old(table: str, key: Any, value: Any, known: list[str]) -> str:
    """The line for an option the old form does not have."""
    given = f"{table}.{name_text(str(key))} = {show(value)}: unknown key"
    homes = [
        home
        for home, keys in (
            ("zero.model_config", {"tensor_placement_policy", "bf16", *_UNUSED["zero.model_config"]}),
            ("zero.optimizer_config", {*_SCALE_KEYS, *_UNUSED["zero.optimizer_config"]} - {"init_scale"}),
        )
        if key in keys and home != table
    ]
    if homes:
        return f"{given}; {key} belongs in {homes[0]}"
    if key in _HINTS:
        return f"{given}; {_HINTS[key]}"
    meant = nearest(str(key), known)
    hint = f"; did you mean {meant}?" if meant else ""
    return f"{given}{hint} (keys of {table}: {', '.join(dict.fromkeys(known))})"
