"""From a config to a model that can be asked."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from zero.config.schema import Config
from zero.generation import Limits, open_generator
from zero.inference import Outlook
from zero.serving.worker import Loaded, Memory

if TYPE_CHECKING:
    from zero.engine import Engine


def load(config: Config, limits: Limits) -> Loaded:
    """Builds tokenizer, model, engine and generator; in the thread that will run the passes.

    Raises:
        UserError: model or tokenizer cannot be had.
        gemini.plan.DoesNotFitError: it does not fit.
    """
    generator, tokenizer, outlook = open_generator(config, limits)
    engine = generator.engine

    def close() -> None:
        generator.close()
        engine.close(keep_values=False)

    # A copy for chat templates and echoes: a tokenizer is not to be used by two threads at a time.
    own = copy.deepcopy(tokenizer)
    return Loaded(generator, own, lambda: memory_of(engine), close, plan_line(outlook, generator.limits))


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


def plan_line(outlook: Outlook, limits: Limits) -> str:
    """The memory plan in one line."""
    tokens = "any number of" if limits.max_tokens is None else f"{limits.max_tokens}"
    return f"model {outlook.text}; {limits.max_rows} rows of {tokens} tokens"
