"""Records a training pass moment by moment, and finds where in the trace of an earlier pass it stands."""

from __future__ import annotations

import time

from gemini.chunk import Chunk
from gemini.store import Kind, Store, Tier
from gemini.tensor import ChunkTensor
from gemini.trace import Moment, Trace
from gemini.work import Work

_START = "<start>"


class MomentListener:
    """Told of each moment as it ends; draws the memory map."""

    def moment_ended(self, moment: Moment) -> None:
        """A moment of a training pass has ended."""
        raise NotImplementedError


class Recorder:
    """Writes down what the present pass does.

    Args:
        store: knows the bytes of gathered copies and the device.

    Attributes:
        trace: of the passes so far; None until one was recorded whole.
        position: where in it the present pass stands; -1 before its first moment.
        listener: told of each moment.
        blocks: labels of the units that are alike: what is there when one of them begins, and was not when the first did,
            has been left behind by those before it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._device = store.device
        self.trace: Trace | None = None
        self.position = -1
        self.listener: MomentListener | None = None
        self.blocks: frozenset[str] = frozenset()
        self._recording = Trace()
        self._active = False
        self._started_s = 0.0
        self._persistent_bytes = 0
        self._refused = False
        self._with_gradient: dict[int, set[int]] = {}
        self._work_before = Work()
        self._held_bytes = self._room_bytes = 0
        # Non-model bytes when the first block began, and how many more there were as each moment began.
        self._base_bytes: int | None = None
        self._left_bytes: list[int] = []

    def begin_pass(self, batch_shape: tuple[int, ...], active: bool, held_bytes: int = 0, room_bytes: int = 0) -> None:
        """Forgets the unfinished record.

        Args:
            batch_shape: of its largest input tensor.
            active: whether it is recorded.
            held_bytes: non-model bytes that are there already and that the record leaves out.
            room_bytes: that plans keep for what passes leave behind: up to these the record leaves that out, too.
        """
        self._held_bytes, self._room_bytes = held_bytes, room_bytes
        self._base_bytes = None
        self._left_bytes = []
        self._recording = Trace(batch_shapes=[batch_shape])
        self._active = active
        self._device.counts_work = active and (self.trace is None or not self.trace.covers(batch_shape))
        self._with_gradient.clear()
        self.position = -1
        self._device.reset_peaks()

    @property
    def moments(self) -> list[Moment]:
        """Of the pass so far."""
        return self._recording.moments

    # -- moments -----------------------------------------------------------------------------------------------------

    def begin_moment(self, label: str, phase: str) -> None:
        """The next moment starts; the caller has closed the one before."""
        self._recording.moments.append(Moment(label, phase))
        live_bytes = self._device.memory().non_model_bytes
        if self._base_bytes is None and label in self.blocks:
            self._base_bytes = live_bytes
        self._left_bytes.append(0 if self._base_bytes is None else max(0, live_bytes - self._base_bytes))
        self.position = self._locate(phase, label)
        self._started_s = time.perf_counter()
        self._work_before = self._device.work.copy()
        self._persistent_bytes = self._persistent()
        self._refused = False
        self._device.reset_peaks()

    def is_at(self, label: str, phase: str) -> bool:
        """Whether the running moment is of this name."""
        moments = self._recording.moments
        return bool(moments) and moments[-1].key == (phase, label)

    def _locate(self, phase: str, label: str) -> int:
        """The trace's position of this moment: the next one, or the nearest later one of the same name."""
        if self.trace is None:
            return len(self._recording.moments) - 1
        moments = self.trace.moments
        for position in range(self.position + 1, len(moments)):
            if moments[position].key == (phase, label):
                return position
        return self.position

    def close(self) -> None:
        """Brings the running moment's figures up to date."""
        if not self._recording.moments:
            return
        moment = self._recording.moments[-1]
        memory = self._device.memory()
        moment.non_model_peak_bytes = max(
            moment.non_model_peak_bytes,
            memory.non_model_peak_bytes - self._held_bytes,
            self._device.refused_bytes - self._held_bytes,
        )
        most = moment.non_model_peak_bytes + moment.gathered_peak_bytes
        # What stays through the pass may grow within the moment (a gradient's buffer): the smaller figure is safe.
        both = memory.peak_bytes - self._held_bytes - min(self._persistent_bytes, self._persistent())
        refused = self._refused or self._device.refused_bytes > 0
        moment.both_peak_bytes = most if refused else min(most, both)
        moment.duration_s = time.perf_counter() - self._started_s
        if self._device.counts_work:
            work = self._device.work.since(self._work_before)
            moment.flops, moment.fp32_flops = work.flops, work.fp32_flops
            moment.traffic_bytes, moment.num_ops = work.traffic_bytes, work.num_ops
            moment.saved_bytes, moment.brought_bytes = work.saved_bytes, work.brought_bytes
        if self.listener is not None:
            self.listener.moment_ended(moment)

    def _persistent(self) -> int:
        return self._device.model_data_bytes - self._gathered()

    def _gathered(self) -> int:
        return self._store.bytes_by[Tier.DEVICE, Kind.GATHERED]

    # -- events ------------------------------------------------------------------------------------------------------

    def note_read(self, chunk: Chunk) -> None:
        """A chunk is read in the running moment, or still in use from the one before."""
        if not self._active:
            return
        if not self._recording.moments:
            if self.position >= 0:
                return  # a second backward pass over one forward, before its first border
            self.begin_moment(_START, "forward")  # read before the first unit runs
        moment = self._recording.moments[-1]
        if chunk.index not in moment.reads:
            moment.reads.append(chunk.index)
        if chunk.resident and chunk.index not in self._recording.resident:
            self._recording.resident.append(chunk.index)
        self.note_gathered()

    def note_gathered(self, refused_bytes: int = 0) -> None:
        """Gathered copies have changed, or ``refused_bytes`` more had no room."""
        self._refused |= refused_bytes > 0
        if self._recording.moments:
            moment = self._recording.moments[-1]
            moment.gathered_peak_bytes = max(moment.gathered_peak_bytes, self._gathered() + refused_bytes)

    def note_gradient(self, tensor: ChunkTensor) -> bool:
        """A gradient of this pass is complete; True if it was its chunk's last."""
        chunk = tensor.chunk
        have = self._with_gradient.setdefault(chunk.index, set())
        have.add(tensor.position)
        complete = len(have) == len(chunk.tensors)
        if complete and self._recording.moments:
            moment = self._recording.moments[-1]
            if chunk.index not in moment.gradients:
                moment.gradients.append(chunk.index)
        return complete

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self) -> bool:
        """The pass is complete; True if something in it asks for a new plan."""
        recorded, self._recording = self._recording, Trace()
        self._device.counts_work = False
        self._with_gradient.clear()
        if not recorded.moments or not recorded.batch_shapes:  # nothing, or a second backward over a kept graph
            return False
        self._leave_out_what_stays(recorded.moments)
        if self.trace is None:
            self.trace = recorded
            return True
        known = self.trace
        if known.same_shape(recorded) or known.covers(recorded.batch_shapes[0]):
            return known.absorb(recorded)
        # A larger batch that went through other moments: its record replaces the old one.
        recorded.cover(known.batch_shapes)
        recorded.step_peak_bytes = known.step_peak_bytes
        recorded.streamed_piece_numel = known.streamed_piece_numel
        self.trace = recorded
        return True

    def _leave_out_what_stays(self, moments: list[Moment]) -> None:
        """Keys and values that a pass has made, and that plans have room for beside all passes, count once."""
        most_bytes = min(self._room_bytes, self._device.memory().non_model_bytes - self._held_bytes)
        if most_bytes <= 0:
            return
        for moment, left_bytes in zip(moments, self._left_bytes, strict=True):
            moment.lower_non_model(min(left_bytes, most_bytes))
