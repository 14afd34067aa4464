"""``zero.launch``: reads the config once for the process, and joins the other ranks of the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero.config.loading import load_config
from zero.config.schema import Config
from zero.launching.place import find_place

_current: Config | None = None


def launch(config: Config | Mapping[str, Any] | str | Path | None = None) -> Config:
    """Reads the config that ``initialize`` and ``ZeroInitContext`` use from now on, and joins the ranks if several run.

    Under ``zero run --nprocs``, ``torchrun`` or ``srun``, ``torch.distributed`` can be used right after; the ranks part
    when the process ends.

    Args:
        config: path (.toml, .py, .yaml, .json), dict or Config; by default what was read before, as by
            ``zero run --config``, else all defaults.

    Raises:
        zero.errors.ConfigError: with every problem at once.
        zero.errors.UserError: this number of ranks cannot work on this machine, or not under ``[parallel]``.
    """
    global _current
    _current = current_config() if config is None else load_config(config)
    join(_current)
    return _current


def launch_from_torch(config: Config | Mapping[str, Any] | str | Path | None = None) -> Config:
    """The same, for programs started by ``torchrun``."""
    return launch(config)


def current_config() -> Config:
    """What ``launch`` read; all defaults before."""
    return _current if _current is not None else load_config(None)


def join(config: Config) -> None:
    """Joins the ranks of the run and gives this one its part of the machine.

    Nothing happens in a process that runs by itself, nor where the user's own code has made a group: it is joined by
    ``initialize`` as it is, and theirs to end.

    Raises:
        zero.errors.UserError: this number of ranks cannot work on this machine, or not under ``[parallel]``.
    """
    place = find_place(os.environ)
    dist = sys.modules.get("torch.distributed")
    if place is None or (dist is not None and dist.is_available() and dist.is_initialized()):
        return
    from zero import binding
    from zero.ranks import join_ranks

    binding.settle(place, config.device.type)
    join_ranks(config)
