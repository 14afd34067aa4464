"""``zero eval``: perplexity of text, lm-eval's tasks and answers in conversations, beside what was published."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemini.device import Device
from gemini.plan import DoesNotFitError
from zero import world
from zero.cli.evaluation_tables import (
    Row,
    dialogue_rows,
    figure_rows,
    perplexity_json,
    perplexity_rows,
    run_figures,
    task_rows,
)
from zero.config.loading import load_config
from zero.config.schema import Config
from zero.data.readers import read_txt, reader_for
from zero.data.records import Problems, TextRecord
from zero.data.sources import ReadOptions, RecordSet, load_records
from zero.dryrun import Scoring
from zero.engine import Engine
from zero.errors import UserError
from zero.evaluation import references
from zero.evaluation.dialogue import (
    Dialogues,
    evaluate_dialogues,
    prepare_dialogues,
    read_dialogues,
)
from zero.evaluation.perplexity import (
    Text,
    TextWindows,
    check_window,
    text_perplexity,
    text_windows,
)
from zero.evaluation.scoring import BatchLimits, Scorer, Sequence
from zero.evaluation.tasks import TaskWish, check_tasks, run_tasks, task_names
from zero.evaluation.writing import Writer
from zero.inference import make_inference_engine
from zero.likelihoods import most_logits_on
from zero.models.build import build_model, build_tokenizer, in_stored_dtype, max_positions, model_config
from zero.ranks import Ranks
from zero.report.codecarbon import check_codecarbon
from zero.report.energy import Cost, EnergyMeter, Reading, combined, cost_of
from zero.report.metrics import jsonable
from zero.report.tables import text_columns, values_text
from zero.run_folder import MODEL_FOLDER
from zero.setup import make_device

logger = logging.getLogger("zero")

_TASK_TOKENS = 1024
"""Of the longest prompt of a task that is planned for: lm-eval makes prompts once the model is there."""


def evaluate_model(config: Config, arguments: argparse.Namespace) -> None:
    """Evaluates what was asked for; the first rank prints the tables, and writes ``--out``. All ranks must call it.

    Raises:
        UserError: something given cannot be; all of it is looked at before the model is loaded.
    """
    _Evaluation(config, arguments).run()


def model_of(config: Config) -> Config:
    """The config with the model that is to be evaluated: where weights would start at random, what the run has made.

    Raises:
        UserError: there is no such model yet.
    """
    config.require_model()
    if config.model.config is None:
        return config
    folder = config.run_folder / MODEL_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.config has random weights, and {folder}, where `zero train` would put the trained ones, is not there: "
            "train first, or name a model folder"
        )
    tables = config.model_dump(exclude_unset=True)
    tables["model"] = {"name_or_path": str(folder)}
    return load_config(tables)


class _Evaluation:
    """What was asked for, checked; ``run()`` does it."""

    def __init__(self, config: Config, arguments: argparse.Namespace) -> None:
        self._config = model_of(config)
        check_codecarbon(config.cost.energy)
        self._arguments = arguments
        self._out = None if arguments.out is None else _writable(Path(arguments.out))
        self._ranks = Ranks(world.current())
        if arguments.batch_size is not None and arguments.batch_size < 1:
            raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
        self._wish = _task_wish(arguments)
        exchanges = [] if arguments.dialogue is None else read_dialogues(Path(arguments.dialogue))
        texts = self._read_texts(bool(exchanges))
        if not (texts or self._wish or exchanges):
            raise UserError(
                "nothing to evaluate: give --text FILE, --tasks NAMES, --dialogue FILE, or data.eval in the config"
            )
        self._tokenizer = build_tokenizer(self._config)
        transformers_config = model_config(self._config)
        self._num_positions = max_positions(transformers_config)
        window, stride = check_window(arguments.window, arguments.stride, self._num_positions)
        self._texts = text_windows(self._tokenizer, texts, window, stride) if texts else None
        self._dialogues = prepare_dialogues(self._tokenizer, exchanges, self._num_positions) if exchanges else None
        self._counting = self._counting_tokenizer()
        self._size = references.recognise(transformers_config)

    def _read_texts(self, has_dialogues: bool) -> list[Text]:
        """The given files, else the config's held-out data where nothing else was asked for."""
        if self._arguments.text is not None:
            return [text for name in self._arguments.text for text in _texts_of_file(name)]
        data = self._config.data
        if data.eval is None or self._wish or has_dialogues:
            return []
        options = ReadOptions(data.dataset_config, data.eval_split or "validation", data.format, data.text_column)
        return _plain_texts(load_records(data.eval, options, on_error=data.on_error), "data.eval")

    def _counting_tokenizer(self) -> Any:
        name = self._arguments.dialogue_tokenizer
        if name is None:
            return None
        return build_tokenizer(load_config({"model": {"name_or_path": name}}))

    def run(self) -> None:
        """Loads the model and does it all."""
        device = make_device(self._config)
        cost = self._config.cost
        meter = None if cost.energy == "off" else EnergyMeter(cost, device.torch_device)
        if meter is not None:
            meter.start()
        try:
            rows, found = self._evaluate(device)
            used = None if meter is None else self._cost(meter)
        finally:
            if meter is not None:
                meter.stop()
        if not self._ranks.is_first:
            return
        lines = [
            text_columns([("what", "here", "published"), *rows]),
            "",
            values_text(figure_rows(found["run"], self._ranks.size)),
        ]
        if used is not None:
            found["cost"] = used.as_json()
            lines += ["", values_text(used.rows())]
        try:  # neither a full disk nor a reader that has gone takes what was found
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
        finally:
            if self._out is not None:
                _write(self._out, found)

    def _cost(self, meter: EnergyMeter) -> Cost:
        """Of all ranks."""
        readings = self._ranks.gather(meter.read().as_json(), "adding up energy")
        return cost_of(combined([Reading.from_json(reading) for reading in readings]), self._config.cost)

    def _evaluate(self, device: Device) -> tuple[list[Row], dict[str, Any]]:
        engine, limits = self._open(device)
        found: dict[str, Any] = {"model": self._config.model.name_or_path, "size": self._size}
        rows: list[Row] = []
        try:
            scorer = Scorer(engine, limits, int(self._tokenizer.pad_token_id))
            writer = Writer(engine, self._tokenizer)
            if self._texts is not None:
                rows += self._perplexity(scorer, self._texts, found)
            if self._dialogues is not None:
                rows += self._dialogue(scorer, writer, self._dialogues, found)
            if self._wish is not None:
                rows += self._tasks(engine, scorer, writer, self._wish, found)
            found["run"] = run_figures(engine, scorer, writer)
        finally:
            engine.close(keep_values=False)
        return rows, found

    def _open(self, device: Device) -> tuple[Engine, BatchLimits]:
        """The model on the device, and how much of it may go through at a time.

        Raises:
            DoesNotFitError: not even one text at a time.
        """
        model: Any = build_model(self._config, self._tokenizer)
        model.eval()
        config = in_stored_dtype(self._config, model, device)
        limits, longest = BatchLimits.of(self._arguments.batch_size), self._longest()
        num_rows = min(limits.num_rows(longest), max(1, len(self._sequences)) if self._wish is None else 1 << 30)
        expected = Scoring(num_rows, longest, most_logits=most_logits_on(device))
        try:
            engine, outlook = make_inference_engine(model, config, device, expected, fewer=True)
        except DoesNotFitError as error:
            error.args = (f"{error} (here --window N: tokens read at a time, now {longest})",)
            raise
        logger.info("%s", outlook.text)
        if outlook.num_rows < num_rows:
            limits = BatchLimits(limits.most_rows, outlook.num_rows * longest)
        return engine, limits

    @property
    def _sequences(self) -> list[Sequence]:
        """To be scored, as far as they are known by now."""
        texts = [] if self._texts is None else self._texts.sequences
        return texts + ([] if self._dialogues is None else self._dialogues.sequences)

    def _longest(self) -> int:
        """Tokens of the longest of them, and of what tasks may bring."""
        known = max((sequence.num_read for sequence in self._sequences), default=1)
        return known if self._wish is None else max(known, min(self._num_positions or _TASK_TOKENS, _TASK_TOKENS))

    def _perplexity(self, scorer: Scorer, texts: TextWindows, found: dict[str, Any]) -> list[Row]:
        result = text_perplexity(scorer, texts)
        reference = references.of_wikitext2(self._size)
        found["perplexity"] = perplexity_json(result) | {"reference": reference and asdict(reference)}
        return perplexity_rows(result, self._arguments.per_word, reference)

    def _dialogue(self, scorer: Scorer, writer: Writer, dialogues: Dialogues, found: dict[str, Any]) -> list[Row]:
        result = evaluate_dialogues(scorer, writer, dialogues, self._counting)
        published = references.of_dialogue(self._size)
        found["dialogue"] = asdict(result) | {
            "perplexity": result.perplexity,
            "normalised_perplexity": result.normalised_perplexity,
            "references": [asdict(reference) for reference in published],
        }
        return dialogue_rows(result, published)

    def _tasks(
        self, engine: Engine, scorer: Scorer, writer: Writer, wish: TaskWish, found: dict[str, Any]
    ) -> list[Row]:
        result = run_tasks(engine, scorer, writer, self._tokenizer, self._num_positions, wish)
        found["tasks"] = asdict(result)
        return task_rows(result, self._size)


