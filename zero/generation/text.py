"""Text from tokens as they come: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
_MOST_HALVES = 3
"""A character of UTF-8 has at most four bytes, so at most three of them may wait for the last."""
_MOST_WAITING = 16
"""Bytes that have not become a character after so many tokens never will."""
_CONTEXT = 6

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """Decodes tokens one after the other.

    What has been handed out, joined, is what decoding everything at once gives, but for half a character at the end.

    Args:
        decode: tokens to text.
        context: of the prompt: a tokenizer may write the first token of a text without the space before it.
    """

    def __init__(self, decode: Decode, context: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(context[-_CONTEXT:])
        self._clean = len(self._tokens)
        self._num_shown = len(_without_half(decode(self._tokens))) if self._tokens else 0

    def push(self, token: int) -> str:
        """The text that this token has completed."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        is_whole = not text.endswith(_HALF)
        if not is_whole:
            if len(self._tokens) - self._clean < _MOST_WAITING:
                return ""
            text = _without_half(text)
        fresh = text[self._num_shown :]
        if is_whole and not fresh:
            # A special token, which shows nothing: alone it would be no context, and the next token lose its space.
            self._clean = len(self._tokens)
        elif is_whole:
            # The tokens since the last whole character stay as context of the next.
            del self._tokens[: self._clean]
            self._clean = len(self._tokens)
            self._num_shown = len(self._decode(self._tokens))
        else:
            self._num_shown = max(self._num_shown, len(text))
        return fresh

    def finish(self) -> str:
        """What is left, without half a character."""
        return _without_half(self._decode(self._tokens))[self._num_shown :] if self._tokens else ""


def _without_half(text: str) -> str:
    most = len(text) - _MOST_HALVES
    while text.endswith(_HALF) and len(text) > most:
        text = text[:-1]
    return text


class StopFinder:
    """Ends a text before the first of several strings, wherever the borders between its pieces fall.

    Of two that lie in one another the one that is complete first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string has come."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        num_held = max(_overlap(self._held, stop) for stop in self._stops)
        border = len(self._held) - num_held
        shown, self._held = self._held[:border], self._held[border:]
        return shown, False

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that a stop string begins with."""
    for num in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:num]):
            return num
    return 0
