"""ZeRO-sharded fine-tuning of causal language models that do not fit on the device, exact to plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zero.config.legacy import AMP_TYPE, BucketTensorShardStrategy, TensorShardStrategy
from zero.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from zero import models
    from zero.context import ZeroInitContext
    from zero.initializer import initialize
    from zero.launcher import launch, launch_from_torch

__all__ = [
    "AMP_TYPE",
    "BucketTensorShardStrategy",
    "ConfigError",
    "DataError",
    "TensorShardStrategy",
    "UserError",
    "ZeroInitContext",
    "initialize",
    "launch",
    "launch_from_torch",
    "models",
]

# Loaded when first used, so that `zero validate` and `import zero` do not wait for torch. No submodule may carry one of
# these names: importing it would replace the function.
_LAZY = {
    "ZeroInitContext": "zero.context",
    "initialize": "zero.initializer",
    "launch": "zero.launcher",
    "launch_from_torch": "zero.launcher",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "models":
        return importlib.import_module("zero.models")
    if name not in _LAZY:
        raise AttributeError(f"module 'zero' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
