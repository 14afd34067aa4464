"""How the next token of a request is chosen: what a user may ask for, checked once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from zero.errors import UserError

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
LEAST_PENALTY, MOST_PENALTY = 1e-3, 1e3
MOST_STOPS, MOST_STOP_CHARACTERS = 16, 256
MOST_LOGPROBS = 100
MOST_SEED = (1 << 63) - 1
_MOST_FLOAT = sys.float_info.max  # whole numbers may be larger, and are no floats then


@dataclass(frozen=True)
class Sampling:
    """Settings of one request.

    Attributes:
        max_new_tokens: most tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token and draws nothing.
        top_k: draw from the k likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens that together have this share of the probability.
        repetition_penalty: above 1 makes every token of the prompt and of the text so far less likely.
        stop: the text ends before the first of these.
        seed: choice i of n draws from ``seed + i``; None: something fresh.
        logprobs: None: none; k: the log-probability of the chosen token and of the k likeliest, of the model's own
            distribution, before any of the above.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Checks every value."""
        _require_int("max_new_tokens", self.max_new_tokens, 1, None)
        _require_number("temperature", self.temperature)
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise UserError(
                f"temperature = {self.temperature}: must be 0 (the likeliest token), or from {LEAST_TEMPERATURE} to "
                f"{MOST_TEMPERATURE:g}"
            )
        _require_int("top_k", self.top_k, 0, None)
        _require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        _require_number("repetition_penalty", self.repetition_penalty)
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty}: must be from {LEAST_PENALTY} to {MOST_PENALTY:g}"
            )
        if self.seed is not None:
            _require_int("seed", self.seed, 0, MOST_SEED)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        object.__setattr__(self, "stop", _stops(self.stop))

    @property
    def draws(self) -> bool:
        """Whether chance decides."""
        return self.temperature > 0


def _require_int(name: str, value: Any, least: int, most: int | None) -> None:
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} = {value!r}: must be a whole number, {allowed}")
    if value < least or (most is not None and value > most):
        raise UserError(f"{name} = {value}: must be {allowed}")


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST_FLOAT:
        raise UserError(f"{name} = {value!r}: must be a finite number")


def _stops(stop: Any) -> tuple[str, ...]:
    given = (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, (tuple, list)) or not all(isinstance(text, str) for text in given):
        raise UserError(f"stop = {stop!r}: must be texts")
    if len(given) > MOST_STOPS:
        raise UserError(f"stop: {len(given)} texts were given; at most {MOST_STOPS} are allowed")
    for text in given:
        if not 1 <= len(text) <= MOST_STOP_CHARACTERS:
            raise UserError(f"stop: a text of {len(text)} characters; allowed are 1 to {MOST_STOP_CHARACTERS}")
    return tuple(given)
