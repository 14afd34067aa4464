"""What a pass did, moment by moment: recorded by the manager, read by the policy.

A *moment* is one stretch of a pass between two borders: a unit's forward starts or ends, its backward starts or ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

EVALUATION = "evaluation"
"""Phase of a moment that stands for a whole pass without gradients, in a dry run."""

_WINDOW = 0
"""First of a shape of a window: no tensor with elements has it. Then come the number of micro-batches, and a shape."""


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
    """Of the program, waits included; on an accelerator, which runs behind it, no measure of the computation."""
    flops: float = 0.0
    """Floating-point operations of matrix products in bf16 and fp16; 0 here and below where nobody counted."""
    fp32_flops: float = 0.0
    """The same in fp32."""
    traffic_bytes: float = 0.0
    """That other operators read and write."""
    num_ops: int = 0
    """Operators."""
    saved_bytes: int = 0
    """Of what forward saved for backward: sent to the host."""
    brought_bytes: int = 0
    """Of the same: asked back."""

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the moment in another pass."""
        return self.phase, self.label

    @property
    def reserve_bytes(self) -> int:
        """Device bytes that no chunk may take for later use: non-model data, and what it may grow by from pass to pass
        (a tensor that the user still holds, another route through the model)."""
        return self.non_model_peak_bytes + self.non_model_peak_bytes // 32

    def raise_work(self, other: Moment) -> None:
        """Takes over the work of the same moment in another pass, if that was more."""
        if (other.num_ops, other.flops + other.fp32_flops) > (self.num_ops, self.flops + self.fp32_flops):
            self.flops, self.fp32_flops = other.flops, other.fp32_flops
            self.traffic_bytes, self.num_ops = other.traffic_bytes, other.num_ops
            self.saved_bytes, self.brought_bytes = other.saved_bytes, other.brought_bytes

    def raise_non_model(self, num_bytes: int) -> bool:
        """Notes that non-model bytes were seen to go higher; True if that was news."""
        growth = num_bytes - self.non_model_peak_bytes
        if growth <= 0:
            return False
        self.non_model_peak_bytes = num_bytes
        if self.both_peak_bytes:
            self.both_peak_bytes += growth  # the worst case: both are highest at the same instant
        return True

    def lower_non_model(self, num_bytes: int) -> None:
        """Leaves out non-model bytes that lay there all through the moment, and are accounted for elsewhere."""
        self.non_model_peak_bytes = max(0, self.non_model_peak_bytes - num_bytes)
        self.both_peak_bytes = max(0, self.both_peak_bytes - num_bytes)


