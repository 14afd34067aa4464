"""The schema and configs as text: help for the command line, a reference for the docs, a resolved config as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gemini.units import exact_bytes
from zero.config.conditions import without_effect
from zero.config.schema import BYTE_KEYS, FIELDS, SECTIONS, Config, table_of
from zero.config.types import Section, allowed_text, choices_of
from zero.config.words import show


def config_help(sections: Iterable[str] | None = None) -> str:
    """Every key with what it may be, its default and its effect, as plain text for a terminal.

    Args:
        sections: Names of the tables wanted; all if none are given.
    """
    blocks = []
    for section in sections or SECTIONS:
        lines = [f"[{section}] {_words(section)}"]
        for dotted in _keys_below(section):
            lines.append(f"  --{dotted} {_metavar(dotted)}  (default: {_default(dotted)})")
            lines.append(f"      {_words(dotted)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def config_reference() -> str:
    """Every table and key as Markdown, for the docs."""
    blocks = []
    for section in SECTIONS:
        rows = [
            f"| `{dotted.partition('.')[2]}` | {_cell(allowed_text(FIELDS[dotted]))} | `{_default(dotted)}` | "
            f"{_cell(_words(dotted))} |"
            for dotted in _keys_below(section)
        ]
        blocks.append(
            "\n".join(
                [f"## [{section}]", "", _words(section), "", "| key | value | default | effect |"]
                + ["|---|---|---|---|", *rows]
            )
        )
    return "\n\n".join(blocks) + "\n"


def to_toml(config: Config) -> str:
    """Writes a resolved config, defaults included, such that ``load_config`` reads back the same values.

    Keys without a value, and keys that have no effect in this config, are left out.

    Args:
        config: A config that ``load_config`` returned.

    Returns:
        The text of a TOML file.
    """
    silent = set(without_effect(config))
    blocks: list[str] = []
    for section in SECTIONS:
        _write_table(blocks, section, getattr(config, section), silent)
    return "\n\n".join(blocks) + "\n"


def _write_table(blocks: list[str], dotted: str, table: Section, silent: set[str]) -> None:
    """Adds one table to the blocks, and the tables inside it behind it, as TOML wants them."""
    lines, inner = [f"[{dotted}]"], []
    for name in type(table).model_fields:
        key, value = f"{dotted}.{name}", getattr(table, name)
        if value is None or key in silent:
            continue
        if isinstance(value, Section | Mapping):
            inner.append((key, value))
        else:
            lines.append(f"{name} = {_toml_value(exact_bytes(value) if key in BYTE_KEYS else value)}")
    blocks.append("\n".join(lines))
    for key, value in inner:
        if isinstance(value, Section):
            _write_table(blocks, key, value, silent)
        else:
            pairs = [f"{_toml_key(name)} = {_toml_value(item)}" for name, item in value.items()]
            blocks.append("\n".join([f"[{key}]", *pairs]))


def _toml_value(value: Any) -> str:
    if value is None:
        return '"null"'  # TOML has no null; the schema reads this word as one
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(name)} = {_toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _toml_text(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(name: str) -> str:
    is_bare = name != "" and all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in name)
    return name if is_bare else _toml_text(name)


def _keys_below(section: str) -> list[str]:
    """The plain keys of a table and of the tables inside it."""
    return [dotted for dotted in FIELDS if dotted.startswith(f"{section}.") and table_of(dotted) is None]


def _words(dotted: str) -> str:
    """The description of a table or key on one line."""
    return " ".join((FIELDS[dotted].description or "").split())


def _metavar(dotted: str) -> str:
    choices = choices_of(FIELDS[dotted].annotation)
    return "{" + ",".join(str(show(choice)).strip('"') for choice in choices) + "}" if choices else "VALUE"


def _default(dotted: str) -> str:
    value = FIELDS[dotted].default
    if value is None:
        return "unset"
    return _toml_value(exact_bytes(value) if dotted in BYTE_KEYS else value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
