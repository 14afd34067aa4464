"""Finds the placement that ``auto`` takes: the fastest predicted of those that fit.

The space is that of every policy: how many leading elements keep their values on the device, and how many keep their
companions there. Early layers first: last in backward and first in forward, their update is the hardest to hide.
Layouts are nearly homogeneous, so few points tell.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from gemini.plan import ChunkFacts, offload_all, persistent_bytes
from gemini.profile import HardwareProfile
from gemini.schedule import Run
from gemini.segment import Placement
from gemini.timeline import Prediction, Replay, required_bytes, transient_bytes, used_in_place
from gemini.trace import Trace

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Fractions of ``static`` that are always among the points tried."""
_ENOUGH_COUNTS = 40
"""Borders between chunks that are tried in each direction, where there are as many; fewer than twice as many."""
DEPTHS = (0, 1, 2, 3, 4)
"""Moments ahead of which chunks are fetched, as far as they are tried."""
_FEW = 400
_MOST_FINALISTS = 6
_STRIDES = (8, 32, 128, 512)
"""Of the climb, as parts of what fits."""
_WORTH = 0.999
_BELOW = 1 - 1e-9
"""A bound that adds up in another order than the clock may be off by the last digits."""


def fill(facts: list[ChunkFacts], fraction: float, bytes_per_numel: Callable[[ChunkFacts], float]) -> list[int]:
    """Leading elements per chunk so that their bytes are ``fraction`` of all, exact to one place to cut."""
    per_numel = [bytes_per_numel(fact) for fact in facts]
    left_bytes = round(fraction * sum(f.numel * b for f, b in zip(facts, per_numel, strict=True)))
    counts = []
    for fact, itemsize in zip(facts, per_numel, strict=True):
        count = min(fact.numel, int(left_bytes // itemsize)) if itemsize else 0
        count -= 0 if count == fact.numel else count % fact.block_numel
        counts.append(count)
        # Less than one element is left over only where a chunk was cut: nothing goes into those after it.
        left_bytes = left_bytes - int(count * itemsize) if count == fact.numel or not itemsize else 0
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
        run: what a step does.
        depth: of prefetching; None: whatever is fastest.

    Attributes:
        placements: the best found.
        depth: of prefetching with them.
        step_s: with the two.
    """

    def __init__(
        self,
        facts: list[ChunkFacts],
        trace: Trace,
        capacity_bytes: int,
        profile: HardwareProfile,
        run: Run | None = None,
        depth: int | None = None,
    ) -> None:
        self._facts = facts
        self._trace = trace
        self._capacity_bytes = capacity_bytes
        self._profile = profile
        self._replay = Replay(facts, trace, capacity_bytes, profile, run)
        self._depths = DEPTHS if depth is None else (depth,)
        # What one depth is best for need not be best for another; where that takes no time, all are tried for all.
        self._tries_all_depths = len(facts) * len(trace.moments) <= _FEW
        # Elements before each chunk: of all chunks, and of those that have companions.
        trained = [fact.numel if fact.companion_bytes_per_numel else 0 for fact in facts]
        self._all_before = [0, *accumulate(fact.numel for fact in facts)]
        self._trained_before = [0, *accumulate(trained)]
        self._bytes = LeadingBytes(facts)
        self._cuts_anywhere = all(fact.block_numel == 1 for fact in facts)
        self._whole = {
            (stays, updates): [
                Placement(f.numel * stays, numel * updates) for f, numel in zip(facts, trained, strict=True)
            ]
            for stays in (False, True)
            for updates in (False, True)
        }
        self._update_s = [self._element_s(fact) for fact in facts]
        self._tried: dict[tuple[Placement, ...], float] = {}
        self._transient: dict[tuple[bool, ...], int] = {}
        self._leading_transient: dict[tuple[int, int, bool], int] = {}
        self._backward_s = self._replay.run.num_passes * sum(
            cost.duration_s
            for cost, moment in zip(self._replay.costs, trace.moments, strict=True)
            if moment.phase == "backward"
        )
        self._in_forward = {c for m in trace.moments if m.phase == "forward" for c in m.reads}
        self.placements = offload_all("auto", facts).placements
        self.depth = self._usual_depth
        self.step_s = self._time(self.placements, self.depth)

    @property
    def _usual_depth(self) -> int:
        return self._depths[len(self._depths) // 2]

    @property
    def prediction(self) -> Prediction:
        """Of the best found."""
        return self._replay.predict(self.placements, self.depth)

    def take(self, placements: list[Placement]) -> None:
        """Leaves these placements, whether they fit or not, with the fastest depth."""
        self.placements, self.step_s = placements, self._time(placements, self.depth)
        self._try_depths(placements)

    @property
    def finalists(self) -> list[list[Placement]]:
        """The best of those that were tried, and as many residents as fit with no companions."""
        best = sorted(self._tried, key=lambda placements: self._tried[placements])[:_MOST_FINALISTS]
        return [list(placements) for placements in best] + [self._leading(max(0, self._most_residents()), 0)]

    def consider(self, placements: list[Placement], most_s: float) -> None:
        """Takes placements that fit, if they are faster than the best found, and take less than ``most_s``."""
        for depth in self._depths if self._tries_all_depths else (self.depth,):
            if self._time(placements, depth) < most_s:
                self._take_if_faster(placements, depth)

    def run(self) -> None:
        """Leaves the best found."""
        if required_bytes(self._facts, self.placements, self._trace) > self._capacity_bytes:
            return
        self._try_depths(self.placements)
        for placements in self._promising(self._points()):
            self._try(placements)
        self._climb()
        self._refine()
        for tried in sorted(self._tried, key=lambda placements: self._tried[placements])[:_MOST_FINALISTS]:
            self._try_depths(list(tried))
        # Whatever a fixed policy would come to, this is no slower.
        for placements in self._promising(self._fixed_points()):
            self._try_depths(placements)

    def _promising(self, points: Iterable[list[Placement]]) -> Iterator[list[Placement]]:
        """Those that may be faster than the best so far, the most promising first."""
        candidates = [(self._least_s(placements), number, placements) for number, placements in enumerate(points)]
        for least_s, _, placements in sorted(candidates):
            if least_s >= self.step_s:
                return  # nor is any that follows faster
            yield placements

    def _fixed_points(self) -> Iterator[list[Placement]]:
        """What fixed policies of plain fractions would place, as far as it fits."""
        for parameters in FRACTIONS:
            for optimizer in FRACTIONS:
                placements = static_placements(self._facts, parameters, optimizer)
                if self._fits(placements):
                    yield placements

    def _points(self) -> Iterator[list[Placement]]:
        """Placements that fit, all over the space."""
        yield from self._fixed_points()
        for companion_numel in _some(self._trained_before):
            for resident_numel in self._resident_counts(companion_numel):
                yield self._leading(resident_numel, companion_numel)
        for resident_numel in _some(self._all_before):
            companion_numel = self._most_companions(resident_numel, 0)
            if companion_numel >= 0:
                yield self._leading(resident_numel, companion_numel)

    def _climb(self) -> None:
        """From the best point in ever smaller strides: more or fewer companions and residents."""
        most_numel = max(self._most_companions(0, 0), self._most_residents(), 1)
        for divisor in _STRIDES:
            while True:
                before_s = self.step_s
                for placements in self._around(max(1, most_numel // divisor)):
                    if self._least_s(placements) < self.step_s:
                        self._try(placements)
                if self.step_s >= before_s * _WORTH:
                    break

    def _around(self, stride: int) -> Iterator[list[Placement]]:
        """Points that fit, so many elements away from the best, and at the next border between chunks below them."""
        resident_numel = sum(placement.resident_numel for placement in self.placements)
        companion_numel = sum(placement.companion_numel for placement in self.placements)
        for residents in _near(resident_numel, stride, self._all_before):
            counts = _near(companion_numel, stride, self._trained_before)
            for companions in dict.fromkeys([self._most_companions(residents, 0), *counts]):
                if companions >= 0 and self._leading_fits(residents, companions):
                    yield self._leading(residents, companions)

    # -- time --------------------------------------------------------------------------------------------------------

    def _time(self, placements: list[Placement], depth: int) -> float:
        return self._replay.time(placements, depth).step_s

    def _least_s(self, placements: list[Placement]) -> float:
        """No step can be faster: updates begin when backward is over, one after another, and forward waits for those of
        what it reads."""
        updates_s = waited_s = 0.0
        for fact, each_s, placement in zip(self._facts, self._update_s, placements, strict=True):
            if each_s and placement.companion_numel < fact.numel:
                updates_s += each_s * (fact.numel - placement.companion_numel)
                if fact.index in self._in_forward:
                    waited_s = updates_s
        together = max if self._replay.run.has_early_updates else sum
        return together((waited_s, self._backward_s)) * _BELOW

    def _element_s(self, fact: ChunkFacts) -> float:
        """Seconds in which the host updates one element, at the least."""
        if not fact.companion_bytes_per_numel:
            return 0.0
        update = fact.host_update(Placement(fact.numel))
        return self._profile.host_update_s(1, update.bytes_per_numel, update.speed)

    def _try(self, placements: list[Placement]) -> None:
        """Placements that fit."""
        key = tuple(placements)
        if key in self._tried:
            return
        if self._tries_all_depths:
            self._tried[key] = self._try_depths(placements)
        else:
            self._tried[key] = self._take_if_faster(placements, self._usual_depth)

    def _try_depths(self, placements: list[Placement]) -> float:
        return min(self._take_if_faster(placements, depth) for depth in self._depths)

    def _take_if_faster(self, placements: list[Placement], depth: int) -> float:
        step_s = self._time(placements, depth)
        if step_s < self.step_s:
            self.placements, self.depth, self.step_s = placements, depth, step_s
        return step_s

    # -- room --------------------------------------------------------------------------------------------------------

    def _fits(self, placements: list[Placement]) -> bool:
        # What stays is put there of our own accord: it must not be what a slightly larger pass then lacks.
        pairs = zip(self._facts, placements, strict=True)
        key = (*(used_in_place(f, p) for f, p in pairs), any(p.companion_numel for p in placements))
        if key not in self._transient:
            self._transient[key] = transient_bytes(self._facts, placements, self._trace, with_margin=True)
        return sum(persistent_bytes(self._facts, placements)) + self._transient[key] <= self._capacity_bytes

    def _leading_fits(self, resident_numel: int, companion_numel: int) -> bool:
        """:meth:`_fits` of :meth:`_leading`, without making it."""
        resident_numel = self._cuttable(resident_numel, self._all_before)
        companion_numel = self._cuttable(companion_numel, self._trained_before)
        # What is used in place: chunks up to where residents end, but for the one that the companions' end cuts.
        whole = bisect_right(self._all_before, resident_numel) - 1
        cut = bisect_left(self._trained_before, companion_numel)
        is_cut = self._trained_before[cut] != companion_numel
        key = whole, cut if is_cut else 0, companion_numel > 0
        if key not in self._leading_transient:
            placements = self._leading(resident_numel, companion_numel)
            self._leading_transient[key] = transient_bytes(self._facts, placements, self._trace, with_margin=True)
        persistent = self._bytes.persistent(resident_numel, companion_numel)
        return persistent + self._leading_transient[key] <= self._capacity_bytes

    def _leading(self, resident_numel: int, companion_numel: int) -> list[Placement]:
        """So many leading elements of all chunks resident, of the trained ones with companions."""
        resident_numel = self._cuttable(resident_numel, self._all_before)
        companion_numel = self._cuttable(companion_numel, self._trained_before)
        num_resident = bisect_right(self._all_before, resident_numel) - 1
        num_companions = bisect_right(self._trained_before, companion_numel) - 1
        first, last = sorted((num_resident, num_companions))
        between = self._whole[True, False] if num_resident > num_companions else self._whole[False, True]
        placements = self._whole[True, True][:first] + between[first:last] + self._whole[False, False][last:]
        rest = resident_numel - self._all_before[num_resident]
        if rest:
            placements[num_resident] = Placement(rest, placements[num_resident].companion_numel)
        rest = companion_numel - self._trained_before[num_companions]
        if rest:
            placements[num_companions] = Placement(placements[num_companions].resident_numel, rest)
        return placements

    def _cuttable(self, numel: int, before: list[int]) -> int:
        """The next number of leading elements, downwards, at which the chunk there may be cut."""
        index = bisect_right(before, numel) - 1
        if self._cuts_anywhere or index == len(self._facts):
            return numel
        return numel - (numel - before[index]) % self._facts[index].block_numel

    def _resident_counts(self, companion_numel: int) -> Iterator[int]:
        """Numbers of resident elements worth trying beside these companions: the most that fits, and less."""
        borders = self._all_before
        # In fp32 values beside their companions are free: the master is there anyway. So what fits need not fit with
        # fewer residents, and the borders from the companions on are searched first.
        level = next((i for i, before in enumerate(self._trained_before) if before >= companion_numel), 0)
        for low, high in ((level, len(borders) - 1), (0, level - 1)):
            most = _last_that_fits(low, high, lambda i: self._leading_fits(borders[i], companion_numel))
            if most >= low:
                yield borders[most]
                for index in {most // 2, most // 4, 0} - {most}:
                    if self._leading_fits(borders[index], companion_numel):
                        yield borders[index]
                yield self._into_next_chunk(borders[most], companion_numel)
                return

    def _into_next_chunk(self, resident_numel: int, companion_numel: int) -> int:
        """As many elements more as fit without the next chunk being resident as a whole."""
        end = next((before for before in self._all_before if before > resident_numel), resident_numel)
        most = _last_that_fits(resident_numel, end - 1, lambda numel: self._leading_fits(numel, companion_numel))
        return max(resident_numel, most)

    def _refine(self) -> None:
        """Moves each border of the best point as far as it fits, element by element."""
        for _ in range(2):
            resident_numel = sum(placement.resident_numel for placement in self.placements)
            companion_numel = sum(placement.companion_numel for placement in self.placements)
            most = max(companion_numel, self._most_companions(resident_numel, companion_numel))
            for numel in (resident_numel, *self._resident_counts(most)):
                if self._leading_fits(numel, most):
                    self._try(self._leading(numel, most))

    def _most_residents(self) -> int:
        return _last_that_fits(0, self._all_before[-1], lambda numel: self._leading_fits(numel, 0))

    def _most_companions(self, resident_numel: int, low: int) -> int:
        high = self._trained_before[-1]
        return _last_that_fits(low, high, lambda numel: self._leading_fits(resident_numel, numel))


class LeadingBytes:
    """Device bytes of leading elements, without a look at every chunk.

    Args:
        facts: of all chunks.
    """

    def __init__(self, facts: list[ChunkFacts]) -> None:
        self._facts = facts
        trained = [fact for fact in facts if fact.companion_bytes_per_numel]
        self._values = _Prefix([(fact.numel, fact.value_itemsize) for fact in facts])
        self._companions = _Prefix([(fact.numel, fact.companion_bytes_per_numel) for fact in trained])
        self._has_shared = any(fact.master_is_values for fact in trained)

    def persistent(self, resident_numel: int, companion_numel: int) -> int:
        """As :func:`gemini.plan.persistent_bytes` has it."""
        num_bytes = self._values.num_bytes(resident_numel) + self._companions.num_bytes(companion_numel)
        return num_bytes + (self._shared(resident_numel, companion_numel) if self._has_shared else 0)

    def _shared(self, resident_numel: int, companion_numel: int) -> int:
        num_bytes = 0
        for fact in self._facts:
            resident, resident_numel = min(fact.numel, resident_numel), max(0, resident_numel - fact.numel)
            if not fact.companion_bytes_per_numel:
                continue
            companions, companion_numel = min(fact.numel, companion_numel), max(0, companion_numel - fact.numel)
            if fact.master_is_values:
                num_bytes += fact.value_itemsize * max(0, companions - resident)
        return num_bytes


class _Prefix:
    def __init__(self, parts: Sequence[tuple[int, float]]) -> None:
        self._numel = [0, *accumulate(numel for numel, _ in parts)]
        self._bytes = [0, *accumulate(int(numel * itemsize) for numel, itemsize in parts)]
        self._itemsizes = [itemsize for _, itemsize in parts]

    def num_bytes(self, numel: int) -> int:
        """Of so many leading elements."""
        index = bisect_right(self._numel, numel) - 1
        rest = numel - self._numel[index]
        return self._bytes[index] + (int(rest * self._itemsizes[index]) if rest else 0)


def _last_that_fits(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number between ``low`` and ``high`` that fits; ``low - 1`` if none does."""
    if high < low or not fits(low):
        return low - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _near(numel: int, stride: int, borders: list[int]) -> list[int]:
    """Numbers a stride away in both directions, and the border below each."""
    found = [min(borders[-1], max(0, numel + more)) for more in (0, -stride, stride)]
    return list(dict.fromkeys([*found, *(borders[bisect_right(borders, at) - 1] for at in found)]))


def _some(borders: list[int]) -> list[int]:
    """:data:`_ENOUGH_COUNTS` of the borders between chunks or more, evenly spread, the first and the last among them."""
    different = sorted(set(borders))
    return sorted({*different[:: max(1, len(different) // _ENOUGH_COUNTS)], different[-1]})
