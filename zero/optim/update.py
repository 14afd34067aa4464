"""The update of one chunk: torch's own arithmetic on pieces, or the native kernel in one pass."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemini.chunk import Chunk
from gemini.plan import ChunkFacts
from gemini.segment import GRADIENT, MASTER, Segment
from gemini.store import Store, Tier
from gemini.tensor import ChunkTensor
from gemini.transfer import Transfer
from zero.optim.elementwise import run, shadow_of
from zero.optim.native import NativeKernel
from zero.optim.straddle import BLOCK_NUMEL, cut_blocks, join, put_back, whole_blocks

Group = dict[str, Any]


def device_piece_numel(capacity_bytes: int) -> int:
    """Most elements per torch call on a device: temporaries count against its capacity, so they get a small share.

    In whole blocks, as torch's fused kernels take them: see :mod:`zero.optim.straddle`.
    """
    return min(1 << 24, max(1 << 10, capacity_bytes // 1024)) // BLOCK_NUMEL * BLOCK_NUMEL


def step_bytes(facts: Sequence[ChunkFacts], temporary_bytes_per_numel: int, capacity_bytes: int) -> int:
    """Temporaries of an optimizer step on a device of this capacity, where companions lie on it.

    Args:
        facts: of all chunks.
        temporary_bytes_per_numel: see :func:`zero.optim.elementwise.temporary_bytes_per_numel`.
        capacity_bytes: of the device.
    """
    trained = [fact for fact in facts if fact.companion_bytes_per_numel]
    most_numel = min(device_piece_numel(capacity_bytes), max((fact.numel for fact in trained), default=0))
    narrow_numel = max((fact.numel for fact in trained if fact.value_itemsize < 4), default=0)
    # A piece's gradient in fp32 and the optimizer's own; a whole gradient in fp32 while its norm is taken.
    return max(most_numel * (4 + temporary_bytes_per_numel), 4 * narrow_numel)


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter inside one segment, in segment elements."""

    tensor: ChunkTensor
    start: int
    stop: int


