"""Optimizer states as the user sees them: copies, whose changes are taken over before they would be missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch

from gemini.tensor import ChunkTensor

State = dict[str, Any]


class ShownStates(MutableMapping[torch.Tensor, State]):
    """``optimizer.state``: host copies of each parameter's states, made when they are asked for.

    Args:
        read: a copy of a tensor's states; empty where it has none.
        write: replaces a tensor's states; empty ones make its next update its first.
        trained: what the optimizer updates, by parameter.
    """

    def __init__(
        self,
        read: Callable[[ChunkTensor], State],
        write: Callable[[ChunkTensor, State], None],
        trained: Callable[[], dict[torch.Tensor, ChunkTensor]],
    ) -> None:
        self._read = read
        self._write = write
        self._trained = trained
        self._shown: dict[ChunkTensor, State] = {}

    def __getitem__(self, parameter: torch.Tensor) -> State:
        """The states; an empty dictionary before the first update, as torch's optimizers have it.

        Raises:
            KeyError: the optimizer does not update the parameter.
        """
        tensor = self._trained()[parameter]
        if tensor not in self._shown:
            self._shown[tensor] = self._read(tensor)
        return self._shown[tensor]

    def __setitem__(self, parameter: torch.Tensor, state: State) -> None:
        """Replaces the states."""
        self._shown[self._trained()[parameter]] = state

    def __delitem__(self, parameter: torch.Tensor) -> None:
        """The parameter has no states any more: its next update is its first."""
        self._shown[self._trained()[parameter]] = {}

    def __contains__(self, parameter: object) -> bool:
        """Whether the parameter has states."""
        return isinstance(parameter, torch.Tensor) and parameter in self._trained() and bool(self[parameter])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Parameters that have states."""
        return (parameter for parameter in self._trained() if self[parameter])

    def __len__(self) -> int:
        """How many parameters have states."""
        return sum(1 for _ in self)

    def clear(self) -> None:
        """No parameter has states any more."""
        self._shown = {tensor: {} for tensor in self._trained().values()}

    def settle(self) -> None:
        """Takes over what has changed, and forgets the copies."""
        shown, self._shown = self._shown, {}
        for tensor, state in shown.items():
            if not _equal(state, self._read(tensor)):
                self._write(tensor, state)


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    return type(one) is type(other) and bool(one == other)
