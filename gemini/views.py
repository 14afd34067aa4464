"""How one parameter's elements lie in a flat buffer, and how they come there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from gemini.layout import Entry, is_dense


class Read(Protocol):
    """Writes a parameter's present values into tensors, be it later on another thread."""

    def __call__(
        self,
        parameter: torch.Tensor,
        start: int | None,
        targets: list[torch.Tensor],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Reads.

        Args:
            parameter: whose values; it may lose them.
            start: None: the targets have its shape; else they are 1-D, from that element on in the order in which
                they lie in the chunk.
            targets: of dtypes of their own.
            then: called when they have been written, before this returns.
        """


def read_tensor(
    parameter: torch.Tensor, start: int | None, targets: list[torch.Tensor], then: Callable[[], None] | None = None
) -> None:
    """The usual :class:`Read`: the values are in memory."""
    source = parameter.detach()
    if start is not None:
        source = source.as_strided((source.numel(),), (1,)) if is_dense(source) else source.reshape(-1)
    for target in targets:
        target.copy_(source if start is None else source[start : start + target.numel()])
    if then is not None:
        then()


def view_of(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The entry's view of a 1-D buffer, with the strides the user's parameter had."""
    return flat.as_strided(entry.spec.shape, entry.spec.stride, flat.storage_offset() + entry.offset)


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """What a placeholder is filled with, so that a computation with it cannot go unnoticed."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
