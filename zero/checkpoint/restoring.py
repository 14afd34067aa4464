"""Puts a checkpoint's tensors where an engine keeps them: of each slice only what this rank owns is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from gemini.segment import GRADIENT as GRADIENT_KEY
from gemini.segment import MASTER
from gemini.tensor import ChunkTensor
from zero.checkpoint.codec import dtype_of
from zero.checkpoint.contents import memory_order, named_buffers, own_range
from zero.checkpoint.manifest import BUFFER, GRADIENT, OPTIMIZER, PARAMETER, Manifest, Slice, rank_gradient
from zero.checkpoint.ranks import SavingRanks
from zero.checkpoint.reading import Block, TensorReader

if TYPE_CHECKING:
    from zero.engine import Engine


def files_to_read(engine: Engine, manifest: Manifest) -> set[str]:
    """Tensor files that this rank will read from."""
    by_name = {tensor.name: tensor for tensor in engine._tensors.values()}
    files = set()
    for part in manifest.tensors:
        if part.role == BUFFER or part.role.startswith(f"{GRADIENT}/"):
            files.add(part.file)
        elif part.name in by_name:
            start, stop = _wanted(by_name[part.name], part)
            if max(start, part.start) < min(stop, part.stop):
                files.add(part.file)
    return files


def _wanted(tensor: ChunkTensor, part: Slice) -> tuple[int, int]:
    """Elements of the stored tensor that this rank needs: all, where their order differs from that in memory here."""
    return own_range(tensor) if part.order == memory_order(tensor.entry.spec) else (0, part.numel)


def restore_tensors(engine: Engine, ranks: SavingRanks, manifest: Manifest, reader: TensorReader) -> list[str]:
    """Reads everything that this rank holds.

    Returns:
        What will make results differ, a line each.

    Raises:
        DamagedError, OSError: a file cannot be read; a part of the state has been replaced.
    """
    _forget_states(engine)
    by_name = {tensor.name: tensor for tensor in engine._tensors.values()}
    buffers = {name: (child, own, buffer) for name, child, own, buffer in named_buffers(engine.module)}
    gradients: dict[str, dict[str, list[Slice]]] = {}
    notes = []
    for (role, name), parts in manifest.by_tensor().items():
        if role == BUFFER:
            if name in buffers:
                _restore_buffer(*buffers[name], reader.whole(parts))
        elif role.startswith(GRADIENT):
            gradients.setdefault(name, {})[role] = parts
        elif role == PARAMETER or engine.optimizer is not None:
            tensor = by_name[name]
            for start, block in _own_blocks(tensor, parts, reader):
                _put(engine, tensor, role, start, block)
            notes += _other_dtype(tensor, role, parts)
    for name, by_role in gradients.items():
        _restore_gradient(engine, ranks, by_name[name], by_role, manifest.world.get("size", 1), reader)
    return notes


def _other_dtype(tensor: ChunkTensor, role: str, parts: list[Slice]) -> list[str]:
    layout = tensor.chunk.layout
    if role != PARAMETER or layout.trainable or dtype_of(parts[0].dtype) == layout.dtype:
        return []
    return [f"parameter {tensor.name} is frozen and was {parts[0].dtype}: it is {layout.dtype} here, so results differ"]


def _forget_states(engine: Engine) -> None:
    """Optimizer states and gradients of the engine's own past."""
    store = engine.manager.store
    for chunk in engine.manager.chunks:
        for segment in chunk.segments:
            states = [key for key in segment.keys if key != MASTER]
            zeros = torch.zeros(segment.numel if segment.codec is not None else 0)
            segment.write(store, {key: zeros for key in states if segment.codes(key)}, segment.start)
            for key in states:
                if not segment.codes(key):
                    segment.drop(store, key)
        chunk.has_sums = False
        for tensor in chunk.tensors:
            tensor.has_gradient, tensor.gradient_norm = False, None
    if engine.optimizer is not None:
        engine.optimizer.updater.scalars.clear()
        engine.optimizer.updater.keys.clear()


def _restore_buffer(module: torch.nn.Module, name: str, buffer: torch.Tensor, values: torch.Tensor) -> None:
    if buffer.shape == values.shape:
        buffer.copy_(values)
    else:  # a cache that had grown: only buffers that no file of a model holds may have another shape
        module._buffers[name] = values.to(device=buffer.device, dtype=buffer.dtype)


def _own_blocks(tensor: ChunkTensor, parts: list[Slice], reader: TensorReader) -> Iterator[Block]:
    """A stored tensor's elements in this parameter's order, as far as this rank owns them."""
    start, stop = own_range(tensor)
    order = memory_order(tensor.entry.spec)
    if start >= stop:
        return
    if parts[0].order == order:
        for part in parts:
            yield from reader.blocks(part, start, stop)
        return
    whole = reader.whole(parts)
    flat = whole.permute(order) if order is not None else whole
    yield start, flat.reshape(-1)[start:stop]


def _put(engine: Engine, tensor: ChunkTensor, role: str, start: int, block: torch.Tensor) -> None:
    """Writes elements of a parameter, in memory order from ``start`` on, to wherever they live."""
    chunk, first = tensor.chunk, tensor.entry.offset + start
    for segment, left, right in chunk.pieces(first, first + block.numel()):
        source = block[left - first : right - first]
        if role == PARAMETER:
            segment.write_values(engine.manager.store, source, left)
        else:
            key = GRADIENT_KEY if role == GRADIENT else role.removeprefix(OPTIMIZER)
            segment.write(engine.manager.store, {key: source}, left)


# -- gradients of an open window -------------------------------------------------------------------------------------


def _restore_gradient(
    engine: Engine,
    ranks: SavingRanks,
    tensor: ChunkTensor,
    by_role: dict[str, list[Slice]],
    num_written: int,
    reader: TensorReader,
) -> None:
    """The sums so far: over all ranks where each owns a part, else this rank's own.

    What ranks had summed apart is one mean for a run that divides the work anew.
    """
    is_whole, same = tensor.chunk.shard.is_whole, ranks.size == num_written
    own = rank_gradient(ranks.rank)
    if GRADIENT in by_role:
        for start, block in _own_blocks(tensor, by_role[GRADIENT], reader):
            _put(engine, tensor, GRADIENT, start, block)
    elif is_whole and same:
        if own not in by_role:
            return  # other ranks have one
        for start, block in _own_blocks(tensor, by_role[own], reader):
            _put(engine, tensor, GRADIENT, start, block)
    else:
        _put_mean(engine, tensor, by_role, num_written, reader)
    tensor.has_gradient = True
    tensor.chunk.has_sums = not is_whole


def _put_mean(
    engine: Engine, tensor: ChunkTensor, by_role: dict[str, list[Slice]], num_written: int, reader: TensorReader
) -> None:
    start, stop = own_range(tensor)
    total = torch.zeros(stop - start, dtype=torch.float32)
    for _, parts in sorted(by_role.items()):
        for first, block in _own_blocks(tensor, parts, reader):
            total[first - start : first - start + block.numel()] += block
    if start < stop:
        _put(engine, tensor, GRADIENT, start, total / num_written)
