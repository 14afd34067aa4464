"""The tensors of a training state: which there are, in which slices this rank holds them, and their bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemini.codec import PIECE_NUMEL
from gemini.layout import ParameterSpec
from gemini.segment import GRADIENT as GRADIENT_KEY
from gemini.segment import MASTER
from gemini.tensor import ChunkTensor
from zero.checkpoint.background import Gate
from zero.checkpoint.codec import dtype_name
from zero.checkpoint.manifest import BUFFER, GRADIENT, OPTIMIZER, PARAMETER, Slice, rank_gradient
from zero.checkpoint.problems import CheckpointError
from zero.checkpoint.ranks import SavingRanks
from zero.checkpoint.tensorfile import Outgoing, as_bytes, in_blocks, storable

if TYPE_CHECKING:
    from zero.engine import Engine

MAX_FILE_BYTES = 1 << 30
"""Most bytes of tensors in one file; a larger tensor is cut into slices."""


@dataclass(frozen=True)
class Source:
    """A run of elements of one tensor that this rank has to write.

    Attributes:
        name: parameter or buffer.
        role: see :mod:`zero.checkpoint.manifest`.
        dtype: of the elements.
        shape: of the whole tensor.
        order: dimensions from slowest to fastest in memory; None is C order.
        start: first element of the flattened tensor.
        stop: first element after.
        chunk_tensor: where the elements are; None for a buffer.
        buffer: a buffer's values; None for a parameter.
    """

    name: str
    role: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    start: int
    stop: int
    chunk_tensor: ChunkTensor | None = None
    buffer: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the run."""
        return (self.stop - self.start) * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether the run is the tensor, in the usual order: it is then stored in its shape."""
        return self.order is None and self.stop - self.start == math.prod(self.shape)

    @property
    def key(self) -> str:
        """Name in the file."""
        return f"{self.role}/{self.name}" if self.whole else f"{self.role}/{self.name}[{self.start}:{self.stop}]"

    def cut(self, start: int, stop: int) -> Source:
        """A part of the run, in elements of the whole tensor."""
        return replace(self, start=start, stop=stop)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The elements as 1-D host tensors; views where they lie on the host."""
        if self.chunk_tensor is None:
            if self.buffer is not None:
                yield from in_blocks(self.buffer.detach().reshape(-1)[self.start : self.stop])
            return
        chunk, offset = self.chunk_tensor.chunk, self.chunk_tensor.entry.offset
        for segment, left, right in chunk.pieces_before_update(offset + self.start, offset + self.stop):
            # What is coded is read in parts: it comes as new tensors.
            step = PIECE_NUMEL if segment.codes(self._key) else right - left
            for at in range(left, right, step):
                for block in in_blocks(segment.read(self._key, at, min(at + step, right))):
                    yield block.to(self.dtype)

    @property
    def _key(self) -> str | None:
        """Companion that holds the elements; None for the values."""
        if self.role == PARAMETER:
            trained = self.chunk_tensor is not None and self.chunk_tensor.chunk.layout.trainable
            return MASTER if trained else None
        return GRADIENT_KEY if self.role.startswith(GRADIENT) else self.role.removeprefix(OPTIMIZER)

    def outgoing(self, gate: Gate | None = None) -> Outgoing:
        """As the file's writer takes it; the gate is told once it has."""
        shape = self.shape if self.whole else (self.stop - self.start,)
        return Outgoing(self.key, self.dtype, shape, partial(self._gated_blocks, gate))

    def _gated_blocks(self, gate: Gate | None) -> Iterator[torch.Tensor]:
        for block in self.blocks():
            if gate is not None:
                gate.require_open()
            yield block
        if gate is not None and self.chunk_tensor is not None:
            gate.taken(self.chunk_tensor.chunk)

    def slice_in(self, file: str) -> Slice:
        """As the manifest names it."""
        order = self.order
        return Slice(
            self.name, self.role, dtype_name(self.dtype), self.shape, order, self.start, self.stop, file, self.key
        )


def memory_order(spec: ParameterSpec) -> tuple[int, ...] | None:
    """Dimensions from slowest to fastest in a parameter's memory; None where that is C order."""
    dims = [dim for dim, length in enumerate(spec.shape) if length > 1]
    by_stride = sorted(dims, key=lambda dim: -spec.stride[dim])
    if by_stride == dims:
        return None
    return (*(dim for dim in range(len(spec.shape)) if dim not in dims), *by_stride)


def parameter_names(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter by its ``id``, in the order of ``named_parameters``."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def named_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Each buffer once: its name, the module that has it, its name there, its values."""
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), child, name, buffer


@dataclass(frozen=True)
class Contents:
    """All tensors that one rank writes.

    Attributes:
        gradients: of an open accumulation window; they change with the next micro-batch.
        buffers: change at any time.
        states: parameters and optimizer states, in the order of chunks, which is the order of updates.
    """

    gradients: list[Source]
    buffers: list[Source]
    states: list[Source]


def own_range(tensor: ChunkTensor) -> tuple[int, int]:
    """The elements of a parameter that this rank owns: the first, and the first after; equal where it owns none."""
    entry, shard = tensor.entry, tensor.chunk.shard
    start = min(max(entry.offset, shard.start), entry.stop)
    return start - entry.offset, max(start, min(entry.stop, shard.stop)) - entry.offset


