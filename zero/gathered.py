"""Whole parameters, readable and writable by the user's code, and what was written taken over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from gemini.manager import Manager
from gemini.segment import MASTER
from gemini.tensor import ChunkTensor
from zero.agreement import Agreement


@contextlib.contextmanager
def gathered(manager: Manager, tensors: Iterable[ChunkTensor], agreement: Agreement) -> Iterator[None]:
    """Inside, every parameter is a host tensor with its authoritative values.

    Args:
        manager: owns them.
        tensors: all.
        agreement: with other ranks, on what was written.
    """
    manager.settle_idle_reads()
    bound = {tensor: tensor.bound for tensor in tensors}
    for tensor in bound:
        tensor.chunk.before_change()
        tensor.bound = tensor.chunk.values_of(tensor)
    try:
        with manager.shown_whole():
            yield
    finally:
        for tensor, placed in bound.items():
            written, tensor.bound = tensor.bound, placed
            _take_over(manager, tensor, written, agreement)


def _take_over(manager: Manager, tensor: ChunkTensor, written: torch.Tensor, agreement: Agreement) -> None:
    """New values of a parameter. Elements that nobody touched keep what the master knows beyond the dtype."""
    present = tensor.chunk.values_of(tensor)
    untouched = (written == present) | (written.isnan() & present.isnan())
    agreed = agreement.one_writing(written, changed=not untouched.all())
    if agreed is None:
        return
    untouched = (agreed == present) | (agreed.isnan() & present.isnan())
    known = tensor.chunk.companion_of(tensor, MASTER) if tensor.chunk.layout.trainable else present
    manager.write(tensor, torch.where(untouched, known, agreed.to(known.dtype)))
