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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch

from gemini.chunk import Chunk
from gemini.device import Device
from gemini.fetching import Counters, GatheredChunks
from gemini.idle import IdleReads
from gemini.integrity import check_chunks
from gemini.plan import Plan
from gemini.recorder import MomentListener, Recorder
from gemini.state import Move, TensorState
from gemini.store import Kind, Store, Tier
from gemini.streamed import StreamedUpdates
from gemini.sums import GradientSums
from gemini.tensor import ChunkTensor
from gemini.trace import Moment, Trace
from gemini.transfer import Transfer

__all__ = ["Counters", "Manager", "MomentListener", "Phase", "Scope", "UnitBackward"]


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


class Manager:
    """Owns the chunks and moves their bytes.

    Args:
        store: counts and gives memory.
        transfer: carries copies.
        chunks: all chunks, by index.
        only_infers: no pass computes gradients. Then passes without are recorded and planned, as training passes are
            otherwise; those beside training keep to the plan that training has, and gather one unit at a time.
    """

    def __init__(self, store: Store, transfer: Transfer, chunks: list[Chunk], only_infers: bool = False) -> None:
        self.store = store
        self.transfer = transfer
        self.chunks = chunks
        self.device: Device = store.device
        self.phase = Phase.IDLE
        self.only_infers = only_infers
        self.training_pass = False
        self.plan: Plan | None = None
        self.recorder = Recorder(store)
        self._gathered = GatheredChunks(chunks, self.device, self.recorder)
        self._idle = IdleReads(self.device, self._gathered.make_room, self.write)
        self.streamed = StreamedUpdates(store, transfer)
        self._scopes: list[Scope] = []
        self._units: dict[str, UnitBackward] = {}
        self._current_unit: str | None = None
        self._num_passes = self._num_borders = 0
        self.num_gradients = 0
        self.all_shown = False
        self.gradients_are_there: Callable[[Chunk], None] = lambda chunk: None
        self.sums: GradientSums | None = None

    @property
    def trace(self) -> Trace | None:
        """Of the passes so far; None until one was recorded whole."""
        return self.recorder.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self.recorder.trace = trace

    @property
    def listener(self) -> MomentListener | None:
        """Told of each moment of a training pass."""
        return self.recorder.listener

    @listener.setter
    def listener(self, listener: MomentListener | None) -> None:
        self.recorder.listener = listener

    # -- passes ------------------------------------------------------------------------------------------------------

    def begin_pass(
        self, training: bool, batch_shape: tuple[int, ...], pending: bool = False, room_bytes: int = 0
    ) -> None:
        """A forward pass starts.

        Args:
            training: gradients will be asked for.
            batch_shape: of its largest input tensor.
            pending: beside the graph of an earlier forward, which no plan knows of: nothing is kept for later.
            room_bytes: that plans keep for what lies there between passes.
        """
        self.settle_idle_reads()
        self._end_all_scopes()
        self._end_all_backward()
        self._current_unit = None
        self.phase = Phase.FORWARD
        self.training_pass = training
        known = self.trace is not None and self.trace.covers(batch_shape) and not pending
        planned = self.records and known and self.plan is not None and self.plan.reserve_bytes
        self._gathered.eager = not planned
        if self._gathered.eager:
            self._gathered.release_all()
        # What lies there between passes without gradients grows from one to the next (keys and values): not theirs.
        held_bytes = self.device.memory().non_model_bytes if self.only_infers else 0
        room_bytes = max(0, room_bytes - held_bytes) if self.only_infers else 0
        self.recorder.begin_pass(batch_shape, self.records, held_bytes, room_bytes)
        self._num_passes += 1

    @property
    def records(self) -> bool:
        """Whether the pass that runs is of the kind that plans are made for."""
        return self.training_pass or self.only_infers

    @property
    def clock(self) -> int:
        """How far this step has come: passes and borders between units. Grows until :meth:`start_clock`."""
        return self._num_passes << 32 | self._num_borders

    def start_clock(self) -> None:
        """A new step begins."""
        self._num_passes = self._num_borders = 0

    def end_forward_pass(self) -> bool:
        """The root module's forward has ended; without gradients the pass is over.

        Returns:
            True if something was learned that asks for a new plan.
        """
        self.recorder.close()
        if self.training_pass:
            return False
        self.phase = Phase.IDLE
        if self._gathered.eager:
            self._gathered.release_all()
        return self.only_infers and self.recorder.learn()

    def abort_pass(self) -> None:
        """The pass will not go on: nobody holds anything any more."""
        self._end_all_scopes()
        self._end_all_backward()
        self._gathered.release_all()
        self.phase = Phase.IDLE

    def begin_backward(self) -> None:
        """The first sign of a backward pass."""
        self.settle_idle_reads()
        self.phase = Phase.BACKWARD

    def end_backward(self) -> bool:
        """The backward pass is over: gradients go out, the record is complete.

        Returns:
            True if something was learned that asks for a new plan.
        """
        self.recorder.close()
        self._end_all_backward()
        for chunk in self._gathered:
            if any(t.state is TensorState.READY_FOR_REDUCE for t in chunk.tensors) or self._gathered.eager:
                self._gathered.drop(chunk)
        self.phase = Phase.IDLE
        self._current_unit = None
        return self.recorder.learn()

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
                self._let_go(tensor, move)
            else:
                self._scopes[-1].held[tensor] = None
        if not self._scopes:
            self._gathered.give_way()

    def swap_scopes(self, scopes: list[Scope]) -> list[Scope]:
        """Another forward pass of several goes on, in whose modules these are held; returns those of the one so far."""
        self._scopes, before = scopes, self._scopes
        self.phase = Phase.FORWARD
        return before

    def drop_scopes(self) -> None:
        """The forward pass that runs has broken off."""
        self._end_all_scopes()

    def _end_all_scopes(self) -> None:
        for scope in self._scopes:
            for tensor in scope.held:
                self._let_go(tensor, Move.LET_GO)
        self._scopes.clear()

    def _let_go(self, tensor: ChunkTensor, move: Move) -> None:
        """One holder less; what the model wrote into the parameter in forward goes to its owner first."""
        if tensor.written and tensor.state is TensorState.COMPUTE:
            with self.device.bookkeeping():
                written = self._idle.written_values(tensor)
                if written is not None:
                    tensor.chunk.put_values(tensor.entry, written)
            tensor.note_written()
        tensor.chunk.let_go(tensor, move)

    def _aliases(self, scope: Scope, returned: Iterable[torch.Tensor]) -> set[ChunkTensor]:
        storages = {id(tensor.untyped_storage()) for tensor in returned}
        return {t for t in scope.held if id(t.storage) in storages}

    def read(self, tensor: ChunkTensor, unit: str | None = None) -> None:
        """A parameter is about to be read by the program.

        In forward the innermost running module holds it. During backward a forward is a recomputation: ``unit`` (the
        innermost running unit) holds it hard. Outside modules, where nobody says how long, the values are shown until
        something is fetched, and what the user writes into them is taken over then.
        """
        if self.all_shown:
            return
        if self.phase is Phase.BACKWARD:
            self._hold_in_backward(tensor, unit or tensor.chunk.layout.unit_name, hard=True)
        elif self._scopes:
            if tensor not in self._scopes[-1].held:
                self._acquire(tensor)
                self._scopes[-1].held[tensor] = None
        else:
            self._idle.show(tensor)

    def is_held(self, tensor: ChunkTensor) -> bool:
        """Whether the innermost running module of a forward holds it already."""
        return self.phase is Phase.FORWARD and bool(self._scopes) and tensor in self._scopes[-1].held

    def _acquire(self, tensor: ChunkTensor) -> None:
        if tensor.state is TensorState.READY_FOR_REDUCE:
            tensor.chunk.restore(tensor)
        elif tensor.state is TensorState.FREE:
            self._fetch(tensor.chunk)
        tensor.chunk.acquire(tensor)
        self.recorder.note_read(tensor.chunk)

    # -- reads outside a pass ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def shown_whole(self) -> Iterator[None]:
        """While the caller has bound parameters to whole tensors of its own, reads need nothing from us."""
        self.all_shown = True
        try:
            yield
        finally:
            self.all_shown = False

    def settle_idle_reads(self) -> None:
        """Takes over what was written into parameters that were shown between passes."""
        self._idle.settle()

    def copy(self, tensor: ChunkTensor) -> torch.Tensor:
        """A copy of a parameter's values on the device, the caller's own."""
        return self._idle.copy(tensor)

    def write(self, tensor: ChunkTensor, values: torch.Tensor) -> None:
        """Replaces a parameter's values, and its master's, between passes."""
        tensor.chunk.write_values(tensor, values)
        self._gathered.forget(tensor.chunk)

    # -- backward ----------------------------------------------------------------------------------------------------

    def begin_unit_backward(self, unit: str) -> None:
        """A unit's backward starts: what other units merely unpacked is let go."""
        for label, other in self._units.items():
            if label != unit:
                self._end_holds(other.soft)
        self._current_unit = unit
        self.begin_moment(unit, "backward")

    def owner(self, saved: torch.Tensor) -> ChunkTensor | None:
        """The tensor of a chunk on the device that a view belongs to; None for anything else."""
        return self._gathered.owner(saved)

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
        self._gathered.give_way()

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

    def end_part(self, last: bool) -> None:
        """One micro-batch's backward through a part of the model is over; ``last`` of all that go through it in turn."""
        self._end_all_backward()
        if self.sums is None:
            raise RuntimeError("a part of a backward pass ended outside a window")
        self.sums.end_micro_batch()
        for tensor in self.sums.finish() if last else ():
            if self.recorder.note_gradient(tensor) and tensor.chunk.droppable:
                self._gathered.drop(tensor.chunk)
        self._gathered.give_way()

    def take_gradient(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        """A parameter's gradient of this backward pass is complete."""
        self.num_gradients += 1
        chunk = tensor.chunk
        if self.sums is not None:
            self.sums.add(tensor, gradient)
            return
        if not chunk.takes_slots or tensor.state is TensorState.READY_FOR_REDUCE:
            with self.device.bookkeeping():
                chunk.deliver(tensor, gradient)
        else:
            for holds in self._units.values():
                holds.soft.pop(tensor, None)
                holds.hard.pop(tensor, None)
            chunk.take_slot(tensor, gradient)
        if self.recorder.note_gradient(tensor):
            if chunk.droppable:
                self._gathered.drop(chunk)
            if all(t.state is not TensorState.READY_FOR_REDUCE for t in chunk.tensors):
                self.gradients_are_there(chunk)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _fetch(self, chunk: Chunk) -> None:
        if chunk.resident:
            return
        self.settle_idle_reads()
        self._gathered.fetch(chunk)

    def release_stale(self) -> None:
        """Before an update: gathered copies of trained chunks are about to be outdated."""
        self.settle_idle_reads()
        self._gathered.release_stale()

    def make_room_for_step(self) -> None:
        """Before an update on the device: everything gathered goes, so that its temporaries fit."""
        self._gathered.release_all()

    def drop_gradients(self) -> None:
        """All gradients are forgotten: their host memory goes, as with torch's ``zero_grad``.

        Pinned memory stays for the next step: to pin it anew would cost more than it holds.
        """
        for chunk in self.chunks:
            chunk.has_sums = False
        if not self.store.host.pinned_bytes:
            for chunk in self.chunks:
                chunk.forget_gradients()

    def settle_updates(self) -> None:
        """Waits for every update that runs beside the program."""
        for chunk in self.chunks:
            chunk.settle_update()

    def apply(self, plan: Plan) -> None:
        """Moves every chunk to where the plan wants it. Nothing may be running."""
        if self.phase is not Phase.IDLE:
            raise RuntimeError(f"a plan can only be applied between passes, not in {self.phase.name}")
        self.settle_idle_reads()
        self._end_all_backward()
        self._gathered.release_all()
        self._close_streamed()
        try:
            # What leaves the device goes first.
            for chunk in sorted(self.chunks, key=lambda c: c.growth_bytes(plan.placements[c.index])):
                chunk.place(plan.placements[chunk.index])
            if any(placement.streams_update for placement in plan.placements):
                self.streamed.open()
            self.plan = plan
        except Exception:
            self.plan = Plan(plan.policy, [chunk.placement for chunk in self.chunks])  # as far as it came
            raise
        finally:
            if self.plan is not None:
                self._gathered.follow(self.plan, self.trace)

    def _close_streamed(self) -> None:
        if self.streamed.is_open:
            self.settle_updates()
            self.streamed.close()

    # -- recording ---------------------------------------------------------------------------------------------------

    def begin_moment(self, label: str, phase: str) -> None:
        """A border of the pass: closes the running moment, opens the next, makes room for what it will need."""
        self._num_borders += 1
        if not self.records:
            self._gathered.give_way()
            return
        self.recorder.close()
        # Several forwards that go through a unit one after the other, without a backward, have one moment there.
        if not (self.only_infers and self.recorder.is_at(label, phase)):
            self.recorder.begin_moment(label, phase)
        self._gathered.give_way()
        for chunk in self._gathered:
            if chunk.in_use:
                self.recorder.note_read(chunk)
        self.recorder.note_gathered()
        self._gathered.prefetch()

    @property
    def pass_moments(self) -> list[Moment]:
        """Moments of the pass that runs now, the last one with its figures so far."""
        self.recorder.close()
        return list(self.recorder.moments)

    @property
    def counters(self) -> Counters:
        """Of the step that runs."""
        return self._gathered.counters

    def reset_counters(self) -> None:
        """Starts a new optimizer step's counts."""
        self._gathered.counters = Counters()
        self.transfer.reset_counters()

    def gathered_by_state(self) -> dict[str, int]:
        """Device bytes of gathered copies per tensor state."""
        return self._gathered.bytes_by_state()

    # -- integrity ---------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises RuntimeError if anything owned twice, lost or miscounted is found."""
        self.store.check_integrity()
        check_chunks(self.chunks)
        self._gathered.check_integrity()
        gathered_bytes = sum(chunk.gathered_bytes for chunk in self.chunks)
        counted_bytes = self.store.bytes_by[Tier.DEVICE, Kind.GATHERED]
        if gathered_bytes != counted_bytes:
            raise RuntimeError(f"gathered copies add up to {gathered_bytes} bytes, {counted_bytes} were counted")
        if self.phase is Phase.IDLE and any(chunk.in_use for chunk in self.chunks):
            raise RuntimeError("a tensor is in COMPUTE though nothing runs")
