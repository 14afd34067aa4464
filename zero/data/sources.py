"""Where records come from: reads every kind of source, and refuses what cannot be trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from zero.data.columns import FORMATS, BadColumns, ColumnPlan, plan_columns
from zero.data.files import BadFile
from zero.data.hub import read_hub, read_saved
from zero.data.locate import SUFFIXES, find_files, is_hub_name
from zero.data.readers import Row, is_plain_text, reader_for
from zero.data.records import BadRecord, Problems, Record, TextRecord
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
        streaming: Read only the first ``max_samples`` rows of a Hub dataset over the network, and no more of it.
        max_samples: Stop after this many records.
    """

    config_name: str | None = None
    split: str = "train"
    format: str = "auto"
    text_column: str | None = None
    streaming: bool = False
    max_samples: int | None = None


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
    options = ReadOptions() if options is None else options
    if options.format not in FORMATS:
        raise DataError(f'data.format = "{options.format}": allowed are {", ".join(FORMATS)}')
    if options.streaming and options.max_samples is None:
        raise DataError("data.streaming = true: set data.max_samples as well, the number of records to read")
    sources = _as_list(source)
    loader = _Loader(options, RecordSet(", ".join(sources), Problems(on_error) if problems is None else problems))
    for one in sources:
        if not loader.full:
            loader.load(one)
    return loader.finish()


def _as_list(source: Source | Sequence[Source] | None) -> list[str]:
    sources = [source] if isinstance(source, str | os.PathLike) else list(source or ())
    if not sources or not all(str(one).strip() for one in sources):
        raise DataError(f'data: no source named; allowed: a file, a folder, a pattern, a dataset name, or "{BUILTIN}"')
    return [str(one) for one in sources]


class _Loader:
    """Fills a record set, file after file."""

    def __init__(self, options: ReadOptions, result: RecordSet) -> None:
        self._options = options
        self._result = result
        self._problems = result.problems
        # The columns are found anew for each file, and must lead to the same kind of record.
        self._plan: ColumnPlan | None = None

    @property
    def full(self) -> bool:
        """True once as many records as asked for are read."""
        limit = self._options.max_samples
        return limit is not None and len(self._result.records) >= limit

    def load(self, source: str) -> None:
        """Reads one source of any kind."""
        options = self._options
        if source == BUILTIN:
            documents = (Row(f"{BUILTIN}: document {i}", {"text": d}) for i, d in enumerate(builtin_documents(), 1))
            self._read(source, documents, plain_text=True)
        elif is_hub_name(source):
            self._read(
                source, read_hub(source, options.config_name, options.split, self._choose, streaming=options.streaming)
            )
        else:
            for path in find_files(source):
                if self.full:
                    return
                if path.is_dir():
                    self._read(str(path), read_saved(path, options.split, self._choose))
                    continue
                reader = reader_for(path)
                if reader is None:
                    raise DataError(f"{path}: not a known kind of data file; known are {SUFFIXES}")
                self._read(str(path), reader(path, self._problems, self._choose), plain_text=is_plain_text(path))

    def _read(self, name: str, rows: Iterable[Row], plain_text: bool = False) -> None:
        self._plan = None
        num_bad, num_rows, where = self._problems.num_bad, 0, name
        try:
            for row in rows:
                num_rows, where = num_rows + 1, row.where
                self._take(row, plain_text)
                if self.full:
                    return
        except BadFile as error:
            self._problems.add(name, str(error))
        except BadColumns as error:
            if not self._problems.skip:
                raise DataError(f"{where}: {error}") from error
            self._problems.add(where, str(error))
        if not num_rows and num_bad == self._problems.num_bad:
            self._problems.add(name, "empty: there is no record in it")

    def _take(self, row: Row, plain_text: bool) -> None:
        try:
            record = self._text(row) if plain_text else self._record(row)
        except BadRecord as error:
            if isinstance(error, BadColumns) and not self._problems.skip:
                raise  # every further row would say the same
            self._problems.add(row.where, str(error))
        else:
            if record is None:
                self._result.num_blank += 1
            else:
                self._result.records.append(record)

    def _text(self, row: Row) -> Record | None:
        if self._options.format not in ("auto", "text"):
            raise BadColumns(f'plain text has no columns, but data.format = "{self._options.format}"')
        self._agree("text", row.where)
        text = str(row.columns["text"])
        return TextRecord(row.where, text) if text.strip() else None

    def _record(self, row: Row) -> Record | None:
        plan = self._plan or self._settle(list(row.columns))
        self._agree(plan.kind, row.where)
        return plan.build(row.where, row.columns)

    def _agree(self, kind: str, where: str) -> None:
        if self._result.kind not in ("", kind):
            raise DataError(
                f'{where}: holds records of kind "{kind}", but those before are of kind "{self._result.kind}". Train '
                "on one kind at a time, or set data.format"
            )
        self._result.kind = kind

    def _settle(self, columns: Sequence[str]) -> ColumnPlan:
        plan = plan_columns(columns, self._options.format, self._options.text_column)
        unused = [name for name in ("text", "prompt", "messages") if name in columns and name not in plan.columns]
        if unused:
            logger.info("data: reading %s; not used: %s", " + ".join(plan.columns), ", ".join(unused))
        self._plan = plan
        return plan

    def _choose(self, columns: Sequence[str]) -> Sequence[str]:
        """Settles the plan by the names of a table's columns; returns those to read."""
        plan = self._settle(columns)
        return [*plan.columns, *(name for name in plan.optional if name in columns)]

    def finish(self) -> RecordSet:
        """Checks what was read as a whole.

        Raises:
            DataError: Bad records that are not to be skipped, or no usable record.
        """
        self._problems.raise_if_refused()
        result = self._result
        if not result.records:
            skipped = self._problems.summary()
            if result.num_blank and skipped is None:
                raise DataError(f"{result.source}: every record is blank ({result.num_blank} in all)")
            raise DataError(f"{result.source}: no usable record" + (f"\n{skipped}" if skipped else ""))
        return result
