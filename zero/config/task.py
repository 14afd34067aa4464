"""Tables about the task: model and data."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from zero.config.types import (
    Allowed,
    NonNegativeInt,
    OpenFraction,
    PositiveInt,
    PositiveNumber,
    Section,
    SequenceLength,
    Text,
    Texts,
)

BUILTIN = "builtin"
_BUILTIN_SPELLINGS = ("built-in", "built_in", "builtin-sample", "built-in sample", "sample")
DEFAULT_SEQ_LENGTH = 512


def _plain(value: Any, path: str = "") -> Any:
    """Checks that a value is what JSON can hold; raises with the path of the part that is not."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is not a finite number")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_plain_key(key): _plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    raise ValueError(f"{path} is {type(value).__name__}; allowed are texts, numbers, true, false, lists and tables")


def _plain_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} must be a text")
    return key


def _plain_table(value: Any) -> Any:
    return _plain(value) if isinstance(value, dict) else value


def _builtin(value: Any) -> Any:
    """One spelling for the built-in sample."""
    return BUILTIN if isinstance(value, str) and value.lower() in _BUILTIN_SPELLINGS else value


def _modules(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class LoraSection(Section):
    """Low-rank adapters through peft: only they are trained."""

    r: PositiveInt = 8
    """Rank of the adapters."""

    alpha: PositiveNumber = 16.0
    """The adapters' output is multiplied by alpha / r."""

    dropout: OpenFraction = 0.0
    """Dropout before the adapters, 0 to below 1."""

    target_modules: Annotated[
        Text | tuple[Text, ...] | None,
        BeforeValidator(_modules),
        Allowed('a list of module names, or one text such as "all-linear"'),
    ] = None
    """Names of the modules that get adapters. Unset: peft's choice for that kind of model."""


class ModelSection(Section):
    """The model that `zero train` builds. Your own loop builds its own and leaves this table out."""

    name_or_path: Text | None = None
    """A model on the Hugging Face Hub, a published OPT by its short name such as "opt-125m", a folder, or a GGUF file."""

    config: Annotated[dict[str, Any] | None, BeforeValidator(_plain_table), Allowed("a table with model_type")] = None
    """A transformers config given here, with `model_type`; the weights start at random. Instead of name_or_path."""

    tokenizer: Annotated[Text | None, BeforeValidator(_builtin)] = None
    """A tokenizer on the Hub, a folder with one, or "builtin": one trained on the built-in sample. Unset: the model's
    own, and "builtin" for a model given by `config`."""

    revision: Text | None = None
    """Branch, tag or commit on the Hub. Unset: the main branch."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Code from the Hub can do anything that you can."""

    attn_implementation: Text | None = None
    """Attention of transformers to use, such as "sdpa" or "eager". Unset: transformers' choice."""

    lora: LoraSection | None = None
    """Train low-rank adapters and not the full model: {r, alpha, dropout, target_modules}."""

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from: `tokenizer`, else the model's name or folder, else "builtin"."""
        return self.tokenizer or self.name_or_path or BUILTIN


Sources = Annotated[
    Texts,
    BeforeValidator(_builtin),
    Allowed('a dataset name, one or several .txt, .jsonl, .json, .csv or .parquet files, or "builtin"'),
]


class DataSection(Section):
    """What is trained and evaluated on, and how it becomes token sequences."""

    train: Sources | None = None
    """Training data: a dataset of the Hugging Face Hub, local .txt, .jsonl, .json, .csv or .parquet files, or
    "builtin", English prose that comes with every Python. Also understood: dataset, name, path, files, train_file."""

    eval: Sources | None = None
    """Held-out data of the same kinds. Unset: eval_fraction of the training data. Also understood: eval_file,
    eval_dataset, validation, validation_file, test, test_file."""

    dataset_config: Text | None = None
    """Configuration of a Hub dataset, such as "wikitext-2-raw-v1"."""

    train_split: Text = "train"
    """Split of a Hub dataset to train on."""

    eval_split: Text | None = None
    """Split of a Hub dataset to evaluate on. Unset: "validation" or "test" where there is one."""

    format: Literal["auto", "text", "prompt", "messages"] = "auto"
    """What the records hold: a `text` column, `prompt` and `completion`, or `messages`. `auto` goes by the columns."""

    text_column: Text | None = None
    """Column with the text. Unset: `text`."""

    seq_length: SequenceLength = DEFAULT_SEQ_LENGTH
    """Tokens per sequence; longer records are cut. Lowered to the positions of a model given by `model.config` where
    that has fewer and this is unset."""

    packing: bool = True
    """Fill each sequence with as many records as fit, so that no padding is computed."""

    loss_on_prompt: bool = False
    """Count the prompt's tokens in the loss as well as the completion's."""

    eval_fraction: OpenFraction = 0.05
    """Fraction of the training records held out for evaluation where `eval` is unset, 0 to below 1. 0: none. With
    streaming it is a fraction of the first 10,000 records (or of all, if fewer), and the first of them."""

    max_samples: PositiveInt | None = None
    """Use only this many training records (a .txt file is one; with streaming, 64 thousand characters of it). Unset:
    all."""

    shuffle: bool = True
    """New order of the training sequences in every epoch, from train.seed."""

    shuffle_buffer: PositiveInt = 1000
    """With streaming: sequences that are shuffled among themselves before those that follow them in the data."""

    on_error: Literal["raise", "skip"] = "raise"
    """What a record that cannot be read gets: the run is refused with file and line, or it is skipped and counted."""

    streaming: bool = False
    """Read, tokenise and pack the training data (a Hub dataset or files) while training and not before it, in bounded
    memory. Needs train.max_steps; every rank reads all data."""

    num_workers: NonNegativeInt = 0
    """Processes that prepare batches. 0: the training process itself."""
