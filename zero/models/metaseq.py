"""metaseq checkpoints to Hugging Face folders: ``python -m zero.models.metaseq SOURCE TARGET [--size opt-125m]``.

Nothing that the files ask to be run is run; see :mod:`zero.models.metaseq_pickle`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zero.errors import UserError
from zero.export import write_safetensors
from zero.models.folders import new_folder
from zero.models.metaseq_args import check_options, contradictions, describe, options_of
from zero.models.metaseq_files import CheckpointFiles, find_files
from zero.models.metaseq_part import Part, Shard, shard_of
from zero.models.metaseq_pickle import load_inert
from zero.models.metaseq_weights import MetaseqWeights, published_layout
from zero.models.sizes import VOCAB_SIZE, opt_size
from zero.models.unified import ARCHITECTURES, OPT, UnifiedConfig
from zero.models.unified_weights import match_weights
from zero.report.logs import configure_logging

logger = logging.getLogger("zero")

EXIT_WRONG_INPUT = 2
_LAYER = re.compile(r".*\.layers\.(\d+)\.")
_TABLE = "decoder.embed_tokens.weight"


def convert_metaseq(
    source: str | Path, target: str | Path, size: str | None = None, name: str | None = None
) -> UnifiedConfig:
    """Makes a Hugging Face folder of a metaseq checkpoint, with the same logits.

    Files are mapped, not read as a whole, and weights are put together one at a time: host memory holds one file of the
    target (2 GiB, or one tensor that is larger), twice while it is written. They stay in their dtype. Nothing is
    written where something is wrong.

    Args:
        source: folder with the files ``NAME-model_part-P-shardS.pt``, ``NAME-model_part-P.pt`` or ``NAME.pt``, or one
            file that is all.
        target: the folder to make; it must not exist, or be empty. The tokenizer is for the user to add.
        size: name of the published size that this is, such as ``opt-6.7b``; None: what the checkpoint says itself.
        name: what the files' names begin with, where the folder holds several checkpoints.

    Returns:
        The description of the model.

    Raises:
        UserError: files are missing, damaged or hostile, or the model is not what OPT's class can express.
    """
    target, files = Path(target), find_files(Path(source), name)
    shards, options = _open(files)
    model = _describe(options, shards, size)
    layout = partial(published_layout, model, len(shards))
    parts = [Part(of_part, layout) for of_part in shards]
    weights = MetaseqWeights(parts)
    found = match_weights(model, OPT, weights)
    config = model.to_config(OPT)
    config.architectures = [ARCHITECTURES[OPT]]
    config.dtype = weights.dtype(next(iter(found.values())))
    with new_folder(target) as folder:
        write_safetensors(_in_order(weights, found), folder)
        config.save_pretrained(folder)
    logger.info("%s of %s (%d parts x %d shards) is now %s in %s", files.name, source, len(shards), len(shards[0]),
                ARCHITECTURES[OPT], target)  # fmt: skip
    return model


def _open(files: CheckpointFiles) -> tuple[list[list[Shard]], dict[str, Any]]:
    """All files, mapped, and the options that the first one holds."""
    options: dict[str, Any] | None = None
    parts = []
    for paths in files.parts:
        shards = []
        for path in paths:
            checkpoint = load_inert(path)
            options = options_of(checkpoint) if options is None else options
            shards.append(shard_of(path, checkpoint))
        parts.append(shards)
    return parts, options or {}


def _describe(options: Mapping[str, Any], shards: Sequence[Sequence[Shard]], size: str | None) -> UnifiedConfig:
    if size is None:
        return describe(options, _vocab_size(shards))
    model = UnifiedConfig.from_config(opt_size(size).config())
    check_options(options)
    against = contradictions(options, model)
    if against:
        raise UserError(f"the checkpoint is not {size}, by what it says itself: {'; '.join(against)}")
    return model


def _vocab_size(shards: Sequence[Sequence[Shard]]) -> int:
    """Rows of the token table over all parts; the published number where the files do not say."""
    total = 0
    for of_part in shards:
        if of_part[0].metadata is None and _TABLE not in of_part[0].tensors:
            return VOCAB_SIZE
        part = Part(of_part, _no_layout)
        if _TABLE not in part.names():
            raise UserError(f"{of_part[0].path} has no token table ({_TABLE}); is this a checkpoint of OPT?")
        total += part.shape(_TABLE)[0]
    return total


def _no_layout(flat: Sequence[str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    raise UserError(f"nothing says what lies in {', '.join(flat[:3])}")


def _in_order(weights: MetaseqWeights, found: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer by layer, so that each part of each file is read once."""

    def place(name: str) -> int:
        match = _LAYER.match(name)
        return int(match[1]) if match else -1

    for name in sorted(found, key=place):
        yield name, weights.read(found[name])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m zero.models.metaseq", description="Makes a Hugging Face folder of a metaseq checkpoint of OPT."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder with the checkpoint's .pt files, or the only file")
    parser.add_argument("target", metavar="TARGET", help="folder to make")
    parser.add_argument("--size", help="the published size that it is, such as opt-6.7b; else what it says itself")
    parser.add_argument("--name", help="what the files' names begin with, where there are several checkpoints")
    arguments = parser.parse_args(argv)
    configure_logging()
    try:
        convert_metaseq(arguments.source, arguments.target, arguments.size, arguments.name)
    except UserError as error:
        sys.stderr.write(f"metaseq: {error}\n")
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
