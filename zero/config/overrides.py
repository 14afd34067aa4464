"""Keys given on the command line: ``--section.key value``.

Read without the schema's values: a free table can be given (``--model.config.hidden_size 64``), and a mistake in the file
and one on the command line are shown together.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from zero.config.draft import ALIASES
from zero.config.problems import unknown_key, unknown_section
from zero.config.schema import FIELDS, SECTIONS
from zero.config.types import is_text
from zero.config.words import name_text, nearest, show
from zero.errors import ConfigError

_FREE_TABLE = "model.config"


def parse_overrides(argv: Sequence[str], problems: list[str] | None = None) -> dict[str, Any]:
    """Reads ``--section.key value`` and ``--section.key=value`` arguments into tables for ``load_config``.

    Values are written as in TOML: numbers, true and false, ``[0.9, 0.95]``, ``{mode = "1d", size = 2}``. Anything else,
    and everything given for a key that holds a text, is a text and needs no quotes. ``null`` takes a value back to "not
    set". The last one of two equal keys holds. Dashes may stand for underscores.

    Args:
        argv: The arguments, without the program's name and its own options.
        problems: Where to put what cannot be read, instead of raising, so that it can be said with what else is wrong.

    Returns:
        Tables, for example ``{"train": {"max_steps": 10}}``; values are not yet checked.

    Raises:
        ConfigError: If an argument cannot be read or its key does not exist; one line for each.
    """
    tables: dict[str, Any] = {}
    raises = problems is None
    problems = [] if problems is None else problems
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--") or argument == "--":
            problems.append(f"{show(argument)}: not an option; write --section.key value, such as --train.max_steps 10")
            continue
        name, has_value, text = argument[2:].partition("=")
        if not has_value and position < len(argv) and not argv[position].startswith("--"):
            text, has_value = argv[position], "="
            position += 1
        problems += _take(tables, name.replace("-", "_"), text if has_value else None)
    if problems and raises:
        raise ConfigError(problems, "command line")
    return tables


def _take(tables: dict[str, Any], name: str, text: str | None) -> list[str]:
    """Puts one argument into the tables, or says what is wrong with it."""
    dotted = ALIASES.get(name, name)
    problem = _unknown(dotted, text)
    if problem:
        return [f"--{problem}"]
    if text is None:
        return [f"--{name_text(name)}: needs a value, such as --{name_text(name)} {_example(dotted)}"]
    *path, key = dotted.split(".")
    place = tables
    for table in path:
        inner = place.setdefault(table, {})
        if not isinstance(inner, dict):
            return [f"--{name_text(name)}: --{'.'.join(path)} is given as {show(inner)} and can have no keys below it"]
        place = inner
    place[key] = _value(dotted, text)
    return []


def _unknown(dotted: str, text: str | None) -> str:
    """The line for a key that does not exist, or nothing."""
    if dotted.startswith(f"{_FREE_TABLE}.") and all(dotted.split(".")):
        return ""
    section, dot, key = dotted.partition(".")
    if dotted in FIELDS and dot:
        return ""
    value = _value(dotted, text) if text is not None else None
    if section in SECTIONS and key:
        table, _, last = dotted.rpartition(".")
        return unknown_key(table if table in FIELDS else section, last, value)
    if section in SECTIONS:
        return f"{section}: is a table; write --{section}.key value"
    meant = [name for name in FIELDS if name.rpartition(".")[2] == dotted and name not in SECTIONS]
    if meant:
        return f"{dotted}: needs its table; write --{' or --'.join(meant)}"
    close = nearest(section, SECTIONS, cutoff=0.7)
    if close and f"{close}.{key}" in FIELDS:
        return f"{name_text(dotted)} = {show(value)}: unknown table; did you mean --{close}.{key}?"
    return unknown_section(dotted if not dot else section, {key: value} if dot else value)


def _example(dotted: str) -> str:
    field = FIELDS.get(dotted)
    if field is None:
        return "64"
    if field.annotation is bool:
        return "true"
    default = field.default
    return "VALUE" if default is None or not isinstance(default, str | int | float) else str(default)


def _value(dotted: str, text: str) -> Any:
    """The value of an argument: TOML where it is TOML, else the text itself."""
    field = FIELDS.get(dotted)
    # A revision such as 1234567 or a folder named 5 stays a text; quotes around one are TOML's, not part of it.
    if field is not None and is_text(field.annotation) and not text.startswith(('"', "'")):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    # TOML would take "5#x" for 5 and a comment, and "1\nx = 2" for two keys.
    if "\n" in text or ("#" in text and not text.startswith(('"', "'", "[", "{"))):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, KeyError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text
