"""How much may run at a time, and how much did."""

from __future__ import annotations

from dataclasses import dataclass

from zero.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a :class:`zero.generation.Generator` may use.

    Attributes:
        max_rows: choices that run at a time; the others wait.
        max_tokens: prompt and new tokens of one choice; None: as many positions as the model has.
        max_batch_tokens: positions, padding counted, that go through the model in one pass; a longer prompt goes alone.
        max_cache_bytes: of keys and values; None: a quarter of the device, or of the host's free
            memory, or what the longest text needs if that is more, up to half.
        cache_on_host: keys and values lie on the host, and each layer's come to the device while it runs.
    """

    max_rows: int = 32
    max_tokens: int | None = None
    max_batch_tokens: int = 4096
    max_cache_bytes: int | None = None
    cache_on_host: bool = False

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("max_rows", "max_tokens", "max_batch_tokens", "max_cache_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"limits.{name} = {value!r}: must be a whole number, at least 1")


@dataclass(frozen=True)
class GenerationStatistics:
    """What a generator does and has done.

    Attributes:
        num_waiting: choices that wait for room.
        num_rows: choices that run.
        num_passes: passes through the model so far.
        num_forwards: forwards so far; those of one pass share what comes over the link.
        num_prompt_tokens: that were read.
        num_new_tokens: that were added.
        padding_fraction: of all positions that went through the model, the share that was padding.
        cache_bytes: of keys and values now.
        cache_peak_bytes: at the highest.
        streamed_bytes: that came over the link to the device.
        tokens_per_s: new tokens, over the time that passes took.
    """

    num_waiting: int = 0
    num_rows: int = 0
    num_passes: int = 0
    num_forwards: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    padding_fraction: float = 0.0
    cache_bytes: int = 0
    cache_peak_bytes: int = 0
    streamed_bytes: int = 0
    tokens_per_s: float = 0.0
