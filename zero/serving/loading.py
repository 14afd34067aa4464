"""From a config to a model that can be asked."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from gemini.units import format_bytes
from zero.config.schema import Config
from zero.generation import Generator, Limits
from zero.initializer import initialize
from zero.models.build import build_model, build_tokenizer
from zero.serving.worker import Loaded, Memory

if TYPE_CHECKING:
    from zero.engine import Engine


def load(config: Config, limits: Limits) -> Loaded:
    """Builds tokenizer, model, engine and generator; in the thread that will run the passes.

    Raises:
        UserError: model or tokenizer cannot be had.
        gemini.plan.DoesNotFitError: it does not fit.
    """
    tokenizer = build_tokenizer(config)
    model: Any = build_model(config, tokenizer)
    model.requires_grad_(False)
    model.eval()
    engine, *_ = initialize(model, config=config)
    generator = Generator(engine, tokenizer, limits)

    def close() -> None:
        generator.close()
        engine.close()

    # A copy for chat templates and echoes: a tokenizer is not to be used by two threads at a time.
    own = copy.deepcopy(tokenizer)
    return Loaded(generator, own, lambda: memory_of(engine), close, plan_line(engine, generator.limits))


def memory_of(engine: Engine) -> Memory:
    """Where an engine's bytes are now."""
    report = engine.memory_report()
    return Memory(
        device_capacity_bytes=report.device_capacity_bytes,
        device_peak_bytes=report.device_peak_bytes,
        model_device_bytes=sum(report.device_bytes_by_kind.values()),
        model_host_bytes=sum(report.host_bytes_by_kind.values()),
        model_disk_bytes=report.disk_bytes,
    )


def plan_line(engine: Engine, limits: Limits) -> str:
    """The memory plan in one line."""
    memory = memory_of(engine)
    parts = [
        f"device {format_bytes(memory.device_capacity_bytes)}" if memory.device_capacity_bytes else "no device cap"
    ]
    parts.append(f"model {format_bytes(memory.model_device_bytes)} on the device")
    if memory.model_host_bytes:
        parts.append(f"{format_bytes(memory.model_host_bytes)} on the host")
    if memory.model_disk_bytes:
        parts.append(f"{format_bytes(memory.model_disk_bytes)} on disk")
    tokens = "any number of" if limits.max_tokens is None else f"{limits.max_tokens}"
    return f"{', '.join(parts)}; {limits.max_rows} rows of {tokens} tokens"
