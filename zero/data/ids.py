"""Texts as token ids: in batches, long ones in parts, and the special tokens around them."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from zero.data.packing import TokenIds

logger = logging.getLogger("zero")

# Tokenizers hold some hundred bytes a character while they work: long texts go through in parts, which is no slower.
MAX_BATCH_CHARS = 1 << 18
MAX_BATCH_RECORDS = 512
# Between two words or lines tokenizers of the GPT-2 kind never put a token, so that cutting there changes none. (Others
# may begin the second part with a blank: one token in fifty thousand of a long text.)
_SEAM = re.compile(r"\S\n(?=\S)|\S(?= \S)")
_warned_about: weakref.WeakSet[Any] = weakref.WeakSet()


class Frame:
    """The special tokens around a text: what the tokenizer itself puts there, and always its end-of-sequence token."""

    def __init__(self, tokenizer: Any) -> None:
        probe = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        framed = list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(framed)) if framed[i : i + len(probe)] == probe), 0)
        self.start: TokenIds = np.array(framed[:at], np.int32)
        self._suffix: TokenIds = np.array(framed[at + len(probe) :], np.int32)
        self._eos_id: int | None = tokenizer.eos_token_id
        if self._eos_id is None and not len(self._suffix) and tokenizer not in _warned_about:
            _warned_about.add(tokenizer)
            logger.warning("data: the tokenizer has no end-of-sequence token: nothing marks where documents end")

    def end(self, ids: TokenIds) -> TokenIds:
        """What follows a text with these ids: nothing more where it is ended already."""
        last = self._suffix[-1:] if len(self._suffix) else ids[-1:]
        if self._eos_id is None or (len(last) and int(last[0]) == self._eos_id):
            return self._suffix
        return np.append(self._suffix, np.int32(self._eos_id))


def token_ids(texts: Iterable[str], tokenizer: Any) -> Iterator[TokenIds]:
    """Ids of each text, no special tokens added; many texts at once go through the tokenizer, long ones in parts."""
    parts: list[TokenIds] = []
    for batch in _batches(texts):
        encoded = tokenizer(
            [part for part, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for (_, is_last), ids in zip(batch, encoded, strict=True):
            parts.append(np.array(ids, np.int32))
            if is_last:
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts = []


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Parts of texts, each with whether it is its text's last."""
    batch: list[tuple[str, bool]] = []
    num_chars = 0
    for text in texts:
        for part in _parts(text):
            batch.append(part)
            num_chars += len(part[0])
            if num_chars >= MAX_BATCH_CHARS or len(batch) >= MAX_BATCH_RECORDS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def text_parts(text: str, num_chars: int) -> list[str]:
    """A text in parts of ``num_chars`` and a little more each, cut where no token stands across; at least one part."""
    parts, start = [], 0
    while len(text) - start > num_chars:
        seam = _SEAM.search(text, start + num_chars)
        if seam is None or seam.end() == len(text):
            break
        parts.append(text[start : seam.end()])
        start = seam.end()
    return [*parts, text[start:]]


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    *parts, last = text_parts(text, MAX_BATCH_CHARS)
    yield from ((part, False) for part in parts)
    yield last, True
