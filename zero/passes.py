"""Before each pass: does the plan still hold, or must it be made anew?"""

from __future__ import annotations

import copy
import logging

from gemini.device import Device
from gemini.manager import Manager, Phase
from gemini.plan import ChunkFacts, DoesNotFitError, Plan, offload_all
from gemini.policy import Policy
from gemini.trace import Trace

logger = logging.getLogger("zero")

_SLACK = 256
"""What users hold on to from step to step is rounded up to one part in so many of the capacity: no new plan for each
byte."""


class PassPlanner:
    """Replaces the manager's plan when something was learnt, or when a pass begins that the plan was not made for.

    Args:
        policy: decides from a trace.
        facts: of all chunks.
        manager: carries plans out.
        device: whose capacity counts.

    Attributes:
        needs_plan: the next training pass makes a new plan first.
    """

    def __init__(self, policy: Policy, facts: list[ChunkFacts], manager: Manager, device: Device) -> None:
        self._policy = policy
        self._facts = facts
        self._manager = manager
        self._device = device
        self.needs_plan = False
        # Views of values are in the user's hands: nothing may move.
        self._fixed = False
        # Non-model bytes that lie on the device when a pass begins: the user holds the last loss, outputs, batches.
        self._held_bytes = 0
        self._traced_held_bytes = 0
        self._planned_held_bytes = 0

    def pass_begins(self, training: bool, batch_shape: tuple[int, ...], pending: bool) -> None:
        """A forward pass is about to run.

        Args:
            training: gradients will be asked for.
            batch_shape: of its largest input tensor.
            pending: an earlier forward waits for its backward. What its modules saved comes back wherever the chunks are
                by then; of what the user's own code holds there may be views.
        """
        self._fixed = pending and bool(self._manager.read_by_user)
        self._held_bytes = self._device.memory().non_model_bytes
        if not self._fixed:
            if self._manager.phase is not Phase.IDLE:
                self._manager.abort_pass()  # a forward that nobody has taken backward yet
            self._prepare(training, batch_shape)
        self._manager.begin_pass(training, batch_shape, pending)

    def _prepare(self, training: bool, batch_shape: tuple[int, ...]) -> None:
        trace = self._manager.trace
        if trace is not None and not trace.covers(batch_shape):
            self.offload_everything()  # nobody knows what this larger batch needs: warm up again
        elif training and (self.needs_plan or self._held_bytes > self._planned_held_bytes):
            self._replan()

    def backward_ends(self) -> None:
        """A training pass was recorded whole."""
        if self._manager.trace is None:
            self._traced_held_bytes = self._held_bytes
        self.needs_plan |= self._manager.end_backward()
        self._traced_held_bytes = max(self._traced_held_bytes, self._held_bytes)

    def _replan(self) -> None:
        self.needs_plan = False
        trace = self._manager.trace
        if trace is None:
            return
        more_bytes = max(0, self._held_bytes - self._traced_held_bytes)
        if more_bytes:
            more_bytes += self._device.capacity_bytes // _SLACK
        self._planned_held_bytes = self._traced_held_bytes + more_bytes
        try:
            plan = self._policy.decide(self._facts, _with_more(trace, more_bytes), self._device.capacity_bytes)
        except DoesNotFitError as error:
            # The pass that was traced did run, so this is a prediction on the safe side: go on as it ran.
            logger.debug("no plan from the trace: %s", error)
            plan = self._as_it_ran()
        self._manager.apply(plan)

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
        if not self.may_offload or self._fixed or plan is None:
            return False
        if not plan.reserve_bytes and not any(p.resident_numel or p.companion_numel for p in plan.placements):
            return False
        self._manager.apply(offload_all("auto", self._facts))
        return True


def _with_more(trace: Trace, num_bytes: int) -> Trace:
    """The trace as if every moment had held so many more non-model bytes."""
    raised = copy.deepcopy(trace)
    for moment in raised.moments:
        moment.raise_non_model(moment.non_model_peak_bytes + num_bytes)
    return raised
