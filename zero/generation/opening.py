"""From a config to a generator: a model taken over for passes without gradients, with room for keys and values planned."""

from __future__ import annotations

import logging
from typing import Any

from gemini.device import Device
from zero.config.schema import Config
from zero.dryrun import Generation
from zero.generation.facts import ModelFacts, facts_of
from zero.generation.generator import Generator, resolved_limits
from zero.generation.limits import Limits
from zero.inference import Outlook, make_inference_engine
from zero.models.build import build_model, build_tokenizer, in_stored_dtype
from zero.setup import make_device

logger = logging.getLogger("zero")

_MOST_EXPECTED = 2048
"""Tokens of a text that room is planned for; longer ones make what is on the device give way when they come."""


def open_generator(
    config: Config, limits: Limits | None = None, tokenizer: Any = None, device: Device | None = None
) -> tuple[Generator, Any, Outlook]:
    """Loads the model that a config names.

    Args:
        config: with ``[model]``.
        limits: of the generator.
        tokenizer: of the model, where it has been made already.
        device: one made already; by default the one that ``[device]`` names.

    Returns:
        The generator, its tokenizer, and where the model's bytes are and how fast passes will be.

    Raises:
        UserError: model or tokenizer cannot be had, or the model does not generate.
        gemini.plan.DoesNotFitError: not even one unit at a time fits on the device.
    """
    limits = limits or Limits()
    tokenizer = tokenizer or build_tokenizer(config)
    model: Any = build_model(config, tokenizer)
    model.eval()
    device = device or make_device(config)
    config = in_stored_dtype(config, model, device)
    facts = facts_of(model, tokenizer)
    wanted = resolved_limits(limits, facts, device)
    room_bytes = 0 if limits.cache_on_host else wanted.max_cache_bytes
    expected = _expected(wanted, facts)
    engine, outlook = make_inference_engine(model, config, device, expected, fewer=True, cache_bytes=room_bytes)
    return Generator(engine, tokenizer, wanted), tokenizer, outlook


def _expected(limits: Limits, facts: ModelFacts) -> Generation:
    """The largest passes within the limits."""
    tokens = min(limits.max_tokens or _MOST_EXPECTED, _MOST_EXPECTED)
    num_cached = (limits.max_cache_bytes or 0) // max(1, facts.position_bytes)
    together = max(1, limits.max_batch_tokens // limits.max_rows)
    prefills = ((1, tokens), (limits.max_rows, min(tokens, together)))
    return Generation(max(1, min(limits.max_rows, num_cached // tokens)), tokens, prefills)
