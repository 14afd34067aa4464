"""Chunks split over data-parallel ranks: values gathered on use, gradients summed straight into their owner's shard.

Ranks need not do the same. Each says before an exchange what it wants, in one small message that all ranks see (a
*round*). Where all want the same, which is the rule, one collective does it. Where they differ (a rank's tokens chose
other experts, its sequences were shorter, it evicted a chunk that others kept), the rank that is furthest behind is
served first, point to point, and the others wait: so ranks that have come apart fall into step again, and nothing can
hang because two ranks called different collectives. A rank with nothing to ask meets the others at the next common
verb, such as ``step()``, and serves them until all have come.

A round is waited for; what it agrees on goes on beside the program where it can: values come while what was fetched
before is computed with, gradients while backward goes on (:mod:`zero.reduction`).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum, unique

import torch
import torch.distributed as dist

from gemini.chunk import Chunk
from gemini.device import Device, HostDevice, Pending
from gemini.exchange import Exchange, Run, Shard
from gemini.layout import ChunkLayout, Entry
from gemini.manager import Manager
from zero.collectives import all_gather
from zero.division import Division, DryExchange, wire_dtype
from zero.errors import UserError
from zero.reduction import Reducer, staging_numel
from zero.world import PeerLostError, World


@unique
class Want(IntEnum):
    """What a rank says in a round."""

    GATHER = 1
    REDUCE = 2
    READ = 3
    MEET = 4


@dataclass(frozen=True)
class Request:
    """What one rank wants.

    Attributes:
        want: kind.
        chunk: index; 0 for a meeting.
        what: of a read, the entry's position and the companion's number; of a meeting, the number of its name.
        clock: how far the rank has come; the lowest is served first.
    """

    want: Want
    chunk: int
    what: int
    clock: int

    def same_as(self, other: Request) -> bool:
        """Whether one exchange serves both."""
        return (self.want, self.chunk, self.what) == (other.want, other.chunk, other.what)


_END_OF_BROKEN = timedelta(seconds=1)
_WORDS = 4
_VERBS = (
    *("step()", "skip_step()", "zero_grad()", "save_pretrained()", "close()", "evaluation", "looking at gradients"),
    *("the run folder", "the end of a window", "the end of the program"),
)
"""Where ranks meet, so that each can name what the others have come to; the user's own are added as they come."""


def number_of(name: str | None) -> int:
    """A number for a companion's key or a meeting's name that is the same on all ranks; 0 for None."""
    return 0 if name is None else 1 + zlib.crc32(name.encode())


class _Gathering(Pending):
    """What others own is coming into a chunk's buffer.

    Args:
        exchange: that has begun it.
        chunk: whose buffer it is.
        works: collectives.
    """

    def __init__(self, exchange: RankExchange, chunk: Chunk, works: Sequence[dist.Work]) -> None:
        self._exchange = exchange
        self.chunk = chunk
        self._works = list(works)

    def wait(self) -> None:
        """It is there afterwards. A second time nothing is waited for, whatever became of the first."""
        works, self._works = self._works, []
        self._exchange.end_gather(self.chunk, works)


