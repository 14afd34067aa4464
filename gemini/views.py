"""How one parameter's elements lie in a flat buffer, and how they come there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemini.layout import Entry, is_dense

Read = Callable[[torch.Tensor, int | None, list[torch.Tensor]], None]
"""Writes a parameter's present values into tensors (of dtypes of their own): of its shape or, where a first element is
given, 1-D, from that element on in the order in which they lie in the chunk."""


def read_tensor(parameter: torch.Tensor, start: int | None, targets: list[torch.Tensor]) -> None:
    """The usual :data:`Read`: the values are in memory."""
    source = parameter.detach()
    if start is not None:
        source = source.as_strided((source.numel(),), (1,)) if is_dense(source) else source.reshape(-1)
    for target in targets:
        target.copy_(source if start is None else source[start : start + target.numel()])


def view_of(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The entry's view of a 1-D buffer, with the strides the user's parameter had."""
    return flat.as_strided(entry.spec.shape, entry.spec.stride, flat.storage_offset() + entry.offset)


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """What a placeholder is filled with, so that a computation with it cannot go unnoticed."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
