"""Config files to plain tables: TOML, YAML, JSON and Python. Whatever is wrong with a file names the file."""

from __future__ import annotations

import json
import re
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import yaml

from zero.config.words import nearest_file
from zero.errors import ConfigError

_MAX_FILE_BYTES = 4 * 2**20  # a config is text of a few kilobytes; anything else was named by mistake


def read_file(path: Path) -> dict[Any, Any]:
    """Reads one config file by its suffix.

    A ``.py`` file is a program: it is executed, with all that it can do. That is why only a file that the user names
    is ever read, and why no config is looked for in the working directory.

    Args:
        path: A ``.toml``, ``.yaml``, ``.yml``, ``.json`` or ``.py`` file.

    Returns:
        The top-level table, unchecked.

    Raises:
        ConfigError: If it cannot be read, is broken, or holds no table; with the line where one is known.
    """
    _check_kind(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        given = f'its name ends in "{path.suffix}"' if path.suffix else "its name has no suffix"
        raise ConfigError([f"{given}; a config is a .toml, .yaml, .json or .py file"], str(path))
    text = _read_text(path)
    try:
        values = reader(text, path)
    except RecursionError:
        raise ConfigError(["tables are nested too deeply"], str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            [f"holds a {type(values).__name__} at the top; it must be a table such as [train] with keys below"],
            str(path),
        )
    return values


def _check_kind(path: Path) -> None:
    """Refuses what is no file at all, so that its name is not blamed first."""
    try:
        if not path.exists():
            raise ConfigError([f"no such file{nearest_file(str(path))}"], str(path))
        if not path.is_file():
            kind = "folder; name the config file inside it" if path.is_dir() else "special file, not a config"
            raise ConfigError([f"this is a {kind}"], str(path))
        if path.stat().st_size > _MAX_FILE_BYTES:
            num_bytes = path.stat().st_size
            raise ConfigError([f"{num_bytes} bytes are too many for a config; is it another file?"], str(path))
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], str(path)) from None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            [f"line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"], str(path)
        ) from None


def _read_toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also what int() says of numbers with too many digits
        place = re.search(r"\s*\(at line (\d+), column (\d+)\)", str(error))
        reason = str(error).replace(place.group(0), "") if place else str(error)
        line = f"line {place.group(1)}, column {place.group(2)}: " if place else ""
        raise ConfigError([f"{line}broken TOML: {reason}{_toml_advice(text, place)}"], str(path)) from None


def _toml_advice(text: str, place: re.Match[str] | None) -> str:
    """The usual slip behind a broken line: a text without quotes, or YAML's colon."""
    if place is None:
        return ""
    lines = text.splitlines()
    line = lines[int(place.group(1)) - 1].strip() if int(place.group(1)) <= len(lines) else ""
    if re.fullmatch(r"[\w.-]+\s*:\s*.+", line):
        return " (TOML writes key = value)"
    bare = re.fullmatch(r"([\w.-]+)\s*=\s*([A-Za-z0-9_./-]+)", line)
    if bare:
        word = bare.group(2)
        fixed = word.lower() if word in ("True", "False") else f'"{word}"'
        return f"; did you mean {bare.group(1)} = {fixed}?"
    return ""


def _read_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ConfigError([f'the key "{key}" is given twice in one table'], str(path))
            table[key] = value
        return table

    try:
        return json.loads(text, object_pairs_hook=unique) if text.strip() else None
    except json.JSONDecodeError as error:
        raise ConfigError([f"line {error.lineno}, column {error.colno}: broken JSON: {error.msg}"], str(path)) from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"broken JSON: {error}"], str(path)) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML without what a config does not need: tags run code elsewhere, aliases make endless structures."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Builds one node, refusing aliases."""
        if self.check_event(yaml.AliasEvent):
            event = cast(Any, self).peek_event()  # untyped in the stubs
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not understood; write the values out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds one table, refusing keys that are given twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" is given twice in one table', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = error.problem or "cannot be parsed"
        if "could not determine a constructor for the tag" in reason:
            reason = f"{reason.rpartition('tag ')[2]}: YAML tags are refused; write a plain value"
        raise ConfigError([f"{place}broken YAML: {reason}"], str(path)) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError([f"broken YAML: {' '.join(str(error).split())}"], str(path)) from None


def _read_python(text: str, path: Path) -> dict[str, Any]:
    """Executes a Python config and returns its variables, without modules, functions, classes and `_names`."""
    namespace: dict[str, Any] = {"__name__": "zero_config", "__file__": str(path)}
    try:
        exec(compile(text, str(path), "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        raise ConfigError([f"{_python_line(error, path)}{_python_reason(error)}"], str(path)) from None
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, ModuleType | type) and not callable(value)
    }


def _python_line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def _python_reason(error: BaseException) -> str:
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "colossalai":
        return (
            f"{error}; Colossal-AI is not needed here: TensorShardStrategy, BucketTensorShardStrategy and AMP_TYPE are "
            "imported from zero (from zero import TensorShardStrategy)"
        )
    if isinstance(error, SyntaxError):
        return f"broken Python: {error.msg}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


_READERS: dict[str, Callable[[str, Path], Any]] = {
    ".toml": _read_toml,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
    ".py": _read_python,
}