class RankExchange(Exchange):
    """Of one rank of many.

    Args:
        world: the ranks.
        division: how chunks are divided.
        reduce_dtype: of gradients on their way and of their sums; None: they travel as they are, sums are fp32.
    """

    def __init__(self, world: World, division: Division, reduce_dtype: torch.dtype | None) -> None:
        self.world = world
        self.num_local = world.place.local_size
        self.division = division
        self._device: Device = HostDevice()
        self._reduce_dtype = reduce_dtype
        self._reducer = self._make_reducer()
        self._clock: Callable[[], int] = int
        self._chunks: list[Chunk] = []
        self._names = {number_of(verb): verb for verb in _VERBS}
        self.on_settle: Callable[[], None] = lambda: None
        """Called before the user looks at gradients."""
        self.has_stepped = False
        """The gradients have been used: each rank will drop them, and none may begin anew before all have come."""
        self._is_broken = False
        self.num_rounds = 0
        self.num_apart = 0
        """Exchanges in which not all ranks wanted the same."""

    def attach(self, manager: Manager) -> None:
        """Serves the others from the manager's chunks, from now on."""
        self._chunks, self._device = manager.chunks, manager.device
        self._reducer = self._make_reducer()
        self._clock = lambda: manager.clock
        self.world.at_end = lambda: self.meet("the end of the program")

    def _make_reducer(self) -> Reducer:
        return Reducer(self.world, self.division, self._reduce_dtype, self._device, self._guarded)

    def detach(self) -> None:
        """Serves nobody any more."""
        self._chunks = []
        self.world.at_end = lambda: None

    def shard(self, layout: ChunkLayout) -> Shard:
        """What this rank owns."""
        return self.division.shard_of(layout, self.world.rank)

    def rehearsal(self) -> Exchange:
        """The same division without the others."""
        return DryExchange(self.division)

    # -- verbs -------------------------------------------------------------------------------------------------------

    def complete(self, chunk: Chunk) -> None:
        """Gathers the chunk; this rank's own part is in its buffer."""
        self._ask(Want.GATHER, chunk.index)

    def reduce(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """Brings gradients to their owners; what is sent is averaged over the ranks.

        After an exchange that failed on this rank nobody waits for its gradients any more: they are dropped, so that
        clearing up does not hide the error.
        """
        if self._is_broken:
            return
        self._ask(Want.REDUCE, chunk.index, runs=runs)

    def settle_gradients(self) -> None:
        """Sees to it that all ranks know the same of every gradient."""
        self.on_settle()

    def before_forgetting(self) -> None:
        """Waits for all ranks, once after each step: what the first would send next, the last would drop."""
        if self.has_stepped:
            self.has_stepped = False
            self.meet("zero_grad()")

    def read(self, chunk: Chunk, entry: Entry, key: str | None) -> torch.Tensor:
        """A host copy of one parameter's values or companion, of all ranks' parts."""
        own = chunk.own_part(entry, key)
        if chunk.shard.is_whole:
            return own
        position = chunk.layout.entries.index(entry)
        whole = torch.zeros(entry.spec.numel, dtype=wire_dtype(chunk, key))
        self._ask(Want.READ, chunk.index, position << 33 | number_of(key), into=whole)
        return whole

    def meet(self, what: str) -> None:
        """Waits until all ranks have come to the same verb, and serves those who have not.

        Raises:
            UserError: others have come to another verb, and wait there.
        """
        self._names[number_of(what)] = what
        self._ask(Want.MEET, 0, number_of(what))

    # -- rounds ------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        want: Want,
        chunk: int,
        what: int = 0,
        runs: Sequence[Run] = (),
        into: torch.Tensor | None = None,
    ) -> None:
        """Takes part in rounds until this rank's own wish is met.

        Raises:
            PeerLostError: an exchange of this rank has failed before. Whoever catches that error and goes on must not
                train with the gradients that were dropped since.
        """
        if self._is_broken:
            raise PeerLostError(
                f"rank {self.world.rank}: an earlier exchange failed here, so the ranks do not know the same any more; "
                "end the program and resume from a checkpoint"
            )
        mine = Request(want, chunk, what, 0 if want is Want.MEET else self._clock())
        with self._guarded(self._describe(mine)):
            self._take_part(mine, runs, into)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Around whatever waits for other ranks: after an error in it, nothing is exchanged any more."""
        try:
            with self.world.operation(what):
                yield
        except BaseException:
            self._is_broken = True
            self._reducer.forget()
            raise

    def _take_part(self, mine: Request, runs: Sequence[Run], into: torch.Tensor | None) -> None:
        while True:
            requests = self._round(mine)
            if all(request.want is Want.MEET for request in requests):
                self._check_meeting(requests)
                return
            if self._serve(requests, runs, into):
                return

    def _round(self, mine: Request) -> list[Request]:
        self.num_rounds += 1
        self._device.begin_exchanges()
        own = torch.tensor([mine.want, mine.chunk, mine.what, mine.clock], dtype=torch.int64)
        said = torch.empty(_WORDS * self.world.size, dtype=torch.int64)
        all_gather(said, own, self.world.control)
        return [Request(Want(w[0]), *w[1:]) for w in said.view(-1, _WORDS).tolist()]

    def _serve(self, requests: list[Request], runs: Sequence[Run], into: torch.Tensor | None) -> bool:
        """One exchange for each different wish of the ranks furthest behind; True if this rank's was among them."""
        asking = [rank for rank, request in enumerate(requests) if request.want is not Want.MEET]
        first = min(requests[rank].clock for rank in asking)
        due = [rank for rank in asking if requests[rank].clock == first]
        while due:
            request = requests[due[0]]
            ranks = [rank for rank in due if requests[rank].same_as(request)]
            due = [rank for rank in due if rank not in ranks]
            self.num_apart += len(ranks) < self.world.size
            mine = self.world.rank in ranks
            self._carry_out(request, ranks, runs if mine else (), into if mine else None)
        return requests[self.world.rank].want is not Want.MEET and requests[self.world.rank].clock == first

    def _carry_out(self, request: Request, ranks: list[int], runs: Sequence[Run], into: torch.Tensor | None) -> None:
        chunk = self._chunks[request.chunk]
        if request.want is Want.GATHER:
            self._gather(chunk, ranks)
        elif request.want is Want.REDUCE:
            self._reduce(chunk, ranks, runs)
        else:
            self._read(chunk, ranks, request.what, into)

    def _check_meeting(self, requests: list[Request]) -> None:
        if all(request.same_as(requests[0]) for request in requests):
            return
        places = ", ".join(
            f"rank {rank} at {self._names.get(request.what, 'another verb')}" for rank, request in enumerate(requests)
        )
        raise UserError(
            f"the ranks have come to different places: {places}. All ranks must call step(), evaluation, saving and "
            "loading in the same order, and look at gradients together; give each the same number of optimizer steps"
        )

    def _describe(self, request: Request) -> str:
        if request.want is Want.MEET:
            return self._names[request.what]
        unit = self._chunks[request.chunk].layout.unit_name
        words = {Want.GATHER: "gathering", Want.REDUCE: "reducing gradients of", Want.READ: "reading"}
        return f"{words[request.want]} chunk {request.chunk} ({unit})"

    # -- values ------------------------------------------------------------------------------------------------------

    def _gather(self, chunk: Chunk, ranks: list[int]) -> None:
        if len(ranks) == self.world.size:
            self._gather_together(chunk)
            return
        own = torch.cat([segment.values.cpu() for segment in chunk.segments])
        for rank in ranks:
            for owner in range(self.world.size):
                shard = self.division.shard_of(chunk.layout, owner)
                if owner == rank:
                    continue
                if self.world.rank == owner:
                    dist.send(own, rank, self.world.control)
                elif self.world.rank == rank:
                    part = torch.empty(shard.numel, dtype=chunk.layout.dtype)
                    dist.recv(part, owner, self.world.control)
                    chunk.buffer[shard.start : shard.stop].copy_(part)

    def _gather_together(self, chunk: Chunk) -> None:
        shard = chunk.shard
        others_bytes = (shard.gathered_numel - shard.numel) * chunk.layout.dtype.itemsize
        chunk.gather(lambda: self._begin_gather(chunk), others_bytes)

    def _begin_gather(self, chunk: Chunk) -> list[Pending]:
        shard, buffer = chunk.shard, chunk.buffer
        if not self._device.is_host:
            all_gather(buffer, buffer[shard.start : shard.stop], self.world.bulk)
            return []
        works = []
        step = staging_numel(self._device, buffer.dtype, self.world.size)  # gloo gathers into a buffer of its own first
        for start in range(0, shard.numel, step):
            numel = min(step, shard.numel - start)
            parts = [buffer[first : first + numel] for first in range(start, buffer.numel(), shard.numel)]
            works.append(dist.all_gather(parts, parts[self.world.rank], self.world.bulk, async_op=True))
        return [_Gathering(self, chunk, works)]

    def end_gather(self, chunk: Chunk, works: Sequence[dist.Work]) -> None:
        """Waits for collectives. After an exchange that failed only so long that they fail, too: the buffer goes."""
        if self._is_broken:
            for work in works:
                with contextlib.suppress(Exception):
                    work.wait(_END_OF_BROKEN)
            return
        with self._guarded(self._describe(Request(Want.GATHER, chunk.index, 0, 0))):
            for work in works:
                work.wait()

    def _read(self, chunk: Chunk, ranks: list[int], what: int, into: torch.Tensor | None) -> None:
        entry = chunk.layout.entries[what >> 33]
        key = _companion(chunk, what & ((1 << 33) - 1))
        for owner in range(self.world.size):
            shard = self.division.shard_of(chunk.layout, owner)
            left, right = max(entry.offset, shard.start), min(entry.stop, shard.stop)
            if left >= right:
                continue
            part = torch.zeros(right - left, dtype=wire_dtype(chunk, key))
            if owner == self.world.rank and (key is None or all(key in s.companions for s in chunk.segments)):
                part.copy_(chunk.own_part(entry, key))
            self._pass_on(part, owner, ranks)
            if into is not None:
                into[left - entry.offset : right - entry.offset] = part.to(into.dtype)

    def _pass_on(self, part: torch.Tensor, owner: int, ranks: list[int]) -> None:
        """An owner's values to those who want them; ``part`` holds them afterwards."""
        if len(ranks) == self.world.size:
            dist.broadcast(part, owner, self.world.control)
            return
        for rank in ranks:
            if rank == owner:
                continue
            if self.world.rank == owner:
                dist.send(part, rank, self.world.control)
            elif self.world.rank == rank:
                dist.recv(part, owner, self.world.control)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _reduce(self, chunk: Chunk, ranks: list[int], runs: Sequence[Run]) -> None:
        """The mean over all ranks of what these ranks send (nothing from the others), added to the owners' sums."""
        if len(ranks) == self.world.size:
            self._reducer.together(chunk, runs)
        else:
            self._reducer.apart(chunk, ranks, runs)


def _companion(chunk: Chunk, number: int) -> str | None:
    """The companion that a number stands for: None for the values, "" if this rank has none of that name."""
    if number == 0:
        return None
    known = [key for segment in chunk.segments for key in segment.companions]
    return next((key for key in known if number_of(key) == number), "")
