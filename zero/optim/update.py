"""The update of one chunk: torch's own arithmetic on pieces, or the native kernel in one pass.

What needs nothing but host memory runs beside the program: the next pass waits for each chunk's update when it fetches
the chunk, and whoever else asks for values or states waits as well (:meth:`gemini.holdings.Holdings.begin_update`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from gemini.chunk import Chunk
from gemini.codec import PIECE_NUMEL
from gemini.device import Event
from gemini.holdings import nothing
from gemini.jobs import HostQueue
from gemini.plan import ChunkFacts
from gemini.segment import GRADIENT, MASTER, Segment
from gemini.store import Store, Tier
from gemini.streamed import StreamedUpdates
from gemini.tensor import ChunkTensor
from gemini.transfer import Transfer
from zero.optim.coded import FormatCodec
from zero.optim.early import EarlyUpdates, Snapshots
from zero.optim.elementwise import run, shadow_of
from zero.optim.formats import BLOCK_NUMEL as _CODED_NUMEL
from zero.optim.formats import FP32
from zero.optim.fused import MOMENTS, FusedPiece, fused_step, is_fused, scaled
from zero.optim.native import NativeKernel
from zero.optim.native_choice import check_still_native, rule_of, scalars_after
from zero.optim.straddle import BLOCK_NUMEL, cut_blocks, join, put_back
from zero.optim.streaming import StreamedWork
from zero.optim.work import ChunkWork, Group, Piece, Scalars, captured


def device_piece_numel(capacity_bytes: int, facts: Sequence[ChunkFacts]) -> int:
    """Most elements per torch call on a device: temporaries count against its capacity, so they get a small share.

    In whole blocks, as torch's fused kernels take them (:mod:`zero.optim.straddle`), and as states are coded in.
    """
    if any(fact.coded_bytes_per_numel for fact in facts):  # which are decoded for the call
        return min(PIECE_NUMEL, max(1 << 8, capacity_bytes // 4096)) // _CODED_NUMEL * _CODED_NUMEL
    return min(1 << 24, max(1 << 10, capacity_bytes // 1024)) // BLOCK_NUMEL * BLOCK_NUMEL


def step_bytes(facts: Sequence[ChunkFacts], temporary_bytes_per_numel: int, capacity_bytes: int) -> int:
    """Temporaries of an optimizer step on a device of this capacity, where companions lie on it.

    Args:
        facts: of all chunks.
        temporary_bytes_per_numel: of :func:`zero.optim.elementwise.temporary_bytes_per_numel`, and of
            :func:`zero.optim.coded.coding_bytes_per_numel`.
        capacity_bytes: of the device.
    """
    trained = [fact for fact in facts if fact.companion_bytes_per_numel]
    most_numel = min(device_piece_numel(capacity_bytes, facts), max((fact.numel for fact in trained), default=0))
    narrow_numel = max((fact.numel for fact in trained if fact.value_itemsize < 4), default=0)
    # A piece's gradient in fp32 and the optimizer's own; a whole gradient in fp32 while its norm is taken.
    return max(most_numel * (4 + temporary_bytes_per_numel), 4 * narrow_numel)


class ScalarsByTensor(dict[ChunkTensor, Scalars]):
    """Step counts and the like of each parameter; whoever reads them waits for the parameter's update."""

    def __getitem__(self, tensor: ChunkTensor) -> Scalars:
        """After the update."""
        tensor.chunk.settle_update()
        return super().__getitem__(tensor)

    def get(self, tensor: ChunkTensor, default: Any = None) -> Any:
        """Likewise."""
        tensor.chunk.settle_update()
        return super().get(tensor, default)

    def items(self) -> Any:
        """After all updates."""
        for tensor in self:
            tensor.chunk.settle_update()
        return super().items()


