"""One reader for each kind of data file: from bytes to rows with named columns, each with its place in the file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zero.data.columns import describe
from zero.data.files import UTF8_BOM, BadFile, decode, line_of_bad_byte, opened, read_all
from zero.data.records import BadRecord, Problems

PARQUET_BATCH_ROWS = 1024


class Row(NamedTuple):
    """One row of a file: where it stands (``file:line``) and its columns."""

    where: str
    columns: Mapping[str, Any]


# Given the names of all columns, those worth reading.
ChooseColumns = Callable[[Sequence[str]], Sequence[str]]
Reader = Callable[[Path, Problems, ChooseColumns], Iterator[Row]]


def read_txt(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    """The whole file as one text: language models learn it as one stream. CRLF becomes LF; all else stays."""
    data = read_all(path)
    try:
        text = decode(data)
    except BadRecord as error:
        problems.add(f"{path}:{line_of_bad_byte(data)}", str(error))
        return
    if data:
        yield Row(f"{path}:1", {"text": text.replace("\r\n", "\n")})


def read_jsonl(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    with opened(path) as handle:
        first_byte = 0
        for number, raw in enumerate(handle, 1):
            where, line = f"{path}:{number}", raw.removeprefix(UTF8_BOM) if number == 1 else raw
            try:
                if line.strip():
                    text = decode(line.rstrip(b"\r\n"), first_byte + len(raw) - len(line))
                    yield Row(where, _json_object(text))
            except BadRecord as error:
                problems.add(where, str(error))
            first_byte += len(raw)


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


def read_json(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    """A list of objects, an object with one such list in it, or (as many sets are named so) JSON lines."""
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


def read_csv(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    """Comma-separated (.tsv: tab-separated) values; the first row names the columns."""
    data = read_all(path)
    try:
        text = decode(data)
    except BadRecord as error:
        problems.add(f"{path}:{line_of_bad_byte(data)}", str(error))
        return
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # The limit is the process's own: lifted while a file is read, because one field may hold a whole book.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(path, reader, problems)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, reader: Any, problems: Problems) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problems.add(where, f"broken CSV: {error} (is a quote left open?); what follows could not be read")
            return
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                problems.add(where, f'the header names column "{twice[0]}" more than once')
                return
        elif len(fields) != len(header):
            problems.add(
                where, f"{len(fields)} fields in a table of {len(header)} columns (is a comma or quote missing?)"
            )
        else:
            yield Row(where, dict(zip(header, (field.replace("\r\n", "\n") for field in fields), strict=True)))


def read_parquet(path: Path, problems: Problems, choose: ChooseColumns) -> Iterator[Row]:
    """Rows of a Parquet file; only the columns chosen are read."""
    # Takes half a second to import, and comes with `datasets`.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with opened(path):
        pass
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            columns = list(choose(table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for columns_of_row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", columns_of_row)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadFile(f"not a Parquet file, or a damaged one, after row {number}: {reason}") from error


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
