"""What no single key can know: values that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gemini.units import exact_bytes
from zero.config.conditions import without_effect
from zero.config.schema import BYTE_KEYS, Config
from zero.config.words import show


class Finding(NamedTuple):
    """One thing a check noticed."""

    text: str
    """The line for the user."""
    is_error: bool = True
    """Whether the config is refused, or the line only logged."""


class _Check(NamedTuple):
    reads: tuple[str, ...]
    """Dotted keys whose values must be sound for the check to mean anything."""
    run: Callable[[Config], Iterator[Finding]]


def _given(config: Config, dotted: str) -> str:
    """``key = value`` as in the file."""
    value: object = config
    for name in dotted.split("."):
        value = getattr(value, name)
    if dotted in BYTE_KEYS and isinstance(value, int):
        value = exact_bytes(value)
    return f"{dotted} = {show(value)}"


def _device(config: Config) -> Iterator[Finding]:
    device = config.device
    if device.type == "cpu" and device.memory is not None:
        yield Finding(
            f'{_given(config, "device.memory")}: device.type = "cpu" has no device memory; a cap needs an accelerator '
            'or type = "simulated" (memory.host caps host memory)'
        )
    if device.type == "simulated" and device.memory is None:
        yield Finding(
            'device.memory: not given; device.type = "simulated" needs its capacity, such as memory = "64MiB"'
        )


def _scale_order(config: Config) -> Iterator[Finding]:
    precision = config.precision
    if precision.dtype == "fp16" and not precision.min_scale <= precision.initial_scale <= precision.max_scale:
        yield Finding(
            f"{_given(config, 'precision.initial_scale')}: must lie between min_scale = {show(precision.min_scale)} "
            f"and max_scale = {show(precision.max_scale)}"
        )


def _kernel(config: Config) -> Iterator[Finding]:
    if config.optimizer.kernel == "native" and config.optimizer.name not in ("adamw", "adam", "sgd", "lion"):
        yield Finding(
            'optimizer.kernel = "native": only adamw, adam, sgd and lion have a native kernel, the optimizer is '
            f'{config.optimizer.name}; use "auto" or "torch"'
        )


def _optimizer_state(config: Config) -> Iterator[Finding]:
    state, dtype, name = config.precision.optimizer_state, config.precision.dtype, config.optimizer.name
    if state == "fp32":
        return
    if dtype != "bf16":
        yield Finding(
            f'precision.optimizer_state = "{state}": the weights are the upper half of the fp32 master then, which needs '
            f'precision.dtype = "bf16", not "{dtype}"; set that or optimizer_state = "fp32"'
        )
    if name not in ("adamw", "adam"):
        yield Finding(
            f'precision.optimizer_state = "{state}": holds the states of adamw and adam, not those of {name}; set '
            'optimizer_state = "fp32" or choose one of these'
        )


def _liger(config: Config) -> Iterator[Finding]:
    if config.train.liger and config.device.type in ("cpu", "simulated"):
        yield Finding(
            f'train.liger = true: Liger\'s kernels are made for GPUs, and device.type = "{config.device.type}"; set '
            "train.liger = false"
        )


def _warmup(config: Config) -> Iterator[Finding]:
    scheduler, train = config.scheduler, config.train
    if scheduler.warmup_ratio and scheduler.warmup_steps:
        yield Finding(
            f"{_given(config, 'scheduler.warmup_steps')}: scheduler.warmup_ratio = {show(scheduler.warmup_ratio)} is "
            "given as well; keep one of the two"
        )
    if 0 < train.max_steps <= scheduler.warmup_steps:
        yield Finding(
            f"{_given(config, 'scheduler.warmup_steps')}: with train.max_steps = {train.max_steps} the learning rate "
            "never reaches optimizer.lr",
            is_error=False,
        )


def _tensor(config: Config) -> Iterator[Finding]:
    tensor = config.parallel.tensor
    key = f"parallel.tensor.size = {tensor.size}"
    side = math.isqrt(tensor.size)
    if tensor.mode == "none" and tensor.size > 1:
        yield Finding(f'{key}: mode = "none" has one rank; set parallel.tensor.mode to 1d, 2d, 2.5d or 3d')
    if tensor.mode == "2d" and side**2 != tensor.size:
        yield Finding(f"{key}: 2d needs a square number of ranks; nearest are {side**2} and {(side + 1) ** 2}")
    if tensor.mode == "2.5d" and not _is_depth_times_square(tensor.size, tensor.depth):
        squares = ", ".join(str(tensor.depth * side**2) for side in (1, 2, 3))
        yield Finding(f"{key}: 2.5d with depth = {tensor.depth} needs depth x a square, such as {squares}")
    if tensor.mode == "3d" and (edge := round(tensor.size ** (1 / 3))) ** 3 != tensor.size:
        cubes = sorted({max(1, edge + step) ** 3 for step in (-1, 0, 1)})
        yield Finding(f"{key}: 3d needs a cube of ranks, such as {', '.join(map(str, cubes))}")
    if tensor.mode != "2.5d" and tensor.depth != 1:
        yield Finding(
            f'parallel.tensor.depth = {tensor.depth}: only mode = "2.5d" has a depth; remove it or set that mode'
        )


def _is_depth_times_square(num_ranks: int, depth: int) -> bool:
    squared, rest = divmod(num_ranks, depth)
    return rest == 0 and squared > 0 and math.isqrt(squared) ** 2 == squared


def _evaluation(config: Config) -> Iterator[Finding]:
    data = config.data
    if config.train.eval_steps and data.train is not None and data.eval is None and data.eval_fraction == 0:
        yield Finding(
            f"{_given(config, 'train.eval_steps')}: there is nothing to evaluate on; give data.eval or a "
            "data.eval_fraction above 0"
        )


def _data(config: Config) -> Iterator[Finding]:
    data = config.data
    if data.text_column is not None and data.format in ("prompt", "messages"):
        yield Finding(
            f'{_given(config, "data.text_column")}: data.format = "{data.format}" reads no text column; remove one of '
            "the two"
        )


def _streaming(config: Config) -> Iterator[Finding]:
    if config.data.streaming and config.data.train is not None and config.train.max_steps <= 0:
        yield Finding(
            "train.max_steps: not given; with data.streaming = true the length of the data is not known before they are "
            "read, so say after how many steps to stop"
        )


def _no_effect(config: Config, unsound: set[str]) -> Iterator[Finding]:
    for key, condition in without_effect(config).items():
        if config.is_set(key) and condition.reads not in unsound:
            now = _given(config, condition.reads)
            yield Finding(
                f"{_given(config, key)}: has no effect with {now}; {condition.advice}", is_error=condition.is_error
            )


_CHECKS = (
    _Check(("device.type", "device.memory"), _device),
    _Check(("precision.dtype", "precision.initial_scale", "precision.min_scale", "precision.max_scale"), _scale_order),
    _Check(("optimizer.name", "optimizer.kernel"), _kernel),
    _Check(("precision.optimizer_state", "precision.dtype", "optimizer.name"), _optimizer_state),
    _Check(("train.liger", "device.type"), _liger),
    _Check(("scheduler.warmup_ratio", "scheduler.warmup_steps", "train.max_steps"), _warmup),
    _Check(("parallel.tensor", "parallel.tensor.mode", "parallel.tensor.size", "parallel.tensor.depth"), _tensor),
    _Check(("train.eval_steps", "data.train", "data.eval", "data.eval_fraction"), _evaluation),
    _Check(("data.text_column", "data.format"), _data),
    _Check(("data.streaming", "data.train", "train.max_steps"), _streaming),
)


def cross_check(config: Config, unsound: set[str]) -> list[Finding]:
    """Runs every check whose keys are sound.

    Args:
        config: A config in which the unsound keys were left at their defaults.
        unsound: Dotted keys that already have a problem line.
    """
    found = [finding for check in _CHECKS if not unsound.intersection(check.reads) for finding in check.run(config)]
    return [*found, *_no_effect(config, unsound)]
