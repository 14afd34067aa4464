"""Models and tokenizers, in one call or from a config; the OPT family: its sizes, OPT as GPT-2 and back, metaseq files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero.models.loading import Loaded, load, loaded

__all__ = ["Loaded", "load", "loaded"]


def __getattr__(name: str) -> Any:
    """Loads torch and transformers only for who asks."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zero.models import loading

    return getattr(loading, name)
