"""Chunks split over data-parallel ranks: values gathered on use, gradients summed straight into their owner's shard.

Ranks need not do the same. Each says before an exchange what it wants, in one small message that all ranks see (a
*round*). Where all want the same, which is the rule, one collective does it. Where they differ (a rank's tokens chose
other experts, its sequences were shorter, it evicted a chunk that others kept), the rank that is furthest behind is
served first, point to point, and the others wait: so ranks that have come apart fall into step again, and nothing can
hang because two ranks called different collectives. A rank with nothing to ask meets the others at the next common
verb, such as ``step()``, and serves them until all have come.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, unique

import torch
import torch.distributed as dist

from gemini.chunk import Chunk
from gemini.device import Device, HostDevice
from gemini.exchange import Exchange, Run, Shard
from gemini.layout import ChunkLayout, Entry
from gemini.manager import Manager
from zero.collectives import all_gather, all_to_all
from zero.errors import UserError
from zero.world import PeerLostError, World

ALIGN_NUMEL = 64
"""Shards begin at a whole number of so many elements, the unit in which optimizer kernels work."""
_MOST_STAGING_BYTES = 16 << 20
_MOST_STAGING_BYTES_ON_HOST = 2 << 20
"""So little that even the sums in fp32, and what gloo copies to inside, need no mapping of their own: a fresh one for each
piece was measured to double a step's seconds in the kernel (see :func:`gemini.heap.begin_tidy`)."""


