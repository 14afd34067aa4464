"""Rows of a Hugging Face dataset: from the Hub, its cache, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

import difflib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from zero.data.rows import ChooseColumns, Place, Row
from zero.errors import DataError

logger = logging.getLogger("zero")

EVAL_SPLITS = ("validation", "valid", "dev", "test")


def is_saved_dataset(folder: Path) -> bool:
    """True for a folder that ``datasets`` wrote with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read_hub(
    name: str,
    config_name: str | None,
    split: str,
    choose: ChooseColumns,
    streaming: bool = False,
    start: Place = None,
) -> Iterator[Row]:
    """Rows of one split of a dataset of the Hub.

    Args:
        name: As on the Hub: ``owner/name`` or ``name``.
        config_name: Configuration, for datasets that have several.
        split: Split, or part of one in the Hub's words (``train[:10%]``).
        choose: Given the names of all columns, those worth reading.
        streaming: Read over the network row by row instead of downloading the split first.
        start: The ``after`` of the row to go on from. What stands before it is passed over without being read where
            the stream can do that, else read again.

    Raises:
        DataError: The Hub cannot be reached, or has no such dataset, configuration or split.
    """
    import datasets

    try:
        with _short_wait_without_network():
            dataset = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # `datasets` raises whatever its file systems and builders raise
        raise DataError(_explain(name, config_name, split, error)) from error
    try:
        yield from _rows(dataset, f"{name}[{split}]", choose, start)
    except (OSError, RuntimeError) as error:
        raise DataError(f'dataset "{name}", split "{split}": reading it failed: {_first_line(error)}') from error


def read_saved(folder: Path, split: str, choose: ChooseColumns, start: Place = None) -> Iterator[Row]:
    """Rows of a dataset that ``save_to_disk`` wrote. Raises DataError where it is damaged or lacks the split."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: a saved dataset that cannot be read: {_first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f'{folder}: no split "{split}"; it has {", ".join(dataset)}')
        dataset = dataset[split]
    yield from _rows(dataset, str(folder), choose, start)


def eval_split(name: str, config_name: str | None, train_split: str) -> str | None:
    """The split of a Hub dataset made for evaluation: "validation" before "test"; None where there is none."""
    import datasets

    try:
        with _short_wait_without_network():
            splits = datasets.get_dataset_split_names(name, config_name)
    except Exception as error:
        # Training data were read, so this is no reason to stop: a part of them is held out instead.
        logger.warning('data: cannot list the splits of "%s" (%s)', name, _first_line(error))
        return None
    return next((split for split in EVAL_SPLITS if split in splits and split != train_split), None)


def _rows(dataset: Any, name: str, choose: ChooseColumns, start: Place) -> Iterator[Row]:
    # A stream may come without a schema; then its rows have the names.
    columns = dataset.column_names
    dataset = dataset if columns is None else dataset.select_columns(list(choose(columns)))
    num_passed = start["row"] if start else 0
    has_state = hasattr(dataset, "state_dict")
    if start and has_state:
        dataset.load_state_dict(start["state"])
    elif start and (not hasattr(dataset, "__len__") or num_passed < len(dataset)):
        dataset = dataset.skip(num_passed)
    elif start:
        return  # tables refuse to be cut at their very end
    for number, row in enumerate(dataset, num_passed + 1):
        after = {"row": number, "state": dataset.state_dict()} if has_state else {"row": number}
        yield Row(f"{name}: row {number}", row, after)


@contextmanager
def _short_wait_without_network() -> Iterator[None]:
    """Without a network the Hub's client retries for half a minute; where its name cannot even be resolved, only the
    cache is asked, at once."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_has_address()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def hub_has_address() -> bool:
    """Whether the Hub's name can be resolved, or a proxy does it; False says for certain that there is no network."""
    if urllib.request.getproxies():
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _explain(name: str, config_name: str | None, split: str, error: Exception) -> str:
    text, kind = str(error), type(error).__name__
    given = f'dataset "{name}"' + (f', configuration "{config_name}"' if config_name else "")
    if isinstance(error, ConnectionError) or "offline" in kind.lower() or "reach" in text:
        return (
            f"{given}: not in the cache, and the Hugging Face Hub cannot be reached ({_first_line(error)}). Check the "
            f'network, or name a local file: there is no file or folder "{name}" here{_nearest_here(name)}'
        )
    if kind == "DatasetNotFoundError":
        return f"{given}: no such dataset on the Hugging Face Hub, and no such file or folder here{_nearest_here(name)}"
    if "split" in text.lower() or "config" in text.lower():
        return (
            f'{given}, split "{split}": {_first_line(error)} (data.dataset_config, data.train_split, data.eval_split)'
        )
    return f"{given}: cannot be loaded: {kind}: {_first_line(error)}"


def _nearest_here(name: str) -> str:
    close = difflib.get_close_matches(name, os.listdir(), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
