"""Finds the placement that ``auto`` takes: the fastest predicted of those that fit.

The space is that of every policy: how many leading elements keep their values on the device, and how many keep their
companions there. Early layers first: last in backward and first in forward, their update is the hardest to hide.
Layouts are nearly homogeneous, so few points tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from gemini.plan import ChunkFacts, offload_all, persistent_bytes
from gemini.segment import Placement
from gemini.timeline import HardwareProfile, Prediction, replay, transient_bytes, used_in_place
from gemini.trace import NextUse, Trace

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Fractions of ``static`` that are always among the points tried."""
_MOST_COUNTS = 40


def fill(facts: list[ChunkFacts], fraction: float, bytes_per_numel: Callable[[ChunkFacts], int]) -> list[int]:
    """Leading elements per chunk so that their bytes are ``fraction`` of all, exact to one element."""
    per_numel = [bytes_per_numel(fact) for fact in facts]
    left_bytes = round(fraction * sum(f.numel * b for f, b in zip(facts, per_numel, strict=True)))
    counts = []
    for fact, itemsize in zip(facts, per_numel, strict=True):
        count = min(fact.numel, left_bytes // itemsize) if itemsize else 0
        counts.append(count)
        # Less than one element is left over only where a chunk was cut: nothing goes into those after it.
        left_bytes = left_bytes - count * itemsize if count == fact.numel or not itemsize else 0
    return counts


def static_placements(facts: list[ChunkFacts], parameters: float, optimizer: float) -> list[Placement]:
    """What ``static`` places for two fractions."""
    resident = fill(facts, parameters, lambda fact: fact.value_itemsize)
    companions = fill(facts, optimizer, lambda fact: fact.companion_bytes_per_numel)
    return [Placement(r, c) for r, c in zip(resident, companions, strict=True)]


class Search:
    """One search.

    Args:
        facts: of all chunks.
        trace: of a pass.
        capacity_bytes: of the device.
        profile: rates.
        prefetch_depth: of the plan.
    """

    def __init__(
        self,
        facts: list[ChunkFacts],
        trace: Trace,
        capacity_bytes: int,
        profile: HardwareProfile,
        prefetch_depth: int = 0,
    ) -> None:
        self._facts = facts
        self._trace = trace
        self._capacity_bytes = capacity_bytes
        self._profile = profile
        self._depth = prefetch_depth
        self._next_use = NextUse(trace)
        # Elements before each chunk: of all chunks, and of those that have companions.
        trained = [fact.numel if fact.companion_bytes_per_numel else 0 for fact in facts]
        self._all_before = [0, *accumulate(fact.numel for fact in facts)]
        self._trained_before = [0, *accumulate(trained)]
        self._tried: set[tuple[Placement, ...]] = set()
        self._transient: dict[tuple[bool, ...], int] = {}
        self.placements = offload_all("auto", facts).placements
        self.prediction = self._predict(self.placements)

    def run(self) -> None:
        """Leaves the best found in ``placements`` and ``prediction``."""
        if not self.prediction.fits:
            return
        for parameters in FRACTIONS:
            for optimizer in FRACTIONS:
                self._try(static_placements(self._facts, parameters, optimizer))
        for companion_numel in _some(self._trained_before):
            for resident_numel in self._resident_counts(companion_numel):
                self._try(self._leading(resident_numel, companion_numel))
        for resident_numel in _some(self._all_before):
            self._try(self._leading(resident_numel, self._most_companions(resident_numel, 0)))
        self._refine()

    def _predict(self, placements: list[Placement]) -> Prediction:
        return replay(
            self._facts, placements, self._trace, self._capacity_bytes, self._profile, self._next_use, self._depth
        )

    def _fits(self, placements: list[Placement]) -> bool:
        # What stays is put there of our own accord: it must not be what a slightly larger pass then lacks.
        pairs = zip(self._facts, placements, strict=True)
        key = (*(used_in_place(f, p) for f, p in pairs), any(p.companion_numel for p in placements))
        if key not in self._transient:
            self._transient[key] = transient_bytes(self._facts, placements, self._trace, with_margin=True)
        return sum(persistent_bytes(self._facts, placements)) + self._transient[key] <= self._capacity_bytes

    def _try(self, placements: list[Placement]) -> None:
        key = tuple(placements)
        if key in self._tried or not self._fits(placements):
            return
        self._tried.add(key)
        prediction = self._predict(placements)
        if prediction.step_s < self.prediction.step_s:
            self.placements, self.prediction = placements, prediction

    def _leading(self, resident_numel: int, companion_numel: int) -> list[Placement]:
        """So many leading elements of all chunks resident, of the trained ones with companions."""
        placements = []
        for index, fact in enumerate(self._facts):
            resident = min(fact.numel, max(0, resident_numel - self._all_before[index]))
            companions = min(fact.numel, max(0, companion_numel - self._trained_before[index]))
            placements.append(Placement(resident, companions if fact.companion_bytes_per_numel else 0))
        return placements

    def _resident_counts(self, companion_numel: int) -> Iterator[int]:
        """Numbers of resident elements worth trying beside these companions: the most that fits, and less."""
        borders = self._all_before
        # In fp32 values beside their companions are free: the master is there anyway. So what fits need not fit with
        # fewer residents, and the borders from the companions on are searched first.
        level = next((i for i, before in enumerate(self._trained_before) if before >= companion_numel), 0)
        for low, high in ((level, len(borders) - 1), (0, level - 1)):
            most = self._last_that_fits(low, high, lambda i: self._leading(borders[i], companion_numel))
            if most >= low:
                yield borders[most]
                yield borders[most // 2]
                yield self._into_next_chunk(borders[most], companion_numel)
                return

    def _into_next_chunk(self, resident_numel: int, companion_numel: int) -> int:
        """As many elements more as fit without the next chunk being resident as a whole."""
        end = next((before for before in self._all_before if before > resident_numel), resident_numel)
        most = self._last_that_fits(resident_numel, end - 1, lambda numel: self._leading(numel, companion_numel))
        return max(resident_numel, most)

    def _refine(self) -> None:
        """Moves each border of the best point as far as it fits, element by element."""
        for _ in range(2):
            resident_numel = sum(placement.resident_numel for placement in self.placements)
            companion_numel = sum(placement.companion_numel for placement in self.placements)
            most = max(companion_numel, self._most_companions(resident_numel, companion_numel))
            self._try(self._leading(resident_numel, most))
            for numel in self._resident_counts(most):
                self._try(self._leading(numel, most))

    def _most_companions(self, resident_numel: int, low: int) -> int:
        high = self._trained_before[-1]
        return self._last_that_fits(low, high, lambda numel: self._leading(resident_numel, numel))

    def _last_that_fits(self, low: int, high: int, placements_at: Callable[[int], list[Placement]]) -> int:
        """The largest number between ``low`` and ``high`` that fits; ``low - 1`` if none does."""
        if high < low or not self._fits(placements_at(low)):
            return low - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(placements_at(middle)):
                low = middle
            else:
                high = middle - 1
        return low


def _some(borders: list[int]) -> list[int]:
    """At most about 40 of the borders between chunks, the first and the last among them."""
    different = sorted(set(borders))
    return sorted({*different[:: max(1, len(different) // _MOST_COUNTS)], different[-1]})