@dataclass(frozen=True)
class Division:
    """How chunks are divided.

    Attributes:
        rank: this process.
        num_ranks: all of them.
        replicate_bytes: chunks of no more than so many bytes of values are owned by every rank: fetching them from
            each other would take longer than their memory is worth.
    """

    rank: int
    num_ranks: int
    replicate_bytes: int

    def is_shared(self, layout: ChunkLayout) -> bool:
        """Whether each rank owns a part, and not everything."""
        return self.num_ranks > 1 and layout.num_bytes > self.replicate_bytes

    def shard_of(self, layout: ChunkLayout, rank: int) -> Shard:
        """What a rank owns of a chunk."""
        if not self.is_shared(layout):
            return Shard(0, layout.numel, layout.numel)
        per_rank = -(-layout.numel // self.num_ranks)
        per_rank += -per_rank % max(ALIGN_NUMEL, layout.align_numel)
        return Shard(rank * per_rank, (rank + 1) * per_rank, self.num_ranks * per_rank)


class DryExchange(Exchange):
    """Of one rank of many in a dry run: nobody else is there, and no values are needed.

    Args:
        division: how the run will divide.
    """

    def __init__(self, division: Division) -> None:
        self.division = division

    def shard(self, layout: ChunkLayout) -> Shard:
        """What the first rank owns."""
        return self.division.shard_of(layout, 0)

    def reduce(self, chunk: Chunk, runs: Sequence[Run]) -> None:
        """The gradients' place with their owner is taken; nothing is sent."""
        chunk.reserve_sums(torch.float32)
        chunk.has_sums = True

    def read(self, chunk: Chunk, entry: Entry, key: str | None) -> torch.Tensor:
        """Something of the right form."""
        return torch.empty(entry.spec.numel, dtype=_wire_dtype(chunk, key))


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


_WORDS = 4
_VERBS = (
    *("step()", "skip_step()", "zero_grad()", "save_pretrained()", "close()", "evaluation", "looking at gradients"),
    *("the run folder", "the end of a window", "the end of the program"),
)
"""Where ranks meet, so that each can name what the others have come to; the user's own are added as they come."""


def number_of(name: str | None) -> int:
    """A number for a companion's key or a meeting's name that is the same on all ranks; 0 for None."""
    return 0 if name is None else 1 + zlib.crc32(name.encode())


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
        self._reduce_dtype = reduce_dtype
        self._clock: Callable[[], int] = int
        self._chunks: list[Chunk] = []
        self._device: Device = HostDevice()
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
        self._clock = lambda: manager.clock
        self.world.at_end = lambda: self.meet("the end of the program")

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
        whole = torch.zeros(entry.spec.numel, dtype=_wire_dtype(chunk, key))
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
        try:
            with self.world.operation(self._describe(mine)):
                self._take_part(mine, runs, into)
        except BaseException:
            self._is_broken = True
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
        shard, buffer = chunk.shard, chunk.buffer
        self._device.exchanges((shard.gathered_numel - shard.numel) * buffer.itemsize)
        if not self._device.is_host:
            all_gather(buffer, buffer[shard.start : shard.stop], self.world.bulk)
            return
        step = self._staging_numel(buffer.dtype)  # gloo gathers into a buffer of its own first
        for start in range(0, shard.numel, step):
            numel = min(step, shard.numel - start)
            parts = [buffer[first : first + numel] for first in range(start, buffer.numel(), shard.numel)]
            dist.all_gather(parts, parts[self.world.rank], self.world.bulk)

    def _read(self, chunk: Chunk, ranks: list[int], what: int, into: torch.Tensor | None) -> None:
        entry = chunk.layout.entries[what >> 33]
        key = _companion(chunk, what & ((1 << 33) - 1))
        for owner in range(self.world.size):
            shard = self.division.shard_of(chunk.layout, owner)
            left, right = max(entry.offset, shard.start), min(entry.stop, shard.stop)
            if left >= right:
                continue
            part = torch.zeros(right - left, dtype=_wire_dtype(chunk, key))
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
        """The mean over all ranks of what these ranks send (nothing from the others), added to the owners' sums.

        Terms are added in fp32 and in the order of ranks, so sums are the same from run to run, and fp16 gradients
        cannot overflow in them. Each element crosses the wire once, in its own dtype.
        """
        sums_dtype = self._reduce_dtype or torch.float32
        chunk.reserve_sums(sums_dtype)
        # Together over the fast links between devices, apart through host memory.
        device = self._device.torch_device if len(ranks) == self.world.size else torch.device("cpu")
        wire_dtype = self._reduce_dtype or chunk.layout.dtype
        step = self._staging_numel(wire_dtype)
        for start in range(0, chunk.shard.numel, step):
            numel = min(step, chunk.shard.numel - start)
            parts = self._parts(chunk, runs, start, numel, wire_dtype, device)
            total = self._sum(parts, ranks, numel, wire_dtype, device).div_(self.world.size)
            chunk.add_sums(chunk.shard.start + start, total.to(sums_dtype).to(self._device.torch_device))
        chunk.has_sums = True

    def _staging_numel(self, dtype: torch.dtype) -> int:
        """Elements of a shard that are exchanged at a time: what is received lies beside the gathered copy."""
        staging_bytes = _MOST_STAGING_BYTES_ON_HOST if self._device.is_host else _MOST_STAGING_BYTES
        most_bytes = min(staging_bytes, max(1 << 14, self._device.capacity_bytes // 64))
        most_numel = most_bytes // (dtype.itemsize * self.world.size)
        return max(ALIGN_NUMEL, most_numel - most_numel % ALIGN_NUMEL)

    def _parts(
        self, chunk: Chunk, runs: Sequence[Run], start: int, numel: int, dtype: torch.dtype, device: torch.device
    ) -> list[torch.Tensor]:
        """What this rank sends to each owner: ``numel`` elements of its shard from ``start`` on; zero where it has none.

        Where all of them lie side by side they are sent from where they are.
        """
        parts = []
        for owner in range(self.world.size):
            first = self.division.shard_of(chunk.layout, owner).start + start
            whole = [v[first - at : first - at + numel] for at, v in runs if at <= first <= at + v.numel() - numel]
            if whole and whole[0].dtype == dtype and whole[0].device == device:
                parts.append(whole[0])
                continue
            part = torch.zeros(numel, dtype=dtype, device=device)
            for at, values in runs:
                left, right = max(at, first), min(at + values.numel(), first + numel)
                if left < right:
                    part[left - first : right - first].copy_(values[left - at : right - at])
            parts.append(part)
        return parts

    def _sum(
        self, parts: list[torch.Tensor], ranks: list[int], numel: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        if len(ranks) == self.world.size:
            self._device.exchanges((self.world.size - 1) * numel * dtype.itemsize)
            received = [torch.empty(numel, dtype=dtype, device=device) for _ in parts]
            all_to_all(received, parts, self.world.bulk)
            total = received[0].float()
            for part in received[1:]:
                total += part
            return total
        total = torch.zeros(numel, dtype=torch.float32, device=device)
        landing = torch.empty(numel, dtype=dtype)
        for sender in ranks:
            if self.world.rank != sender:
                dist.recv(landing, sender, self.world.control)
                total += landing
                continue
            for owner in range(self.world.size):
                if owner != sender:
                    dist.send(parts[owner], owner, self.world.control)
            total += parts[sender]
        return total


def _wire_dtype(chunk: Chunk, key: str | None) -> torch.dtype:
    """Of a value or companion between ranks; fp32 holds every companion exactly."""
    return chunk.layout.dtype if key is None else torch.float32


def _companion(chunk: Chunk, number: int) -> str | None:
    """The companion that a number stands for: None for the values, "" if this rank has none of that name."""
    if number == 0:
        return None
    known = [key for segment in chunk.segments for key in segment.companions]
    return next((key for key in known if number_of(key) == number), "")
