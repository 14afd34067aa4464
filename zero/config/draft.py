"""A config on its way in: tables as they were given, turned to the schema's keys, with what is wrong so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zero.config.problems import unknown_key, unknown_section, value_problem
from zero.config.schema import FIELDS, SECTIONS, table_of
from zero.config.words import show

# Other names a key may be given by, and the key they stand for.
ALIASES: dict[str, str] = {
    **{
        f"data.{name}": "data.train"
        for name in (
            *("dataset", "dataset_name", "dataset_path", "name", "path", "paths", "source", "sources"),
            *("file", "files", "data_file", "data_files", "train_file", "train_files", "train_path", "train_paths"),
            *("train_data", "train_dataset"),
        )
    },
    **{
        f"data.{name}": "data.eval"
        for name in (
            *("eval_file", "eval_files", "eval_path", "eval_paths", "eval_data", "eval_dataset"),
            *("validation", "validation_file", "validation_files", "validation_path", "validation_data"),
            *("test", "test_file", "test_files", "test_path", "test_data"),
        )
    },
    "train.warmup_ratio": "scheduler.warmup_ratio",
    "train.warmup_steps": "scheduler.warmup_steps",
}

# Keys of which one replaces the other: an override of one takes the file's other one away.
_INSTEAD = (
    ("scheduler.warmup_ratio", "scheduler.warmup_steps"),
    ("model.name_or_path", "model.config"),
)


@dataclass
class Draft:
    """Values under the schema's own keys, and what was noticed while they were read."""

    values: dict[str, Any] = field(default_factory=dict)
    """Tables of keys; only known keys, not yet checked values."""
    given_as: dict[str, str] = field(default_factory=dict)
    """Dotted key -> the name it was given by, where that is another one."""
    overridden: set[str] = field(default_factory=set)
    """Dotted keys whose value comes from an override."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    """Free variables of a Python config."""
    helper_hint: bool = False
    """Whether an unknown name may be a variable of a Python file."""

    def put(self, dotted: str, value: Any, given_as: str = "") -> None:
        """Sets a key, or reports that it was already given under another name.

        Args:
            dotted: A key of the schema.
            value: Its value, unchecked. The word "null" is no value, since TOML has no other way to say it.
            given_as: The name used, where it is not `dotted`.
        """
        value = _without_null_word(value, deep=dotted == "model.config")
        earlier = self.given_as.get(dotted, dotted)
        name = given_as or dotted
        if self.has(dotted):
            # In the datasets library, "name" beside "path" is the configuration.
            hint = " (a dataset's configuration is data.dataset_config)" if "data.name" in (name, earlier) else ""
            if earlier != name and (self.get(dotted) != value or dotted.startswith("data.")):
                self.problems.append(
                    f"{name} = {show(value)}: {earlier} = {show(self.get(dotted))} is given as well and means the "
                    f"same; keep one of the two{hint}"
                )
            return
        *tables, key = dotted.split(".")
        place = self.values
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
        if given_as and given_as != dotted:
            self.given_as[dotted] = given_as

    def has(self, dotted: str) -> bool:
        """Whether a key was given."""
        *tables, key = dotted.split(".")
        place: Any = self.values
        for table in tables:
            place = place.get(table)
            if not isinstance(place, dict):
                return False
        return key in place

    def get(self, dotted: str) -> Any:
        """The value given for a key, ``None`` if there is none."""
        place: Any = self.values
        for name in dotted.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        return place

    def drop(self, dotted: str) -> None:
        """Removes a key, so that its default holds."""
        *tables, key = dotted.split(".")
        place: Any = self.values
        for table in tables:
            place = place.get(table)
            if not isinstance(place, dict):
                return
        place.pop(key, None)

    def where(self, dotted: str) -> str:
        """How a key was given, in brackets, where the user would otherwise look in vain for it."""
        name = self.given_as.get(dotted)
        marks = ([f"given as {name}"] if name else []) + (["override"] if dotted in self.overridden else [])
        return f" ({', '.join(marks)})" if marks else ""


def _without_null_word(value: Any, deep: bool) -> Any:
    if value == "null" and isinstance(value, str):
        return None
    if deep and isinstance(value, dict):
        return {key: _without_null_word(item, deep) for key, item in value.items()}
    if deep and isinstance(value, list):
        return [_without_null_word(item, deep) for item in value]
    return value


def take_tables(draft: Draft, raw: Mapping[Any, Any]) -> None:
    """Moves tables as they were given into a draft, reporting names that the schema does not have."""
    for section, table in raw.items():
        if section not in SECTIONS:
            is_helper = draft.helper_hint and not isinstance(table, Mapping)
            hint = "; name a helper variable in upper case or with a leading _" if is_helper else ""
            draft.problems.append(unknown_section(section, table) + hint)
        elif isinstance(table, Mapping):
            _take_keys(draft, section, table)
        elif table is not None:  # a YAML table with all its lines commented out is an empty one
            draft.problems.append(value_problem(section, table))


def _take_keys(draft: Draft, table: str, raw: Mapping[Any, Any]) -> None:
    for key, value in raw.items():
        given = f"{table}.{key}"
        dotted = ALIASES.get(given, given)
        if not isinstance(key, str) or dotted not in FIELDS:
            draft.problems.append(unknown_key(table, key, value))
        elif table_of(dotted) is not None and isinstance(value, Mapping):
            _take_keys(draft, dotted, value)
            if not draft.has(dotted):
                draft.put(dotted, {})  # an empty table is a choice too: [model.lora] with all defaults
        else:
            draft.put(dotted, dict(value) if isinstance(value, Mapping) else value, given)


def apply_overrides(draft: Draft, overrides: Draft) -> None:
    """Lays one draft over another: single keys replace, tables (also inside model.config) are merged."""
    for one, other in _INSTEAD:
        for wins, loses in ((one, other), (other, one)):
            if overrides.has(wins) and not overrides.has(loses):
                draft.drop(loses)
    _merge(draft, draft.values, overrides.values, "")
    for dotted, name in overrides.given_as.items():
        draft.given_as[dotted] = name
    draft.problems += overrides.problems
    draft.notes += overrides.notes
    draft.variables |= overrides.variables


def _merge(draft: Draft, below: dict[str, Any], above: Mapping[str, Any], prefix: str) -> None:
    for key, value in above.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            _merge(draft, below[key], value, f"{dotted}.")
        else:
            below[key] = value
        draft.overridden.add(dotted)
        draft.given_as.pop(dotted, None)
