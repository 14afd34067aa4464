"""From a row with named columns to a record: which columns hold what, and what may stand in them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero.data.records import BadRecord, MessagesRecord, PromptRecord, Record, TextRecord

Row = Mapping[str, Any]

FORMATS = ("auto", "text", "prompt", "messages")
# In order of choice: the form that says most about which tokens to learn comes first.
LAYOUTS = (
    ("messages", ("messages",)),
    ("prompt", ("prompt", "completion")),
    ("prompt", ("instruction", "output")),
    ("text", ("text",)),
)
# Other sets' words for the same roles, for the advice in messages.
_ROLE_WORDS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class BadColumns(BadRecord):
    """The columns are not those of any known layout: what is wrong with one row is wrong with the whole file."""


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """Which columns are read, and how a row of them becomes a record.

    Attributes:
        kind: ``text``, ``prompt`` or ``messages``.
        columns: Those read; all must be there in every row.
        optional: Read where present.
        build: From (where, row) to a record; None for a row that is blank.
    """

    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[str, Row], Record | None]


def plan_columns(columns: Sequence[str], format: str = "auto", text_column: str | None = None) -> ColumnPlan:
    """Finds the training columns by name.

    Args:
        columns: Names of the columns that are there.
        format: One of ``FORMATS``; with "auto" the first of ``LAYOUTS`` that fits is taken.
        text_column: Name of the column with plain text; given, it settles the format.

    Raises:
        BadColumns: No layout fits; says what is there, what is expected, and the nearest name.
    """
    if text_column is not None:
        if text_column not in columns:
            raise BadColumns(_mismatch(columns, [text_column], f'"{text_column}" (data.text_column)'))
        return ColumnPlan("text", (text_column,), (), lambda where, row: _text_record(where, row, text_column))
    candidates = [(kind, names) for kind, names in LAYOUTS if format in ("auto", kind)]
    for kind, names in candidates:
        if all(name in columns for name in names):
            return _plan(kind, names)
    expected = ", or ".join(" + ".join(f'"{name}"' for name in names) for _, names in candidates)
    named = "" if format == "auto" else f' (data.format = "{format}")'
    raise BadColumns(_mismatch(columns, [name for _, names in candidates for name in names], expected + named))


def _plan(kind: str, names: tuple[str, ...]) -> ColumnPlan:
    if kind == "messages":
        return ColumnPlan(kind, names, (), _messages_record)
    if kind == "text":
        return ColumnPlan(kind, names, (), lambda where, row: _text_record(where, row, "text"))
    if names[0] == "prompt":
        return ColumnPlan(kind, names, (), _prompt_record)
    return ColumnPlan(kind, names, ("input",), _instruction_record)


def _mismatch(columns: Sequence[str], wanted: Sequence[str], expected: str) -> str:
    near = nearest_columns(columns, wanted)
    partner = next((name for name in wanted if name in columns), None)
    if near:
        advice = f"Did you mean {near}? Rename it"
    elif partner is not None:
        advice = f'"{partner}" lacks its partner. Add it'
    else:
        advice = _separator_hint(columns) or "Rename the columns"
    return (
        f"no column to train on: the columns are {_quoted(columns)}; expected {expected}. "
        f"{advice}, or name the column of plain text with data.text_column"
    )


def _quoted(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(f'"{name}"' for name in names[:20])
    return (shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "none"


def nearest_columns(columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The likeliest misspelling, as '"txt" for "text"'; empty where nothing comes near."""
    lowered = {name.strip().lower(): name for name in columns if name not in wanted}
    for name in wanted:
        if name not in columns and (close := difflib.get_close_matches(name, list(lowered), n=1, cutoff=0.6)):
            return f'"{lowered[close[0]]}" for "{name}"'
    return ""


def _separator_hint(columns: Sequence[str]) -> str:
    if len(columns) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in columns[0]:
                return (
                    f"The fields seem to be separated by {name}; .csv is read with commas, .tsv with tabs. Convert it"
                )
    return ""


