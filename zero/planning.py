"""Does it fit, and how: a config walked through on fake tensors before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemini.device import Device
from gemini.dryrun import fake_mode
from gemini.hostinfo import host_memory
from gemini.plan import ChunkFacts, DoesNotFitError, Plan
from gemini.policy import Policy, least_capacity_bytes
from gemini.trace import Trace
from zero.config.schema import Config
from zero.dryrun import walk
from zero.models.build import dress, model_config
from zero.optimizers import build_optimizer
from zero.setup import make_policy

logger = logging.getLogger("zero")


@dataclass(frozen=True)
class PlannedRun:
    """What a dry run found.

    Attributes:
        num_parameters: of the model, tied ones once.
        facts: of its chunks.
        trace: of one micro-batch of the config's shape.
        plan: what the policy decided for the device's capacity; None if it does not fit.
        refusal: why not, if it does not fit.
        least_device_bytes: the smallest device that works under ``auto``.
        host_bytes: model data that the plan keeps on the host; of the all-offloaded one if it does not fit.
        host_available_bytes: host memory free at the time.
    """

    num_parameters: int
    facts: list[ChunkFacts]
    trace: Trace
    plan: Plan | None
    refusal: DoesNotFitError | None
    least_device_bytes: int
    host_bytes: int
    host_available_bytes: int

    def require(self) -> Plan:
        """The plan.

        Raises:
            DoesNotFitError: there is none.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.plan is None:
            raise RuntimeError("a planned run has either a plan or a refusal")
        return self.plan


def plan_run(
    config: Config, device: Device, tokenizer: Any = None, host_available_bytes: int | None = None
) -> PlannedRun | None:
    """Walks one micro-batch of the config's shape through the model without loading it.

    Args:
        config: of the run.
        device: that it is planned for.
        tokenizer: of the run, for a model given inline.
        host_available_bytes: of the machine that it is planned for; by default what this one has free.

    Returns:
        What was found; None where the model's forward depends on data (it branches on values), so that only the
        warm-up of the real run can tell.
    """
    shape = (config.train.per_device_train_batch_size, config.data.seq_length)
    transformers_config = model_config(config, tokenizer)

    def build() -> nn.Module:
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": config.model.attn_implementation} if config.model.attn_implementation else {}
        return dress(AutoModelForCausalLM.from_config(transformers_config, dtype=torch.float32, **options), config)

    try:
        trace, facts, num_parameters = dry_trace(build, config, shape)
    except Exception as error:  # any model code may fail on fake tensors, in any way
        logger.info(
            "this model cannot be walked through without data (%s); its warm-up will tell", type(error).__name__
        )
        return None
    policy = make_policy(config, device)
    return decide(config, policy, facts, trace, device.capacity_bytes, num_parameters, host_available_bytes)


def dry_trace(
    build: Callable[[], nn.Module], config: Config, shape: tuple[int, int]
) -> tuple[Trace, list[ChunkFacts], int]:
    """Runs forward and backward of one micro-batch on fake tensors.

    Args:
        build: makes the model; called inside the fake mode.
        config: of the run.
        shape: batch size and tokens per row.

    Returns:
        The trace of a pass with everything offloaded, the chunk facts, and the number of parameters.
    """
    with fake_mode():
        model = build()
        model.train()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        tokens = torch.ones(shape, dtype=torch.long)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        trace, engine = walk(model, build_optimizer(model, config), config, (), batch)
    return trace, engine.facts, num_parameters


def decide(
    config: Config,
    policy: Policy,
    facts: list[ChunkFacts],
    trace: Trace,
    capacity_bytes: int,
    num_parameters: int,
    host_available_bytes: int | None = None,
) -> PlannedRun:
    """The policy's answer for a capacity, and what the host must hold."""
    plan: Plan | None = None
    refusal: DoesNotFitError | None = None
    try:
        plan = policy.decide(facts, trace, capacity_bytes)
    except DoesNotFitError as error:
        refusal = error
    on_device = (plan.resident_parameter_bytes + plan.device_optimizer_bytes) if plan is not None else 0
    total_bytes = sum(fact.value_bytes + fact.companion_bytes for fact in facts)
    host_bytes = max(0, total_bytes - on_device)
    available_bytes = host_available_bytes or host_memory().available_bytes
    limit_bytes = min(available_bytes, config.memory.host or available_bytes)
    if refusal is None and host_bytes > limit_bytes:
        refusal = _host_refusal(facts, host_bytes, limit_bytes)
    return PlannedRun(
        num_parameters,
        facts,
        trace,
        plan if refusal is None else None,
        refusal,
        least_capacity_bytes(facts, trace),
        host_bytes,
        available_bytes,
    )


def _host_refusal(facts: list[ChunkFacts], host_bytes: int, limit_bytes: int) -> DoesNotFitError:
    from gemini.units import format_bytes

    values = sum(fact.value_bytes for fact in facts)
    rows = [
        ("parameters", "host", values, "compute dtype"),
        ("master, optimizer states, gradients", "host", sum(fact.companion_bytes for fact in facts), ""),
        ("needed on the host", "host", host_bytes, f"{format_bytes(limit_bytes)} available"),
    ]
    return DoesNotFitError(
        f"it does not fit: the host must hold {format_bytes(host_bytes)}, {format_bytes(limit_bytes)} are available",
        rows,
        "smallest change that would fit: free host memory or raise memory.host, a larger device.memory, a smaller "
        "model, or model.lora",
    )
