"""From a file or a dict to a checked config: every problem at once, or a config that can be relied on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from zero.config.architecture import inspect_architecture
from zero.config.checks import cross_check
from zero.config.draft import Draft, apply_overrides, take_tables
from zero.config.legacy import split_old, take_old
from zero.config.needs import Need, missing_data, missing_model
from zero.config.problems import value_problem
from zero.config.reading import read_file
from zero.config.schema import FIELDS, Config
from zero.errors import ConfigError

_Form = Literal["tables", "dict", "python"]
_log = logging.getLogger("zero")

_NEEDS: dict[str, Callable[[Config], list[Need]]] = {
    "model": lambda config: missing_model(config.model),
    "data": lambda config: missing_data(config.data),
}


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    require: Iterable[str] = (),
) -> Config:
    """Loads, merges and checks a config. Precedence: overrides, source, defaults.

    A ``.py`` file is executed, with all that a program can do: name only files that you trust.

    Args:
        source: A ``.toml``, ``.yaml``, ``.json`` or ``.py`` file, a dict of tables (also in the old Python form), a
            config, or nothing for all defaults.
        overrides: Tables laid over the source, as ``parse_overrides`` returns them. Tables are merged key by key.
        require: What the command needs beyond a valid config: "model", "data" or both; reported with the rest.

    Returns:
        The config, read-only. What was accepted but has no effect is logged as a warning and kept in ``notes``.

    Raises:
        ConfigError: If anything is wrong; one line for each problem.
    """
    raw, label, form = _read(source)
    draft = _draft(raw, form)
    if overrides:
        apply_overrides(draft, _draft(overrides, "tables"))
    config, unsound = _build(draft)
    for finding in cross_check(config, unsound):
        (draft.problems if finding.is_error else draft.notes).append(finding.text)
    config = _fit_to_model(config, unsound, draft)
    needs = [need for name in require for need in _NEEDS[name](config)]
    draft.problems += [need.text for need in needs if not unsound.intersection(need.reads)]
    if draft.problems:
        raise ConfigError(draft.problems, label)
    return _finished(config, draft, label, source)


def for_trainer(config: Config) -> Config:
    """The config with what is `auto` there as `zero train` has it, where that differs from a loop of the user's own."""
    if config.train.chunked_loss != "auto":
        return config
    return load_config(config, {"train": {"chunked_loss": True}})


def _read(source: Any) -> tuple[Mapping[Any, Any], str, _Form]:
    """The source's tables, its name for messages, and the form they are in."""
    if source is None:
        return {}, "config", "tables"
    if isinstance(source, Config):
        return source.model_dump(exclude_unset=True), source.source, "tables"
    if isinstance(source, Mapping):
        return source, "config", "dict"
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        return read_file(path), str(path), "python" if path.suffix.lower() == ".py" else "tables"
    raise ConfigError([f"a config is a file path or a dict, not a {type(source).__name__}"])


def _draft(raw: Mapping[Any, Any], form: _Form) -> Draft:
    """Sorts what was given. Only Python, a file or a dict, may use the old form and free variables."""
    draft = Draft(helper_hint=form == "python")
    tables, old = split_old(raw) if form != "tables" else (raw, {})
    take_tables(draft, tables)
    take_old(draft, old)
    return draft


def _build(draft: Draft) -> tuple[Config, set[str]]:
    """Builds the config out of the sound values, and reports the unsound ones.

    pydantic stops at the first layer that fails, so that a wrong value would hide what is wrong between keys. The
    unsound keys are therefore taken out and the rest is built again.

    Returns:
        The config, with defaults for the unsound keys, and the dotted names of those.
    """
    unsound: set[str] = set()
    while True:
        try:
            return Config.model_validate(draft.values), unsound
        except ValidationError as error:
            wrong = _wrong_keys(error)
        if unsound.issuperset(wrong):
            raise RuntimeError(f"config keys could not be taken out: {sorted(wrong)}")
        for dotted, reason in wrong.items():
            draft.problems.append(value_problem(dotted, draft.get(dotted), reason) + draft.where(dotted))
            draft.drop(dotted)
        unsound |= set(wrong)


def _wrong_keys(error: ValidationError) -> dict[str, str]:
    """Dotted key -> what one of our own validators says about it, or nothing where the kind of the key says it."""
    wrong: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        reason = str(item["ctx"]["error"]) if item["type"] == "value_error" else ""
        wrong.setdefault(_dotted(item["loc"]), reason)
    return wrong


def _dotted(place: tuple[int | str, ...]) -> str:
    """The key of the schema an error is about; what follows it are list indices and members of unions."""
    dotted = str(place[0])
    for part in place[1:]:
        if f"{dotted}.{part}" not in FIELDS:
            break
        dotted = f"{dotted}.{part}"
    return dotted


def _fit_to_model(config: Config, unsound: set[str], draft: Draft) -> Config:
    """Checks a model given inline, and lowers data.seq_length to its positions where that was left open."""
    if config.model.config is None or "model.config" in unsound:
        return config
    architecture = inspect_architecture(config.model.config)
    draft.problems += architecture.problems
    draft.notes += architecture.notes
    num_positions, seq_length = architecture.num_positions, config.data.seq_length
    if num_positions is None or seq_length <= num_positions or "data.seq_length" in unsound:
        return config
    if config.is_set("data.seq_length"):
        draft.problems.append(
            f"data.seq_length = {seq_length}: the model has {num_positions} positions "
            f"(model.config.{architecture.positions_key}); lower the one or raise the other"
        )
        return config
    draft.notes.append(f"data.seq_length is {num_positions}, all the positions that model.config has")
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_length": num_positions})})


def _finished(config: Config, draft: Draft, label: str, source: Any) -> Config:
    variables = dict(source.variables) if isinstance(source, Config) else {}
    config._source = label
    config._variables = variables | draft.variables
    config._notes = tuple(draft.notes)
    for note in () if isinstance(source, Config) else draft.notes:  # a config that is checked again has said it
        _log.warning("%s: %s", label, note)
    return config
