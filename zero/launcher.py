"""``zero.launch``: reads the config once for the process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero.config.loading import load_config
from zero.config.schema import Config

_current: Config | None = None


def launch(config: Config | Mapping[str, Any] | str | Path | None = None) -> Config:
    """Reads the config that ``initialize`` and ``ZeroInitContext`` use from now on.

    Args:
        config: path (.toml, .py, .yaml, .json), dict or Config; None for all defaults.

    Raises:
        zero.errors.ConfigError: with every problem at once.
    """
    global _current
    _current = load_config(config)
    return _current


def launch_from_torch(config: Config | Mapping[str, Any] | str | Path | None = None) -> Config:
    """The same, for programs started by ``torchrun``."""
    return launch(config)


def current_config() -> Config:
    """What ``launch`` read; all defaults before."""
    return _current if _current is not None else load_config(None)
