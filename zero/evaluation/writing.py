"""Answers to many prompts: rows of one generator, which join and leave between passes, on the ranks of an engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

from gemini.device import Device
from zero.engine import Engine
from zero.evaluation.shares import Shares
from zero.generation.cache import rounded
from zero.generation.facts import ModelFacts, facts_of
from zero.generation.generator import Generator, resolved_limits
from zero.generation.limits import Limits
from zero.generation.sampling import Sampling

_MOST_ROWS = 64
_DEVICE_SHARE = 4
"""One part in so many of the device is for keys and values; where that holds no row they lie on the host."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be gone on with, and how.

    Attributes:
        tokens: Token numbers.
        sampling: Settings.
    """

    tokens: Several[int]
    sampling: Sampling

    @property
    def num_tokens(self) -> int:
        """With the answer, at the most."""
        return len(self.tokens) + self.sampling.max_new_tokens


class Writer:
    """Writes answers; with several ranks each has its share of the prompts, and all must call.

    Args:
        engine: around a causal language model of transformers.
        tokenizer: of the model.

    Attributes:
        num_new: tokens that were written, over all ranks.
        elapsed_s: in which they were.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._shares = Shares(engine)
        self.num_new = 0
        self.elapsed_s = 0.0

    def write(self, prompts: Several[Prompt]) -> list[str]:
        """The text of each answer, in the order of the prompts.

        Raises:
            UserError: the model does not generate, or a prompt is too long for it.
        """
        started_s = time.perf_counter()
        mine = self._shares.mine(list(enumerate(prompts)))
        written = self._shares.put_together(self._write(mine), len(prompts))
        self.num_new += sum(num_new for _, num_new in written)
        self.elapsed_s += time.perf_counter() - started_s
        return [text for text, _ in written]

    def _write(self, prompts: Several[tuple[int, Prompt]]) -> dict[int, tuple[str, int]]:
        if not prompts:
            return {}
        engine = self._engine
        facts = facts_of(engine.module, self._tokenizer)
        limits = _limits(
            facts, engine.device, max(prompt.num_tokens for _, prompt in prompts), engine.exchange.num_local
        )
        if not limits.cache_on_host:
            engine._planner.leave_room(limits.max_cache_bytes or 0)
        generator = Generator(engine, self._tokenizer, limits)
        try:
            jobs = [(number, generator.submit(prompt.tokens, prompt.sampling)) for number, prompt in prompts]
            generator.run()
            choices = [(number, job.result()[0]) for number, job in jobs]
        finally:
            generator.close()
            engine._planner.leave_room(0)
        return {number: (choice.text, len(choice.tokens)) for number, choice in choices}


def _limits(facts: ModelFacts, device: Device, num_tokens: int, num_local: int) -> Limits:
    """Room for the longest answer, and for as many as go together.

    Args:
        facts: of the model.
        device: that it runs on.
        num_tokens: of the longest prompt and its answer.
        num_local: processes that share the host's memory.
    """
    row_bytes = rounded(num_tokens) * facts.position_bytes * 5 // 4
    on_host = not device.is_host and row_bytes > device.capacity_bytes // _DEVICE_SHARE
    limits = resolved_limits(Limits(_MOST_ROWS, num_tokens, cache_on_host=on_host), facts, device)
    share = num_local if on_host or device.is_host else 1
    most_bytes = min((limits.max_cache_bytes or 0) // share, (_MOST_ROWS + 1) * row_bytes)
    return dataclasses.replace(limits, max_cache_bytes=max(row_bytes, most_bytes))
