"""Blocks of a parameter that a border between segments cuts, for optimizers whose kernels round by position.

torch's fused CPU kernels go through a parameter in vectors and finish with single elements, which round differently. A
piece gives the same bits as the whole parameter only if it begins and ends at a whole number of vectors. What the
border cuts is therefore put together, updated as one, and put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.exchange import Shard
from gemini.layout import Entry
from gemini.segment import GRADIENT, Segment, overlaps
from gemini.store import Store, Tier
from gemini.tensor import ChunkTensor

BLOCK_NUMEL = 64
"""Elements, counted from the parameter's first; the unit in which torch's fused kernels divide work."""


def whole_blocks(entry: Entry, shard: Shard, left: int, right: int) -> tuple[int, int]:
    """The part of ``[left, right)`` (chunk elements of one parameter) that consists of whole blocks.

    What the shard's own ends cut is left in: the rest of such a block is with another process.
    """
    if left > shard.start:
        left += -(left - entry.offset) % BLOCK_NUMEL
    if right < min(entry.stop, shard.stop):
        right -= (right - entry.offset) % BLOCK_NUMEL
    return left, right


def cut_blocks(tensor: ChunkTensor, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Blocks of a parameter with a border between ``segments`` inside, in chunk elements, as far as they are owned."""
    entry, shard = tensor.entry, tensor.chunk.shard
    last = min(entry.stop, shard.stop)
    starts: dict[int, None] = {}
    for _, _, border in overlaps(segments, entry.offset, entry.stop):
        beyond = (border - entry.offset) % BLOCK_NUMEL
        if border < last and beyond:
            starts[max(border - beyond, shard.start)] = None
    return [(start, min(start + BLOCK_NUMEL, last)) for start in starts]


def join(segments: Sequence[Segment], start: int, stop: int) -> Segment:
    """A segment of host copies of the block's companions, none of them coded."""
    pieces = list(overlaps(segments, start, stop))
    keys = [key for key in pieces[0][0].keys if all(key in segment.keys for segment, _, _ in pieces)]
    parts = {key: [segment.read(key, left, right) for segment, left, right in pieces] for key in keys}
    companions = {key: torch.cat([part.cpu() for part in of_key]) for key, of_key in parts.items()}
    return Segment(start, stop, Tier.HOST, Tier.HOST, torch.empty(0), companions)


def put_back(segments: Sequence[Segment], joined: Segment, store: Store, step: int) -> None:
    """Writes what has become of a joined block in an update to the segments that own it."""
    for segment, left, right in overlaps(segments, joined.start, joined.stop):
        inside = slice(left - joined.start, right - joined.start)
        states = {key: values[inside] for key, values in joined.companions.items() if key != GRADIENT}
        segment.write(store, states, left, step)
