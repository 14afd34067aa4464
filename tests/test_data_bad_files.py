"""Bad training data are refused before anything starts, in words that a person can act on; or skipped where asked."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_case import chat_tokenizer, config, tokenizer

from zero.data.loaders import build_dataloaders
from zero.errors import DataError

GOOD = '{"text": "a good line"}\n'
TALK = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'


def put(name: str, content: str | bytes) -> Callable[[Path], str]:
    """Writes one file; the source is that file."""

    def write(folder: Path) -> str:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return str(folder / name)

    return write


def talk(*messages: Any) -> str:
    return TALK + json.dumps({"messages": messages}) + "\n"


def table(rows: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else pa.table(rows), folder / "t.parquet")
        return str(folder / "t.parquet")

    return write


def cut_parquet(folder: Path) -> str:
    path = table([{"text": "word " * 50}] * 200)(folder)
    Path(path).write_bytes(Path(path).read_bytes()[:-40])
    return path


def folder_of(**files: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return str(folder)

    return write


def dangling(folder: Path) -> str:
    (folder / "link.jsonl").symlink_to(folder / "gone.jsonl")
    return str(folder / "link.jsonl")


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.jsonl")
    return str(folder / "pipe.jsonl")


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}

# What is written, and what the message must say (a pattern); {at} stands for the source's path.
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    # nothing there
    "missing file": (lambda d: f"{d}/none.jsonl", r"{at}: no such file or folder in "),
    "misspelt file": (
        lambda d: put("train.jsonl", GOOD)(d).replace("train", "trian"),
        r'did you mean ".*/train\.jsonl"',
    ),
    "missing folder above": (lambda d: f"{d}/no/where/a.txt", r"the folder .*/no/where does not exist either"),
    "dangling link": (dangling, r"{at}: no such file.*a link to .*gone\.jsonl, which is missing"),
    "pattern without a match": (
        lambda d: f"{d}/*.jsonl",
        r"the pattern matches nothing; data files end in \.txt, \.jsonl",
    ),
    "folder without data": (folder_of(notes_md="x"), r"{at}: no data file in this folder \(it has notes\.md\)"),
    "empty folder": (folder_of(), r"{at}: no data file in this folder \(it is empty\)"),
    "nothing named": (lambda d: [], r'no source named; allowed: .*"builtin"'),
    "blank name": (lambda d: " ", r"no source named"),
    "unknown kind of file": (put("a.docx", b"PK\x03\x04"), r"{at}: not a known kind of data file; known are \.txt, "),
    "unknown packed kind": (put("a.parquet.gz", b"\x1f\x8b"), r"{at}: not a known kind of data file"),
    "a pipe": (fifo, r"{at}: not a regular file"),
    # bytes
    "empty text": (put("a.txt", ""), r"{at}: empty: there is no record in it"),
    "empty jsonl": (put("a.jsonl", ""), r"{at}: empty"),
    "empty parquet": (table({"text": pa.array([], pa.string())}), r"{at}: empty"),
    "only a header": (put("a.csv", "text\n"), r"{at}: empty"),
    "blank text": (put("a.txt", " \n\n\t\n"), r"{at}: every record is blank \(1 in all\)"),
    "all records blank": (put("a.jsonl", '{"text": ""}\n{"text": " "}\n'), r"{at}: every record is blank \(2 in all\)"),
    "latin-1 text": (
        put("a.txt", "one\ntwo\ncaf\xe9\n".encode("latin-1")),
        r"{at}:3: not UTF-8: byte 0xe9 at offset 11 .*iconv",
    ),
    "latin-1 line": (
        put("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n'),
        r"{at}:2: not UTF-8: byte 0xff at offset 34 ",
    ),
    "latin-1 table": (put("a.csv", b"text\nfine\ncaf\xe9\n"), r"{at}:3: not UTF-8: byte 0xe9 at offset 13"),
    "utf-16": (put("a.txt", "words".encode("utf-16")), r"{at}:1: not UTF-8.*It is UTF-16"),
    "gzip by another name": (
        put("a.jsonl", gzip.compress(GOOD.encode())),
        r"{at}:1: not UTF-8.*gzip-compressed: add \.gz",
    ),
    "binary": (put("a.txt", b"words\nand\x00more"), r"{at}:2: NUL byte at offset 9 .*binary"),
    "cut gzip": (put("a.jsonl.gz", gzip.compress(GOOD.encode() * 999)[:-20]), r"{at}: damaged or incomplete gzip data"),
    "no gzip": (put("a.txt.gz", "plain"), r"{at}: damaged or incomplete gzip data.*again"),
    "gzip with a flipped byte": (
        put("a.txt.gz", gzip.compress(b"word " * 99)[:-8] + b"\0" * 8),
        r"{at}: damaged or incomplete gzip data \(CRC",
    ),
    "parquet junk": (put("a.parquet", b"PAR1 this is no table"), r"{at}: not a Parquet file, or a damaged one"),
    "cut parquet": (cut_parquet, r"{at}: not a Parquet file, or a damaged one"),
    # JSON
    "broken line": (put("a.jsonl", GOOD + '{"text": "open\n' + GOOD), r"{at}:2: broken JSON: .* at column 10: "),
    "cut last line": (put("a.jsonl", GOOD * 2 + '{"text": "a go'), r"{at}:3: broken JSON: Unterminated string"),
    "two objects on a line": (put("a.jsonl", GOOD.strip() + GOOD), r"{at}:1: broken JSON: Extra data at column 24"),
    "a list on a line": (put("a.jsonl", GOOD + "[1, 2]\n"), r"{at}:2: holds a list \(\[1, 2\]\); a JSON object"),
    "bare text": (put("a.jsonl", "just words\n"), r"{at}:1: broken JSON: Expecting value at column 1: 'just words'"),
    "deep nesting": (put("a.jsonl", GOOD + "[" * 100_000 + "\n"), r"{at}:2: broken JSON: "),
    "a number too long": (
        put("a.jsonl", GOOD + '{"text": ' + "9" * 5000 + "}\n"),
        r"{at}:2: broken JSON: Exceeds the limit",
    ),
    "cut list": (put("a.json", '[\n{"text": "a b"},\n{"text": "c'), r"{at}:3: broken JSON: Unterminated string"),
    "list without commas": (
        put("a.json", '[{"text": "a b"}\n{"text": "c"}]'),
        r"{at}:2: broken JSON: ',' or '\]' expected",
    ),
    "more after a list": (put("a.json", '[{"text": "a b"}]\n[]'), r"{at}:1: broken JSON: more after the end"),
    "a number in a list": (put("a.json", '[{"text": "a b"},\n7]'), r"{at}:2: holds a number \(7\)"),
    "an empty list": (put("a.json", "[]"), r"{at}: empty"),
    # columns
    "null text": (put("a.jsonl", GOOD + '{"text": null}\n'), r'{at}:2: "text" is null; a string is expected'),
    "a number for text": (put("a.jsonl", GOOD + '{"text": 42}\n'), r'{at}:2: "text" holds a number \(42\); a string'),
    "missing column": (
        put("a.jsonl", GOOD + '{"txt": "a"}\n'),
        r'{at}:2: column "text" is missing; .*"txt" \(did you mean',
    ),
    "wrong columns": (
        put("a.jsonl", '{"txt": "a", "id": 1}\n' * 30),
        r'{at}:1: no column to train on: the columns are "txt", "id"; .*Did you mean "txt" for "text".*text_column',
    ),
    "wrong columns in a table": (
        table([{"Text ": "a", "label": 1}]),
        r'{at}: no column .*"Text ", "label".*"Text " for "text"',
    ),
    "half a pair of columns": (
        put("a.jsonl", '{"prompt": "a", "answer": "b"}\n'),
        r'{at}:1: no column .*"prompt" lacks its partner',
    ),
    "semicolons": (put("a.csv", "text;label\nwords;1\n"), r'{at}:2: no column .*"text;label".*separated by semicolons'),
    "ragged row": (put("a.csv", "id,text\n1,fine\n2,a,b\n"), r"{at}:3: 3 fields in a table of 2 columns"),
    "short row": (put("a.csv", "id,text\n1\n"), r"{at}:2: 1 fields in a table of 2 columns"),
    "open quote": (put("a.csv", 'text\nfine\n"never closed\nmore\n'), r"{at}:3: broken CSV: .*quote left open"),
    "column twice": (put("a.csv", "text,text\na,b\n"), r'{at}:1: the header names column "text" more than once'),
    "numbers in a table": (table([{"text": 1}]), r'{at}: row 1: "text" holds a number \(1\)'),
    "null in a table": (table([{"text": "a b"}, {"text": None}]), r'{at}: row 2: "text" is null'),
    "half a surrogate": (
        put("a.jsonl", '{"text": "ab\\ud83d"}\n'),
        r'{at}:1: "text" holds half a surrogate pair \(\\ud83d\)',
    ),
    "blank completion": (
        put("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": " "}\n'),
        r'{at}:2: "completion" is blank: there is nothing to learn from',
    ),
    "a list for a prompt": (
        put("a.jsonl", '{"prompt": [], "completion": "b"}\n'),
        r'{at}:1: "prompt" holds a list \(\[\]\)',
    ),
    # conversations
    "empty messages": (put("a.jsonl", talk()), r'{at}:2: "messages" is empty'),
    "messages as text": (
        put("a.jsonl", TALK + '{"messages": "hi"}\n'),
        r"""{at}:2: "messages" holds text \('hi'\); a list of""",
    ),
    "null messages": (put("a.jsonl", TALK + '{"messages": null}\n'), r'{at}:2: "messages" is null'),
    "unknown role": (
        put("a.jsonl", talk({"role": "human", "content": "a"})),
        r"""{at}:2: messages\[0\] has role 'human'; allowed: .*mean "user"\?""",
    ),
    "misspelt role": (put("a.jsonl", talk(USER, {**ANSWER, "role": "asistant"})), r'mean "assistant"'),
    "no role": (
        put("a.jsonl", talk({"from": "user", "value": "a"})),
        r'{at}:2: messages\[0\] has no "role" \(it has "from",',
    ),
    "null content": (put("a.jsonl", talk(USER, {"role": "assistant"})), r"{at}:2: content of messages\[1\] is null"),
    "a number for content": (
        put("a.jsonl", talk(USER, {**ANSWER, "content": 5})),
        r"{at}:2: content of messages\[1\] holds a number",
    ),
    "an image": (
        put("a.jsonl", talk({"role": "user", "content": [{"type": "image"}]}, ANSWER)),
        r"{at}:2: content of messages\[0\] has a part that is not text",
    ),
    "text for a message": (put("a.jsonl", talk("hi")), r"{at}:2: messages\[0\] holds text \('hi'\)"),
    "no assistant": (
        put("a.jsonl", talk(USER, USER)),
        r"{at}:2: .*no assistant turn, so there is nothing to learn from \(roles: user\)",
    ),
    "blank answers": (
        put("a.jsonl", talk(USER, {**ANSWER, "content": ""})),
        r"{at}:2: every assistant turn .* is blank",
    ),
    # several
    "two kinds": (
        folder_of(a_jsonl=GOOD, b_jsonl=TALK),
        r'b\.jsonl:1: holds records of kind "messages", but .* "text"',
    ),
    "one empty among good": (folder_of(a_jsonl=GOOD, b_jsonl=""), r"b\.jsonl: empty"),
    "too little to hold out": (put("a.jsonl", GOOD), r"too little to hold a part out for evaluation.*data\.eval"),
}


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", CASES)
def test_bad_data_are_refused_with_file_and_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, pattern = CASES[name]
    monkeypatch.chdir(tmp_path)
    given = build(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(DataError) as caught:
        build_dataloaders(config(given), chat_tokenizer())
    message = str(caught.value)
    assert re.search(pattern.replace("{at}", re.escape(str(given))), message, re.DOTALL), message
    assert "Traceback" not in message
    assert len(message) < 1500
    assert listing(tmp_path) == before


# Data with good records among bad ones: how many of each are there.
SKIPPED: dict[str, tuple[Callable[[Path], Any], int, int]] = {
    "broken line": (put("a.jsonl", GOOD + "{\n" + GOOD), 2, 1),
    "latin-1 line": (put("a.jsonl", GOOD.encode() * 2 + b'{"text": "\xff"}\n'), 2, 1),
    "null, number and missing": (put("a.jsonl", GOOD * 2 + '{"text": null}\n{"text": 1}\n{"x": ""}\n'), 2, 3),
    "bad first line": (put("a.jsonl", '{"wrong": 1}\n' + GOOD * 3), 3, 1),
    "ragged row": (put("a.csv", "id,text\n1,fine\n2,a,b\n3,good\n"), 2, 1),
    "open quote at the end": (put("a.csv", 'text\nfine one\ngood one\n"never closed\n'), 2, 1),
    "cut gzip": (put("a.jsonl.gz", gzip.compress(GOOD.encode() * 5)[:-4]), 5, 1),
    "cut list": (put("a.json", '[{"text": "a b"}, {"text": "b c"}, {"text": "c'), 2, 1),
    "nulls in a table": (table([{"text": "a b"}, {"text": None}, {"text": "c d"}]), 2, 1),
    "an empty file among good": (folder_of(a_jsonl=GOOD, b_jsonl="", c_jsonl=GOOD), 2, 1),
    "a latin-1 file among good": (
        lambda d: [put("a.txt", "fine words")(d), put("b.txt", b"\xff")(d), put("c.txt", "good words")(d)],
        2,
        1,
    ),
    "bad conversations": (
        put("a.jsonl", TALK * 2 + talk() + talk(USER) + talk({"role": "x", "content": ""})),
        4 + 1,
        3,
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_records_are_skipped_and_counted_where_asked(name: str, tmp_path: Path) -> None:
    build, num_good, num_bad = SKIPPED[name]
    given = build(tmp_path)
    bundle = build_dataloaders(config(given, on_error="skip", packing=False, eval_fraction=0), chat_tokenizer())
    assert (len(bundle.train_dataset), bundle.problems.num_bad) == (num_good, num_bad)
    assert f"skipped {num_bad} record" in str(bundle.problems.summary())


def test_nothing_left_after_skipping_is_an_error(tmp_path: Path) -> None:
    given = put("a.jsonl", '{"text": null}\n{\n')(tmp_path)
    with pytest.raises(DataError, match=r"no usable record\ndata: skipped 2 records:\n  - .*a\.jsonl:1: .*null"):
        build_dataloaders(config(given, on_error="skip"), tokenizer())


def test_several_bad_records_are_listed_at_once_but_not_all_of_thousands(tmp_path: Path) -> None:
    given = put("a.jsonl", GOOD + '{"text": 1}\n' * 3)(tmp_path)
    with pytest.raises(DataError) as few:
        build_dataloaders(config(given), tokenizer())
    assert "3 records cannot be used" in str(few.value)
    assert all(f"a.jsonl:{line}: " in str(few.value) for line in (2, 3, 4))
    given = put("a.jsonl", GOOD + '{"text": 1}\n' * 3000)(tmp_path)
    with pytest.raises(DataError) as many:
        build_dataloaders(config(given), tokenizer())
    assert "more than 8 records cannot be used" in str(many.value)
    assert 'data.on_error = "skip"' in str(many.value)
    assert len(str(many.value)) < 2000


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r'data/trian: no such file or folder \(did you mean "data/train"\?\)'):
        build_dataloaders(config("data/trian"), tokenizer())


@pytest.mark.parametrize("what", ["file", "folder"])
def test_permission_denied_is_said(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read anything, so the refusal is made here.
    def refuse(*given: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    given = put("a.jsonl", GOOD)(tmp_path)
    if what == "file":
        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(DataError, match=re.escape(given) + ": cannot be read: permission denied.*chmod"):
            build_dataloaders(config(given), tokenizer())
    else:
        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(DataError, match="the folder cannot be read: Permission denied"):
            build_dataloaders(config(str(tmp_path)), tokenizer())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_permission_denied_for_real(tmp_path: Path) -> None:
    given = put("a.jsonl", GOOD)(tmp_path)
    Path(given).chmod(0)
    with pytest.raises(DataError, match="permission denied"):
        build_dataloaders(config(given), tokenizer())


def test_format_and_settings_are_checked(tmp_path: Path) -> None:
    given = put("a.txt", "some words")(tmp_path)
    with pytest.raises(DataError, match=r'a\.txt:1: plain text has no columns, but data\.format = "messages"'):
        build_dataloaders(config(given, format="messages"), tokenizer())
    with pytest.raises(DataError, match=r'data\.format = "csv": allowed are auto, text, prompt, messages'):
        build_dataloaders(config(given, format="csv"), tokenizer())
    given = put("a.jsonl", GOOD)(tmp_path)
    with pytest.raises(
        DataError, match=r'no column .*"text"; expected "prompt" \+ "completion".*data\.format = "prompt"'
    ):
        build_dataloaders(config(given, format="prompt"), tokenizer())
    with pytest.raises(DataError, match=r'expected "body" \(data\.text_column\)'):
        build_dataloaders(config(given, text_column="body"), tokenizer())
