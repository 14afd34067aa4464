"""Gradients on their way to the segments that own them.

The first gradient of a step keeps its dtype; sums over micro-batches are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.layout import ParameterSpec
from gemini.segment import GRADIENT, Segment, overlaps
from gemini.store import Kind, Store
from gemini.transfer import Arrival, Transfer


def flat_gradient(gradient: torch.Tensor, spec: ParameterSpec) -> torch.Tensor:
    """A gradient's elements in the order in which its parameter's lie in the chunk."""
    if gradient.stride() == spec.stride:  # the usual case: its memory, in order, is what the owner wants
        return gradient.as_strided((spec.numel,), (1,))
    flat = torch.empty(spec.numel, dtype=gradient.dtype, device=gradient.device)
    flat.as_strided(spec.shape, spec.stride).copy_(gradient)
    return flat


def reserve(segments: Sequence[Segment], store: Store, start: int, stop: int, dtype: torch.dtype, first: bool) -> None:
    """Makes room for the gradient of elements ``[start, stop)`` with its owners, so that sending it cannot fail.

    Args:
        segments: of the chunk.
        store: gives memory.
        start: first element of the chunk.
        stop: first element after.
        dtype: of the gradient.
        first: nothing of these elements has come since the last ``zero_grad``.

    Raises:
        torch.OutOfMemoryError: the device has no room.
        HostMemoryError: the host has no room.
    """
    for segment, _, _ in overlaps(segments, start, stop):
        _owned(segment, store, dtype if first else torch.float32)


def must_widen(segments: Sequence[Segment], start: int, stop: int) -> bool:
    """Whether a sum over elements ``[start, stop)`` needs other memory than the gradient that is there."""
    owners = [segment.companions.get(GRADIENT) for segment, _, _ in overlaps(segments, start, stop)]
    return any(present is not None and present.dtype != torch.float32 for present in owners)


def send(
    segments: Sequence[Segment], store: Store, transfer: Transfer, start: int, source: torch.Tensor, first: bool
) -> list[Arrival]:
    """Copies a gradient to its owners, or adds it; returns what is still on its way.

    Args:
        segments: of the chunk.
        store: gives memory; none is asked for after :func:`reserve`.
        transfer: carries the bytes.
        start: first element of the chunk.
        source: 1-D, the gradient of the elements from ``start`` on.
        first: copy instead of adding.
    """
    arrivals = []
    for segment, left, right in overlaps(segments, start, start + source.numel()):
        target = _owned(segment, store, source.dtype if first else torch.float32)
        inside = target[left - segment.start : right - segment.start]
        piece = source[left - start : right - start]
        arrival = transfer.gradient_out(inside, piece, segment.tier_of(GRADIENT), add=not first)
        if arrival is not None:
            arrivals.append(arrival)
    return arrivals


def drop(segments: Sequence[Segment], store: Store) -> None:
    """Gives the host memory of gradients back that nobody will read again.

    On a device whose memory is not the host's they stay: there nobody else can use the room before the next ones come.
    """
    for segment in segments:
        if GRADIENT in segment.companions and (store.device.is_host or not segment.updates_on_device):
            segment.drop(store, GRADIENT)


def _owned(segment: Segment, store: Store, dtype: torch.dtype) -> torch.Tensor:
    """The segment's gradient buffer, able to take ``dtype``; widened where it is too narrow."""
    present = segment.companions.get(GRADIENT)
    if present is None:
        return segment.companion(store, GRADIENT, dtype)
    if present.dtype == dtype or present.dtype == torch.float32:
        return present
    # Both exist for a moment: if there is no room for the wide one, the narrow one must still be there.
    wide = store.allocate(segment.tier_of(GRADIENT), Kind.GRADIENTS, segment.numel, torch.float32).copy_(present)
    segment.drop(store, GRADIENT)
    segment.companions[GRADIENT] = wide
    return wide
