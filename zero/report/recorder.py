"""Turns the moments of one step into the samples of the memory map."""

from __future__ import annotations

from gemini.manager import Manager, MomentListener
from gemini.store import Tier
from gemini.trace import Moment
from zero.report.memory_map import PASSED_KIND, MemorySample


class StepRecorder(MomentListener):
    """Records device and host bytes of each moment of a micro-batch: what is there at its end, up to the highest sum.

    Attributes:
        samples: of the last recorded pass.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self.samples: list[MemorySample] = []

    def start(self) -> None:
        """Records from now on, forgetting what was."""
        self.samples = []
        self._manager.listener = self

    def stop(self) -> None:
        """Records no more."""
        self._manager.listener = None

    def moment_ended(self, moment: Moment) -> None:
        """Takes a sample: what is there now, non-model bytes at their highest, and what of the peak is gone again."""
        memory = self._manager.device.memory()
        beside_bytes = memory.peak_bytes - self._manager.store.tier_bytes(Tier.DEVICE)
        highest_bytes = max(memory.non_model_bytes, min(moment.non_model_peak_bytes, beside_bytes))
        self._sample(moment.label, moment.phase, highest_bytes, max(0, beside_bytes - highest_bytes))

    def step_ended(self) -> None:
        """Takes a sample of what stays between steps."""
        self._sample("update", "step", self._manager.device.memory().non_model_bytes)

    def _sample(self, label: str, phase: str, non_model_bytes: int, passed_bytes: int = 0) -> None:
        store = self._manager.store
        device = {kind: count for kind, count in store.kinds(Tier.DEVICE).items() if kind != "gathered"}
        for state, count in self._manager.gathered_by_state().items():
            device[state] = device.get(state, 0) + count
        if passed_bytes:
            device[PASSED_KIND] = passed_bytes
        self.samples.append(
            MemorySample(len(self.samples), label, phase, device, non_model_bytes, store.kinds(Tier.HOST))
        )