class ChunkUpdater:
    """Updates chunks with a user's optimizer.

    Args:
        optimizer: the user's; its class and groups give arithmetic and hyperparameters.
        store: gives memory for states that appear on the first step.
        transfer: carries new values between tiers.
        queue: takes updates that may run beside the program.
        kernel: the native kernel, or None for torch's arithmetic.
        piece_numel: most elements per torch call on the host: what stays in cache, and what temporaries may take.
        device_piece_numel: the same on the device, where temporaries count against its capacity.
        early_bytes: host memory for what updates inside backward overwrite; 0: there are none.
        fuses: on a device that is not the host, take torch's fused kernel where the optimizer leaves the choice.
        streamed: carries updates of what lies on the host to the device, for chunks that a plan says it of.

    On a worker of the queue the kernel has its share of torch's threads, less those that batches are prepared on.

    Attributes:
        num_loader_workers: processes that prepare batches, on the same cores.
        groups: of every parameter that is updated, with its hyperparameters.
        early: updates that begin inside backward.
        scalars: states that are no tensors of the parameter's length, by parameter; none before its first update.
        keys: names and dtypes of the states that are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        store: Store,
        transfer: Transfer,
        queue: HostQueue,
        kernel: NativeKernel | None,
        piece_numel: int = 1 << 20,
        device_piece_numel: int = 1 << 20,
        early_bytes: int = 0,
        fuses: bool = False,
        streamed: StreamedUpdates | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._kind = type(optimizer)
        self.groups: dict[ChunkTensor, Group] = {}
        self._store = store
        self._transfer = transfer
        self._queue = queue
        self._kernel = kernel
        self._fuses = fuses and not store.device.is_host
        self._streamed = streamed
        self._piece_numel = {True: device_piece_numel, False: piece_numel}  # by whether it is on the device
        self.num_loader_workers = 0
        self._num_threads = 1
        self._of_thread = threading.local()
        self.scalars: dict[ChunkTensor, Scalars] = ScalarsByTensor()
        self.keys: dict[str, torch.dtype] = {}
        self.early = EarlyUpdates(self, Snapshots(store, early_bytes))

    @property
    def _shadow(self) -> torch.optim.Optimizer:
        """What carries out torch's arithmetic: one for each thread, which gives it parameters for a moment."""
        shadow: torch.optim.Optimizer | None = getattr(self._of_thread, "shadow", None)
        if shadow is None:
            shadow = self._of_thread.shadow = shadow_of(self._optimizer)
        return shadow

    def use_groups(self, group_of: dict[ChunkTensor, Group]) -> None:
        """From now on these tensors are updated, each with the hyperparameters of its group."""
        self.groups = group_of

    def forget(self, tensor: ChunkTensor) -> None:
        """The tensor has no states any more: its next update is its first."""
        tensor.chunk.settle_update()
        self.scalars.pop(tensor, None)
        tensor.chunk.before_change()
        for segment, left, right in tensor.chunk.pieces(tensor.entry.offset, tensor.entry.stop):
            if segment.codec is not None:  # the room behind it shares its last scale
                right += min(segment.stop - right, -(right - segment.start) % segment.codec.block_numel)
            zeros = {key: torch.zeros(right - left, dtype=self.keys[key]) for key in segment.keys if key in self.keys}
            segment.write(self._store, zeros, left)

    def makes_states_on_device(self, chunks: list[Chunk]) -> bool:
        """Whether the next update creates states in places that a plan has given to states already there."""
        return any(
            tensor.has_gradient and tensor in self.groups and tensor not in self.scalars
            for chunk in chunks
            if chunk.placement.companion_numel and self.keys
            for tensor in chunk.tensors
        )

    def update(self, chunks: Iterable[Chunk], factor: float) -> None:
        """One optimizer step on every parameter that has a gradient; what may run beside the program is only begun.

        Args:
            chunks: in the order in which the next pass reads them, with no gathered copies on the device.
            factor: gradients are multiplied by it first (1 / loss scale x clip coefficient).

        Raises:
            UserError: the optimizer has been asked for what the native kernel does not do; nothing was changed.
        """
        if self._kernel is not None:
            check_still_native(self.groups.values())
        coming: list[ChunkWork] = []
        self.early.make_way()
        self._num_threads = self._share_of_threads()
        now = {id(group): captured(group) for group in {id(g): g for g in self.groups.values()}.values()}
        for chunk in chunks:
            groups = {t: now[id(self.groups[t])] for t in chunk.tensors if t.has_gradient and t in self.groups}
            if not groups or self.early.confirm(chunk, groups, factor):
                continue
            before = {tensor: self.scalars.get(tensor) for tensor in groups}
            work = ChunkWork(chunk, chunk.segments, groups, before, factor)
            if self._begin_streamed(work):
                continue
            if work.needs_only_host_memory(self.keys):
                position = len(coming)
                coming.append(work)
                self.begin(work, lambda at=position: self._read_ahead(coming[at : at + 2]))  # type: ignore[misc]
            else:
                self._carry_out(work)
                self._store.device.host_updates(work.host_update())
                self._bring_values(work, self._rounded(work))
                work.let_go(self._store.disk)

        if self._streamed is not None:
            self._streamed.start()

    def _share_of_threads(self) -> int:
        """Of each worker of the queue; the program itself, if it updates, takes all: nothing else of it runs then."""
        others = self.num_loader_workers if self._queue.runs_beside else 0
        return max(1, (torch.get_num_threads() - others) // self._queue.num_workers)

    def _begin_streamed(self, work: ChunkWork) -> bool:
        """Queues an update that is streamed; False if this one is none."""
        if self._streamed is None or not work.chunk.placement.streams_update:
            return False
        whole = StreamedWork(work, self._kind, self._streamed)
        if not whole.is_possible(self._fuses):
            return False
        for key in MOMENTS:
            self.keys[key] = torch.float32
            whole.segment.companion(self._store, key, torch.float32)
        for tensor in work.groups:
            self.scalars[tensor] = scalars_after(self._kind, work.native_step(tensor))
        work.chunk.begin_update(self._streamed.submit(whole.begin), nothing)
        return True

    def _read_ahead(self, works: list[ChunkWork]) -> None:
        for work in works:
            work.read_ahead(self._store.disk)

    def begin(
        self,
        work: ChunkWork,
        prepare: Callable[[], None],
        finished: Callable[[], None] = nothing,
        undo: Callable[[], None] | None = None,
        kept_bytes: int = 0,
        after: Sequence[Event] = (),
    ) -> None:
        """Queues an update.

        Args:
            work: that needs only host memory.
            prepare: called first, on the thread that makes it.
            finished: called once it is done and wanted, by the program.
            undo: see :meth:`gemini.holdings.Holdings.begin_update`.
            kept_bytes: that ``prepare`` copies.
            after: what it waits for.
        """
        rounded: list[torch.Tensor | None] = []

        def run() -> None:
            prepare()
            self._carry_out(work)
            rounded.extend(self._rounded(work))
            work.let_go(self._store.disk)

        def finish() -> None:
            self._bring_values(work, rounded)
            finished()

        job = self._queue.submit(run, work.host_update(kept_bytes), after)
        work.chunk.begin_update(job, finish, undo)

    # -- on whichever thread -----------------------------------------------------------------------------------------

    def _carry_out(self, work: ChunkWork) -> None:
        """The arithmetic; touches nothing of the chunk but what ``work`` names."""
        work.chunk.before_change()
        for segment in work.segments:
            with self._on(segment, segment.numel):
                if self._kernel is not None and self._is_native(segment):
                    self._native(self._kernel, work, segment)
                else:
                    # What a border cuts of a block is joined below, unless the kernel has its part of it.
                    for pieces in work.batches(segment, self._most_numel(segment), in_blocks=self._kernel is None):
                        self._device_step(work, segment, pieces)
        for tensor in work.groups:
            if self._kernel is not None:
                self.scalars[tensor] = scalars_after(self._kind, work.native_step(tensor))
            elif work.rounds_by_position(tensor):
                self._joint_steps(work, tensor)
            if self._kernel is None and not work.is_owned(tensor):
                self._count(work, tensor)

    def _is_native(self, segment: Segment) -> bool:
        """Whether the native kernel makes the update.

        Where the host is the device it reaches what lies there, too; in fp32 torch's arithmetic stays there, which is
        plain PyTorch's to the bit and as fast.
        """
        if self._kernel is None:
            return False
        in_fp32 = segment.master_is_values and segment.codec is None
        return not segment.updates_on_device or (self._store.device.is_host and not in_fp32)

    def _is_beside(self, segment: Segment) -> bool:
        """Whether values and companions are on the same side of a link."""
        return not segment.values_cross or self._store.device.is_host

    def _most_numel(self, segment: Segment) -> int:
        """Of a call of torch's arithmetic."""
        numel = self._piece_numel[segment.updates_on_device]
        return numel if segment.codec is None else min(numel, PIECE_NUMEL)

    def _on(self, segment: Segment, numel: int = 0) -> contextlib.AbstractContextManager[Any]:
        if not segment.updates_on_device:
            return contextlib.nullcontext()
        return self._store.device.update_activity(numel, 1.0 if segment.codec is None else segment.codec.device_cost)

    def _count(self, work: ChunkWork, tensor: ChunkTensor) -> None:
        """Step counts and the like of a parameter that only others own a part of: all processes know the same of them.

        Such scalars do not depend on values, so the optimizer runs on one element that nobody keeps.
        """
        one = {key: torch.zeros(1, dtype=torch.float32) for key in (MASTER, GRADIENT)}
        one |= {key: torch.zeros(1, dtype=dtype) for key, dtype in self.keys.items() if work.before[tensor] is not None}
        stand_in = Segment(0, 1, Tier.HOST, Tier.HOST, torch.empty(0), one)
        self._torch_step(work, stand_in, [Piece(tensor, 0, 1)])
        for key in stand_in.companions.keys() - one.keys():
            stand_in.drop(self._store, key)

    # -- torch -------------------------------------------------------------------------------------------------------

    def _joint_steps(self, work: ChunkWork, tensor: ChunkTensor) -> None:
        for start, stop in cut_blocks(tensor, work.segments):
            joined = join(work.segments, start, stop)
            known = set(joined.companions)
            self._torch_step(work, joined, [Piece(tensor, 0, stop - start)])
            put_back(work.segments, joined, self._store, work.native_step(tensor))
            for key in joined.companions.keys() - known:  # states of the first step
                joined.drop(self._store, key)

    def _is_fused(self, work: ChunkWork, tensor: ChunkTensor) -> bool:
        return not self._store.device.is_host and is_fused(self._kind, work.groups[tensor], self._fuses)

    def _device_step(self, work: ChunkWork, segment: Segment, pieces: list[Piece]) -> None:
        """On the device by the fused kernel, where that is what the optimizer is; else by torch's own optimizer."""
        by_kernel: dict[bool, list[Piece]] = {}
        for piece in pieces:
            by_kernel.setdefault(segment.updates_on_device and self._is_fused(work, piece.tensor), []).append(piece)
        if True in by_kernel:
            self._fused_step(work, segment, by_kernel[True])
        if False in by_kernel:
            self._torch_step(work, segment, by_kernel[False])

    def _fused_step(self, work: ChunkWork, segment: Segment, pieces: list[Piece]) -> None:
        for key in MOMENTS:
            self.keys[key] = torch.float32
            if not segment.codes(key):
                segment.companion(self._store, key, torch.float32)
        parts: list[FusedPiece] = []
        for piece in pieces:
            states = segment.decoded(segment.start + piece.start, segment.start + piece.stop)
            gradient = scaled(segment.companions[GRADIENT][piece.start : piece.stop], work.factor)
            parts.append(FusedPiece(states, gradient, work.groups[piece.tensor], work.native_step(piece.tensor)))
        fused_step(self._kind, parts)
        for piece, part in zip(pieces, parts, strict=True):
            self.scalars[piece.tensor] = scalars_after(self._kind, part.step)
            segment.encode(part.states, segment.start + piece.start, segment.start + piece.stop, part.step)

    def _torch_step(self, work: ChunkWork, segment: Segment, pieces: list[Piece]) -> None:
        by_group: dict[int, tuple[Group, list[torch.Tensor]]] = {}
        state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        owners: list[tuple[Piece, torch.Tensor]] = []
        for piece in pieces:
            states = segment.decoded(segment.start + piece.start, segment.start + piece.stop)
            master = states[MASTER]
            master.grad = scaled(segment.companions[GRADIENT][piece.start : piece.stop], work.factor)
            state[master] = self._state_of(states, work.before[piece.tensor])
            group = work.groups[piece.tensor]
            by_group.setdefault(id(group), (group, []))[1].append(master)
            owners.append((piece, master))
        shadow = self._shadow
        shadow.param_groups = [{**group, "params": params} for group, params in by_group.values()]
        shadow.state = state  # type: ignore[assignment]
        try:
            with torch.no_grad():
                run(shadow)
        finally:
            # Views of buffers that a plan may move: what is still held then does not leave the device.
            shadow.param_groups = []
            shadow.state = {}  # type: ignore[assignment]
        for piece, master in owners:
            master.grad = None
            self._keep(segment, piece, state[master])
            if segment.codec is not None:
                start, stop = segment.start + piece.start, segment.start + piece.stop
                segment.encode({MASTER: master, **state[master]}, start, stop, work.native_step(piece.tensor))

    def _state_of(self, states: dict[str, torch.Tensor], scalars: Scalars | None) -> dict[str, Any]:
        """The state a torch optimizer expects of a piece: views of companions, copies of scalars."""
        if scalars is None:
            return {}  # the optimizer makes its own on the first step
        state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in scalars.items()}
        state.update({key: states[key] for key in self.keys if key in states})
        return state

    def _keep(self, segment: Segment, piece: Piece, state: dict[str, Any]) -> None:
        """After a step: scalars to the tensor, elementwise states that are new to companions if they are not coded."""
        scalars: Scalars = {}
        for key, value in state.items():
            if not (isinstance(value, torch.Tensor) and value.dim() > 0):
                scalars[key] = value
                continue
            self.keys.setdefault(key, value.dtype)
            if segment.codes(key):
                continue
            companion = segment.companion(self._store, key, value.dtype)[piece.start : piece.stop]
            if companion.data_ptr() != value.data_ptr():
                companion.copy_(value)
        self.scalars[piece.tensor] = scalars

    # -- native ------------------------------------------------------------------------------------------------------

    def _native(self, kernel: NativeKernel, work: ChunkWork, segment: Segment) -> None:
        groups = {id(group): group for group in work.groups.values()}.values()
        keys = {key for group in groups for key in rule_of(self._kind, group, 1, True, 1.0).moments}
        fresh = not keys <= segment.companions.keys() and segment.codec is None  # momentum that was 0 until now
        for key in keys:
            self.keys[key] = torch.float32
            if not segment.codes(key):
                segment.companion(self._store, key, torch.float32)
        codec = segment.codec if isinstance(segment.codec, FormatCodec) else None
        out = segment.values if self._is_beside(segment) and not segment.master_is_values else None
        for part in work.native_runs(segment):
            held = segment.companions if codec is None else codec.leading(segment.companions, part.stop)
            kernel.step(
                rule_of(self._kind, part.group, part.step, part.first or fresh, work.factor),
                held,
                held[GRADIENT],
                out if codec is None else held[MASTER],
                form=FP32 if codec is None else codec.form,
                noise=None if codec is None else codec.noise(segment.start, part.step),
                start=part.start,
                stop=part.stop,
                num_threads=self._num_threads,
            )

    # -- new values --------------------------------------------------------------------------------------------------

    def _rounded(self, work: ChunkWork) -> list[torch.Tensor | None]:
        """New values where they lie beside the master; of each segment where they do not, what must cross the link."""
        crossing: list[torch.Tensor | None] = []
        for segment in work.segments:
            master = segment.companions[MASTER]
            if segment.codec is not None:  # it is their new values
                crossing.append(master if segment.values_cross else None)
                continue
            done = segment.master_is_values or (self._is_native(segment) and self._is_beside(segment))
            crosses = segment.values_cross and not done
            with self._on(segment):
                crossing.append(master.to(segment.values.dtype) if crosses else None)
            if not crosses and not done:
                segment.values.copy_(master)
        return crossing

    def _bring_values(self, work: ChunkWork, crossing: Sequence[torch.Tensor | None]) -> None:
        """Over the link, in the program's own thread: it alone knows what the device is doing."""
        for segment, rounded in zip(work.segments, crossing, strict=True):
            if rounded is None:
                continue
            if segment.value_tier is Tier.DEVICE:
                self._transfer.values_in(segment.values, rounded)
            else:
                self._transfer.values_out(segment.values, rounded)
