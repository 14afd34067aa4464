"""One function per verb. Heavy imports happen inside, so that ``zero validate`` answers at once."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero.cli.processes import launch, start_ranks
from zero.config.describe import config_help, to_toml
from zero.config.loading import load_config
from zero.config.overrides import parse_overrides
from zero.errors import ConfigError, UserError

if TYPE_CHECKING:
    from zero.config.schema import Config
    from zero.stopping import StopRequest


_GENERATE_TABLES = {"device", "memory", "model", "precision"}
_EVAL_TABLES = {*_GENERATE_TABLES, "cost", "parallel"}
_CONFIG_SUFFIXES = (".toml", ".yaml", ".yml", ".json", ".py")


class RunFailed(RuntimeError):
    """A run that began could not be finished; exit code 1."""


def _load(arguments: argparse.Namespace, rest: list[str], require: tuple[str, ...] = ()) -> Config:
    if arguments.config is None and not rest:
        raise UserError("a config file is needed, such as configs/quickstart.toml")
    if any(word.partition("=")[0] == "--config" for word in rest):
        raise UserError(f"--config: the file stands by itself: zero {arguments.command} configs/quickstart.toml")
    problems: list[str] = []
    overrides = parse_overrides(rest, problems)
    try:
        config = load_config(arguments.config, overrides, require=require)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], error.source) from error
    if problems:
        raise ConfigError(problems, "command line")
    return config


def train(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero train CONFIG``, as one process or as ranks."""
    config = _load(arguments, rest, require=("model", "data"))
    if start_ranks(arguments):
        return launch(arguments, config)
    from zero.stopping import StopRequest

    with StopRequest().listening() as stop:  # from the first moment: what follows imports for seconds
        return _train(config, stop)


def _train(config: Config, stop: StopRequest) -> int:
    from torch import OutOfMemoryError

    from zero.launcher import join
    from zero.progress import TrainingStopped
    from zero.trainer import Trainer

    join(config)
    try:
        Trainer(config, stop).run()
    except (TrainingStopped, OutOfMemoryError) as error:
        raise RunFailed(str(error)) from error
    return 0


def validate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero validate CONFIG``: 0 and the resolved config, or 2 and every problem."""
    if arguments.keys:
        _nothing_more(rest)
        sys.stdout.write(config_help() + "\n")
        return 0
    config = _load(arguments, rest)
    sys.stdout.write(to_toml(config))
    return 0


def plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero plan CONFIG``: 0 if it fits, 2 if not."""
    config = _load(arguments, rest, require=("model",))
    from zero.cli.plan import Wish, say_plan

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        return 0 if say_plan(config, Wish(arguments.on, arguments.timeline, arguments.trace), say) else 2
    except BrokenPipeError:  # `zero plan ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def probe(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero probe``: what this machine can do, as one process or as ranks."""
    overrides = parse_overrides(rest)
    given = [f"{table}.{key}" for table, keys in overrides.items() for key in keys]
    unread = sorted(key for key in given if not key.startswith("device.") and key != "memory.disk")
    if unread:
        raise UserError(f"--{unread[0]}: zero probe does not read it; it reads --device.* and --memory.disk")
    config = load_config(None, overrides)
    if start_ranks(arguments):
        return launch(arguments, config)
    from zero.cli.probe import probe_text
    from zero.launcher import join

    join(config)
    text = probe_text(config, arguments.again, arguments.json)
    if text is not None:
        sys.stdout.write(text + "\n")
    return 0


def env(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero env``."""
    _nothing_more(rest)
    from zero.cli.env import collect_env, env_json, env_text

    found = collect_env()
    sys.stdout.write((env_json(found) if arguments.json else env_text(found)) + "\n")
    return 0


def export(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero export CHECKPOINT DIR``."""
    _nothing_more(rest)
    from zero.checkpoint import choose
    from zero.checkpoint import export as export_checkpoint

    checkpoint = choose(Path(arguments.checkpoint)).path
    target = Path(arguments.folder)
    if target.resolve().is_relative_to(checkpoint.resolve()):
        raise UserError(f"{target} lies inside the checkpoint {checkpoint}; name another folder")
    try:
        export_checkpoint(checkpoint, target, arguments.dtype)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}; name another folder") from error
    return 0


def run_script(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero run SCRIPT``: the user's own loop, as one process or as ranks."""
    script = Path(arguments.script)
    if not script.is_file():
        raise UserError(f"{script}: no such file")
    if start_ranks(arguments):
        return launch(arguments, None if arguments.config is None else load_config(arguments.config))
    if arguments.config is not None:
        from zero.launcher import launch as launch_config

        launch_config(arguments.config)
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def generate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero generate MODEL --prompt TEXT``; ``--device.memory 2GiB`` caps the device."""
    overrides = parse_overrides(rest)
    _require_tables("zero generate", overrides, _GENERATE_TABLES)
    from zero.cli.generate import generate_texts
    from zero.cli.prompts import OutputError

    config = load_config({"model": {"name_or_path": arguments.model}}, overrides, require=("model",))
    try:
        return generate_texts(config, arguments)
    except OutputError as error:
        raise RunFailed(str(error)) from error


def serve(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero serve MODEL``: until SIGTERM."""
    overrides = parse_overrides(rest)
    from zero.cli.serve import serve_model
    from zero.serving.run import ServiceFailed

    try:
        serve_model(arguments, overrides)
    except ServiceFailed as error:
        raise RunFailed(str(error)) from error
    return 0


def evaluate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``zero eval CONFIG|MODEL``: perplexity, tasks, conversations, as one process or as ranks."""
    overrides = parse_overrides(rest)
    path = Path(arguments.model)
    if path.suffix in _CONFIG_SUFFIXES and not path.is_dir():
        config = load_config(arguments.model, overrides, require=("model",))
    else:
        _require_tables("zero eval MODEL", overrides, _EVAL_TABLES)
        config = load_config({"model": {"name_or_path": arguments.model}}, overrides, require=("model",))
    if start_ranks(arguments):
        return launch(arguments, config)
    from zero.cli.evaluate import evaluate_model
    from zero.launcher import join

    join(config)
    evaluate_model(config, arguments)
    return 0


def _require_tables(command: str, overrides: Mapping[str, Any], tables: set[str]) -> None:
    unread = sorted(set(overrides) - tables)
    if unread:
        read = ", ".join(f"--{table}.*" for table in sorted(tables))
        raise UserError(f"--{unread[0]}.*: {command} does not read it; it reads {read}")


def _nothing_more(rest: list[str]) -> None:
    if rest:
        raise UserError(f"unknown argument {rest[0]}; see --help")
