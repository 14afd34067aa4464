"""A chunk's first segment: parameters' values come to where they are at home, each original going as soon as it is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.codec import Codec
from gemini.exchange import Shard
from gemini.layout import Entry
from gemini.segment import MASTER, Homes, Segment
from gemini.store import Kind, Store
from gemini.tensor import ChunkTensor
from gemini.views import Read, view_of


def first_segment(
    tensors: Sequence[ChunkTensor],
    shard: Shard,
    store: Store,
    homes: Homes,
    keep_master: bool,
    codec: Codec | None,
    read: Read,
) -> Segment:
    """All of what is owned of a chunk, at home; the parameters are left with no elements.

    Args:
        tensors: of the chunk.
        shard: what is owned.
        store: gives memory.
        homes: where values and companions go.
        keep_master: make a master.
        codec: of master and states; None: the master is fp32, and states come later.
        read: gets the parameters' present values.
    """
    dtype = tensors[0].chunk.layout.dtype
    values = store.allocate(homes.values, Kind.PARAMETERS, shard.numel, dtype)
    segment = Segment(shard.start, shard.stop, homes.values, homes.companions, values, codec=codec)
    try:
        if codec is not None:
            segment.companions[MASTER] = values
            for part in codec.parts:
                segment.companion(store, part.key, part.dtype)
        elif keep_master and dtype == torch.float32:
            segment.companions[MASTER] = values
        elif keep_master:
            # Not segment.companion(): its zeros would be written just before the values are.
            segment.companions[MASTER] = store.allocate(homes.companions, Kind.MASTER, shard.numel, torch.float32)
    except (MemoryError, OSError):
        segment.free(store)
        raise
    for tensor in tensors:
        _read(tensor, segment, shard, store, read)
        tensor.bound = torch.empty(0, dtype=dtype, device=store.device.torch_device)
    for buffer in segment.on_disk():
        store.disk.let_go(buffer)
    return segment


def _read(tensor: ChunkTensor, segment: Segment, shard: Shard, store: Store, read: Read) -> None:
    entry = tensor.entry
    left = min(max(entry.offset, shard.start), entry.stop)
    right = max(left, min(entry.stop, shard.stop))  # of some parameters nothing is owned
    start = None if shard.is_whole else left - entry.offset
    if segment.codec is not None and tensor.parameter.dtype != segment.values.dtype:
        _read_coded(tensor, segment, start, left, right, store, read)
        return
    buffers = list({id(t): t for t in (segment.values, segment.companions.get(MASTER, segment.values))}.values())
    if start is None:
        read(tensor.parameter, None, [view_of(buffer, entry) for buffer in buffers])
        return
    parts = [buffer[left - shard.start : right - shard.start] for buffer in buffers]
    read(tensor.parameter, start, parts if left < right else [buffers[0][:0]])


def _read_coded(
    tensor: ChunkTensor, segment: Segment, start: int | None, left: int, right: int, store: Store, read: Read
) -> None:
    """Through fp32: one parameter's values are there twice for a moment."""
    master = torch.empty(right - left, dtype=torch.float32)
    target = view_of(master, Entry(tensor.entry.spec, 0)) if start is None else master
    read(tensor.parameter, start, [target], lambda: segment.write_values(store, master, left))
