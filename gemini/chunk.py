"""One chunk: its segments, its gathered buffer, and the state of each tensor in it.

One method per move of :data:`gemini.state.LEGAL_MOVES`. The gathered buffer is one storage whose memory is taken and
given back; parameters and every view that autograd saved stay views of it, so fetching again makes all of them valid
at once. A chunk whose values are wholly resident uses that resident buffer as its gathered buffer and is never free.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from gemini.codec import Codec
from gemini.device import Event, Pending
from gemini.exchange import ALONE, Exchange
from gemini.gradients import flat_gradient, must_widen, reserve, send
from gemini.holdings import Holdings
from gemini.layout import ChunkLayout, Entry, joined
from gemini.segment import AT_HOME, Homes, Placement, rebuild
from gemini.state import HOLDING, Move, TensorState, next_state
from gemini.store import Kind, Store, Tier
from gemini.takeover import first_segment
from gemini.tensor import ChunkTensor
from gemini.transfer import Transfer
from gemini.views import Read, poison_of, read_tensor, view_of

_READABLE = HOLDING | {TensorState.COMPUTE}


class Chunk(Holdings):
    """A contiguous buffer of whole parameters, and who may do what with it.

    Args:
        layout: what lies where.
        parameters: the tensors, in the layout's order; their present values are taken over and freed one by one.
        store: gives and counts memory.
        transfer: carries copies between tiers.
        keep_master: keep an fp32 master beside (or as) the values: the chunk will be trained.
        read: gets the parameters' present values.
        exchange: with the other processes that own a part of the chunk.
        homes: where values and companions are when they are not on the device.
        codec: of master and states; None: they are as they are, in fp32.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        parameters: list[torch.Tensor],
        store: Store,
        transfer: Transfer,
        keep_master: bool,
        read: Read = read_tensor,
        exchange: Exchange = ALONE,
        homes: Homes = AT_HOME,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(store, transfer, exchange.shard(layout))
        self._exchange = exchange
        self.homes = homes
        self.layout = layout
        self.index = layout.index
        self.tensors = [ChunkTensor(self, index, parameter) for index, parameter in enumerate(parameters)]
        self.codec = codec
        self._segments = [first_segment(self.tensors, self.shard, store, homes, keep_master, codec, read)]
        self._offsets = [entry.offset for entry in layout.entries]
        self._buffer: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        # Recorded by the fetch stream after the last fetch; computation waits on it at the first acquire.
        self._fetched: Event | None = None
        self._num_in_use = 0
        self.step = 0
        placeholder = torch.full((), poison_of(layout.dtype), dtype=layout.dtype, device=store.device.torch_device)
        self._placeholders = [placeholder.expand(e.spec.shape) for e in layout.entries]
        self._bind_placeholders()

    @property
    def numel(self) -> int:
        """Number of elements of all parameters, and of what aligns them."""
        return self.layout.numel

    @property
    def num_bytes(self) -> int:
        """Bytes of the gathered buffer."""
        return self.shard.gathered_numel * self.layout.dtype.itemsize

    @property
    def resident(self) -> bool:
        """Whether all values live on the device, so that no gathered copy is needed."""
        return self.shard.is_whole and len(self._segments) == 1 and self._segments[0].value_tier is Tier.DEVICE

    @property
    def on_device(self) -> bool:
        """Whether the gathered buffer has memory."""
        return self._buffer is not None and self._buffer.untyped_storage().nbytes() > 0

    @property
    def gathered_bytes(self) -> int:
        """Device bytes of the gathered copy: 0 when free, and 0 when resident (counted as parameters there)."""
        return self.num_bytes if self.on_device and not self.resident else 0

    # -- moves -------------------------------------------------------------------------------------------------------

    def _after(self, tensor: ChunkTensor, move: Move) -> TensorState:
        return next_state(move, tensor.state, chunk=self.index, tensor=tensor.name, step=self.step)

    def _move(self, tensor: ChunkTensor, move: Move) -> None:
        tensor.state = self._after(tensor, move)

    def fetch(self) -> None:
        """FREE -> HOLD for all tensors: memory under the buffer, values on their way.

        Raises:
            IllegalMoveError: the chunk is on the device already.
            torch.OutOfMemoryError: the device has no room.
        """
        after = [self._after(tensor, Move.FETCH) for tensor in self.tensors]
        self.settle_update()  # which may fail, or be interrupted: before memory is taken
        numel = self.shard.gathered_numel
        if self._buffer is None:
            self._buffer = self._store.allocate(Tier.DEVICE, Kind.GATHERED, numel, self.layout.dtype)
            self._views = [view_of(self._buffer, entry) for entry in self.layout.entries]
        else:
            self._store.device.take_again(self._buffer, numel)
            self._store.bytes_by[Tier.DEVICE, Kind.GATHERED] += self.num_bytes
        try:
            self._fill_buffer()
        except BaseException:  # another process is lost, or somebody has interrupted: the chunk is as free as before
            with contextlib.suppress(Exception):
                self._settle_fetch()  # what others may be writing there
            self._fetched = None
            self._store.free(Tier.DEVICE, Kind.GATHERED, self.buffer)
            raise
        for tensor, state, view in zip(self.tensors, after, self._views, strict=True):
            tensor.state = state
            tensor.bound = view

    def _fill_buffer(self) -> None:
        """Queues this process's own values on their way into the gathered buffer, and asks for the others'."""
        for segment in self.segments:
            target = self.buffer[segment.start : segment.stop]
            self._transfer.to_gathered(target, segment.values, segment.value_tier)
        self._fetched = self._transfer.fetched_event()
        if not self.shard.is_whole:
            self._exchange.complete(self)

    def gather(self, begin: Callable[[], Sequence[Pending]], num_bytes: int) -> None:
        """What others own comes by an exchange beside the program: whoever waits for the fetch waits for it, too.

        Args:
            begin: begins it.
            num_bytes: that come.
        """
        if self._fetched is None:
            raise RuntimeError(f"chunk {self.index}: nothing was fetched that an exchange could complete")
        self._fetched = self._transfer.gather(begin, num_bytes, self._fetched)

    def acquire(self, tensor: ChunkTensor) -> None:
        """HOLD or HOLD_AFTER_* -> COMPUTE; one more holder if it is in COMPUTE already."""
        if tensor.state is not TensorState.COMPUTE:
            self.settle_update()  # of resident values; others cannot have been fetched before
            self._move(tensor, Move.ACQUIRE)
            self._num_in_use += 1
            if self._fetched is not None:
                self._transfer.device.wait(self._fetched)
                self._fetched = None
        tensor.num_holders += 1

    def let_go(self, tensor: ChunkTensor, move: Move) -> None:
        """One holder less; the last one moves the tensor by LET_GO, END_FORWARD or END_BACKWARD.

        Raises:
            IllegalMoveError: nobody holds it. A gradient in the slot has dismissed all holders: their leaving is legal.
        """
        if tensor.state is TensorState.READY_FOR_REDUCE:
            return
        after = self._after(tensor, move)
        if tensor.num_holders == 1:
            tensor.state = after
            self._num_in_use -= 1
        tensor.num_holders -= 1

    def take_slot(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        """The gradient is complete: it takes the values' slot in the gathered buffer; holders are dismissed.

        Raises:
            IllegalMoveError: the tensor is free, or its slot is taken.
            RuntimeError: the values are resident: there is no copy of them to overwrite.
        """
        after = self._after(tensor, Move.TAKE_SLOT)
        if self.resident:
            raise RuntimeError(
                f"chunk {self.index}, tensor {tensor.name}: a gradient may not overwrite resident values"
            )
        self._settle_fetch()
        self._num_in_use -= tensor.state is TensorState.COMPUTE
        tensor.state = after
        tensor.num_holders = 0
        with torch.no_grad():
            self._views[tensor.position].copy_(gradient)

    def restore(self, tensor: ChunkTensor) -> None:
        """READY_FOR_REDUCE -> HOLD: the gradient goes to its owner, the values come back into the slot.

        Where others own values too, all slots are restored: what comes back is the whole buffer.
        """
        if not self.shard.is_whole:
            self._restore_all()
            return
        after = self._after(tensor, Move.RESTORE)
        with self._transfer.device.bookkeeping():
            self._send([tensor])
            self.settle_arrivals()  # the slot is written next
            for segment, start, stop in self.pieces(tensor.entry.offset, tensor.entry.stop):
                source = segment.values[start - segment.start : stop - segment.start]
                self._transfer.to_gathered(self.buffer[start:stop], source, segment.value_tier)
            self._fetched = self._transfer.fetched_event()
        tensor.state = after

    def _restore_all(self) -> None:
        ready = [tensor for tensor in self.tensors if tensor.state is TensorState.READY_FOR_REDUCE]
        after = [self._after(tensor, Move.RESTORE) for tensor in ready]
        with self._transfer.device.bookkeeping():
            self._send(ready)
            self.settle_arrivals()
            self._fill_buffer()
        for tensor, state in zip(ready, after, strict=True):
            tensor.state = state

    def reduce(self) -> None:
        """Sends every gradient that waits in a slot to its owner and gives the device memory back.

        Raises:
            IllegalMoveError: a tensor is in use, or nothing is on the device.
            HostMemoryError: the host has no room for the gradients, which stay where they are.
        """
        after = self._all_freed()
        self._send([t for t in self.tensors if t.state is TensorState.READY_FOR_REDUCE])
        self._to_free(after)

    def release(self) -> None:
        """Gives the device memory back; nothing in it needs saving.

        Raises:
            IllegalMoveError: a tensor is in use, or its slot holds a gradient.
        """
        self._to_free([self._after(tensor, Move.RELEASE) for tensor in self.tensors])

    def _all_freed(self) -> list[TensorState]:
        """The states after everything has left the device, each tensor by the move that its state asks for."""
        moves = [Move.REDUCE if t.state is TensorState.READY_FOR_REDUCE else Move.RELEASE for t in self.tensors]
        return [self._after(tensor, move) for tensor, move in zip(self.tensors, moves, strict=True)]

    def _to_free(self, after: list[TensorState]) -> None:
        if self.resident:
            raise RuntimeError(f"chunk {self.index}: resident values are moved by a placement, not released")
        if not self.shard.is_whole:
            self._settle_fetch()  # others still write there; of copies the allocator knows by itself
        self._bind_placeholders()
        self._store.free(Tier.DEVICE, Kind.GATHERED, self.buffer)
        self._fetched = None
        for tensor, state in zip(self.tensors, after, strict=True):
            tensor.state = state

    # -- questions ---------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether some tensor is in COMPUTE."""
        return self._num_in_use > 0

    @property
    def droppable(self) -> bool:
        """Whether the memory may be given back now, gradients being sent out first where there are any."""
        return self.on_device and not self.resident and not self.in_use

    @property
    def takes_slots(self) -> bool:
        """Whether gradients may overwrite values here: a gathered copy, never the resident values themselves."""
        return self.on_device and not self.resident

    # -- gradients ---------------------------------------------------------------------------------------------------

    def settle_gradients(self) -> None:
        """Where several processes train together, afterwards all know the same of every gradient."""
        self._exchange.settle_gradients()

    def before_forgetting(self) -> None:
        """Call it before gradients are dropped, which other processes may be about to add to."""
        self.undo_update()
        self._exchange.before_forgetting()

    def deliver(self, tensor: ChunkTensor, gradient: torch.Tensor) -> None:
        """Sends a gradient straight to its owner, without a slot: the chunk is free or resident, or the slot is taken."""
        with torch.no_grad():
            flat = flat_gradient(gradient, tensor.entry.spec)
            self.deliver_all({tensor: flat})
        if self.shard.is_whole:
            self._transfer.let_go(flat)  # it is autograd's, and may go when this returns

    def deliver_all(self, gradients: Mapping[ChunkTensor, torch.Tensor]) -> None:
        """Sends flat gradients without a slot; they must be kept until :meth:`settle_arrivals`."""
        if not self.shard.is_whole:
            self._send_to_owners(gradients, [(t.entry.offset, flat) for t, flat in gradients.items()])
            return
        self.settle_update()
        for tensor, flat in gradients.items():
            self._reserve(tensor, flat.dtype)
        for tensor, flat in gradients.items():
            first = not tensor.has_gradient
            self.expect(send(self._segments, self._store, self._transfer, tensor.entry.offset, flat, first))
            tensor.has_gradient = True

    def _reserve(self, tensor: ChunkTensor, dtype: torch.dtype) -> None:
        """Makes room for a gradient, so that sending it cannot fail."""
        start, stop, first = tensor.entry.offset, tensor.entry.stop, not tensor.has_gradient
        if not first and must_widen(self._segments, start, stop):
            self.settle_arrivals()  # what is on its way to the narrow one
        reserve(self._segments, self._store, start, stop, dtype, first)

    def _send(self, tensors: Sequence[ChunkTensor]) -> None:
        """Sends gradients out of their slots, neighbours in one copy. All or, where memory lacks, none.

        They are on their way when this returns; the slots may be given back, not written.
        """
        if not self.shard.is_whole:
            owned = joined([tensor.entry for tensor in tensors])
            self._send_to_owners(tensors, [(start, self.buffer[start:stop]) for start, stop in owned])
            return
        self.settle_update()
        runs: list[list[ChunkTensor]] = []
        for tensor in tensors:
            entry, before = tensor.entry, runs[-1][-1] if runs else None
            self._reserve(tensor, self.layout.dtype)
            if before and before.entry.stop == entry.offset and before.has_gradient == tensor.has_gradient:
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        for run in runs:
            start, stop = run[0].entry.offset, run[-1].entry.stop
            piece = self.buffer[start:stop]
            self.expect(send(self._segments, self._store, self._transfer, start, piece, not run[0].has_gradient))
            for tensor in run:
                tensor.has_gradient = True

    def _send_to_owners(self, tensors: Collection[ChunkTensor], runs: list[tuple[int, torch.Tensor]]) -> None:
        if tensors:
            self._exchange.reduce(self, runs)
        for tensor in tensors:
            tensor.has_gradient = True

    # -- placement and whole values ----------------------------------------------------------------------------------

    def place(self, placement: Placement) -> None:
        """Moves values and companions to the tiers a plan names. The chunk must not be in use.

        Raises:
            IllegalMoveError: a tensor is in use.
            torch.OutOfMemoryError: the device has no room; everything stays where it was.
            HostMemoryError: the host has no room; likewise.
        """
        stays = replace(placement, streams_update=False) == replace(self.placement, streams_update=False)
        if stays:
            self._streams_update = placement.streams_update
            return
        self.before_change()
        self._leave_device()
        try:
            self._segments = rebuild(self.segments, placement, self._store, self.homes)
            self._streams_update = placement.streams_update
        finally:
            if self.resident:
                self._enter_residence()

    def _leave_device(self) -> None:
        """No copy on the device, gradients sent, no transfer under way: segments may change."""
        if self.resident:
            self._leave_residence()
        elif self.on_device:
            self.reduce()
        # Host memory that a queued copy still reads must not go.
        self._store.device.synchronize()

    def _leave_residence(self) -> None:
        for tensor, state in zip(self.tensors, self._all_freed(), strict=True):
            tensor.state = state
        self._bind_placeholders()
        self._buffer, self._views = None, []

    def _enter_residence(self) -> None:
        self._buffer = self.segments[0].values
        self._views = [view_of(self._buffer, entry) for entry in self.layout.entries]
        for tensor, view in zip(self.tensors, self._views, strict=True):
            self._move(tensor, Move.FETCH)
            tensor.bound = view

    @property
    def buffer(self) -> torch.Tensor:
        """The gathered buffer.

        Raises:
            RuntimeError: the chunk was never gathered.
        """
        if self._buffer is None:
            raise RuntimeError(f"chunk {self.index} has no gathered buffer")
        return self._buffer

    @property
    def storage(self) -> torch.UntypedStorage:
        """The gathered buffer's storage: the same object for as long as the chunk is not resident."""
        return self.buffer.untyped_storage()

    def tensor_at(self, offset: int) -> ChunkTensor:
        """The tensor that owns the element at ``offset``."""
        return self.tensors[bisect_right(self._offsets, offset) - 1]

    def view_of(self, tensor: ChunkTensor) -> torch.Tensor:
        """The tensor's view of the gathered buffer; valid while the chunk is on the device."""
        return self._views[tensor.position]

    def values_of(self, tensor: ChunkTensor) -> torch.Tensor:
        """A host copy of one parameter's authoritative values, in its shape and compute dtype."""
        return self._whole(tensor.entry, None)

    def companion_of(self, tensor: ChunkTensor, key: str) -> torch.Tensor:
        """A host copy of one parameter's share of a companion, in its shape.

        Raises:
            KeyError: no segment of the tensor has such a companion.
        """
        return self._whole(tensor.entry, key)

    def _whole(self, entry: Entry, key: str | None) -> torch.Tensor:
        with self._transfer.device.bookkeeping():
            flat = self._exchange.read(self, entry, key)
        return flat.as_strided(entry.spec.shape, entry.spec.stride)

    def write_companion(self, tensor: ChunkTensor, key: str, data: torch.Tensor) -> None:
        """Writes one parameter's share of a companion, allocating the companion if need be."""
        self.put_companion(tensor.entry, key, data)

    def write_values(self, tensor: ChunkTensor, data: torch.Tensor) -> None:
        """Writes new values (and master), shape of the parameter, any float dtype. A gathered copy is dropped first."""
        if self.on_device and not self.resident:
            self.reduce()
        self.put_values(tensor.entry, data)

    def dissolve(self, keep_values: bool = True) -> None:
        """Gives everything back; the parameters become ordinary tensors with their values on the host, or empty ones."""
        if not keep_values:
            self.abandon_update()
        self.before_change()
        self._leave_device()
        nothing = torch.empty(0, dtype=self.layout.dtype)
        values = [self.values_of(tensor) if keep_values else nothing for tensor in self.tensors]
        for segment in self.segments:
            segment.free(self._store)
        self._segments = []
        for tensor, whole in zip(self.tensors, values, strict=True):
            tensor.bound = whole

    # -- inside ------------------------------------------------------------------------------------------------------

    def _settle_fetch(self) -> None:
        """A slot must not be overwritten while the fetch that fills it is still queued."""
        if self._fetched is not None:
            self._transfer.device.wait(self._fetched)
            self._fetched = None

    def _bind_placeholders(self) -> None:
        for tensor, placeholder in zip(self.tensors, self._placeholders, strict=True):
            if not tensor.is_shown:  # the user looks at a copy, whatever becomes of the chunk
                tensor.bound = placeholder

    def bind(self, tensor: ChunkTensor) -> None:
        """Points the parameter at where its values are: the chunk's memory on the device, or the placeholder."""
        bound = self._views if self.on_device else self._placeholders
        tensor.bound = bound[tensor.position]

    def check_integrity(self) -> None:
        """Raises RuntimeError if states, memory and segments contradict one another."""
        self.check_cover(self.index)
        if self.is_updating and self.gathered_bytes:
            raise RuntimeError(f"chunk {self.index}: gathered from values that an update is changing")
        if self._num_in_use != sum(tensor.state is TensorState.COMPUTE for tensor in self.tensors):
            raise RuntimeError(f"chunk {self.index}: {self._num_in_use} tensors in use were counted")
        for tensor in self.tensors:
            if (tensor.state is TensorState.FREE) == self.on_device:
                raise RuntimeError(f"chunk {self.index}: {tensor!r} while on_device is {self.on_device}")
            if (tensor.num_holders > 0) != (tensor.state is TensorState.COMPUTE):
                raise RuntimeError(f"chunk {self.index}: {tensor!r}: holders and state disagree")
            if self.resident and tensor.state is TensorState.READY_FOR_REDUCE:
                raise RuntimeError(f"chunk {self.index}: {tensor!r}: a gradient overwrote resident values")
            bound = tensor.address == self.view_of(tensor).data_ptr() if self._views else False
            if tensor.state in _READABLE and not bound and not tensor.is_shown:
                raise RuntimeError(f"chunk {self.index}: {tensor.name} does not point into its chunk")
