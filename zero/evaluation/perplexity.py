"""Perplexity of text: each token is scored once, with as much before it as window and stride give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, fields
from typing import Any

from zero.data.ids import Frame, token_ids
from zero.errors import UserError
from zero.evaluation.scoring import Scorer, Sequence

_WHOLE_CHARS = 1 << 23
"""A text of no more characters goes through the tokenizer as a whole; see :func:`zero.data.ids.token_ids`."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be scored.

    Attributes:
        where: It comes from, for messages.
        text: Itself.
    """

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class TextCounts:
    """How much text there is, and how it is cut.

    Attributes:
        num_unscored: First tokens of texts with nothing before them, where the tokenizer has no token for a beginning.
        num_bytes: Of the texts as UTF-8.
        num_words: Between blanks.
        num_lines: Line ends.
        num_texts: Scored by themselves.
        window: Most tokens that the model reads at a time.
        stride: Tokens between one window and the next.
    """

    num_unscored: int
    num_bytes: int
    num_words: int
    num_lines: int
    num_texts: int
    window: int
    stride: int


@dataclass(frozen=True, slots=True)
class TextWindows(TextCounts):
    """Texts, cut as the model will read them.

    Attributes:
        sequences: That score each token once.
    """

    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class PerplexityResult(TextCounts):
    """What came of it.

    Attributes:
        loglikelihood: Of all scored tokens, in nats.
        num_tokens: That were scored.
    """

    loglikelihood: float
    num_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return -self.loglikelihood / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return exp_or_infinity(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text would take, compressed with this model, for each of its bytes."""
        return -self.loglikelihood / math.log(2) / self.num_bytes

    @property
    def word_perplexity(self) -> float:
        """Per word as WikiText counts: what stands between blanks, and every line end (its ``<eos>``)."""
        return exp_or_infinity(-self.loglikelihood / max(1, self.num_words + self.num_lines))


def exp_or_infinity(exponent: float) -> float:
    """exp, infinite where that is too large for a float."""
    return math.exp(exponent) if exponent < 700 else math.inf


def check_window(window: int | None, stride: int | None, num_positions: int | None) -> tuple[int, int]:
    """Window and stride with their defaults: all that the model reads, and no overlap.

    Raises:
        UserError: the model reads fewer tokens, or tokens would be left out.
    """
    if window is None:
        window = num_positions or 2048
    if window < 1 or (num_positions is not None and window > num_positions):
        most = "" if num_positions is None else f" and at most {num_positions}, which is what the model reads at once"
        raise UserError(f"--window {window}: must be at least 1{most}")
    if stride is None:
        stride = window
    if not 1 <= stride <= window:
        raise UserError(f"--stride {stride}: must be from 1 to the window of {window}, or tokens would be left out")
    return window, stride


def text_windows(tokenizer: Any, texts: Several[Text], window: int, stride: int) -> TextWindows:
    """Cuts texts, each by itself.

    Before a text stands what the tokenizer puts there, else its token for the beginning or the end of texts: it is read
    and not scored.

    Args:
        tokenizer: of the model.
        texts: at least one.
        window: most tokens that the model reads at a time.
        stride: tokens that are scored between one window and the next; the window's others are only read.

    Raises:
        UserError: there is no text, or an empty one.
    """
    if not texts:
        raise UserError("no text to score")
    prefix = beginning(tokenizer)
    pieces: list[Sequence] = []
    num_unscored = 0
    for text in texts:
        ids = _tokens_of(text, tokenizer)
        first = max(1, len(prefix))
        num_unscored += first - len(prefix)
        if len(prefix) + len(ids) <= first:
            raise UserError(f"{text.where}: a single token, and nothing before it to predict it from; give more text")
        pieces += windows((*prefix, *ids), first, window, stride)
    whole = [text.text for text in texts]
    return TextWindows(
        sequences=pieces,
        num_unscored=num_unscored,
        num_bytes=sum(len(text.encode()) for text in whole),
        num_words=sum(len(text.split()) for text in whole),
        num_lines=sum(text.count("\n") for text in whole),
        num_texts=len(texts),
        window=window,
        stride=stride,
    )


def text_perplexity(scorer: Scorer, texts: TextWindows) -> PerplexityResult:
    """Scores texts."""
    return PerplexityResult(
        **{count.name: getattr(texts, count.name) for count in fields(TextCounts)},
        loglikelihood=math.fsum(score.loglikelihood for score in scorer.scores(texts.sequences)),
        num_tokens=sum(sequence.num_scored for sequence in texts.sequences),
    )


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a text is preceded by; none where the tokenizer knows of none."""
    own = tuple(int(token) for token in Frame(tokenizer).start)
    if own:
        return own
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next(((int(mark),) for mark in marks if mark is not None), ())


def windows(tokens: tuple[int, ...], first: int, window: int, stride: int) -> Iterator[Sequence]:
    """Sequences that score each of ``tokens[first:]`` once.

    Args:
        tokens: of one text, what stands before it included.
        first: number of the first token that is scored, at least 1.
        window: most tokens read at a time.
        stride: most tokens scored at a time, but for the first window, which scores all it reads.
    """
    done, end = first, min(len(tokens), max(window, first) + 1)
    while done < len(tokens):
        begin = max(0, end - 1 - window)
        yield Sequence(tokens[begin:end], end - done)
        done, end = end, min(len(tokens), end + stride)


def _tokens_of(text: Text, tokenizer: Any) -> tuple[int, ...]:
    try:
        text.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text.where}: not UTF-8 at character {error.start + 1}") from error
    if len(text.text) <= _WHOLE_CHARS:
        options = {"add_special_tokens": False, "return_token_type_ids": False, "verbose": False}
        ids = tokenizer(text.text, **options)["input_ids"]
    else:
        ids = next(token_ids([text.text], tokenizer)).tolist()
    if not ids:
        raise UserError(f"{text.where}: empty; give some text")
    return tuple(ids)
