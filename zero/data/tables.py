"""Readers of tables: CSV and Parquet. They are read bit by bit, as all of ``readers`` are."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zero.data.files import UTF8_BOM, BadFile, decode, opened
from zero.data.records import BadRecord, Problems
from zero.data.rows import ChooseColumns, Place, Row

PARQUET_BATCH_ROWS = 1024
# A line with its end, whichever system it is from; or the rest.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")


def read_csv(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """Comma-separated (.tsv: tab-separated) values; the first row names the columns."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    # The limit is the process's own: lifted while a row is read, because one field may hold a whole book.
    with opened(path) as handle:
        lines = _Lines(handle)
        table = _Table(path, csv.reader(lines, delimiter=delimiter, strict=True), lines, problems)
        header = table.header()
        if start:
            lines.seek(start)
        while header and (row := table.next_row(header)):
            if row.columns:
                yield row


class _Lines:
    """Lines of a handle as text, and where the next one begins."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._split: list[str] = []
        self.byte, self.line = 0, 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._split:
            raw = self._handle.readline()
            if not raw:
                raise StopIteration
            text = decode(raw.removeprefix(UTF8_BOM) if self.byte == 0 else raw, self.byte)
            self.byte += len(raw) - len(text.encode())
            self._split = _LINE.findall(text)[::-1]
        part = self._split.pop()
        self.byte += len(part.encode())
        self.line += 1
        return part

    @property
    def place(self) -> Place:
        return {"byte": self.byte, "line": self.line}

    def seek(self, place: Place) -> None:
        self._handle.seek(place["byte"])
        self._split, self.byte, self.line = [], place["byte"], place["line"]


class _Table:
    """Rows of a CSV file, one at a time."""

    def __init__(self, path: Path, reader: Any, lines: _Lines, problems: Problems) -> None:
        self._path = path
        self._reader = reader
        self._lines = lines
        self._problems = problems
        self._where = ""

    def _fields(self) -> list[str] | None:
        """The next row that is not blank; None at the end, or where the file cannot be read any further."""
        while True:
            self._where = f"{self._path}:{self._lines.line}"
            limit = csv.field_size_limit(sys.maxsize)
            try:
                fields: list[str] | None = next(self._reader, None)
            except csv.Error as error:
                self._problems.add(
                    self._where, f"broken CSV: {error} (is a quote left open?); what follows could not be read"
                )
                return None
            except BadRecord as error:
                self._problems.add(f"{self._path}:{self._lines.line}", str(error))
                return None
            finally:
                csv.field_size_limit(limit)
            if fields is None or fields:
                return fields

    def header(self) -> list[str] | None:
        """The columns' names; None where there are none to go by."""
        names = [name.strip() for name in self._fields() or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            self._problems.add(self._where, f'the header names column "{twice[0]}" more than once')
            return None
        return names

    def next_row(self, header: list[str]) -> Row | None:
        """The next row, without columns where it is not as long as the header; None at the end."""
        fields = self._fields()
        if fields is None:
            return None
        after = self._lines.place
        if len(fields) == len(header):
            columns = dict(zip(header, (field.replace("\r\n", "\n") for field in fields), strict=True))
            return Row(self._where, columns, after)
        self._problems.add(
            self._where, f"{len(fields)} fields in a table of {len(header)} columns (is a comma or quote missing?)"
        )
        return Row(self._where, {}, after)


def read_parquet(path: Path, problems: Problems, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
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
            group, number = _row_group(table, start or 0)
            groups = list(range(group, table.num_row_groups))
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, row_groups=groups, columns=columns):
                passed = min(max((start or 0) - number, 0), batch.num_rows)
                number += passed
                for columns_of_row in batch.slice(passed).to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", columns_of_row, number)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadFile(f"not a Parquet file, or a damaged one, after row {number}: {reason}") from error


def _row_group(table: Any, row: int) -> tuple[int, int]:
    """The group of rows that a row stands in, and how many rows stand before that group."""
    before = 0
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        if row < before + num_rows:
            return group, before
        before += num_rows
    return table.num_row_groups, before