def _texts_of_file(name: str) -> list[Text]:
    """The texts of a data file; any other file is one text, whatever it is called."""
    path = Path(name)
    if not path.is_file() or reader_for(path) is not None:
        return _plain_texts(load_records(name, ReadOptions(format="text")), f"--text {name}")
    problems = Problems()
    texts = [Text(row.where, str(row.columns["text"])) for row in read_txt(path, problems, list)]
    problems.raise_if_refused()
    if not texts:
        raise UserError(f"--text {name}: empty; give some text")
    return texts


def _plain_texts(records: RecordSet, what: str) -> list[Text]:
    texts = [Text(record.where, record.text) for record in records.records if isinstance(record, TextRecord)]
    if len(texts) < len(records.records):
        raise UserError(f"{what} holds prompts or conversations; perplexity is of plain text: give --text FILE")
    return texts


def _task_wish(arguments: argparse.Namespace) -> TaskWish | None:
    if arguments.tasks is None:
        return None
    for option, value, least in (("--shots", arguments.shots, 0), ("--limit", arguments.limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: must be at least {least}")
    folder = None if arguments.task_path is None else Path(arguments.task_path)
    wish = TaskWish(task_names(arguments.tasks), arguments.shots, arguments.limit, folder)
    if not wish.tasks:
        raise UserError("--tasks: no task named")
    check_tasks(wish)
    return wish


def _writable(path: Path) -> Path:
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir():
        raise UserError(f"--out {path}: a file in a folder that is there is needed")
    is_file = path.is_file() or not path.exists()  # else a pipe, or /dev/stdout
    if is_file and not os.access(folder, os.W_OK):
        raise UserError(f"--out {path}: nothing can be written in {folder}; name a file in another folder")
    return path


def _write(path: Path, found: dict[str, Any]) -> None:
    """A file is written beside and then put in its place: what was there before stays until the new one is whole."""
    text, path = json.dumps(jsonable(found), indent=2, allow_nan=False) + "\n", path.resolve()
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        aside = path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from error
