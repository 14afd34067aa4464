"""Where records come from: reads every kind of source, and refuses what cannot be trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero.data.columns import FORMATS, BadColumns, ColumnPlan, plan_columns
from zero.data.files import BadFile
from zero.data.hub import read_hub, read_saved
from zero.data.locate import SUFFIXES, find_files, is_hub_name
from zero.data.readers import is_plain_text, read_txt_pieces, reader_for
from zero.data.records import BadRecord, Problems, Record, TextRecord
from zero.data.rows import Place, Row
from zero.data.sample import builtin_documents
from zero.errors import DataError

logger = logging.getLogger("zero")

BUILTIN = "builtin"
Source = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How sources are read; the fields are those of the ``[data]`` section.

    Attributes:
        config_name: Configuration of a Hub dataset.
        split: Split of a Hub dataset.
        format: "auto", "text", "prompt" or "messages".
        text_column: Column of plain text; settles the format where given.
        streaming: Read a Hub dataset row by row over the network, and .txt files in pieces, each a record.
        max_samples: Stop after this many records.
    """

    config_name: str | None = None
    split: str = "train"
    format: str = "auto"
    text_column: str | None = None
    streaming: bool = False
    max_samples: int | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the sources reading is: after so many records.

    Attributes:
        num_records: Records read so far.
        unit: Number of the file or dataset, in the order they are read.
        place: Where in it, in its reader's own terms; None: its beginning.
        columns: The names of the columns by which its rows are understood, where they have been settled.
    """

    num_records: int = 0
    unit: int = 0
    place: Place = None
    columns: tuple[str, ...] | None = None

    def as_json(self) -> list[Any]:
        """What ``from_json`` reads."""
        return [self.num_records, self.unit, self.place, None if self.columns is None else list(self.columns)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Position:
        """The position that ``as_json`` wrote."""
        num_records, unit, place, columns = value
        return cls(int(num_records), int(unit), place, None if columns is None else tuple(columns))


@dataclass(slots=True)
class RecordSet:
    """Records of one kind.

    Attributes:
        source: As the user named it.
        problems: What was skipped, and the place to add to.
        kind: "text", "prompt" or "messages".
        records: In the order of the files.
        num_blank: Records without any text, which are passed over.
    """

    source: str
    problems: Problems
    kind: str = ""
    records: list[Record] = field(default_factory=list)
    num_blank: int = 0


def load_records(
    source: Source | Sequence[Source] | None,
    options: ReadOptions | None = None,
    *,
    on_error: str = "raise",
    problems: Problems | None = None,
) -> RecordSet:
    """Reads all records of a source.

    Args:
        source: "builtin"; a .txt, .jsonl, .json, .csv, .tsv or .parquet file (all but the last also as .gz); a folder
            of them; a pattern; a Hub dataset's name; or several of these. A .txt file is one record.
        options: How to read it.
        on_error: "raise" refuses bad records, "skip" leaves them out and counts them.
        problems: The list to collect bad records in; goes before ``on_error``.

    Raises:
        DataError: Something is missing, unreadable, damaged or not of a known form (says file, line and what to do);
            or there is no record at all.
    """
    reader = RecordReader(source, options, Problems(on_error) if problems is None else problems)
    records = [record for record, _ in reader.records()]
    return reader.finish(records)


def _as_list(source: Source | Sequence[Source] | None) -> list[str]:
    sources = [source] if isinstance(source, str | os.PathLike) else list(source or ())
    if not sources or not all(str(one).strip() for one in sources):
        raise DataError(f'data: no source named; allowed: a file, a folder, a pattern, a dataset name, or "{BUILTIN}"')
    return [str(one) for one in sources]


class RecordReader:
    """Reads records one by one, from the beginning or from a position.

    Args:
        source: As for ``load_records``.
        options: How to read it.
        problems: Takes what cannot be used.

    Attributes:
        source: As the user named it.
        kind: "text", "prompt" or "messages", once the first record is read.
        num_blank: Records without any text so far, which are passed over.

    Raises:
        DataError: Nothing is named, or the format is not known.
    """

    def __init__(
        self, source: Source | Sequence[Source] | None, options: ReadOptions | None, problems: Problems
    ) -> None:
        self._options = ReadOptions() if options is None else options
        if self._options.format not in FORMATS:
            raise DataError(f'data.format = "{self._options.format}": allowed are {", ".join(FORMATS)}')
        self._sources = _as_list(source)
        self._problems = problems
        # The columns are found anew for each file, and must lead to the same kind of record.
        self._plan: ColumnPlan | None = None
        self._columns: tuple[str, ...] | None = None
        self.source = ", ".join(self._sources)
        self.kind = ""
        self.num_blank = 0

    def units(self) -> Iterator[str | Path]:
        """Files and datasets in the order they are read; files are looked for only when their turn comes.

        Raises:
            DataError: There is no such file.
        """
        for source in self._sources:
            if source == BUILTIN or is_hub_name(source):
                yield source
            else:
                yield from find_files(source)

    def records(self, start: Position | None = None) -> Iterator[tuple[Record, Position]]:
        """Records with the position after each, until ``max_samples`` are read, those before ``start`` counted.

        Raises:
            DataError: Something is missing, unreadable, damaged or not of a known form.
        """
        start = start or Position()
        num_records, limit = start.num_records, self._options.max_samples
        if limit is not None and num_records >= limit:
            return
        for number, unit in enumerate(self.units()):
            if number < start.unit:
                continue
            first = start if number == start.unit else Position()
            for record, place in self._records_of(unit, first):
                num_records += 1
                yield record, Position(num_records, number, place, self._columns)
                if num_records == limit:
                    return

    def _records_of(self, unit: str | Path, start: Position) -> Iterator[tuple[Record, Place]]:
        self._plan = self._columns = None
        if start.columns is not None:
            self._settle(start.columns)
        num_bad, num_rows, where = self._problems.num_bad, 0, str(unit)
        try:
            rows, plain_text = self._open(unit, start.place)
            for row in rows:
                num_rows, where = num_rows + 1, row.where
                record = self._record_of(row, plain_text)
                if record is not None:
                    yield record, row.after
        except BadFile as error:
            self._problems.add(str(unit), str(error))
        except BadColumns as error:
            if not self._problems.skip:
                raise DataError(f"{where}: {error}") from error
            self._problems.add(where, str(error))
        if not num_rows and num_bad == self._problems.num_bad and start.place is None:
            self._problems.add(str(unit), "empty: there is no record in it")

    def _open(self, unit: str | Path, start: Place) -> tuple[Iterable[Row], bool]:
        """A unit's rows, and whether they are plain text."""
        options = self._options
        if unit == BUILTIN:
            documents = enumerate(builtin_documents(), 1)
            return (Row(f"{unit}: document {i}", {"text": d}, i) for i, d in documents if i > (start or 0)), True
        if isinstance(unit, str):
            return (
                read_hub(unit, options.config_name, options.split, self._choose, options.streaming, start),
                False,
            )
        if unit.is_dir():
            return read_saved(unit, options.split, self._choose, start), False
        reader = reader_for(unit)
        if reader is None:
            raise DataError(f"{unit}: not a known kind of data file; known are {SUFFIXES}")
        if is_plain_text(unit) and options.streaming:
            reader = read_txt_pieces
        return reader(unit, self._problems, self._choose, start), is_plain_text(unit)

    def _record_of(self, row: Row, plain_text: bool) -> Record | None:
        """A row's record; None where it is blank or cannot be used, which is noted."""
        try:
            record = self._text(row) if plain_text else self._record(row)
        except BadRecord as error:
            if isinstance(error, BadColumns) and not self._problems.skip:
                raise  # every further row would say the same
            self._problems.add(row.where, str(error))
            return None
        self.num_blank += record is None
        return record

    def _text(self, row: Row) -> Record | None:
        if self._options.format not in ("auto", "text"):
            raise BadColumns(f'plain text has no columns, but data.format = "{self._options.format}"')
        self._agree("text", row.where)
        record = TextRecord(row.where, **row.columns)
        is_whole = record.begins and record.ends
        return None if is_whole and not record.text.strip() else record

    def _record(self, row: Row) -> Record | None:
        plan = self._plan or self._settle(list(row.columns))
        self._agree(plan.kind, row.where)
        return plan.build(row.where, row.columns)

    def _agree(self, kind: str, where: str) -> None:
        if self.kind not in ("", kind):
            raise DataError(
                f'{where}: holds records of kind "{kind}", but those before are of kind "{self.kind}". Train '
                "on one kind at a time, or set data.format"
            )
        self.kind = kind

    def _settle(self, columns: Sequence[str]) -> ColumnPlan:
        plan = plan_columns(columns, self._options.format, self._options.text_column)
        unused = [name for name in ("text", "prompt", "messages") if name in columns and name not in plan.columns]
        if unused and self._columns is None:
            logger.info("data: reading %s; not used: %s", " + ".join(plan.columns), ", ".join(unused))
        self._plan, self._columns = plan, tuple(columns)
        return plan

    def _choose(self, columns: Sequence[str]) -> Sequence[str]:
        """Settles the plan by the names of a table's columns; returns those to read."""
        plan = self._settle(columns)
        return [*plan.columns, *(name for name in plan.optional if name in columns)]

    def finish(self, records: list[Record]) -> RecordSet:
        """Checks what was read as a whole.

        Raises:
            DataError: Bad records that are not to be skipped, or no usable record.
        """
        self._problems.raise_if_refused()
        if not records:
            skipped = self._problems.summary()
            if self.num_blank and skipped is None:
                raise DataError(f"{self.source}: every record is blank ({self.num_blank} in all)")
            raise DataError(f"{self.source}: no usable record" + (f"\n{skipped}" if skipped else ""))
        return RecordSet(self.source, self._problems, self.kind, records, self.num_blank)
