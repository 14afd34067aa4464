"""One reader for each kind of data file: from bytes to rows with named columns, each with its place in the file.

Every reader takes the place to start from, which is None for the beginning or the ``after`` of a row that it gave
before: rows that follow are the same as they were then. All but ``.json`` (and ``.txt`` as one text) are read bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zero.data.columns import describe
from zero.data.files import UTF8_BOM, decode, line_of_bad_byte, opened, read_all
from zero.data.ids import text_parts
from zero.data.records import BadRecord, Problems
from zero.data.rows import ChooseColumns, Place, Row
from zero.data.tables import read_csv, read_parquet

# A .txt file that is streamed is cut into texts of about this length.
PIECE_CHARS = 1 << 16
_READ_BYTES = 1 << 18

Reader = Callable[[Path, Problems, ChooseColumns, Place], Iterator[Row]]


def read_txt(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """The whole file as one text: language models learn it as one stream. CRLF becomes LF; all else stays."""
    data = read_all(path)
    try:
        text = decode(data)
    except BadRecord as error:
        problems.add(f"{path}:{line_of_bad_byte(data)}", str(error))
        return
    if data:
        yield Row(f"{path}:1", {"text": text.replace("\r\n", "\n")})


def read_txt_pieces(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """The same text in pieces, cut between words: ``begins`` and ``ends`` say which is the first and which the last."""
    place = start or {"byte": 0, "line": 1}
    begins = place["byte"] == 0
    with opened(path) as handle:
        handle.seek(place["byte"])
        pending, rest, is_end = "", b"", False
        while not is_end:
            read = handle.read(_READ_BYTES)
            is_end = not read
            try:
                text, rest = _decoded(rest + read, place["byte"] + len(pending.encode()), is_end)
            except BadRecord as error:
                line = place["line"] + pending.count("\n") + line_of_bad_byte(rest + read) - 1
                problems.add(f"{path}:{line}", str(error))
                text, is_end = "", True
            *pieces, pending = text_parts(pending + text, PIECE_CHARS)
            for piece in [*pieces, pending] if is_end else pieces:
                text = piece.removeprefix("\ufeff") if place["byte"] == 0 else piece
                place, where = _after(place, piece), f"{path}:{place['line']}"
                if text:  # there is none at the very end of the file, where one that was read is gone on with
                    columns = {
                        "text": text.replace("\r\n", "\n"),
                        "begins": begins,
                        "ends": is_end and piece is pending,
                    }
                    yield Row(where, columns, place)
                    begins = False


def _decoded(data: bytes, first_byte: int, is_end: bool) -> tuple[str, bytes]:
    """Text, and the bytes of a character that is not all there yet."""
    whole = len(data)
    if not is_end:
        # A character has at most four bytes; all but its first begin with the bits 10.
        while whole > max(len(data) - 4, 0) and data[whole - 1] & 0xC0 == 0x80:
            whole -= 1
        whole -= whole > 0 and data[whole - 1] >= 0xC0
    return decode(data[:whole], first_byte), data[whole:]


def _after(place: Place, text: str) -> Place:
    return {"byte": place["byte"] + len(text.encode()), "line": place["line"] + text.count("\n")}


def read_jsonl(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    place = start or {"byte": 0, "line": 1}
    with opened(path) as handle:
        handle.seek(place["byte"])
        for raw in handle:
            first_byte, where = place["byte"], f"{path}:{place['line']}"
            line = raw if first_byte else raw.removeprefix(UTF8_BOM)
            place = {"byte": first_byte + len(raw), "line": place["line"] + 1}
            try:
                if line.strip():
                    text = decode(line.rstrip(b"\r\n"), first_byte + len(raw) - len(line))
                    yield Row(where, _json_object(text), place)
            except BadRecord as error:
                problems.add(where, str(error))


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise BadRecord(f"broken JSON: {what} at column {error.colno}: {_excerpt(text, error.pos)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON: {error}") from error
    return _checked_object(value)


def _checked_object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"holds {describe(value)}; a JSON object with named columns is expected")
    return value


def _excerpt(text: str, position: int) -> str:
    """What stands around a position, short enough for a message."""
    start, end = max(position - 20, 0), min(position + 20, len(text.rstrip()))
    return repr(("..." if start else "") + text[start:end] + ("..." if end < len(text.rstrip()) else ""))


def read_json(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """A list of objects, an object with one such list in it, or (as many sets are named so) JSON lines."""
    if isinstance(start, dict):
        yield from read_jsonl(path, problems, choose, start)
        return
    for number, row in enumerate(_rows_of_json(path, problems, choose), 1):
        if number > (start or 0):
            yield row if row.after else Row(row.where, row.columns, number)


def _rows_of_json(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    data = read_all(path)
    try:
        text = decode(data)
    except BadRecord as error:
        problems.add(f"{path}:{line_of_bad_byte(data)}", str(error))
        return
    body = text.lstrip()
    if body.startswith("["):
        yield from _json_list(path, text, len(text) - len(body), problems)
    elif (rows := _rows_of_object(text)) is None:
        yield from read_jsonl(path, problems, choose)
    elif len(rows) == 1:
        yield Row(f"{path}:1", rows[0])
    else:
        for number, row in enumerate(rows, 1):
            yield Row(f"{path}: record {number}", row)


def _rows_of_object(text: str) -> list[Mapping[str, Any]] | None:
    """The records of ``{"data": [...]}``, or the object itself as the only one; None where it is not one object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    # A single conversation is an object with one list in it, too.
    if "messages" not in value and len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
        return lists[0]
    return [value]


def _json_list(path: Path, text: str, start: int, problems: Problems) -> Iterator[Row]:
    """Decodes element by element, so that each is known by its line."""
    decoder, line, counted, position = json.JSONDecoder(), 1, 0, start + 1
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                problems.add(where, f"broken JSON: more after the end of the list: {_excerpt(text, position + 1)}")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"broken JSON: {error}; what follows could not be read")
            return
        try:
            yield Row(where, _checked_object(value))
        except BadRecord as error:
            problems.add(where, str(error))
        position = _skip_blank(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            problems.add(f"{path}:{line}", f"broken JSON: ',' or ']' expected: {_excerpt(text, position)}")
            return


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


READERS: dict[str, Reader] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
GZIPPED = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def is_plain_text(path: Path) -> bool:
    """True for .txt and .txt.gz: the file is the record."""
    return reader_for(path) is read_txt


def reader_for(path: Path) -> Reader | None:
    """The reader for a file, by the end of its name; None where the name says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return READERS[suffixes[-2]] if len(suffixes) > 1 and suffixes[-2] in GZIPPED else None
    return READERS.get(suffixes[-1]) if suffixes else None
