"""Keys and values of rows that run together: left-padded tensors, on the device or on the host.

Every layer has two tensors [rows, heads, positions, head dimension]. Rows end at the same position; a row that is shorter
begins with padding, which is zero and masked. Memory grows in steps, so that a new token copies nothing but itself, and
what a pass has added counts only once :meth:`KeyValues.commit` says so: a pass that failed can be run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from gemini.device import Device
from gemini.units import format_bytes

STEP = 64
"""Positions by which memory grows."""


def rounded(num_positions: int) -> int:
    """Positions that memory is taken for."""
    return -(-num_positions // STEP) * STEP


class CacheAccount:
    """Bytes of all caches of a generator, and where they lie.

    Args:
        device: that the model runs on.
        max_bytes: never more than these.
        on_host: the tensors lie on the host.

    Attributes:
        num_bytes: now.
        peak_bytes: at the highest.
    """

    def __init__(self, device: Device, max_bytes: int, on_host: bool) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.on_host = on_host
        self.num_bytes = self.peak_bytes = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor.

        Raises:
            torch.OutOfMemoryError: more than ``max_bytes``, or no room on the device.
        """
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        if self.num_bytes + num_bytes > self.max_bytes:
            raise torch.OutOfMemoryError(
                f"keys and values: {format_bytes(num_bytes)} more would be more than {format_bytes(self.max_bytes)}"
            )
        with self.activity():
            if not self.on_host:
                tensor = torch.zeros(shape, dtype=dtype, device=self.device.torch_device)
            else:
                tensor = torch.zeros(shape, dtype=dtype, pin_memory=self.device.torch_device.type == "cuda")
        self.num_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return tensor

    def gone(self, tensor: torch.Tensor) -> None:
        """A tensor of :meth:`zeros` is given up."""
        self.num_bytes -= tensor.nbytes

    def activity(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what is made counts where the caches lie."""
        return self.device.bookkeeping() if self.on_host else self.device.activity()


class Extent:
    """What all layers of one cache share: positions that count."""

    def __init__(self, account: CacheAccount) -> None:
        self.account = account
        self.length = 0


class RowsLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, as transformers' models ask for them."""

    is_sliding = False  # a model's window is in its mask
    is_compileable = False

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self._extent = extent
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    # -- what models call --------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Memory comes with the first :meth:`update`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts new positions behind those that count, and returns all, on the device."""
        del args, kwargs
        length, end = self._extent.length, self._extent.length + key_states.shape[-2]
        self.keys = self._with_room(self.keys, key_states, end)
        self.values = self._with_room(self.values, value_states, end)
        self.is_initialized = True
        return self._put(self.keys, key_states, length, end), self._put(self.values, value_states, length, end)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Positions there will be, and 0; older transformers ask with the new positions themselves."""
        num_new = int(query_length.shape[0]) if isinstance(query_length, torch.Tensor) else int(query_length)
        return self._extent.length + num_new, 0

    def get_seq_length(self) -> int:
        """Positions that count."""
        return self._extent.length

    def get_max_length(self) -> int:
        """No most."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same in older transformers."""
        return -1

    # -- memory ------------------------------------------------------------------------------------------------------

    def _with_room(self, held: torch.Tensor | None, states: torch.Tensor, end: int) -> torch.Tensor:
        if held is not None and held.shape[2] >= end:
            return held
        rows, heads, _, width = states.shape
        account = self._extent.account
        grown = account.zeros((rows, heads, rounded(end), width), states.dtype)
        if held is not None:
            with account.activity():
                grown[:, :, : self._extent.length] = held[:, :, : self._extent.length]
            account.gone(held)
        return grown

    def _put(self, held: torch.Tensor, states: torch.Tensor, length: int, end: int) -> torch.Tensor:
        account = self._extent.account
        if account.on_host:
            every = states if not length else states.new_empty((*states.shape[:2], end, states.shape[3]))
            with account.activity():
                # Waits for the device: what is on the host is read at the next pass, or moved when rows leave before it.
                held[:, :, length:end].copy_(states)
                if length:
                    every.copy_(held[:, :, :end], non_blocking=True)
            return every
        held[:, :, length:end] = states
        return held[:, :, :end] if length else states

    def replace(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts what ``make`` makes of keys, then of values, in their place."""
        for name in ("keys", "values"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, make(held))
                self._extent.account.gone(held)

    def close(self) -> None:
        """Gives the memory back."""
        for held in (self.keys, self.values):
            if held is not None:
                self._extent.account.gone(held)
        self.keys = self.values = None
        self.is_initialized = False


class KeyValues(Cache):  # type: ignore[misc]
    """Keys and values of the rows of one bucket.

    Args:
        num_layers: of the model.
        account: of the generator.
    """

    def __init__(self, num_layers: int, account: CacheAccount) -> None:
        self._extent = Extent(account)
        super().__init__(layers=[RowsLayer(self._extent) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Positions that count, the same for all rows."""
        return self._extent.length

    def commit(self, num_positions: int) -> None:
        """A pass has added these, and was well."""
        self._extent.length += num_positions

    def select(self, rows: list[int], num_cut: int) -> None:
        """Keeps these rows, without so many positions at the left, which are padding for all of them."""
        account, length = self._extent.account, self.length

        def kept(held: torch.Tensor) -> torch.Tensor:
            left = length - num_cut
            new = account.zeros((len(rows), held.shape[1], rounded(left), held.shape[3]), held.dtype)
            with account.activity():
                for place, row in enumerate(rows):
                    new[place, :, :left] = held[row, :, num_cut:length]
            return new

        for layer in self.layers:
            layer.replace(kept)
        self._extent.length -= num_cut

    def join(self, other: KeyValues) -> None:
        """Takes the rows of another cache over, behind its own, with padding for whichever is shorter."""
        account, length = self._extent.account, max(self.length, other.length)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name in ("keys", "values"):
                first, second = getattr(mine, name), getattr(theirs, name)
                if first is None or second is None:
                    continue
                num_rows = first.shape[0]
                new = account.zeros(
                    (num_rows + second.shape[0], first.shape[1], rounded(length), first.shape[3]), first.dtype
                )
                with account.activity():
                    new[:num_rows, :, length - self.length : length] = first[:, :, : self.length]
                    new[num_rows:, :, length - other.length : length] = second[:, :, : other.length]
                setattr(mine, name, new)
                setattr(theirs, name, None)
                account.gone(first)
                account.gone(second)
        self._extent.length = length

    def close(self) -> None:
        """Gives all memory back."""
        for layer in self.layers:
            layer.close()

    def bytes_per_position(self) -> tuple[int, int]:
        """Of one row, in all layers, and in the largest tensor alone; 0 before a pass."""
        tensors = [held for layer in self.layers for held in (layer.keys, layer.values) if held is not None]
        each = [held.shape[1] * held.shape[3] * held.element_size() for held in tensors]
        return sum(each), max(each, default=0)
