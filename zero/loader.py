"""A view of the user's data loader that says when the last batch is out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class LoaderView:
    """Iterates as the loader does, one batch ahead, so that the last batch of an epoch is known as such.

    An accumulation window that the epoch's end cuts short is then stepped, not dropped.

    Args:
        loader: any iterable of batches.
        on_last: called before the last batch is handed out.
    """

    def __init__(self, loader: Any, on_last: Callable[[], None]) -> None:
        self._loader = loader
        self._on_last = on_last

    def __iter__(self) -> Iterator[Any]:
        """Batches in the loader's order."""
        iterator = iter(self._loader)
        missing = object()
        batch = next(iterator, missing)
        while batch is not missing:
            following = next(iterator, missing)
            if following is missing:
                self._on_last()
            yield batch
            batch = following

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
