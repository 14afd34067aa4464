"""Carries out a plan: fetch, release, evict, gradients out; and records what a pass does.

The caller (``zero.hooks``) says what the model does: a pass begins, a module starts and ends, a parameter is read, a
unit's backward starts and ends, a gradient is complete. The manager decides which bytes are on the device.

Two kinds of holders keep a tensor in COMPUTE:

- in forward, the innermost running module that read it, until that module's forward ends;
- in backward, the unit whose backward wants it. A *soft* hold comes from a saved tensor being unpacked (it can be
  unpacked again); a *hard* one from recomputation, whose saved views point straight into the gathered buffer, so it
  lasts until the unit's backward is over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch

from gemini.chunk import Chunk, ChunkTensor
from gemini.device import Device
from gemini.plan import Plan
from gemini.state import Move, TensorState
from gemini.store import Kind, Store, Tier
from gemini.timeline import choose_victim
from gemini.trace import Moment, NextUse, Trace
from gemini.transfer import Transfer

_USER = "<user code>"


class Phase(Enum):
    """What the model is doing."""

    IDLE = "idle"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass
class Scope:
    """A running module and what it holds."""

    label: str
    held: dict[ChunkTensor, None] = field(default_factory=dict)


@dataclass
class UnitBackward:
    """What one unit's backward holds."""

    soft: dict[ChunkTensor, None] = field(default_factory=dict)
    hard: dict[ChunkTensor, None] = field(default_factory=dict)


@dataclass
class Counters:
    """Since the last :meth:`Manager.reset_counters`."""

    num_fetches: int = 0
    num_evictions: int = 0