@dataclass
class Trace:
    """The moments of one training pass: forward and backward of one micro-batch, or of a window of them, layer by layer."""

    moments: list[Moment] = field(default_factory=list)
    batch_shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the largest input tensor of the passes that the figures cover, none of them within another."""
    step_peak_bytes: int = 0
    """Highest temporaries of an optimizer step on the device."""
    streamed_piece_numel: int = 0
    """Elements of a piece of an update that is streamed (:mod:`gemini.streamed`); 0: no update may be."""
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

    @property
    def is_window(self) -> bool:
        """Whether it is one of several micro-batches that went through the model layer by layer."""
        return any(shape[:1] == (_WINDOW,) for shape in self.batch_shapes)

    def with_work_of(self, other: Trace | None) -> Trace:
        """The same memory with the work of another pass through the same moments.

        Args:
            other: None: of a single token, which is estimated from what moments read.
        """
        if other is None or not self.same_shape(other):
            moments = [replace(m, flops=0.0, fp32_flops=0.0, traffic_bytes=0.0, num_ops=0) for m in self.moments]
            return replace(self, moments=moments, batch_shapes=[(1, 1)])
        pairs = zip(self.moments, other.moments, strict=True)
        moments = [
            replace(m, flops=o.flops, fp32_flops=o.fp32_flops, traffic_bytes=o.traffic_bytes, num_ops=o.num_ops)
            for m, o in pairs
        ]
        return replace(self, moments=moments)

    def covers(self, batch_shape: tuple[int, ...]) -> bool:
        """Whether a batch of this shape needs no more than one that was seen: no longer *and* no more rows.

        Elements alone would not do: attention needs more for one row of 128 tokens than for 8 rows of 16.
        """
        return any(_within(batch_shape, seen) for seen in self.batch_shapes)

    def cover(self, batch_shapes: list[tuple[int, ...]]) -> None:
        """Takes note of further shapes that the figures hold for: if this is of one micro-batch, windows are not."""
        for shape in batch_shapes:
            if shape[:1] == (_WINDOW,) and not self.is_window:
                continue
            if not self.covers(shape):
                self.batch_shapes = [seen for seen in self.batch_shapes if not _within(seen, shape)] + [shape]

    def same_shape(self, other: Trace) -> bool:
        """Whether both passes went through the same moments."""
        return [m.key for m in self.moments] == [m.key for m in other.moments]

    def absorb(self, other: Trace) -> bool:
        """Keeps the highest figures of both passes; True if anything grew.

        A pass through other moments (layer drop, another branch) cannot be laid over this one moment by moment; its
        peak is then taken for every moment, which is safe. A window can that had fewer micro-batches.
        """
        pairs = self._matched(other) if self.is_window or self.same_shape(other) else None
        if pairs is None:
            grew = [mine.raise_non_model(other.non_model_peak_bytes) for mine in self.moments]
        else:
            grew = [mine.raise_non_model(theirs.non_model_peak_bytes) for mine, theirs in pairs]
            for mine, theirs in pairs:
                mine.raise_work(theirs)
        self.cover(other.batch_shapes)
        self.step_peak_bytes = max(self.step_peak_bytes, other.step_peak_bytes)
        self.streamed_piece_numel = max(self.streamed_piece_numel, other.streamed_piece_numel)
        return any(grew)

    def _matched(self, other: Trace) -> list[tuple[Moment, Moment]] | None:
        """Each moment of the other pass with the one here where the recorder found it; None if it has others."""
        pairs, mine = [], iter(self.moments)
        for theirs in other.moments:
            found = next((moment for moment in mine if moment.key == theirs.key), None)
            if found is None:
                return None
            pairs.append((found, theirs))
        return pairs


def window_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """What :attr:`Trace.batch_shapes` has for micro-batches of these shapes that go through the model in one pass."""
    longest = max(map(len, shapes))
    same = [shape for shape in shapes if len(shape) == longest]
    return (_WINDOW, len(shapes), *(max(lengths) for lengths in zip(*same, strict=True)))


def num_elements(shape: tuple[int, ...]) -> int:
    """Of one micro-batch's tensor of such a shape."""
    return prod(shape[2:] if shape[:1] == (_WINDOW,) else shape)


def _within(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a shape is no longer than another in any dimension. A window needs all that one of its micro-batches does."""
    if other[:1] == (_WINDOW,) and shape[:1] != (_WINDOW,):
        other = other[2:]
    return len(shape) == len(other) and all(mine <= theirs for mine, theirs in zip(shape, other, strict=True))


class NextUse:
    """Answers when a chunk is read next, for furthest-next-use eviction (Belady's rule over the recorded order)."""

    def __init__(self, trace: Trace) -> None:
        self._num_moments = len(trace.moments)
        self._reads = [moment.reads for moment in trace.moments]
        self._never = 2 * self._num_moments + 1
        self._rows = self._table()
        self._coming: dict[tuple[int, int], list[int]] = {}

    def _table(self) -> list[list[int]]:
        """By position, from the one before the first moment on: the answer for every chunk."""
        num_chunks = max((chunk for reads in self._reads for chunk in reads), default=-1) + 1
        row = [self._never] * num_chunks
        for position in reversed(range(self._num_moments)):
            for chunk in self._reads[position]:
                row[chunk] = position + self._num_moments  # in the end, the first moment that reads it
        rows = [row]
        for position in reversed(range(self._num_moments)):
            row = list(row)
            for chunk in self._reads[position]:
                row[chunk] = position
            rows.append(row)
        return rows[::-1]

    def reads(self, position: int) -> list[int]:
        """Chunks that a moment reads; none where there is no such moment."""
        return self._reads[position] if 0 <= position < self._num_moments else []

    def coming(self, position: int, depth: int) -> list[int]:
        """Chunks that the ``depth`` moments after one read, in the order in which they are read."""
        key = position, depth
        if key not in self._coming:
            later = (chunk for reads in self._reads[position + 1 : position + 1 + depth] for chunk in reads)
            self._coming[key] = list(dict.fromkeys(later))
        return self._coming[key]

    def after(self, chunk: int, position: int) -> int:
        """The first moment after ``position`` that reads the chunk; one full pass later if none is left in this one."""
        row = self._rows[max(0, min(position + 1, self._num_moments))]
        return row[chunk] if chunk < len(row) else self._never

    def furthest_first(self, chunks: Iterable[int], position: int) -> list[int]:
        """The chunks in the order in which they are read next after ``position``, last one first, then by index."""
        row = self._rows[max(0, min(position + 1, self._num_moments))]
        num_known = len(row)
        return [
            -key[1] for key in sorted(((row[c] if c < num_known else self._never, -c) for c in chunks), reverse=True)
        ]
