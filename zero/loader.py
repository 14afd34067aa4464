"""A view of the user's data loader that says when the last batch is out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class LoaderView:
    """Iterates as the loader does, and knows the last batch of an epoch as such.

    An accumulation window that the epoch's end cuts short is then stepped, not dropped.

    Args:
        loader: any iterable of batches.
        on_batch: called before each batch is handed out, with whether it is the last; and with False after the end.
        look_ahead: read one batch ahead to know. Without it batches are read when asked for, as by a plain loop, and
            none is called the last.
    """

    def __init__(self, loader: Any, on_batch: Callable[[bool], None], look_ahead: bool) -> None:
        self._loader = loader
        self._on_batch = on_batch
        self._look_ahead = look_ahead

    def __iter__(self) -> Iterator[Any]:
        """Batches in the loader's order."""
        if not self._look_ahead:
            yield from self._loader
            return
        iterator = iter(self._loader)
        missing = object()
        batch = next(iterator, missing)
        while batch is not missing:
            following = next(iterator, missing)
            self._on_batch(following is missing)
            yield batch
            batch = following
        # A loop that read the data without training must not leave the mark behind.
        self._on_batch(False)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
