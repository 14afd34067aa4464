"""The tensors of a training state: which there are, in which slices this rank holds them, and their bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemini.chunk import ChunkTensor
from gemini.layout import ParameterSpec
from gemini.segment import GRADIENT as GRADIENT_KEY
from gemini.segment import MASTER
from zero.checkpoint.codec import dtype_name
from zero.checkpoint.manifest import BUFFER, GRADIENT, OPTIMIZER, PARAMETER, Slice
from zero.checkpoint.problems import CheckpointError
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
        fields = (self.name, self.role, self.dtype, self.shape, self.order)
        return Source(*fields, start, stop, self.chunk_tensor, self.buffer)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The elements as 1-D host tensors; views where they lie on the host."""
        if self.chunk_tensor is None:
            if self.buffer is not None:
                yield from in_blocks(self.buffer.detach().reshape(-1)[self.start : self.stop])
            return
        chunk, offset = self.chunk_tensor.chunk, self.chunk_tensor.entry.offset
        for segment, left, right in chunk.pieces(offset + self.start, offset + self.stop):
            held = segment.values if self._key is None else segment.companions[self._key]
            for block in in_blocks(held[left - segment.start : right - segment.start]):
                yield block.to(self.dtype)

    @property
    def _key(self) -> str | None:
        """Companion that holds the elements; None for the values."""
        if self.role == PARAMETER:
            trained = self.chunk_tensor is not None and self.chunk_tensor.chunk.layout.trainable
            return MASTER if trained else None
        return GRADIENT_KEY if self.role == GRADIENT else self.role.removeprefix(OPTIMIZER)

    def outgoing(self) -> Outgoing:
        """As the file's writer takes it."""
        shape = self.shape if self.whole else (self.stop - self.start,)
        return Outgoing(self.key, self.dtype, shape, self.blocks)

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


def collect(engine: Engine, include_frozen: bool) -> list[Source]:
    """All tensors that this rank writes: parameters, their optimizer states and gradients, and buffers."""
    sources: list[Source] = []
    for tensor in engine._tensors.values():
        if tensor.chunk.layout.trainable or include_frozen:
            sources.append(values_source(tensor))
        sources += _state_sources(engine, tensor)
        if engine._micro_step and tensor.has_gradient:
            sources.append(_of(tensor, GRADIENT, torch.float32))
    sources += [_buffer_source(name, buffer) for name, _, _, buffer in named_buffers(engine.module)]
    for source in sources:
        if not storable(source.dtype):
            raise CheckpointError(f"{source.role} {source.name} has dtype {source.dtype}, which no checkpoint can hold")
    return sources


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
        if all(key in segment.companions for segment, _, _ in pieces)
    ]


def _buffer_source(name: str, buffer: torch.Tensor) -> Source:
    return Source(name, BUFFER, buffer.dtype, tuple(buffer.shape), None, 0, buffer.numel(), buffer=buffer)


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
    """Hash of a parameter's values in memory order: what stands for frozen values that are not stored."""
    digest = hashlib.sha256()
    for block in values_source(tensor).blocks():
        digest.update(as_bytes(block.contiguous()))
    return digest.hexdigest()
