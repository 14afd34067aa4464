"""Is the training healthy? Losses that stop being finite, spike, or skip too many steps in a row."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

_WINDOW = 32
_LEAST = 8
"""Losses that must be known before one can be a spike."""


class HealthWatch:
    """Judges steps by their loss, before they change anything.

    Args:
        spike_factor: a loss this many times the median of the last 32 is a spike; None: none is.
        most_bad: bad steps in a row that are borne.
    """

    def __init__(self, spike_factor: float | None, most_bad: int) -> None:
        self._spike_factor = spike_factor
        self._most_bad = most_bad
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self.num_bad = 0
        """Bad steps in a row."""
        self.last_good_step = 0
        """Its loss speaks for the update before it, not for its own."""

    def problem(self, loss: float) -> str | None:
        """Why a step with this loss should be skipped; None if it should not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._spike_factor is None or len(self._recent) < _LEAST:
            return None
        median = statistics.median(self._recent)
        if loss > self._spike_factor * median:
            return f"the loss is {loss:.4g}, the median of the last {len(self._recent)} was {median:.4g}"
        return None

    def note(self, step: int, loss: float, bad: bool) -> None:
        """A step has ended."""
        self.num_bad = self.num_bad + 1 if bad else 0
        if not bad:
            self._recent.append(loss)
            self.last_good_step = step

    @property
    def is_hopeless(self) -> bool:
        """Whether too many steps in a row were bad."""
        return self.num_bad >= self._most_bad

    @property
    def is_healthy(self) -> bool:
        """Whether the last step was good."""
        return self.num_bad == 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"recent": list(self._recent), "num_bad": self.num_bad, "last_good_step": self.last_good_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._recent = deque((float(loss) for loss in state["recent"]), maxlen=_WINDOW)
        self.num_bad, self.last_good_step = int(state["num_bad"]), int(state["last_good_step"])

    def start_anew(self) -> None:
        """After going back: nothing is held against the steps to come."""
        self.num_bad = 0