class Manager:
    """Owns the chunks and moves their bytes.

    Args:
        store: counts and gives memory.
        transfer: carries copies.
        chunks: all chunks, by index.
    """

    def __init__(self, store: Store, transfer: Transfer, chunks: list[Chunk]) -> None:
        self.store = store
        self.transfer = transfer
        self.chunks = chunks
        self.device: Device = store.device
        self.phase = Phase.IDLE
        self.training_pass = False
        self.plan: Plan | None = None
        self.trace: Trace | None = None
        self.counters = Counters()
        self.listener: MomentListener | None = None
        self._next_use: NextUse | None = None
        self._scopes: list[Scope] = []
        self._units: dict[str, UnitBackward] = {}
        self._current_unit: str | None = None
        self._recording = Trace()
        self._eager = True
        self._position = 0
        self._moment_started_s = 0.0
        self._gathered: dict[int, Chunk] = {}
        self._shown_idle: dict[ChunkTensor, None] = {}
        self._whole_shown = False
        # PyTorch keeps one Python object per storage while the storage lives, so its id names a gathered buffer.
        self._chunk_by_storage: dict[int, Chunk] = {}

    # -- passes ------------------------------------------------------------------------------------------------------

    def begin_pass(self, training: bool, batch_numel: int) -> None:
        """A forward pass starts.

        Args:
            training: gradients will be asked for; such a pass is recorded.
            batch_numel: elements of its largest input tensor.
        """
        self.settle_idle_reads()
        self._scopes.clear()
        self._end_all_backward()
        self.phase = Phase.FORWARD
        self.training_pass = training
        known = self.trace is not None and batch_numel <= self.trace.batch_numel
        self._eager = not (training and known and self.plan is not None and self.plan.reserve_bytes)
        if self._eager:
            self._release_all()
        self._recording = Trace(batch_numel=batch_numel)
        self._position = -1
        self.device.reset_peaks()

    def end_forward_pass(self) -> None:
        """The root module's forward has ended; without gradients the pass is over."""
        self._close_moment()
        if not self.training_pass:
            self.phase = Phase.IDLE
            self._release_all()

    def abort_pass(self) -> None:
        """An error ended the pass: nobody holds anything any more."""
        for scope in self._scopes:
            for tensor in list(scope.held):
                tensor.chunk.let_go(tensor, Move.LET_GO)
        self._scopes.clear()
        self._end_all_backward()
        self._release_all()
        self.phase = Phase.IDLE

    def begin_backward(self) -> None:
        """The first sign of a backward pass."""
        self.phase = Phase.BACKWARD

    def end_backward(self) -> bool:
        """The backward pass is over: gradients go out, the record is complete.

        Returns:
            True if something was learned that asks for a new plan.
        """
        self._close_moment()
        self._end_all_backward()
        for chunk in list(self._gathered.values()):
            if any(t.state is TensorState.READY_FOR_REDUCE for t in chunk.tensors) or self._eager:
                self._drop(chunk)
        self.phase = Phase.IDLE
        self._current_unit = None
        return self._learn()

    def _learn(self) -> bool:
        recorded, self._recording = self._recording, Trace()
        if not recorded.moments:
            return False
        if self.trace is None or recorded.batch_numel > self.trace.batch_numel:
            if self.trace is not None and self.trace.same_shape(recorded):
                recorded.absorb(self.trace)
                recorded.step_peak_bytes = self.trace.step_peak_bytes
            self.trace = recorded
            return True
        return self.trace.absorb(recorded)

    # -- forward scopes ----------------------------------------------------------------------------------------------

    def enter(self, label: str) -> None:
        """A module starts to run."""
        self._scopes.append(Scope(label))

    def leave(self, returned: Iterable[torch.Tensor] = ()) -> None:
        """The innermost module has ended. Parameters among what it returned stay held by its caller."""
        scope = self._scopes.pop()
        kept: set[ChunkTensor] = set()
        if self._scopes and scope.held:
            kept = self._aliases(scope, returned)
        move = Move.END_FORWARD if self.training_pass else Move.LET_GO
        for tensor in scope.held:
            if tensor not in kept or tensor in self._scopes[-1].held:
                tensor.chunk.let_go(tensor, move)
            else:
                self._scopes[-1].held[tensor] = None
        if self._eager and not self._scopes:
            self._release_all()

    def _aliases(self, scope: Scope, returned: Iterable[torch.Tensor]) -> set[ChunkTensor]:
        storages = {id(tensor.untyped_storage()) for tensor in returned}
        return {t for t in scope.held if id(t.parameter.untyped_storage()) in storages}

    def read(self, tensor: ChunkTensor, unit: str | None = None) -> None:
        """A parameter is about to be read by the program.

        In forward the innermost running module holds it. During backward a forward is a recomputation: ``unit`` (the
        innermost running unit) holds it hard. Outside any pass the values are shown until the next pass begins, and
        what the user writes into them is taken over then.
        """
        if self._whole_shown:
            return
        if self.phase is Phase.BACKWARD:
            self._hold_in_backward(tensor, unit or tensor.chunk.layout.unit_name, hard=True)
        elif self._scopes:
            if tensor not in self._scopes[-1].held:
                self._acquire(tensor)
                self._scopes[-1].held[tensor] = None
        elif self.phase is Phase.FORWARD:
            # Between forward and backward the user's own loss reads it; nobody will tell us when that is over.
            self._hold_in_backward(tensor, _USER, hard=True)
        else:
            self._show_idle(tensor)

    def _acquire(self, tensor: ChunkTensor) -> None:
        if tensor.state is TensorState.READY_FOR_REDUCE:
            with self.device.bookkeeping():
                tensor.chunk.restore(tensor)
        elif tensor.state is TensorState.FREE:
            self._fetch(tensor.chunk)
        tensor.chunk.acquire(tensor)
        self._note_read(tensor.chunk)

    # -- reads outside a pass ----------------------------------------------------------------------------------------

    def _show_idle(self, tensor: ChunkTensor) -> None:
        if tensor.state is TensorState.FREE:
            self._fetch(tensor.chunk)
        if tensor not in self._shown_idle:
            self.device.synchronize()
            self._shown_idle[tensor] = None

    @contextlib.contextmanager
    def shown_whole(self) -> Iterator[None]:
        """While the caller has bound parameters to whole tensors of its own, reads need nothing from us."""
        self._whole_shown = True
        try:
            yield
        finally:
            self._whole_shown = False

    def settle_idle_reads(self) -> None:
        """Takes over what was written into parameters that were shown between passes."""
        shown, self._shown_idle = self._shown_idle, {}
        for tensor in shown:
            if not tensor.chunk.on_device:
                continue
            present = tensor.parameter.detach().cpu()
            # Resident values were written in place; whether their master follows cannot be seen by comparing them.
            if tensor.chunk.resident or not torch.equal(present, tensor.chunk.values_of(tensor)):
                self.write(tensor, present.clone())

    def write(self, tensor: ChunkTensor, values: torch.Tensor) -> None:
        """Replaces a parameter's values, and its master's, between passes."""
        tensor.chunk.write_values(tensor, values)
        if not tensor.chunk.on_device:
            self._gathered.pop(tensor.chunk.index, None)

    # -- backward ----------------------------------------------------------------------------------------------------

    def begin_unit_backward(self, unit: str) -> None:
        """A unit's backward starts: what other units merely unpacked is let go."""
        for label, other in self._units.items():
            if label != unit:
                self._end_holds(other.soft)
        self._current_unit = unit
        self.begin_moment(unit, "backward")

    def owner(self, saved: torch.Tensor) -> ChunkTensor | None:
        """The tensor of a gathered chunk that a view belongs to; None for anything that cannot be released."""
        storage = saved.untyped_storage()
        chunk = self._chunk_by_storage.get(id(storage))
        # A chunk that became resident has given its gathered buffer up: its old id may name another storage now.
        if chunk is None or chunk.resident or chunk.storage is not storage:
            return None
        return chunk.tensor_at(int(saved.storage_offset()))

    def unpack(self, tensor: ChunkTensor) -> None:
        """Backward needs a parameter's values that forward saved."""
        self._hold_in_backward(tensor, self._current_unit or tensor.chunk.layout.unit_name, hard=False)

    def end_unit_backward(self, unit: str) -> None:
        """Nothing of this unit's backward is left to run."""
        holds = self._units.pop(unit, None)
        if holds is None:
            return
        self._end_holds(holds.soft)
        self._end_holds(holds.hard)
        if self._eager:
            self._release_all()

    def _hold_in_backward(self, tensor: ChunkTensor, unit: str, hard: bool) -> None:
        holds = self._units.setdefault(unit, UnitBackward())
        mine = holds.hard if hard else holds.soft
        if tensor not in mine:
            self._acquire(tensor)
            mine[tensor] = None

    def _end_holds(self, holds: dict[ChunkTensor, None]) -> None:
        for tensor in list(holds):
            tensor.chunk.let_go(tensor, Move.END_BACKWARD)
        holds.clear()

    def _end_all_backward(self) -> None:
        for holds in self._units.values():
            self._end_holds(holds.soft)
            self._end_holds(holds.hard)
        self._units.clear()

    def take_gradient(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        """A parameter's gradient of this backward pass is complete."""
        chunk = tensor.chunk
        if not chunk.takes_slots or tensor.state is TensorState.READY_FOR_REDUCE:
            with self.device.bookkeeping():
                chunk.deliver(tensor, gradient)
            return
        for holds in self._units.values():
            holds.soft.pop(tensor, None)
            holds.hard.pop(tensor, None)
        chunk.take_slot(tensor, gradient)
        if chunk.ready:
            self._drop(chunk)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _fetch(self, chunk: Chunk) -> None:
        if chunk.resident:
            return
        self._make_room(chunk.num_bytes)
        with self.device.bookkeeping():
            chunk.fetch()
        self._chunk_by_storage[id(chunk.storage)] = chunk
        self._gathered[chunk.index] = chunk
        self.counters.num_fetches += 1

    def _reserve_bytes(self) -> int:
        """Device bytes the present moment needs for activations."""
        if self._eager or self.plan is None or not 0 <= self._position < len(self.plan.reserve_bytes):
            return 0
        return self.plan.reserve_bytes[self._position]

    def _make_room(self, num_bytes: int) -> None:
        """Evicts, furthest next use first, until ``num_bytes`` more and the moment's reserve fit."""
        room_bytes = self.device.capacity_bytes - self._reserve_bytes()
        while self.device.model_data_bytes + num_bytes > room_bytes:
            candidates = [index for index, chunk in self._gathered.items() if chunk.droppable]
            if not candidates:
                return  # the allocation will say whether it fits after all
            next_use = self._next_use
            victim = choose_victim(candidates, next_use, self._position) if next_use else candidates[0]
            self._drop(self._gathered[victim])
            self.counters.num_evictions += 1

    def _drop(self, chunk: Chunk) -> None:
        with self.device.bookkeeping():
            chunk.reduce()
        self._gathered.pop(chunk.index, None)

    def _release_all(self) -> None:
        for chunk in list(self._gathered.values()):
            if chunk.droppable:
                self._drop(chunk)

    def release_stale(self) -> None:
        """Before an update: gathered copies of trained chunks are about to be outdated."""
        self.settle_idle_reads()
        for chunk in list(self._gathered.values()):
            if chunk.layout.trainable and chunk.droppable:
                self._drop(chunk)

    def make_room_for_step(self) -> None:
        """Before an update on the device: everything gathered goes, so that its temporaries fit."""
        self._release_all()

    def apply(self, plan: Plan) -> None:
        """Moves every chunk to where the plan wants it. Nothing may be running."""
        if self.phase is not Phase.IDLE:
            raise RuntimeError(f"a plan can only be applied between passes, not in {self.phase.name}")
        self.settle_idle_reads()
        self._end_all_backward()
        self._release_all()
        order = sorted(self.chunks, key=lambda c: _growth(c, plan))
        for chunk in order:  # what leaves the device goes first
            chunk.place(plan.placements[chunk.index])
        self.plan = plan
        self._next_use = NextUse(self.trace) if self.trace is not None else None

    # -- recording ---------------------------------------------------------------------------------------------------

    def begin_moment(self, label: str, phase: str) -> None:
        """A border of the pass: closes the running moment, opens the next, makes room for what it will need."""
        if not self.training_pass:
            if self._eager:
                self._release_all()
            return
        self._close_moment()
        self._recording.moments.append(Moment(label, phase))
        self._position = self._locate(phase, label)
        self._moment_started_s = time.perf_counter()
        self.device.reset_peaks()
        if self._eager:
            self._release_all()
        else:
            self._make_room(0)
        self._note_gathered()

    def _locate(self, phase: str, label: str) -> int:
        """The trace's position of this moment: the next one, or the nearest later one of the same name."""
        if self.trace is None:
            return len(self._recording.moments) - 1
        moments = self.trace.moments
        for position in range(max(0, self._position + 1), len(moments)):
            if moments[position].key == (phase, label):
                return position
        return max(0, self._position)

    def _close_moment(self) -> None:
        if not self._recording.moments:
            return
        moment = self._recording.moments[-1]
        memory = self.device.memory()
        moment.non_model_peak_bytes = max(moment.non_model_peak_bytes, memory.non_model_peak_bytes)
        moment.duration_s = time.perf_counter() - self._moment_started_s
        if self.listener is not None:
            self.listener.moment_ended(moment)

    def _note_read(self, chunk: Chunk) -> None:
        if not self._recording.moments:
            return
        moment = self._recording.moments[-1]
        if chunk.index not in moment.reads:
            moment.reads.append(chunk.index)
        self._note_gathered()

    def _note_gathered(self) -> None:
        moment = self._recording.moments[-1]
        gathered_bytes = self.store.bytes_by[Tier.DEVICE, Kind.GATHERED]
        moment.gathered_peak_bytes = max(moment.gathered_peak_bytes, gathered_bytes)

    @property
    def pass_moments(self) -> list[Moment]:
        """Moments of the pass that runs now, the last one with its figures so far."""
        self._close_moment()
        return list(self._recording.moments)

    def reset_counters(self) -> None:
        """Starts a new optimizer step's counts."""
        self.counters = Counters()
        self.transfer.reset_counters()

    def gathered_by_state(self) -> dict[str, int]:
        """Device bytes of gathered copies per tensor state."""
        by_state: dict[str, int] = {}
        for chunk in self._gathered.values():
            for tensor in chunk.tensors:
                num_bytes = tensor.entry.spec.numel * chunk.layout.dtype.itemsize
                by_state[tensor.state.value] = by_state.get(tensor.state.value, 0) + num_bytes
        return by_state

    # -- integrity ---------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises RuntimeError if anything owned twice, lost or miscounted is found."""
        self.store.check_integrity()
        seen: set[int] = set()
        gathered_bytes = 0
        for position, chunk in enumerate(self.chunks):
            if chunk.index != position:
                raise RuntimeError(f"chunk {chunk.index} stands at position {position}")
            chunk.check_integrity()
            for tensor in chunk.tensors:
                if id(tensor.parameter) in seen:
                    raise RuntimeError(f"parameter {tensor.name} is in two chunks")
                seen.add(id(tensor.parameter))
            if (chunk.on_device and not chunk.resident) != (chunk.index in self._gathered):
                raise RuntimeError(f"chunk {chunk.index}: gathered list and memory disagree")
            gathered_bytes += chunk.gathered_bytes
        counted_bytes = self.store.bytes_by[Tier.DEVICE, Kind.GATHERED]
        if gathered_bytes != counted_bytes:
            raise RuntimeError(f"gathered copies add up to {gathered_bytes} bytes, {counted_bytes} were counted")
        if self.phase is Phase.IDLE and any(chunk.in_use for chunk in self.chunks):
            raise RuntimeError("a tensor is in COMPUTE though nothing runs")


class MomentListener:
    """Told of each moment as it ends; draws the memory map."""

    def moment_ended(self, moment: Moment) -> None:
        """A moment of a training pass has ended."""
        raise NotImplementedError


def _growth(chunk: Chunk, plan: Plan) -> int:
    """Device elements a chunk gains by the plan; negative when it leaves."""
    placement = plan.placements[chunk.index]
    present = sum(s.numel for s in chunk.segments if s.value_tier is Tier.DEVICE)
    present += sum(s.numel for s in chunk.segments if s.companion_tier is Tier.DEVICE)
    return placement.resident_numel + placement.companion_numel - present
