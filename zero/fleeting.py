"""Keys and values that nobody keeps: for passes of which only the work and the activations are asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class _FleetingLayer(DynamicLayer):  # type: ignore[misc]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """They are what the pass itself made."""
        del args, kwargs
        return key_states, value_states


def fleeting_like(cache: Any) -> Cache | None:
    """A cache for one pass that begins sequences, in place of one that keeps; None where that is no ordinary one."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return Cache(layers=[_FleetingLayer() for _ in cache.layers])