def names_with_gradient(engine: Engine) -> list[str]:
    """Parameters that have gradients in an open accumulation window, as far as this rank knows."""
    return [t.name for t in engine._tensors.values() if engine._micro_step and t.has_gradient]


def collect(engine: Engine, include_frozen: bool, ranks: SavingRanks, with_gradient: set[str]) -> Contents:
    """All tensors that this rank writes: what it owns; of chunks that all ranks own, each rank writes some.

    Args:
        engine: whose.
        include_frozen: frozen values too.
        ranks: those that save.
        with_gradient: parameters that have gradients on any rank.
    """
    contents = Contents([], [], [])
    for tensor in sorted(engine._tensors.values(), key=lambda t: (t.chunk.index, t.position)):
        is_whole = tensor.chunk.shard.is_whole
        if tensor.name in with_gradient:
            tensor.chunk.settle_arrivals()  # blocks are read past what else waits for them
            contents.gradients.extend(_gradient_sources(tensor, ranks))
        if is_whole and tensor.chunk.index % ranks.size != ranks.rank:
            continue
        if tensor.chunk.layout.trainable or include_frozen:
            contents.states.extend(_owned(values_source(tensor)))
        for source in _state_sources(engine, tensor):
            contents.states.extend(_owned(source))
    if ranks.is_first:
        contents.buffers.extend(_buffer_source(name, buffer) for name, _, _, buffer in named_buffers(engine.module))
    for source in (*contents.buffers, *contents.states):
        if not storable(source.dtype):
            raise CheckpointError(f"{source.role} {source.name} has dtype {source.dtype}, which no checkpoint can hold")
    return contents


def _owned(source: Source) -> list[Source]:
    """The part of a parameter's source that this rank owns, if any."""
    if source.chunk_tensor is None:
        return [source]
    start, stop = own_range(source.chunk_tensor)
    return [source.cut(start, stop)] if start < stop else []


def _gradient_sources(tensor: ChunkTensor, ranks: SavingRanks) -> list[Source]:
    """Of chunks that several ranks own whole, each has summed its own micro-batches so far."""
    if not (tensor.chunk.shard.is_whole and ranks.size > 1):
        return _owned(_of(tensor, GRADIENT, torch.float32))
    return [_of(tensor, rank_gradient(ranks.rank), torch.float32)] if tensor.has_gradient else []


def values_source(tensor: ChunkTensor) -> Source:
    """A parameter's values: the fp32 master where it is trained."""
    return _of(tensor, PARAMETER, torch.float32 if tensor.chunk.layout.trainable else tensor.chunk.layout.dtype)


def _of(tensor: ChunkTensor, role: str, dtype: torch.dtype) -> Source:
    spec = tensor.entry.spec
    return Source(tensor.name, role, dtype, tuple(spec.shape), memory_order(spec), 0, spec.numel, chunk_tensor=tensor)


def _state_sources(engine: Engine, tensor: ChunkTensor) -> list[Source]:
    if engine.optimizer is None or tensor not in engine.optimizer.updater.scalars:
        return []
    pieces = tensor.chunk.pieces(tensor.entry.offset, tensor.entry.stop)
    return [
        _of(tensor, OPTIMIZER + key, dtype)
        for key, dtype in engine.optimizer.updater.keys.items()
        if all(key in segment.keys for segment, _, _ in pieces)
    ]


def _buffer_source(name: str, buffer: torch.Tensor) -> Source:
    return Source(name, BUFFER, buffer.dtype, tuple(buffer.shape), None, 0, buffer.numel(), buffer=buffer)


def copied(sources: Iterable[Source]) -> list[Source]:
    """Buffers as they are now, on the host."""
    return [s if s.buffer is None else replace(s, buffer=s.buffer.detach().cpu().clone()) for s in sources]


def into_files(sources: list[Source]) -> list[list[Source]]:
    """Cuts and groups runs so that no file has more than :data:`MAX_FILE_BYTES` of tensors."""
    files: list[list[Source]] = []
    filled_bytes = MAX_FILE_BYTES
    for source in sources:
        for part in _cut_large(source):
            if filled_bytes + part.num_bytes > MAX_FILE_BYTES:
                files.append([])
                filled_bytes = 0
            files[-1].append(part)
            filled_bytes += part.num_bytes
    return files


def _cut_large(source: Source) -> Iterator[Source]:
    most = max(1, MAX_FILE_BYTES // source.dtype.itemsize)
    if source.stop - source.start <= most:
        yield source
        return
    for start in range(source.start, source.stop, most):
        yield source.cut(start, min(start + most, source.stop))


def values_sha256(tensor: ChunkTensor) -> str:
    """Hash of a parameter's values in memory order: what stands for frozen values that are not stored.

    All ranks must ask, where each owns a part.
    """
    digest = hashlib.sha256()
    if tensor.chunk.shard.is_whole:
        blocks = values_source(tensor).blocks()
    else:  # of frozen values, which have no master, so the others' parts come as they are
        blocks = in_blocks(tensor.chunk.values_of(tensor).as_strided((tensor.entry.spec.numel,), (1,)))
    for block in blocks:
        digest.update(as_bytes(block.contiguous()))
    return digest.hexdigest()
