"""What generation hands out: text as it comes, and the choices of a request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, in nats, of the model's own distribution.

    Attributes:
        token: that was chosen.
        text: of that token alone; half a character shows as U+FFFD.
        logprob: of it.
        top: token, text and log-probability of the likeliest, best first.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one pass added to one choice.

    Attributes:
        index: which of n.
        text: never ends inside a character or inside a possible stop string; may be empty.
        tokens: of this pass; their text may come with a later piece.
        logprobs: of these tokens; empty where none were asked for.
        finish_reason: None, "stop" (a stop string, or a token that ends the text), "length" or "cancelled".
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass
class Choice:
    """One of the n answers to a request, so far. The same fields as of :class:`Piece`, put together."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Takes over what a pass has added."""
        self.text += piece.text
        self.tokens.extend(piece.tokens)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason
