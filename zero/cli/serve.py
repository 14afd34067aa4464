"""``zero serve MODEL``: a model behind HTTP, with a page."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero.config.loading import load_config
from zero.config.schema import Config
from zero.errors import UserError

if TYPE_CHECKING:
    from zero.serving.worker import Loaded

_TABLES = frozenset({"device", "memory", "model", "precision"})
_CONFIG_SUFFIXES = (".toml", ".yaml", ".yml", ".json", ".py")
_KEY_VARIABLE = "ZERO_API_KEY"


def serve_model(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Serves until it is told to stop.

    Args:
        arguments: of the command line.
        overrides: keys of the config given there.

    Raises:
        UserError: an option is out of range, the address cannot be had, or the model cannot be loaded.
        zero.serving.run.ServiceFailed: passes through the model keep failing.
    """
    unread = sorted(set(overrides) - _TABLES)
    if unread:
        tables = ", ".join(f"--{table}.*" for table in sorted(_TABLES))
        raise UserError(f"--{unread[0]}.*: zero serve does not read it; it reads {tables}")
    from zero.serving.settings import ServingSettings

    settings = ServingSettings(
        model_name=served_name(arguments.model),
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key if arguments.api_key is not None else os.environ.get(_KEY_VARIABLE) or None,
        max_queue=arguments.max_queue,
        deadline_s=arguments.deadline_s,
    )
    config = model_of(arguments.model, overrides)
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise UserError(f"--max-rows {arguments.max_rows}: must be at least 1")
    from zero.serving.run import serve

    serve(partial(_load, config, arguments.max_rows), settings, _say)


def _load(config: Config, max_rows: int | None) -> Loaded:
    """In the passes' thread; torch is imported there, when the service listens already."""
    from zero.generation import Limits
    from zero.serving.loading import load

    return load(config, Limits() if max_rows is None else Limits(max_rows=max_rows))


def model_of(model: str, overrides: dict[str, Any]) -> Config:
    """The config of what was named: a config file, or a model's folder or name.

    Raises:
        ConfigError: it cannot be read; every problem is named.
    """
    if Path(model).suffix in _CONFIG_SUFFIXES and not Path(model).is_dir():
        return load_config(model, overrides, require=("model",))
    return load_config({"model": {"name_or_path": model}}, overrides, require=("model",))


def served_name(model: str) -> str:
    """What clients call the model: a Hub name as it is; of a file or folder its name, without the way to it."""
    path = Path(model)
    if path.suffix in (*_CONFIG_SUFFIXES, ".gguf") and not path.is_dir():
        return path.stem
    if not path.is_dir():
        return model
    whole = path.resolve()
    # A run's model lies in RUN/model: the run's name says more.
    return whole.parent.name or whole.name if whole.name == "model" else whole.name


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
