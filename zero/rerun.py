"""What a forward pass changes, kept so that it can be run again from the same point."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class BufferWatch:
    """Knows which buffers of a model a forward pass may write (running statistics, counters)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions = {id(buffer): buffer._version for buffer in model.buffers()}

    def may_be_written(self) -> Iterator[torch.Tensor]:
        """All that are saved with the model, and others that have been written in place since the watch began.

        Versions alone do not tell: batch norm's kernel writes its statistics without counting.
        """
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                saved = name not in module._non_persistent_buffers_set
                if saved or self._versions.get(id(buffer), buffer._version) != buffer._version:
                    yield buffer


class StartingPoint:
    """Random generators and written buffers before a forward pass.

    Args:
        watch: of the model.
        device: whose generator the model draws from, beside the host's.
    """

    def __init__(self, watch: BufferWatch, device: torch.device) -> None:
        self._host_state = torch.get_rng_state()
        self._python_state = random.getstate()
        self._device = device
        self._device_state = None if device.type == "cpu" else _generators(device).get_rng_state(device)
        self._buffers = [(buffer, buffer.clone()) for buffer in watch.may_be_written()]

    def restore(self) -> None:
        """Puts everything back."""
        torch.set_rng_state(self._host_state)
        random.setstate(self._python_state)
        if self._device_state is not None:
            _generators(self._device).set_rng_state(self._device_state, self._device)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device)
