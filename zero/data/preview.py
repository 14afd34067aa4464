"""One sample as the model will see it, to be read before hours are spent on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.text import Text

from zero.data.packing import IGNORED_LABEL

DEFAULT_MAX_TOKENS = 400
LEARNED_STYLE = "green"
MASKED_STYLE = "dim"
# Data are others' text: what would move the cursor or recolour the terminal is shown as a character of its own.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class SamplePreview:
    """A decoded sample.

    Attributes:
        title: Counts of tokens: all, in the loss, masked.
        segments: Runs of tokens of one kind, decoded, each with True where they are in the loss.
        num_hidden: Tokens left out at the end.
    """

    title: str
    segments: tuple[tuple[str, bool], ...]
    num_hidden: int

    @property
    def plain(self) -> str:
        """For logs and files: masked parts stand in [masked: ...]."""
        body = "".join(text if learned else f"[masked: {text}]" for text, learned in self.segments)
        return f"{self.title}\n{body}{self._tail()}"

    @property
    def renderable(self) -> Text:
        """For a rich console: tokens in the loss stand out, masked ones are dim."""
        text = Text(f"{self.title}\n", style="bold")
        for part, learned in self.segments:
            text.append(part, style=f"not bold {LEARNED_STYLE if learned else MASKED_STYLE}")
        return text.append(self._tail(), style="not bold italic")

    def __rich__(self) -> Text:
        return self.renderable

    def _tail(self) -> str:
        return f"\n... and {self.num_hidden} more tokens" if self.num_hidden else ""


def describe_sample(sample: Mapping[str, Any], tokenizer: Any, max_tokens: int = DEFAULT_MAX_TOKENS) -> SamplePreview:
    """Decodes a sample for people.

    Args:
        sample: ``input_ids`` and ``labels`` [tokens], tensors or lists; padding is left out where ``attention_mask`` is
            there.
        tokenizer: The one it was made with.
        max_tokens: At most so many are shown.
    """
    ids, labels = (torch.as_tensor(sample[name]).tolist() for name in ("input_ids", "labels"))
    if "attention_mask" in sample:
        seen = torch.as_tensor(sample["attention_mask"]).tolist()
        ids, labels = ([item for item, is_token in zip(row, seen, strict=True) if is_token] for row in (ids, labels))
    learned = [label != IGNORED_LABEL for label in labels]
    # The first token has a label in plain text, too, but nothing stands before it to predict it from.
    num_learned = sum(learned[1:])
    title = f"{len(ids)} tokens, {num_learned} in the loss, {len(ids) - num_learned} not"
    shown = list(zip(ids, learned, strict=True))[:max_tokens]
    segments = tuple(
        (_decode(tokenizer, [token_id for token_id, _ in run]), is_learned)
        for is_learned, run in itertools.groupby(shown, key=lambda pair: pair[1])
    )
    return SamplePreview(title, segments, len(ids) - len(shown))


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))
