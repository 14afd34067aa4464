"""Keys that only count beside another one's value: one table, read by the checks and by what writes configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zero.config.schema import Config
from zero.config.training import OPTIMIZER_KEYS


@dataclass(frozen=True)
class Condition:
    """When some keys have an effect."""

    keys: tuple[str, ...]
    """Dotted keys it is about."""
    reads: str
    """The dotted key that decides."""
    holds: Callable[[Config], bool]
    """Whether the keys have an effect in this config."""
    advice: str
    """What to do where they were given and have none."""
    is_error: bool = False
    """Whether giving them in vain is refused (it would mislead about what runs) or only said."""


def _optimizer_takes(key: str) -> Callable[[Config], bool]:
    return lambda config: key in OPTIMIZER_KEYS[config.optimizer.name]


def _optimizers_with(key: str) -> str:
    return ", ".join(name for name, keys in OPTIMIZER_KEYS.items() if key in keys)


CONDITIONS: tuple[Condition, ...] = (
    Condition(
        ("memory.resident_parameters", "memory.resident_optimizer"),
        "memory.policy",
        lambda config: config.memory.policy == "static",
        'only memory.policy = "static" keeps fixed fractions; set that policy or remove the key',
        is_error=True,
    ),
    Condition(
        ("device.streams", "device.stream_seed", "device.poison"),
        "device.type",
        lambda config: config.device.type == "simulated",
        'only device.type = "simulated" has it',
    ),
    Condition(
        tuple(
            f"precision.{key}"
            for key in (
                *("initial_scale", "growth_factor", "backoff_factor", "growth_interval"),
                *("hysteresis", "min_scale", "max_scale"),
            )
        ),
        "precision.dtype",
        lambda config: config.precision.dtype == "fp16",
        'only precision.dtype = "fp16" scales the loss',
    ),
    *(
        Condition(
            (f"optimizer.{key}",), "optimizer.name", _optimizer_takes(key), f"only {_optimizers_with(key)} have it"
        )
        for key in ("betas", "eps", "momentum", "weight_decay")
    ),
    Condition(
        ("optimizer.early",),
        "train.max_grad_norm",
        lambda config: config.optimizer.early is not True or config.train.max_grad_norm is None,
        "how much gradients are clipped is known when the last has come; remove one of the two",
    ),
    Condition(
        ("optimizer.early",),
        "train.gradient_accumulation_steps",
        lambda config: config.optimizer.early is not True or config.train.gradient_accumulation_steps == 1,
        "a sum of gradients is known when the last has come; remove one of the two",
    ),
    Condition(
        ("optimizer.early",),
        "optimizer.workers",
        lambda config: config.optimizer.early is not True or config.optimizer.workers != 0,
        "without workers no update runs beside the program; remove one of the two",
    ),
    Condition(
        ("train.accumulation_order",),
        "train.gradient_accumulation_steps",
        lambda config: config.train.accumulation_order == "batch" or config.train.gradient_accumulation_steps > 1,
        "one micro-batch has no order; raise it or remove the key",
    ),
    Condition(
        ("scheduler.warmup_ratio", "scheduler.warmup_steps"),
        "scheduler.name",
        lambda config: config.scheduler.name != "constant",
        'the constant schedule has no warm-up; "constant_with_warmup" has',
    ),
    Condition(
        ("data.eval_fraction",),
        "data.eval",
        lambda config: config.data.eval is None,
        "data.eval is given, so that nothing is held out of the training data",
    ),
    Condition(
        ("data.shuffle_buffer",),
        "data.streaming",
        lambda config: config.data.streaming,
        "data that are read before training are shuffled as a whole",
    ),
    Condition(
        ("model.revision",),
        "model.config",
        lambda config: config.model.config is None,
        "model.config builds a new model, which has no revisions",
    ),
)


def without_effect(config: Config) -> dict[str, Condition]:
    """The keys that have no effect in this config, given or not, and why."""
    return {key: condition for condition in CONDITIONS if not condition.holds(config) for key in condition.keys}
