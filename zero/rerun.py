"""What a forward pass changes, kept so that it can be run again from the same point."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn


class BufferWatch:
    """Knows which buffers of a model a forward pass writes (running statistics, counters)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions = {id(buffer): buffer._version for buffer in model.buffers()}

    def written(self) -> list[torch.Tensor]:
        """Buffers that have been written in place since the watch began."""
        return [b for b in self._model.buffers() if self._versions.get(id(b), b._version) != b._version]


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
        self._buffers = [(buffer, buffer.clone()) for buffer in watch.written()]

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