class ChunkUpdater:
    """Updates chunks with a user's optimizer.

    Args:
        optimizer: the user's; its class and groups give arithmetic and hyperparameters.
        store: gives memory for states that appear on the first step.
        transfer: carries new values between tiers.
        kernel: the native kernel, or None for torch's arithmetic.
        piece_numel: most elements per torch call on the host: what stays in cache, and what temporaries may take.
        device_piece_numel: the same on the device, where temporaries count against its capacity.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        store: Store,
        transfer: Transfer,
        kernel: NativeKernel | None,
        piece_numel: int = 1 << 20,
        device_piece_numel: int = 1 << 20,
    ) -> None:
        self._shadow = shadow_of(optimizer)
        self._groups: dict[ChunkTensor, Group] = {}
        self._store = store
        self._transfer = transfer
        self._kernel = kernel
        self._piece_numel = {Tier.HOST: piece_numel, Tier.DEVICE: device_piece_numel}
        self.scalars: dict[ChunkTensor, dict[str, Any]] = {}
        self.keys: dict[str, torch.dtype] = {}

    def use_groups(self, group_of: dict[ChunkTensor, Group]) -> None:
        """From now on these tensors are updated, each with the hyperparameters of its group."""
        self._groups = group_of

    def forget(self, tensor: ChunkTensor) -> None:
        """The tensor has no states any more: its next update is its first."""
        self.scalars.pop(tensor, None)
        tensor.chunk.before_change()
        for segment, left, right in tensor.chunk.pieces(tensor.entry.offset, tensor.entry.stop):
            for key in self.keys.keys() & segment.companions.keys():
                segment.companions[key][left - segment.start : right - segment.start].zero_()

    def makes_states_on_device(self, chunks: list[Chunk]) -> bool:
        """Whether the next update creates states in places that a plan has given to states already there."""
        return any(
            tensor.has_gradient and tensor in self._groups and tensor not in self.scalars
            for chunk in chunks
            if chunk.placement.companion_numel and self.keys
            for tensor in chunk.tensors
        )

    def update(self, chunk: Chunk, factor: float) -> None:
        """One optimizer step on every parameter of the chunk that has a gradient.

        Args:
            chunk: trainable, with no gathered copy on the device.
            factor: gradients are multiplied by it first (1 / loss scale x clip coefficient).
        """
        if not any(tensor.has_gradient and tensor in self._groups for tensor in chunk.tensors):
            return
        chunk.before_change()
        before = {tensor: self.scalars.get(tensor) for tensor in chunk.tensors}
        for segment in chunk.segments:
            with self._on(segment):
                if self._kernel is not None and segment.companion_tier is Tier.HOST:
                    self._native(chunk, segment, factor, before)
                else:
                    self._torch(chunk, segment, factor, before)
        for tensor in chunk.tensors:
            if tensor.has_gradient and self._rounds_by_position(tensor):
                self._joint_steps(tensor, factor, before)
        self._count_elsewhere(chunk, before)
        for segment in chunk.segments:
            with self._on(segment):
                self._publish(segment)

    def _count_elsewhere(self, chunk: Chunk, before: dict[ChunkTensor, dict[str, Any] | None]) -> None:
        """Step counts and the like of parameters that only others own a part of: all processes know the same of them.

        Such scalars do not depend on values, so the optimizer runs on one element that nobody keeps.
        """
        for tensor in chunk.tensors:
            owned = next(iter(chunk.pieces(tensor.entry.offset, tensor.entry.stop)), None) is not None
            if owned or not tensor.has_gradient or tensor not in self._groups:
                continue
            one = {key: torch.zeros(1) for key in (MASTER, GRADIENT)}
            one |= {key: torch.zeros(1, dtype=dtype) for key, dtype in self.keys.items() if before[tensor] is not None}
            stand_in = Segment(0, 1, Tier.HOST, Tier.HOST, torch.empty(0), one)
            known = set(one)
            self._torch_step(stand_in, [Piece(tensor, 0, 1)], 1.0, before)
            for key in stand_in.companions.keys() - known:
                stand_in.drop(self._store, key)
            if self._kernel is not None:
                self.scalars[tensor] = {"step": torch.tensor(float(self.scalars[tensor]["step"]))}

    def _on(self, segment: Segment) -> contextlib.AbstractContextManager[Any]:
        on_device = segment.companion_tier is Tier.DEVICE
        return self._store.device.activity() if on_device else contextlib.nullcontext()

    # -- torch -------------------------------------------------------------------------------------------------------

    def _rounds_by_position(self, tensor: ChunkTensor) -> bool:
        return self._kernel is None and bool(self._groups.get(tensor, {}).get("fused"))

    def _joint_steps(
        self, tensor: ChunkTensor, factor: float, before: dict[ChunkTensor, dict[str, Any] | None]
    ) -> None:
        for start, stop in cut_blocks(tensor):
            joined = join(tensor, start, stop)
            known = set(joined.companions)
            self._torch_step(joined, [Piece(tensor, 0, stop - start)], factor, before)
            put_back(tensor, joined, self._store)
            for key in joined.companions.keys() - known:  # states of the first step
                joined.drop(self._store, key)

    def _torch(
        self, chunk: Chunk, segment: Segment, factor: float, before: dict[ChunkTensor, dict[str, Any] | None]
    ) -> None:
        for pieces in self._batches(chunk, segment):
            self._torch_step(segment, pieces, factor, before)

    def _torch_step(
        self, segment: Segment, pieces: list[Piece], factor: float, before: dict[ChunkTensor, dict[str, Any] | None]
    ) -> None:
        by_group: dict[int, tuple[Group, list[torch.Tensor]]] = {}
        state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        owners: list[tuple[Piece, torch.Tensor]] = []
        for piece in pieces:
            master = segment.companions[MASTER][piece.start : piece.stop]
            gradient = segment.companions[GRADIENT][piece.start : piece.stop].to(torch.float32)
            master.grad = gradient.mul_(factor) if factor != 1.0 else gradient
            state[master] = self._state_of(segment, piece, before[piece.tensor])
            group = self._groups[piece.tensor]
            by_group.setdefault(id(group), (group, []))[1].append(master)
            owners.append((piece, master))
        self._shadow.param_groups = [{**group, "params": params} for group, params in by_group.values()]
        self._shadow.state = state  # type: ignore[assignment]
        try:
            with torch.no_grad():
                run(self._shadow)
        finally:
            # Views of buffers that a plan may move: what is still held then does not leave the device.
            self._shadow.param_groups = []
            self._shadow.state = {}  # type: ignore[assignment]
        for piece, master in owners:
            self._keep(segment, piece, state[master])
            master.grad = None

    def _state_of(self, segment: Segment, piece: Piece, scalars: dict[str, Any] | None) -> dict[str, Any]:
        """The state a torch optimizer expects of this piece: views of companions, copies of scalars."""
        if scalars is None:
            return {}  # the optimizer makes its own on the first step
        state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in scalars.items()}
        for key in self.keys:
            if key in segment.companions:
                state[key] = segment.companions[key][piece.start : piece.stop]
        return state

    def _keep(self, segment: Segment, piece: Piece, state: dict[str, Any]) -> None:
        """After a step: scalars to the tensor, elementwise states that are new to companions."""
        scalars: dict[str, Any] = {}
        for key, value in state.items():
            if not (isinstance(value, torch.Tensor) and value.dim() > 0):
                scalars[key] = value
                continue
            self.keys.setdefault(key, value.dtype)
            companion = segment.companion(self._store, key, value.dtype)[piece.start : piece.stop]
            if companion.data_ptr() != value.data_ptr():
                companion.copy_(value)
        self.scalars[piece.tensor] = scalars

    # -- native ------------------------------------------------------------------------------------------------------

    def _native(
        self, chunk: Chunk, segment: Segment, factor: float, before: dict[ChunkTensor, dict[str, Any] | None]
    ) -> None:
        kernel = self._kernel
        if kernel is None:
            raise RuntimeError("no native kernel")
        moments = [segment.companion(self._store, key, torch.float32) for key in ("exp_avg", "exp_avg_sq")]
        self.keys.update(exp_avg=torch.float32, exp_avg_sq=torch.float32)
        writes_values = segment.value_tier is Tier.HOST and not segment.master_is_values
        for start, stop, group, step in self._native_runs(chunk, segment, before):
            inside = slice(start, stop)
            kernel.adamw(
                segment.companions[MASTER][inside],
                moments[0][inside],
                moments[1][inside],
                segment.companions[GRADIENT][inside],
                segment.values[inside] if writes_values else None,
                lr=float(group["lr"]),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                step=step,
                grad_scale=factor,
                decoupled=bool(group.get("decoupled_weight_decay", False)),
                maximize=bool(group.get("maximize", False)),
            )

    def _native_runs(
        self, chunk: Chunk, segment: Segment, before: dict[ChunkTensor, dict[str, Any] | None]
    ) -> Iterator[tuple[int, int, Group, int]]:
        """Neighbouring parameters of one group and one step count, merged: one kernel call each."""
        run_: tuple[int, int, Group, int] | None = None
        for piece in self._pieces(chunk, segment):
            group = self._groups[piece.tensor]
            step = int((before[piece.tensor] or {}).get("step", 0)) + 1
            self.scalars[piece.tensor] = {"step": torch.tensor(float(step))}
            if run_ is not None and run_[1] == piece.start and run_[2] is group and run_[3] == step:
                run_ = (run_[0], piece.stop, group, step)
                continue
            if run_ is not None:
                yield run_
            run_ = (piece.start, piece.stop, group, step)
        if run_ is not None:
            yield run_

    # -- common ------------------------------------------------------------------------------------------------------

    def _pieces(self, chunk: Chunk, segment: Segment) -> Iterator[Piece]:
        for tensor in chunk.tensors:
            left = max(tensor.entry.offset, segment.start)
            right = min(tensor.entry.stop, segment.stop)
            if self._rounds_by_position(tensor):
                left, right = whole_blocks(tensor.entry, chunk.shard, left, right)
            if tensor.has_gradient and tensor in self._groups and left < right:
                yield Piece(tensor, left - segment.start, right - segment.start)

    def _batches(self, chunk: Chunk, segment: Segment) -> Iterator[list[Piece]]:
        """Pieces in groups of at most ``piece_numel`` elements; a larger parameter is cut.

        Cutting changes no bit: elementwise kernels give the same result for an element wherever it stands.
        """
        most = self._piece_numel[segment.companion_tier]
        batch: list[Piece] = []
        filled = 0
        for piece in self._pieces(chunk, segment):
            for start in range(piece.start, piece.stop, most):
                part = Piece(piece.tensor, start, min(start + most, piece.stop))
                if batch and filled + part.stop - part.start > most:
                    yield batch
                    batch, filled = [], 0
                batch.append(part)
                filled += part.stop - part.start
        if batch:
            yield batch

    def _publish(self, segment: Segment) -> None:
        """New values from the master, wherever both lie."""
        if segment.master_is_values:
            return
        master = segment.companions[MASTER]
        if segment.value_tier is segment.companion_tier:
            if not (self._kernel is not None and segment.companion_tier is Tier.HOST):
                segment.values.copy_(master)
            return
        rounded = master.to(segment.values.dtype)
        if segment.value_tier is Tier.DEVICE:
            self._transfer.values_in(segment.values, rounded)
        else:
            self._transfer.values_out(segment.values, rounded)
