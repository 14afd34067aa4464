"""One problem line for each thing that is wrong: dotted key, value given, what is allowed, what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero.config.schema import FIELDS, SECTIONS, table_of
from zero.config.types import allowed_text, choices_of
from zero.config.words import FOREIGN_DOTTED, FOREIGN_KEYS, FOREIGN_SECTIONS, name_text, nearest, nearest_value, show

# The key that someone means who gives a text where a table is wanted.
_MAIN_KEYS = {
    "device": "type",
    "memory": "policy",
    "precision": "dtype",
    "optimizer": "name",
    "scheduler": "name",
    "model": "name_or_path",
    "data": "train",
}


def value_problem(dotted: str, value: Any, reason: str = "") -> str:
    """The line for a value that its key does not allow.

    Args:
        dotted: A key of the schema.
        value: What was given.
        reason: What is wrong, where the kind of the key alone does not say it.
    """
    table = table_of(dotted)
    if table is not None:
        return f"{dotted} = {show(value)}: must be a table with keys {_keys_text(dotted)}{_table_hint(dotted, value)}"
    if value is None:
        return f"{dotted} = null: needs a value, {allowed_text(FIELDS[dotted])}; remove the key to get the default"
    return f"{dotted} = {show(value)}: {reason or 'must be ' + allowed_text(FIELDS[dotted])}{_hint(dotted, value)}"


def _hint(dotted: str, value: Any) -> str:
    """What was probably meant by a wrong value."""
    field = FIELDS[dotted]
    meant = nearest_value(value, [choice for choice in choices_of(field.annotation) if isinstance(choice, str)])
    if meant is not None:
        return f'; did you mean "{meant}"?'
    allowed = allowed_text(field)
    if isinstance(value, str) and "whole number" in allowed and value.strip().lstrip("+-").isdigit():
        return f"; write {value.strip()} without quotes"
    if isinstance(value, float) and "whole number" in allowed and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and "true" in allowed and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
    return ""


def _table_hint(dotted: str, value: Any) -> str:
    key = _MAIN_KEYS.get(dotted)
    return f"; did you mean {dotted} = {{{key} = {show(value)}}}?" if key and isinstance(value, str) else ""


def unknown_key(table: str, key: Any, value: Any) -> str:
    """The line for a key that its table does not have.

    Args:
        table: Dotted name of the table.
        key: The unknown key.
        value: What was given.
    """
    given = f"{table}.{name_text(str(key))} = {show(value)}"
    if not isinstance(key, str):
        return f"{table}: the key {key!r} must be a text; keys of [{table}] are {_keys_text(table)}"
    meant = FOREIGN_DOTTED.get(f"{table}.{key}")
    homes = [] if meant else _homes(key)
    if homes:
        return f"{given}: unknown key; {key} belongs in {' or '.join(f'[{home}]' for home in homes)}"
    keys = {name.rpartition(".")[2]: name for name in FIELDS if name.rpartition(".")[0] == table}
    close = nearest(key, keys, cutoff=0.75)
    meant = meant or FOREIGN_KEYS.get(key.lower()) or (keys[close] if close else None)
    if meant is None and (loose := nearest(key, keys)):
        meant = keys[loose]
    if meant is None and (elsewhere := _anywhere(key)):
        meant = elsewhere
    if meant and not meant.startswith(f"{table}."):
        return f"{given}: unknown key; did you mean {meant}?"
    hint = f"; did you mean {meant}?" if meant else ""
    return f"{given}: unknown key{hint} (keys of [{table}]: {_keys_text(table)})"


def unknown_section(key: Any, value: Any) -> str:
    """The line for a name at the top of the config that is no table of the schema."""
    if not isinstance(key, str):
        return f"the key {key!r} must be a text; tables are {_tables_text()}"
    name = name_text(key)
    given = f"{name} = {show(value)}" if not isinstance(value, Mapping) else f"[{name}]"
    if key in FIELDS:
        table, _, last = key.rpartition(".")
        return f"{given}: a dotted key in quotes; write it as {last} in the table [{table}]"
    homes = _homes(key)
    if homes:
        return f"{given}: not at the top; {key} belongs in {' or '.join(f'[{home}]' for home in homes)}"
    if not isinstance(value, Mapping) and key.lower() in FOREIGN_KEYS:
        return f"{given}: unknown key; did you mean {FOREIGN_KEYS[key.lower()]}?"
    section = nearest(key, SECTIONS, cutoff=0.7) or FOREIGN_SECTIONS.get(key.lower())
    if section is None and key.lower() in FOREIGN_KEYS:
        return f"{given}: unknown table; did you mean {FOREIGN_KEYS[key.lower()]}?"
    other = None if section else _anywhere(key)
    hint = f"; did you mean [{section}]?" if section else f"; did you mean {other}?" if other else ""
    kind = "table" if isinstance(value, Mapping) else "key"
    return f"{given}: unknown {kind}{hint} (tables: {_tables_text()})"


def _homes(key: str) -> list[str]:
    """Dotted names of the tables that have this very key."""
    return [
        dotted.rpartition(".")[0]
        for dotted in FIELDS
        if dotted.rpartition(".")[2] == key and "." in dotted and table_of(dotted) is None
    ]


def _anywhere(key: str) -> str | None:
    """The dotted key of any table that looks most like this one."""
    last_words = {dotted.rpartition(".")[2]: dotted for dotted in FIELDS if "." in dotted}
    found = nearest(key, last_words, cutoff=0.8)
    foreign = nearest(key, FOREIGN_KEYS, cutoff=0.85)
    return last_words[found] if found else FOREIGN_KEYS[foreign] if foreign else None


def _keys_text(table: str) -> str:
    return ", ".join(name.rpartition(".")[2] for name in FIELDS if name.rpartition(".")[0] == table)


def _tables_text() -> str:
    return ", ".join(SECTIONS)
