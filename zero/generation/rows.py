"""One choice of a request while it runs."""

from __future__ import annotations

import torch

from zero.generation.choosing import Chosen
from zero.generation.jobs import Job
from zero.generation.pieces import Piece, TokenLogprob
from zero.generation.sampling import MOST_SEED
from zero.generation.text import Decode, StopFinder, TextStream


class Row:
    """One choice of a request.

    Args:
        job: it belongs to.
        index: which of its n.
        seed: of the job.
        decode: tokens to text.
        ends: tokens that end a text.

    Attributes:
        tokens: of the prompt and of the text so far.
        num_cached: of these, how many have keys and values in a cache.
        num_refusals: passes that had no room for it.
        finish_reason: why it has ended; None while it runs.
    """

    def __init__(self, job: Job, index: int, seed: int, decode: Decode, ends: frozenset[int]) -> None:
        self.job = job
        self.index = index
        self.sampling = job.sampling
        self.tokens = list(job.prompt)
        self.num_cached = 0
        self.num_refusals = 0
        self.finish_reason: str | None = None
        self._ends = ends
        self._decode = decode
        self._text = TextStream(decode, job.prompt)
        self._stops = StopFinder(job.sampling.stop)
        self._seen = set(job.prompt) if job.sampling.repetition_penalty != 1.0 else None
        self._random: torch.Generator | None = None
        self._drawn: float | None = None
        if job.sampling.draws:
            self._random = torch.Generator().manual_seed((seed + index) & MOST_SEED)

    # -- for choosing ------------------------------------------------------------------------------------------------

    @property
    def seen(self) -> set[int]:
        """Tokens of the prompt and of the text so far."""
        return set(self.tokens) if self._seen is None else self._seen

    def draw(self) -> float:
        """A number from [0, 1) for the next token; the same until it is taken, so that a pass can be run again."""
        if self._drawn is None:
            self._drawn = float(torch.rand((), dtype=torch.float64, generator=self._random))
        return self._drawn

    # -- how far it is -----------------------------------------------------------------------------------------------

    @property
    def num_new(self) -> int:
        """Tokens added so far."""
        return len(self.tokens) - self.job.num_prompt_tokens

    @property
    def num_passes_left(self) -> int:
        """Most passes after the one that reads all tokens there are now."""
        return self.sampling.max_new_tokens - self.num_new - 1

    def take(self, chosen: Chosen) -> Piece:
        """The next token; returns what it adds."""
        self._drawn = None
        self.tokens.append(chosen.token)
        if self._seen is not None:
            self._seen.add(chosen.token)
        ends = chosen.token in self._ends
        text, stopped = self._stops.push("" if ends else self._text.push(chosen.token))
        reason = "stop" if stopped or ends else None
        if reason is None and self.num_new >= self.sampling.max_new_tokens:
            reason = "length"
        if reason is not None and not stopped:
            rest, stopped = self._stops.push(self._text.finish())
            text += rest if stopped else rest + self._stops.finish()
            reason = "stop" if stopped else reason
        self.finish_reason = reason
        return Piece(self.index, text, (chosen.token,), self._logprobs(chosen), reason)

    def cancel(self) -> Piece:
        """It ends here; what was held back is not shown."""
        self.finish_reason = "cancelled"
        return Piece(self.index, "", finish_reason="cancelled")

    def _logprobs(self, chosen: Chosen) -> tuple[TokenLogprob, ...]:
        if chosen.logprob is None:
            return ()
        top = tuple((token, self._decode([token]), value) for token, value in chosen.top)
        return (TokenLogprob(chosen.token, self._decode([chosen.token]), chosen.logprob, top),)
