"""What a pass did, moment by moment: recorded by the manager, read by the policy.

A *moment* is one stretch of a pass between two borders: a unit's forward starts or ends, its backward starts or ends.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

EVALUATION = "evaluation"
"""Phase of a moment that stands for a whole pass without gradients, in a dry run."""


@dataclass
class Moment:
    """One stretch of a training pass."""

    label: str
    """Unit name."""
    phase: str
    """``"forward"`` or ``"backward"``; :data:`EVALUATION` in a dry run."""
    reads: list[int] = field(default_factory=list)
    """Chunk indices in the order they were first read; first those still in use from the moment before."""
    gradients: list[int] = field(default_factory=list)
    """Chunks whose last gradient of the pass arrived here: their gathered copies have served."""
    non_model_peak_bytes: int = 0
    """Highest bytes of activations and temporaries."""
    gathered_peak_bytes: int = 0
    """Highest bytes of gathered copies of chunks."""
    both_peak_bytes: int = 0
    """Highest bytes of the two together at one instant, at most their sum; 0 while unknown."""
    duration_s: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the moment in another pass."""
        return self.phase, self.label

    @property
    def reserve_bytes(self) -> int:
        """Device bytes that no chunk may take for later use: non-model data, and what it may grow by from pass to pass
        (a tensor that the user still holds, another route through the model)."""
        return self.non_model_peak_bytes + self.non_model_peak_bytes // 32

    def raise_non_model(self, num_bytes: int) -> bool:
        """Notes that non-model bytes were seen to go higher; True if that was news."""
        growth = num_bytes - self.non_model_peak_bytes
        if growth <= 0:
            return False
        self.non_model_peak_bytes = num_bytes
        if self.both_peak_bytes:
            self.both_peak_bytes += growth  # the worst case: both are highest at the same instant
        return True


@dataclass
class Trace:
    """The moments of one training pass (one micro-batch: forward and backward)."""

    moments: list[Moment] = field(default_factory=list)
    batch_shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the largest input tensor of the passes that the figures cover, none of them within another."""
    step_peak_bytes: int = 0
    """Highest temporaries of an optimizer step on the device."""
    resident: list[int] = field(default_factory=list)
    """Chunks that needed no gathered copy in this pass, so that the moments' bytes do not count them."""

    def to_json(self) -> dict[str, Any]:
        """Numbers, texts, lists and dictionaries only."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Trace:
        """What :meth:`to_json` gave.

        Raises:
            TypeError, KeyError: it did not.
        """
        moments = [Moment(**moment) for moment in value["moments"]]
        return cls(**{**value, "moments": moments, "batch_shapes": [tuple(shape) for shape in value["batch_shapes"]]})

    @property
    def non_model_peak_bytes(self) -> int:
        """Highest non-model bytes of the pass."""
        return max((moment.non_model_peak_bytes for moment in self.moments), default=0)

    def covers(self, batch_shape: tuple[int, ...]) -> bool:
        """Whether a batch of this shape needs no more than one that was seen: no longer *and* no more rows.

        Elements alone would not do: attention needs more for one row of 128 tokens than for 8 rows of 16.
        """
        return any(_within(batch_shape, seen) for seen in self.batch_shapes)

    def cover(self, batch_shapes: list[tuple[int, ...]]) -> None:
        """Takes note of further shapes that the figures hold for."""
        for shape in batch_shapes:
            if not self.covers(shape):
                self.batch_shapes = [seen for seen in self.batch_shapes if not _within(seen, shape)] + [shape]

    def same_shape(self, other: Trace) -> bool:
        """Whether both passes went through the same moments."""
        return [m.key for m in self.moments] == [m.key for m in other.moments]

    def absorb(self, other: Trace) -> bool:
        """Keeps the highest figures of both passes; True if anything grew.

        A pass through other moments (layer drop, another branch) cannot be laid over this one moment by moment; its
        peak is then taken for every moment, which is safe.
        """
        if self.same_shape(other):
            peaks = [moment.non_model_peak_bytes for moment in other.moments]
        else:
            peaks = [other.non_model_peak_bytes] * len(self.moments)
        grew = [mine.raise_non_model(peak) for mine, peak in zip(self.moments, peaks, strict=True)]
        self.cover(other.batch_shapes)
        self.step_peak_bytes = max(self.step_peak_bytes, other.step_peak_bytes)
        return any(grew)


def _within(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a shape is no longer than another in any dimension."""
    return len(shape) == len(other) and all(mine <= theirs for mine, theirs in zip(shape, other, strict=True))


class NextUse:
    """Answers when a chunk is read next, for furthest-next-use eviction (Belady's rule over the recorded order)."""

    def __init__(self, trace: Trace) -> None:
        self._positions: dict[int, list[int]] = {}
        for position, moment in enumerate(trace.moments):
            for chunk in moment.reads:
                self._positions.setdefault(chunk, []).append(position)
        self._num_moments = len(trace.moments)
        self._reads = [moment.reads for moment in trace.moments]

    def reads(self, position: int) -> list[int]:
        """Chunks that a moment reads; none where there is no such moment."""
        return self._reads[position] if 0 <= position < self._num_moments else []

    def coming(self, position: int, depth: int) -> list[int]:
        """Chunks that the ``depth`` moments after one read, in the order in which they are read."""
        later = (chunk for reads in self._reads[position + 1 : position + 1 + depth] for chunk in reads)
        return list(dict.fromkeys(later))

    def after(self, chunk: int, position: int) -> int:
        """The first moment after ``position`` that reads the chunk; one full pass later if none is left in this one."""
        uses = self._positions.get(chunk)
        if not uses:
            return 2 * self._num_moments + 1
        index = bisect_right(uses, position)
        return uses[index] if index < len(uses) else uses[0] + self._num_moments
