"""What a pass did, moment by moment: recorded by the manager, read by the policy.

A *moment* is one stretch of a pass between two borders: a unit's forward starts or ends, its backward starts or ends.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass
class Moment:
    """One stretch of a training pass."""

    label: str
    """Unit name."""
    phase: str
    """``"forward"`` or ``"backward"``."""
    reads: list[int] = field(default_factory=list)
    """Chunk indices in the order they were first read."""
    non_model_peak_bytes: int = 0
    """Highest bytes of activations and temporaries."""
    gathered_peak_bytes: int = 0
    """Highest bytes of gathered copies of chunks."""
    duration_s: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the moment in another pass."""
        return self.phase, self.label


@dataclass
class Trace:
    """The moments of one training pass (one micro-batch: forward and backward)."""

    moments: list[Moment] = field(default_factory=list)
    batch_numel: int = 0
    """Elements of the largest input tensor of the pass: a larger batch needs a new trace."""
    step_peak_bytes: int = 0
    """Highest temporaries of an optimizer step on the device."""

    @property
    def non_model_peak_bytes(self) -> int:
        """Highest non-model bytes of the pass."""
        return max((moment.non_model_peak_bytes for moment in self.moments), default=0)

    def same_shape(self, other: Trace) -> bool:
        """Whether both passes went through the same moments."""
        return [m.key for m in self.moments] == [m.key for m in other.moments]

    def absorb(self, other: Trace) -> bool:
        """Keeps the highest figures of both passes; True if anything grew.

        A pass through other moments (layer drop, another branch) cannot be laid over this one moment by moment; its
        peak is then taken for every moment, which is safe.
        """
        grew = False
        pairs = zip(self.moments, other.moments, strict=False) if self.same_shape(other) else None
        if pairs is None:
            highest = max(other.moments, key=lambda m: m.non_model_peak_bytes, default=None)
            pairs = ((moment, highest) for moment in self.moments) if highest is not None else iter(())
        for mine, theirs in pairs:
            if theirs.non_model_peak_bytes > mine.non_model_peak_bytes:
                mine.non_model_peak_bytes = theirs.non_model_peak_bytes
                grew = True
        self.batch_numel = max(self.batch_numel, other.batch_numel)
        return grew


class NextUse:
    """Answers when a chunk is read next, for furthest-next-use eviction (Belady's rule over the recorded order)."""

    def __init__(self, trace: Trace) -> None:
        self._positions: dict[int, list[int]] = {}
        for position, moment in enumerate(trace.moments):
            for chunk in moment.reads:
                self._positions.setdefault(chunk, []).append(position)
        self._num_moments = len(trace.moments)

    def after(self, chunk: int, position: int) -> int:
        """The first moment after ``position`` that reads the chunk; one full pass later if none is left in this one."""
        uses = self._positions.get(chunk)
        if not uses:
            return 2 * self._num_moments + 1
        index = bisect_right(uses, position)
        return uses[index] if index < len(uses) else uses[0] + self._num_moments
