"""OPT folders to GPT-2 folders and back: ``python -m zero.models.convert SOURCE TARGET --to gpt2``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from zero.errors import UserError
from zero.export import write_safetensors
from zero.models.folders import copy_companions, new_folder
from zero.models.unified import ARCHITECTURES, GPT2, KINDS, UnifiedConfig, read_json_object
from zero.models.unified_weights import UNREAD_ROWS, to_gpt2_weights, to_opt_weights
from zero.report.logs import configure_logging
from zero.safetensors_reader import SafetensorsFile
from zero.weights_folder import ShardedWeights

logger = logging.getLogger("zero")

UNREAD_FILE = f"{UNREAD_ROWS}.safetensors"
"""Beside a GPT-2's weights: OPT's two unread position rows, so that the way back is exact."""
EXIT_WRONG_INPUT = 2


def convert_folder(
    source: str | Path, target: str | Path, to: str, changes: dict[str, Any] | None = None
) -> UnifiedConfig:
    """Makes a GPT-2 folder of an OPT folder, or the other way round, with the same logits.

    Weights stay in their dtype and are streamed: host memory holds one file of the target (2 GiB, or one tensor that is
    larger), twice while it is written.
    Tokenizer, chat template and generation config are copied. Nothing is written where something is wrong.

    Args:
        source: a folder with ``config.json`` and safetensors weights.
        target: the folder to make; it must not exist, or be empty.
        to: "opt" or "gpt2".
        changes: other values for fields of :class:`zero.models.unified.UnifiedConfig` that the weights do not depend
            on, such as ``{"embedding_dropout": 0.0}``, which a GPT-2 needs to become an OPT.

    Returns:
        The description of the model.

    Raises:
        UserError: the other class cannot express the model, or the folder is not what it should be.
    """
    source, target = Path(source), Path(target)
    if to not in KINDS:
        raise UserError(f"to is {to!r}; allowed are {' and '.join(KINDS)}")
    config = read_config(source)
    if config.model_type == to:
        raise UserError(f"{source} holds an {ARCHITECTURES[to]} already")
    model = UnifiedConfig.from_config(config).changed(changes or {})
    made = model.to_config(to)
    made.architectures = [ARCHITECTURES[to]]
    weights = ShardedWeights(source)
    rows = _read_unread_rows(source) if to != GPT2 else None
    tensors = to_gpt2_weights(model, weights) if to == GPT2 else to_opt_weights(model, weights, rows)
    with new_folder(target) as folder:
        write_safetensors(_without_unread_rows(tensors, folder), folder)
        made.save_pretrained(folder)
        copied = copy_companions(source, folder)
    logger.info(
        "%s is now %s in %s; copied with it: %s", source, ARCHITECTURES[to], target, ", ".join(copied) or "nothing"
    )
    return model


def read_config(folder: Path) -> Any:
    """The transformers config of a folder with an OPT or a GPT-2.

    Raises:
        UserError: there is none, or it is another model's.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GPT2Config, OPTConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a model")
    values = read_json_object(folder / "config.json")
    kind = values.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder} holds a model of type {kind!r}; only {' and '.join(KINDS)} can be converted")
    try:
        return (GPT2Config if kind == GPT2 else OPTConfig).from_dict(values)
    except (TypeError, ValueError, StrictDataclassError) as error:  # a field of a wrong type
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def _read_unread_rows(folder: Path) -> torch.Tensor | None:
    path = folder / UNREAD_FILE
    if not path.exists():
        return None
    file = SafetensorsFile(path)
    if file.names() != [UNREAD_ROWS]:
        raise UserError(f"{path} holds {', '.join(file.names()) or 'nothing'}; only {UNREAD_ROWS} belongs there")
    return file.read(UNREAD_ROWS)


def _without_unread_rows(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Lets the weights pass and puts the rows that GPT-2's class has no place for into a file of their own."""
    for name, value in tensors:
        if name == UNREAD_ROWS:
            # Not save_file(), whose file only its owner could read.
            (folder / UNREAD_FILE).write_bytes(save({name: value}, metadata={"format": "pt"}))
        else:
            yield name, value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m zero.models.convert", description="Makes a GPT-2 folder of an OPT folder, or an OPT of a GPT-2."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the model")
    parser.add_argument("target", metavar="TARGET", help="folder to make")
    parser.add_argument("--to", required=True, choices=KINDS, help="class of the new model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, such as embedding_dropout=0"
    )
    arguments = parser.parse_args(argv)
    configure_logging()
    try:
        convert_folder(arguments.source, arguments.target, arguments.to, dict(_change(text) for text in arguments.set))
    except UserError as error:
        sys.stderr.write(f"convert: {error}\n")
        return EXIT_WRONG_INPUT
    return 0


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise UserError(f"--set {text}: give FIELD=VALUE with a number, true, false or null") from None


if __name__ == "__main__":
    sys.exit(main())