def read_text(row: Row, name: str) -> str:
    """A column's text.

    Raises:
        BadRecord: Missing, null, not a string, or half a surrogate pair, which no encoding can write.
    """
    if name not in row:
        near = nearest_columns(list(row), [name])
        hint = f" (did you mean {near}?)" if near else ""
        raise BadRecord(f'column "{name}" is missing; this record has {_quoted(row)}{hint}')
    return check_text(row[name], f'"{name}"')


def check_text(value: Any, name: str) -> str:
    """``value`` as it is, where it is text that can be trained on; ``name`` is how messages call it.

    Raises:
        BadRecord: It is null, not a string, or holds half a surrogate pair.
    """
    if value is None:
        raise BadRecord(f"{name} is null; a string is expected")
    if not isinstance(value, str):
        raise BadRecord(f"{name} holds {describe(value)}; a string is expected")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRecord(
            f"{name} holds half a surrogate pair ({half}) at character {error.start}, which stands for no character"
        ) from error
    return value


def describe(value: Any) -> str:
    """A value of a wrong type in a message: its type, and itself where it is short."""
    shown = repr(value)
    name = {
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "dict": "an object",
        "str": "text",
        "bool": "true or false",
    }
    kind = name.get(type(value).__name__, type(value).__name__)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def _text_record(where: str, row: Row, name: str) -> Record | None:
    text = read_text(row, name)
    return TextRecord(where, text) if text.strip() else None


def _prompt_record(where: str, row: Row) -> Record | None:
    return _completed(where, read_text(row, "prompt"), read_text(row, "completion"), "completion")


def _instruction_record(where: str, row: Row) -> Record | None:
    instruction, output = read_text(row, "instruction"), read_text(row, "output")
    given = "" if row.get("input") is None else read_text(row, "input")
    if not (instruction.strip() or given.strip() or output.strip()):
        return None
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    prompt = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    return _completed(where, prompt, output, "output")


def _completed(where: str, prompt: str, completion: str, name: str) -> Record | None:
    if not completion.strip():
        if not prompt.strip():
            return None
        raise BadRecord(f'"{name}" is blank: there is nothing to learn from')
    return PromptRecord(where, prompt, completion)


def _messages_record(where: str, row: Row) -> Record | None:
    if "messages" not in row:
        read_text(row, "messages")
    messages = row["messages"]
    if messages is None:
        raise BadRecord('"messages" is null; a list of {"role", "content"} objects is expected')
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadRecord(f'"messages" holds {describe(messages)}; a list of {{"role", "content"}} objects is expected')
    if not messages:
        raise BadRecord('"messages" is empty: a conversation needs at least one assistant turn')
    turns = tuple(_message(f"messages[{position}]", message) for position, message in enumerate(messages))
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise BadRecord(f'"messages" has no assistant turn, so there is nothing to learn from (roles: {roles})')
    if not any(turn.get("tool_calls") or turn["content"].strip() for turn in answers):
        raise BadRecord('every assistant turn of "messages" is blank: there is nothing to learn from')
    return MessagesRecord(where, turns)


def _message(name: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRecord(f'{name} holds {describe(message)}; an object with "role" and "content" is expected')
    # Tables give every object all keys that any of them has, with null for "not there".
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn:
        raise BadRecord(f'{name} has no "role" (it has {_quoted(message)})')
    role = turn["role"]
    if role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, n=1, cutoff=0.5)
        near = _ROLE_WORDS.get(str(role).lower()) or (close[0] if close else None)
        hint = f' (did you mean "{near}"?)' if near else ""
        raise BadRecord(f"{name} has role {role!r}; allowed: {', '.join(ROLES)}{hint}")
    turn["content"] = _content(turn, name)
    return turn


def _content(turn: Mapping[str, Any], name: str) -> str:
    if "content" not in turn and turn["role"] == "assistant" and turn.get("tool_calls"):
        return ""
    content = turn.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return check_text(content, f"content of {name}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRecord(
                f"content of {name} has a part that is not text ({describe(part)}); only text can be trained on"
            )
        texts.append(check_text(part.get("text"), f"content of {name}"))
    return "".join(texts)
