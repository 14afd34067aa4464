"""The time model of one training step: what waits for what, and how long it takes.

The walk over a trace (:mod:`gemini.walk`) says which chunk is fetched, dropped or read at which moment; the schedule
says when that happens. A step begins with the update of the step before, as in a run that goes on and on:

- ``step()`` queues updates chunk by chunk, in forward order; what lies on the device is updated there at once.
- What is streamed to the device is updated chunk by chunk as well, one ahead of the one that is fetched. Its copies have
  their place among the others.
- A fetch waits for its chunk's update, and the program with it; then for the computation issued so far, whose memory it
  may take; then for the link.
- A moment's computation waits for the fetches of all that it reads.
- A gradient leaves when its moment has computed it. Only so many bytes may be on their way: beyond, the program waits.
- Where updates may begin inside backward, a chunk's does when its gradient has arrived, and keeps what it overwrites.
- What forward saves on the host leaves before a moment's computation, and comes back one moment ahead in backward.
- What is on disk is read before it is updated or fetched, a little ahead, and written back after its update.
- What other ranks own comes behind the fetch, beside the computation; sending them their gradients takes turns with it.
- When all have arrived the norm is known, and the next ``step()`` begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemini.clock import Booking, Clock
from gemini.device import Device
from gemini.plan import ChunkFacts
from gemini.profile import HardwareProfile
from gemini.segment import Placement
from gemini.trace import Moment, Trace, num_elements

_ADDED_BYTES_PER_NUMEL = 10
"""Host memory traffic of adding a bf16 gradient to an fp32 sum: read both, write one."""


@dataclass(frozen=True)
class Cost:
    """What one moment's computation takes.

    Attributes:
        duration_s: on the device.
        num_ops: operators that the program issues.
    """

    duration_s: float
    num_ops: int


def moment_costs(facts: list[ChunkFacts], trace: Trace, profile: HardwareProfile) -> list[Cost]:
    """What each moment of a trace costs, from its operators; where nobody counted them, from what it reads."""
    counted = {phase: any(m.num_ops for m in trace.moments if m.phase == phase) for phase in ("forward", "backward")}
    forward = {moment.label: moment for moment in trace.moments if moment.phase == "forward"}
    costs = []
    for moment in trace.moments:
        if counted.get(moment.phase, True):
            costs.append(_counted(moment, profile, 1))
        elif counted["forward"] and moment.label in forward:
            costs.append(_counted(forward[moment.label], profile, 2))  # gradients of both factors of each product
        else:
            costs.append(_from_reads(facts, trace, moment, profile))
    return costs


def _counted(moment: Moment, profile: HardwareProfile, times: int) -> Cost:
    duration_s = profile.compute_s(moment.flops, moment.fp32_flops, moment.traffic_bytes)
    return Cost(times * duration_s, times * moment.num_ops)


def _from_reads(facts: list[ChunkFacts], trace: Trace, moment: Moment, profile: HardwareProfile) -> Cost:
    num_tokens = max(map(num_elements, trace.batch_shapes), default=1)
    per_numel = 2 if moment.phase == "forward" else 4
    duration_s = 0.0
    for chunk in moment.reads:
        flops = float(per_numel * num_tokens * (facts[chunk].numel + facts[chunk].others_numel))
        duration_s += profile.compute_s(*((0.0, flops, 0) if facts[chunk].value_itemsize >= 4 else (flops, 0.0, 0)))
    return Cost(duration_s, 0)


@dataclass(frozen=True)
class Run:
    """What a step does beside its plan.

    Attributes:
        num_micro_batches: passes per step.
        most_bytes_on_way: gradients that may be on their way to the host at a time.
        in_one_pass: the micro-batches go through the model layer by layer, in one pass; sums leave, in fp32.
        early_bytes: of host memory for what updates inside backward overwrite; 0: there are none.
    """

    num_micro_batches: int = 1
    most_bytes_on_way: int = Device.most_bytes_on_way
    in_one_pass: bool = False
    early_bytes: int = 0

    @property
    def has_early_updates(self) -> bool:
        """Whether updates may begin inside backward: where each gradient is the only one of its step."""
        return self.early_bytes > 0 and self.num_micro_batches == 1 and not self.in_one_pass

    @property
    def num_passes(self) -> int:
        """Over the trace."""
        return 1 if self.in_one_pass else self.num_micro_batches


@dataclass(frozen=True)
class _OnWay:
    """A gradient that has left: when it arrives, and how many of its elements are added to what is there."""

    arrives_s: float
    num_bytes: int
    added_numel: int


class Schedule:
    """One step, from its ``step()`` call to the next.

    Args:
        facts: of all chunks.
        placements: by chunk index.
        costs: of each moment, from :func:`moment_costs`.
        profile: rates.
        run: what the step does.
        draws: keep what happened, for a picture.
        piece_numel: elements of a piece of an update that is streamed.

    Attributes:
        clock: how far it has come, and what happened when.
    """

    def __init__(
        self,
        facts: list[ChunkFacts],
        placements: list[Placement],
        costs: list[Cost],
        profile: HardwareProfile,
        run: Run,
        draws: bool = False,
        piece_numel: int = 0,
    ) -> None:
        self._facts = facts
        self._placements = placements
        self._costs = costs
        self._run = run
        self._draws = draws
        self.clock = Clock(profile, draws)
        self._piece_numel = piece_numel
        # Chunks whose updates are streamed and have not begun, in order.
        self._waiting: list[int] = []
        # By chunk: when its update is done, 0 where none is pending, infinite where it has not begun; when its values
        # are on the device.
        self._updated_s = [0.0] * len(facts)
        self._fetched_s = [0.0] * len(facts)
        # Gradients that have not been waited for, by chunk, oldest first.
        self._on_way: dict[int, _OnWay] = {}
        self._on_way_bytes = 0
        self._num_passes = 0
        # By chunk on disk: when values that are read ahead are there.
        self._read_s: dict[int, float] = {}
        # Chunks whose update was queued inside backward, and the room that is left for what such updates overwrite.
        self._early: dict[int, Booking] = {}
        self._early_bytes = run.early_bytes if run.has_early_updates else 0
        # What forward has saved on the host: bytes, and when they are there; on their way back, when the last ones are.
        self._saved: list[tuple[int, float]] = []
        self._brought_s: float | None = None

    # -- the update of the step before -------------------------------------------------------------------------------

    def begin(self) -> None:
        """``step()``: all gradients have arrived. Updates queued before that have not begun take their turn in order."""
        for chunk, booking in reversed(list(self._early.items())):
            if self.clock.withdraw(booking):
                del self._early[chunk]
        for fact, placement in zip(self._facts, self._placements, strict=True):
            if fact.companion_bytes_per_numel and fact.index not in self._early:
                self._update(fact, placement)
        self._early.clear()
        self._early_bytes = self._run.early_bytes if self._run.has_early_updates else 0
        self._num_passes = 0
        self._begin_streamed(1)

    def _update(self, fact: ChunkFacts, placement: Placement) -> None:
        clock, on_device = self.clock, placement.companion_numel
        label = self._label(fact.index)
        if placement.streams_update and not on_device:
            self._waiting.append(fact.index)
            self._updated_s[fact.index] = math.inf
            return
        if not on_device:
            self._updated_s[fact.index] = clock.update(fact.host_update(placement), label).stop_s
            return
        update_s = clock.profile.device_update_s(on_device, fact.device_update_cost)
        clock.compute(update_s, 1, f"update {label}" if label else "")
        if on_device < fact.numel:  # cut in two: the program carries out both parts
            clock.update_now(fact.host_update(placement), label)
        crossing_bytes = max(0, on_device - placement.resident_numel) * fact.value_itemsize
        if crossing_bytes:
            clock.wait(clock.copy_out(crossing_bytes, clock.compute_s, label), label)
        self._bring_values(fact, placement)

    def _begin_streamed(self, number: int) -> None:
        """So many of the updates that are streamed begin, as :class:`gemini.streamed.StreamedUpdates` has it."""
        for chunk in self._waiting[:number]:
            self._updated_s[chunk] = self._stream(self._facts[chunk])
        del self._waiting[:number]

    def _stream(self, fact: ChunkFacts) -> float:
        """Queues a chunk's way to the device and back; returns when it has come back."""
        clock, profile, label = self.clock, self.clock.profile, self._label(fact.index)
        in_bytes, out_bytes = (int(n * fact.numel * profile.streamed_slowdown) for n in fact.streamed_bytes_per_numel)
        num_pieces = max(1, -(-fact.numel // max(1, self._piece_numel)))
        update_s = profile.device_update_s(fact.numel)
        there_s = clock.copy_in(in_bytes, 0.0, label)
        clock.compute(update_s, num_pieces, f"update {label}" if label else "")
        # The first piece goes back while the second comes.
        first_s = there_s - (1 - 1 / num_pieces) * in_bytes / profile.h2d_bytes_per_s + update_s / num_pieces
        back_s = clock.copy_out(out_bytes, first_s, label)
        return max(back_s, there_s + (update_s + out_bytes / profile.d2h_bytes_per_s) / num_pieces)

    def _bring_values(self, fact: ChunkFacts, placement: Placement) -> None:
        """New values, made on the host, to where they stay on the device; the program waits."""
        crossing_bytes = max(0, placement.resident_numel - placement.companion_numel) * fact.value_itemsize
        if crossing_bytes:
            label = self._label(fact.index)
            self.clock.wait(self.clock.copy_in(crossing_bytes, self.clock.compute_s, label), label)

    # -- a pass ------------------------------------------------------------------------------------------------------

    def must_wait(self, chunk: int) -> bool:
        """Whether a fetch of the chunk would wait for its update now; only where this process owns all of it."""
        return self._updated_s[chunk] > self.clock.host_s and not self._facts[chunk].others_numel

    def fetch(self, chunk: int) -> None:
        """The program queues a chunk's values."""
        self._settle(chunk)
        fact, clock = self._facts[chunk], self.clock
        num_bytes = (fact.numel - self._placements[chunk].resident_numel) * fact.value_itemsize
        if fact.values_on_disk and num_bytes:
            self.read_ahead(chunk)
            clock.wait(self._read_s.pop(chunk), self._label(chunk))
        there_s = clock.copy_in(num_bytes, clock.compute_s, self._label(chunk))
        if fact.others_numel:
            there_s = clock.exchange_beside(fact.others_numel * fact.value_itemsize, there_s, self._label(chunk))
        self._fetched_s[chunk] = there_s

    def read_ahead(self, chunk: int) -> None:
        """The disk begins to read a chunk's values, unless an update is about to write them."""
        fact = self._facts[chunk]
        num_bytes = (fact.numel - self._placements[chunk].resident_numel) * fact.value_itemsize
        if fact.values_on_disk and num_bytes and chunk not in self._read_s and not self._updated_s[chunk]:
            self._read_s[chunk] = self.clock.read_disk(num_bytes, self.clock.host_s, self._label(chunk))

    def _settle(self, chunk: int) -> None:
        """The program waits for a chunk's update, and for gradients of an earlier micro-batch that are on their way."""
        if chunk in self._on_way:
            self._settle_arrival(chunk)
        if self._placements[chunk].streams_update and self._updated_s[chunk]:
            self._begin_streamed(self._waiting.index(chunk) + 2 if chunk in self._waiting else 1)
        updated_s, self._updated_s[chunk] = self._updated_s[chunk], 0.0
        if updated_s:
            self.clock.wait(updated_s, self._label(chunk))
        if updated_s and not self._placements[chunk].streams_update:
            self._bring_values(self._facts[chunk], self._placements[chunk])

    def compute(self, position: int, moment: Moment) -> None:
        """A moment's computation, its chunks having been fetched."""
        clock = self.clock
        for chunk in moment.reads:
            if self._updated_s[chunk]:  # values that stay on the device
                self._settle(chunk)
            clock.compute_waits(self._fetched_s[chunk])
        if moment.saved_bytes:
            self._save(moment)
        elif moment.brought_bytes:
            self._bring_back(moment)
        cost = self._costs[position]
        clock.compute(cost.duration_s, cost.num_ops, f"{moment.phase} {moment.label}" if self._draws else "")
        if moment.saved_bytes and moment.brought_bytes:  # the last of forward, in which backward begins
            self._bring_back(moment)

    def _save(self, moment: Moment) -> None:
        """Before what is saved next leaves, the program waits for what was saved last."""
        if self._saved:
            self.clock.wait(self._saved[-1][1], "activations")
        gone_s = self.clock.copy_out(moment.saved_bytes, self.clock.compute_s, "activations")
        self._saved.append((moment.saved_bytes, gone_s))

    def _bring_back(self, moment: Moment) -> None:
        """What the moment needs, if it is not on its way yet; then what the next one will."""
        if self._brought_s is None:
            self._brought_s = self._bring_last(moment.saved_bytes)
        self.clock.compute_waits(self._brought_s)
        self._brought_s = self._bring_last(0) if self._saved else None

    def _bring_last(self, num_bytes: int) -> float:
        gone_s = 0.0
        if self._saved:
            num_bytes, gone_s = self._saved.pop()
        self.clock.wait(gone_s, "activations")
        return self.clock.copy_in(num_bytes, self.clock.compute_s, "activations")

    def send(self, moment: Moment) -> None:
        """The gradients that a moment has completed leave."""
        for chunk in moment.gradients:
            fact = self._facts[chunk]
            numel = fact.numel - self._placements[chunk].companion_numel
            if fact.others_numel and fact.companion_bytes_per_numel:
                num_sent = (fact.others_numel // max(1, fact.numel)) * fact.numel
                self.clock.exchange(num_sent * fact.value_itemsize, self._label(chunk))
            if not fact.companion_bytes_per_numel or not numel:
                continue
            in_fp32 = self._run.in_one_pass or fact.others_numel
            num_bytes = numel * (4 if in_fp32 else fact.value_itemsize)
            arrives_s = self.clock.copy_out(num_bytes, self.clock.compute_s, self._label(chunk))
            if chunk in self._on_way:
                self._settle_arrival(chunk)
            self._on_way[chunk] = _OnWay(arrives_s, num_bytes, numel if self._num_passes else 0)
            self._on_way_bytes += num_bytes
            if fact.others_numel:  # what it comes from is the exchange's, and goes
                self._settle_arrival(chunk)
            while self._on_way_bytes > self._run.most_bytes_on_way:
                self._settle_arrival(next(iter(self._on_way)))
            placement = self._placements[chunk]
            if self._early_bytes and not placement.companion_numel and not placement.streams_update:
                self._update_early(fact, arrives_s)

    def _update_early(self, fact: ChunkFacts, arrives_s: float) -> None:
        placement = self._placements[fact.index]
        kept_bytes = fact.overwritten_bytes(placement)
        if kept_bytes <= self._early_bytes and fact.index not in self._early:
            self._early_bytes -= kept_bytes
            update = fact.host_update(placement, early=True)
            self._early[fact.index] = self.clock.update(update, self._label(fact.index), arrives_s)
            self._updated_s[fact.index] = self._early[fact.index].stop_s

    def _settle_arrival(self, chunk: int) -> None:
        arrival = self._on_way.pop(chunk)
        self._on_way_bytes -= arrival.num_bytes
        label = self._label(chunk)
        self.clock.wait(arrival.arrives_s, label)
        if arrival.added_numel:
            self.clock.touch_host_memory(arrival.added_numel * _ADDED_BYTES_PER_NUMEL, label)

    def end_pass(self) -> None:
        """Backward is over."""
        self._num_passes += 1
        self._saved.clear()
        self._brought_s = None

    def end(self) -> None:
        """The program waits for all gradients and for their norm."""
        while self._on_way:
            self._settle_arrival(next(iter(self._on_way)))
        self.clock.wait(self.clock.compute_s, "norm")
        if self._run.num_micro_batches > 1:  # the norm of sums, which lie on the host
            num_bytes = sum(
                (f.numel - p.companion_numel) * f.gradient_itemsize
                for f, p in zip(self._facts, self._placements, strict=True)
            )
            self.clock.touch_host_memory(num_bytes, "norm")
        self.clock.write_disk()

    def _label(self, chunk: int) -> str:
        return f"{self._facts[chunk].unit_name} #{chunk}" if self._draws else ""
