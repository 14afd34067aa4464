"""What a training record is, and the list of those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zero.errors import DataError

logger = logging.getLogger("zero")

# More than this many bad records are not listed one by one: the first ones show what is wrong.
MAX_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Plain text; every token of it is learned.

    Attributes:
        where: Origin for messages: ``file:line``.
        text: As in the file, line structure included.
        begins: False: it goes on from the record before it, of which it is the next piece.
        ends: False: the next record is its next piece.
    """

    where: str
    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt and what is to come after it; the completion is learned.

    Attributes:
        where: Origin for messages: ``file:line``.
        prompt: May be empty.
        completion: Follows the prompt with nothing put between.
    """

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class MessagesRecord:
    """A conversation; the assistant's turns are learned.

    Attributes:
        where: Origin for messages: ``file:line``.
        messages: Dicts with at least ``role`` and ``content``, in the form chat templates take.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...]


Record = TextRecord | PromptRecord | MessagesRecord


class BadRecord(Exception):
    """One record cannot be used. Never leaves this package: ``Problems`` turns it into a ``DataError`` or counts it."""


@dataclass(slots=True)
class Problems:
    """Collects what is wrong with records: an error that lists them, or a counted skip.

    Attributes:
        on_error: ``"skip"`` leaves bad records out and counts them; anything else refuses them all.
        num_bad: Records that could not be used so far.
        examples: The first of them, each as "where: what".
        at_once: Refuse the first one when it is met, for data that are read while training.
    """

    on_error: str = "raise"
    num_bad: int = 0
    examples: list[str] = field(default_factory=list)
    at_once: bool = False

    @property
    def skip(self) -> bool:
        """True where bad records are left out instead of refused."""
        return self.on_error == "skip"

    def add(self, where: str, what: str) -> None:
        """Counts a bad record.

        Raises:
            DataError: Bad records are refused, and enough of them are known to show what is wrong.
        """
        self.num_bad += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {what}")
            if self.at_once:
                self.raise_if_refused()
        elif not self.skip:
            self.raise_if_refused()

    def raise_if_refused(self) -> None:
        """Ends a pass over the data.

        Raises:
            DataError: There are bad records and they are not to be skipped.
        """
        if self.skip or not self.num_bad:
            return
        advice = 'Mend the data, or set data.on_error = "skip" to leave such records out and count them.'
        if self.num_bad == 1:
            raise DataError(f"{self.examples[0].rstrip('.')}. {advice}")
        more = self.num_bad - len(self.examples)
        title = f"{'more than ' if more else ''}{len(self.examples)} records cannot be used"
        lines = "\n".join(f"  - {example}" for example in self.examples)
        raise DataError(f"data: {title}\n{lines}\n{advice}")

    def summary(self) -> str | None:
        """One line (and the first examples) on what was skipped; None where nothing was."""
        if not self.num_bad:
            return None
        lines = "\n".join(f"  - {example}" for example in self.examples)
        more = self.num_bad - len(self.examples)
        tail = f"\n  - and {more} more" if more else ""
        return f"data: skipped {self.num_bad} record{'s' if self.num_bad != 1 else ''}:\n{lines}{tail}"
