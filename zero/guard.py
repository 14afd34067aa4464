"""Keeps ``module.to(...)``, ``.half()`` and the like from tearing a managed model's parameters out of their chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zero.errors import UserError


class CastGuard:
    """Refuses to change dtype or device of a managed model; what would change nothing passes.

    Args:
        root: the user's model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        root.__dict__["_apply"] = self._apply

    def remove(self) -> None:
        """The model can be cast again."""
        self._root.__dict__.pop("_apply", None)

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        del recurse
        for dtype, device in {(p.dtype, p.device) for p in self._root.parameters()}:
            changed = function(torch.empty(0, dtype=dtype, device=device))
            if changed.dtype != dtype or changed.device != device:
                raise UserError(
                    f"the model is managed by an engine: it stays in {dtype} on {device} and cannot be moved or cast to "
                    f"{changed.dtype} on {changed.device}. Set precision.dtype and device.type in the config, or "
                    "close() the engine first"
                )
        return self._root
