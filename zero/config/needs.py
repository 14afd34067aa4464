"""What a command needs beyond a valid config: a model, training data."""

from __future__ import annotations

import os
from typing import NamedTuple

from zero.config.task import BUILTIN, DataSection, ModelSection
from zero.config.words import nearest_file


class Need(NamedTuple):
    """One thing that is missing."""

    reads: tuple[str, ...]
    """Dotted keys it was concluded from."""
    text: str
    """The line for the user."""


_DATA_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt.gz", ".json.gz", ".csv.gz")


def missing_model(model: ModelSection) -> list[Need]:
    """What keeps a model from being built from this table."""
    problems: list[Need] = []
    both = ("model.name_or_path", "model.config")
    if model.name_or_path is None and model.config is None:
        text = 'not given; set it to a Hub name such as "facebook/opt-125m" or a folder, or give model.config'
        problems.append(Need(both, f"model.name_or_path: {text}"))
    if model.name_or_path is not None and model.config is not None:
        text = "model.config is given as well; keep the one to be trained"
        problems.append(Need(both, f'model.name_or_path = "{model.name_or_path}": {text}'))
    for key, value in (("name_or_path", model.name_or_path), ("tokenizer", model.tokenizer)):
        if value is not None and _is_local(value) and not _holds_model(os.path.expanduser(value)):
            problems.append(_not_there(f"model.{key}", value, "folder"))
    return problems


def missing_data(data: DataSection) -> list[Need]:
    """What keeps training data from being found."""
    problems: list[Need] = []
    if data.train is None:
        text = 'not given; set it to a dataset name, to .txt, .jsonl, .csv or .parquet files, or to "builtin"'
        problems.append(Need(("data.train",), f"data.train: {text}"))
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for source in sources or ():
            if source != BUILTIN and _is_data_path(source) and not os.path.exists(os.path.expanduser(source)):
                problems.append(_not_there(f"data.{key}", source, "file"))
    return problems


def _is_local(text: str) -> bool:
    """Whether a text can only be meant as a path; `a/b` may be a Hub name and is left alone."""
    deep = text.count("/") > 1 and "://" not in text
    return deep or text.startswith(("/", "./", "../", "~", ".\\")) or text in (".", "..")


def _holds_model(path: str) -> bool:
    return os.path.isdir(path) or (path.endswith(".gguf") and os.path.isfile(path))


def _is_data_path(text: str) -> bool:
    # A pattern is expanded, and found empty, by what reads the data.
    return (_is_local(text) or text.lower().endswith(_DATA_SUFFIXES)) and not any(mark in text for mark in "*?[")


def _not_there(dotted: str, path: str, kind: str) -> Need:
    return Need((dotted,), f'{dotted} = "{path}": no such {kind}{nearest_file(path)}')
