"""Before each pass: does the plan still hold, or must it be made anew?"""

from __future__ import annotations

import copy
import logging
import zlib
from typing import TYPE_CHECKING, Any

import torch

from gemini.device import Device
from gemini.manager import Manager, Phase
from gemini.plan import ChunkFacts, DoesNotFitError, Plan, offload_all
from gemini.policy import Policy, does_not_fit
from gemini.segment import Placement
from gemini.timeline import transient_bytes
from gemini.trace import Trace
from gemini.units import format_bytes

if TYPE_CHECKING:
    from zero.dryrun import InferenceNeeds

logger = logging.getLogger("zero")

_SLACK = 256
"""What users hold on to from step to step is rounded up to one part in so many of the capacity: no new plan for each
byte."""
_GROWTH = 4
"""Of what is held between passes without gradients, one part in so many more is planned for: they come by the hundred."""
_OTHERS_SLACK = 64
"""Likewise what other processes take."""


class PassPlanner:
    """Replaces the manager's plan when something was learnt, or when a pass begins that the plan was not made for.

    Args:
        policy: decides from a trace.
        facts: of all chunks.
        manager: carries plans out.
        device: whose capacity counts.

    Attributes:
        needs_plan: the next training pass makes a new plan first.
        has_news: what other ranks' plans should be made from, too, has changed since they were told.
        step_bytes: temporaries of an update on the device, as far as they are known beforehand.
        streamed_piece_numel: see :attr:`gemini.trace.Trace.streamed_piece_numel`.
        room_bytes: that the program will hold on the device between passes, at the highest, as far as it has said: the
            keys and values of generation.
        light: the pass that plans are to be fast for where no pass has a backward: of one token for each row, since those
            are nearly all. Its memory does not count.
    """

    def __init__(self, policy: Policy, facts: list[ChunkFacts], manager: Manager, device: Device) -> None:
        self._policy = policy
        self._facts = facts
        self._manager = manager
        self._device = device
        self.needs_plan = self.has_news = False
        self.step_bytes = 0
        self.streamed_piece_numel = 0
        self.room_bytes = 0
        self.light: Trace | None = None
        # Non-model bytes that lie on the device when a pass begins: the user holds the last loss, outputs, batches.
        self._held_bytes = 0
        self._traced_held_bytes = 0
        self._planned_held_bytes = 0
        # A pass ran out of memory: the next one begins with nothing on the device, and plans leave more room.
        self._ran_out = False
        self._was_planned = False
        self._margin_bytes = 0
        self._planned_margin_bytes = 0
        # Of the device, what other processes have taken: as far as this rank has seen, and on the rank with the most.
        self._seen_taken_bytes = 0
        self._taken_bytes = 0

    def pass_begins(self, training: bool, batch_shape: tuple[int, ...], pending: bool) -> None:
        """A forward pass is about to run.

        Args:
            training: gradients will be asked for.
            batch_shape: of its largest input tensor.
            pending: an earlier forward waits for its backward. What it saved comes back wherever the chunks are by then.
        """
        self._held_bytes = self._device.memory().non_model_bytes
        if self._manager.phase is not Phase.IDLE:
            self._manager.abort_pass()  # a forward that nobody has taken backward yet
        planned = training or self._manager.only_infers
        if planned:
            self._look_for_others()
        self._prepare(planned, batch_shape, pending)
        self._manager.begin_pass(training, batch_shape, pending, self.room_bytes)

    def _look_for_others(self) -> None:
        """Whether other processes have taken, or given back, so much of the device that another plan is needed."""
        slack_bytes = self._device.capacity_bytes // _OTHERS_SLACK
        taken_bytes = self._device.taken_bytes()
        if taken_bytes > self._seen_taken_bytes or taken_bytes + 2 * slack_bytes < self._seen_taken_bytes:
            # With some to spare, so that not every megabyte asks for a new plan.
            self._seen_taken_bytes = self._taken_bytes = taken_bytes + slack_bytes if taken_bytes else 0
            self.needs_plan |= self._manager.trace is not None
            self.has_news = True

    def _prepare(self, planned: bool, batch_shape: tuple[int, ...], pending: bool) -> None:
        trace = self._manager.trace
        if trace is None:
            return
        if not trace.covers(batch_shape) or self._ran_out or (pending and self._crowded(trace, planned)):
            self._ran_out = False
            self.offload_everything()  # nobody knows what this pass needs: warm up again
        elif planned and (self.needs_plan or self._held_bytes > self._planned_held_bytes):
            self._replan()

    def _crowded(self, trace: Trace, training: bool) -> bool:
        """Whether a pass beside the graph of another might not fit beside what the plan keeps on the device."""
        nothing_stays = [Placement() for _ in self._facts]
        needed_bytes = self._held_bytes + transient_bytes(self._facts, nothing_stays, trace, with_margin=True)
        if training:  # one backward through both graphs keeps a gradient until the other graph has added to it
            needed_bytes += sum(fact.gathered_bytes for fact in self._facts if fact.companion_bytes_per_numel)
        return self._device.model_data_bytes + needed_bytes > self._device.capacity_bytes

    def expect(self, found: InferenceNeeds, room_bytes: int, plan: Plan) -> None:
        """Before the first pass everything goes where it will be.

        Args:
            found: by a dry run of the largest passes there will be.
            room_bytes: see :attr:`room_bytes`.
            plan: made for :func:`expected_trace` of the two.
        """
        self._manager.trace, self.light = found.trace, found.light
        self.room_bytes = self._planned_held_bytes = room_bytes
        self.needs_plan, self._was_planned = False, True
        self._manager.apply(plan)

    def leave_room(self, num_bytes: int) -> None:
        """From the next pass on plans are made for another :attr:`room_bytes`."""
        self.room_bytes = num_bytes
        self.needs_plan |= self._manager.trace is not None

    def ran_out(self) -> None:
        """A pass ran out of memory, or broke off in backward for a reason that nobody told us."""
        self._ran_out = True
        least_bytes, most_bytes = self._device.capacity_bytes // 64, self._device.capacity_bytes // 2
        self._margin_bytes = min(most_bytes, max(least_bytes, 2 * self._margin_bytes))

    def make_way(self, num_bytes: int) -> None:
        """Between forward and backward ``num_bytes`` will be used that no trace knows of: this plan, or the next, has room.

        What a forward has saved comes back wherever the chunks are by then, so everything may go at once.
        """
        plan = self._manager.plan
        if plan is None or not plan.reserve_bytes or num_bytes <= self._planned_margin_bytes:
            return
        self._margin_bytes = max(self._margin_bytes, num_bytes)
        self._manager.abort_pass()
        self.offload_everything()

    def forward_ends(self) -> None:
        """The outermost module has returned."""
        self.needs_plan |= self._manager.end_forward_pass()

    def backward_ends(self) -> None:
        """A training pass was recorded whole."""
        if self._manager.trace is None:
            self._traced_held_bytes = self._held_bytes
        self.needs_plan |= self._manager.end_backward()
        if self._manager.trace is not None:
            self._manager.trace.step_peak_bytes = max(self._manager.trace.step_peak_bytes, self.step_bytes)
            self._manager.trace.streamed_piece_numel = self.streamed_piece_numel
        self._traced_held_bytes = max(self._traced_held_bytes, self._held_bytes)

    def refusal(self, error: torch.OutOfMemoryError, trace: Trace | None) -> Exception:
        """An out-of-memory error of a pass as a table of who needs what.

        Args:
            error: of the device.
            trace: of such a pass, if a dry run could tell; else as far as the pass came.
        """
        trace = trace or Trace(moments=self._manager.pass_moments)
        if not trace.moments or self._manager.plan is None:
            return error
        refused = does_not_fit(self._facts, self._manager.plan, trace, self._device.capacity_bytes)
        refused.__notes__ = [str(error)]
        return refused

    # -- with other ranks --------------------------------------------------------------------------------------------

    @property
    def plan_number(self) -> int:
        """A number that differs, as a rule, where plans do."""
        plan = self._manager.plan
        return 0 if plan is None else zlib.crc32(repr((plan.placements, plan.reserve_bytes)).encode())

    def basis(self) -> dict[str, Any] | None:
        """What the next plan will be made from, as JSON; None before a trace exists."""
        trace = self._manager.trace
        if trace is None:
            return None
        return {
            "trace": trace.to_json(),
            "held_bytes": max(self._held_bytes, self._traced_held_bytes),
            "margin_bytes": self._margin_bytes,
            "taken_bytes": self._seen_taken_bytes,
        }

    def adopt(self, bases: list[dict[str, Any]]) -> None:
        """Plans anew, from what all ranks have seen: the highest of each figure, so that all make the same plan."""
        traces = [Trace.from_json(basis["trace"]) for basis in bases]
        for trace in traces[1:]:
            traces[0].absorb(trace)
        self._manager.trace = traces[0]
        self._traced_held_bytes = max(basis["held_bytes"] for basis in bases)
        self._margin_bytes = max(basis["margin_bytes"] for basis in bases)
        self._taken_bytes = max(basis["taken_bytes"] for basis in bases)
        self.needs_plan, self.has_news = True, False

    def _replan(self) -> None:
        self.needs_plan = False
        trace = self._manager.trace
        if trace is None:
            return
        more_bytes = self._more_bytes()
        margin_bytes = more_bytes + self._margin_bytes
        self._planned_margin_bytes = self._margin_bytes
        self._planned_held_bytes = self._traced_held_bytes + more_bytes
        left_bytes = self._device.capacity_bytes - self._taken_bytes
        if self._manager.only_infers:
            trace = trace.with_work_of(self.light)
        try:
            plan = self._policy.decide(self._facts, _with_more(trace, margin_bytes), left_bytes)
            plan.spared_bytes += self._taken_bytes
        except DoesNotFitError as error:
            # The pass that was traced did run, so this is a prediction on the safe side: go on as it ran.
            logger.debug("no plan from the trace: %s", error)
            plan = self._as_it_ran()
        if self._was_planned:
            needed_bytes = max((moment.both_peak_bytes for moment in trace.moments), default=0)
            taken = format_bytes(self._taken_bytes)
            logger.info(
                "a pass needed more than those before it (now %s at the highest, beside what stays)%s: planned anew",
                format_bytes(needed_bytes),
                f", or others have taken device memory ({taken})" if self._taken_bytes else "",
            )
        self._was_planned = True
        self._manager.apply(plan)

    def _more_bytes(self) -> int:
        """That will be held beside what the trace has."""
        if self._held_bytes <= self.room_bytes:
            return self.room_bytes
        more_bytes = max(0, self._held_bytes - self._traced_held_bytes)
        if more_bytes:
            more_bytes += self._device.capacity_bytes // _SLACK
        if self._manager.only_infers:  # keys and values grow with every pass
            more_bytes += more_bytes // _GROWTH
        return more_bytes

    def _as_it_ran(self) -> Plan:
        """The plan that needs least; of a policy with fixed placements the one there is, without reserves."""
        present = self._manager.plan
        if self.may_offload or present is None:
            return offload_all(self._policy.name, self._facts)
        return Plan(present.policy, present.placements)

    @property
    def may_offload(self) -> bool:
        """Whether the policy may take everything off the device."""
        return self._policy.name == "auto"

    def offload_everything(self) -> bool:
        """Takes all model data off the device and releases chunks as soon as they are read, if the policy may.

        Returns:
            Whether anything has changed, so that a pass that ran out of memory is worth another try.
        """
        self.needs_plan = True
        plan = self._manager.plan
        if not self.may_offload or plan is None:
            return False
        if not plan.reserve_bytes and all(placement == Placement() for placement in plan.placements):
            return False
        self._manager.apply(offload_all("auto", self._facts))
        return True


def expected_trace(found: InferenceNeeds, room_bytes: int) -> Trace:
    """What a plan is made from before the first pass: the memory of the largest, the work of the most frequent.

    Args:
        found: by a dry run of the largest passes there will be.
        room_bytes: that are held beside them.
    """
    return _with_more(found.trace, room_bytes).with_work_of(found.light)


def _with_more(trace: Trace, num_bytes: int) -> Trace:
    """The trace as if every moment had held so many more non-model bytes."""
    raised = copy.deepcopy(trace)
    for moment in raised.moments:
        moment.raise_non_model(moment.non_model_peak_bytes + num_bytes)
    return raised
