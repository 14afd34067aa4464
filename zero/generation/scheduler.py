"""Which rows run: who joins at a pass border, and with whom.

Rows join in the order they came. One that finds no room lets others pass, but only so often: then nobody passes it, so
that a long request cannot starve behind short ones. A row is let in only if the cache holds it to its last token beside
all that run, whenever those end. Nothing here looks at a clock: the same requests give the same passes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence

from zero.generation.buckets import Bucket, Need, may_prefill_together, may_run_together, most_positions
from zero.generation.cache import CacheAccount, rounded
from zero.generation.limits import Limits
from zero.generation.rows import Row

MOST_REFUSALS = 32
"""Passes for which others may go ahead of a row that finds no room."""
_MOST_LOOKED_AT = 64
"""Rows that are refused at one border before the others are not asked."""


class Scheduler:
    """Rows that wait and rows that run.

    Args:
        num_layers: of the model.
        account: of the cache.
        limits: rows and positions at a time.
        position_bytes: of keys and values; see :meth:`measure`.

    Attributes:
        waiting: rows that have not joined, first come first.
        buckets: rows that have been through the model.
        most_rows: that run at a time: fewer than the limit after memory ran out.
    """

    def __init__(self, num_layers: int, account: CacheAccount, limits: Limits, position_bytes: int) -> None:
        self._num_layers = num_layers
        self._account = account
        self._limits = limits
        self._position_bytes = position_bytes
        self._tensor_bytes = -(-position_bytes // (2 * num_layers))
        self.waiting: deque[Row] = deque()
        self.buckets: list[Bucket] = []
        self.most_rows = limits.max_rows

    @property
    def num_rows(self) -> int:
        """Rows that run."""
        return sum(len(bucket.rows) for bucket in self.buckets)

    # -- room --------------------------------------------------------------------------------------------------------

    def measure(self, bucket: Bucket) -> None:
        """Takes over what a position really costs."""
        position_bytes, tensor_bytes = bucket.cache.bytes_per_position()
        self._position_bytes, self._tensor_bytes = position_bytes, tensor_bytes

    def needed_bytes(self, num_positions: Sequence[int]) -> int:
        """Of buckets with so many positions each at their worst, and of a tensor that is being made anew."""
        return sum(num_positions) * self._position_bytes + max(num_positions, default=0) * self._tensor_bytes

    def fits_alone(self, num_positions: int) -> bool:
        """Whether a row of this length fits when nobody else is there."""
        return self.needed_bytes([rounded(num_positions)]) <= self._account.max_bytes

    def _fit(self, num_positions: Sequence[int]) -> bool:
        return self.needed_bytes(num_positions) <= self._account.max_bytes

    # -- joining -----------------------------------------------------------------------------------------------------

    def queue(self, rows: Sequence[Row]) -> None:
        """Rows that have come wait behind the others."""
        self.waiting.extend(rows)

    @property
    def num_waiting(self) -> int:
        """Rows that wait, and are still wanted."""
        return sum(row.finish_reason is None for row in self.waiting)

    def admit(self) -> None:
        """Rows that find room join, as buckets of their own; whose request has ended leave."""
        if any(row.finish_reason is not None for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if row.finish_reason is None)
        running = [most_positions(bucket.needs) for bucket in self.buckets]
        num_running = self.num_rows
        chosen: list[Row] = []
        refused: list[Row] = []
        while self.waiting and num_running + len(chosen) < self.most_rows and len(refused) < _MOST_LOOKED_AT:
            row = self.waiting.popleft()
            if self._has_room(running, num_running, [*chosen, row]):
                chosen.append(row)
                continue
            refused.append(row)
            if row.num_refusals >= MOST_REFUSALS:
                break
        for row in refused:
            row.num_refusals += 1
        self.waiting.extendleft(reversed(refused))
        self.buckets += [Bucket(group, self._num_layers, self._account) for group in _groups(chosen)]

    def _has_room(self, running: list[int], num_running: int, rows: list[Row]) -> bool:
        groups = _groups(rows)
        num_positions = sum(len(group) * max(len(row.tokens) for row in group) for group in groups)
        if len(rows) > 1 and num_running + num_positions > self._limits.max_batch_tokens:
            return False
        return self._fit([*running, *(most_positions([Need.of(row) for row in group]) for group in groups)])

    # -- between passes ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Rows that have ended leave; buckets that may run together become one.

        Raises:
            torch.OutOfMemoryError: no memory to do so; the rows concerned wait again.
        """
        for bucket in self.buckets:
            with self._in_hand(bucket):
                bucket.keep([row for row in bucket.rows if row.finish_reason is None])
        self.buckets = [bucket for bucket in self.buckets if bucket.rows]
        self._merge()

    def give_up(self, *buckets: Bucket) -> None:
        """Takes buckets apart: their rows wait again, and will be read anew."""
        self.buckets = [bucket for bucket in self.buckets if bucket not in buckets]
        for bucket in buckets:
            self.waiting.extendleft(reversed([row for row in bucket.close() if row.finish_reason is None]))

    @contextlib.contextmanager
    def _in_hand(self, *buckets: Bucket) -> Iterator[None]:
        """While caches are made anew: one that broke off is of no use."""
        try:
            yield
        except BaseException:
            self.give_up(*buckets)
            raise

    def _merge(self) -> None:
        merged: list[Bucket] = []
        for bucket in sorted(self.buckets, key=lambda bucket: -bucket.cache.length):
            host = next((other for other in merged if self._may_join(other, bucket)), None)
            if host is None:
                merged.append(bucket)
                continue
            with self._in_hand(host, bucket):
                host.join(bucket)
            self.buckets.remove(bucket)
        self.buckets = merged

    def _may_join(self, host: Bucket, bucket: Bucket) -> bool:
        shortest = min(row.num_cached for row in bucket.rows)
        if not may_run_together(host.cache.length, shortest):
            return False
        others = [most_positions(b.needs) for b in self.buckets if b is not host and b is not bucket]
        apart = [most_positions(host.needs), most_positions(bucket.needs)]
        together = most_positions([*host.needs, *bucket.needs])
        # While one tensor after the other is made anew, the larger of both is there, and that tensor.
        return self._fit([*others, max(sum(apart), together)])


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose prompts may share a forward."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if groups and may_prefill_together(len(groups[-1][0].tokens), len(row.tokens)):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
