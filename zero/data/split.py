"""Holds a part of the training data out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from zero.data.packing import TokenDataset, TokenRecord
from zero.data.sampler import epoch_order
from zero.data.tokenise import EncodeOptions, pack
from zero.errors import DataError

# Not the run's seed: runs that differ in their seed are evaluated on the same part.
SPLIT_SEED = 0


def hold_out(
    records: Sequence[TokenRecord], text: bool, fraction: float, options: EncodeOptions
) -> tuple[TokenDataset, TokenDataset]:
    """Divides records into sequences to train and to evaluate on, by the records and ``fraction`` alone.

    Whole records are held out. Only plain text in fewer records than would give one to hold out (a single file, say) is
    divided within: the last sequences of it are held out.

    Args:
        records: Tokenised records.
        text: True for plain text.
        fraction: Part to hold out, 0 to 1: of the tokens of plain text, of the number of other records.
        options: How sequences are laid out.

    Returns:
        Sequences to train on and sequences to evaluate on, at least one each, no record or token in both.

    Raises:
        DataError: There is too little to divide.
    """
    if text and len(records) * fraction < 1:
        return _last_sequences(pack(records, text, options), fraction)
    if len(records) < 2:
        raise _too_little(f"{len(records)} record")
    chosen = _choose([len(record.token_ids) if text else 1 for record in records], fraction)
    return (
        pack([record for index, record in enumerate(records) if index not in chosen], text, options),
        pack([record for index, record in enumerate(records) if index in chosen], text, options),
    )


def _last_sequences(dataset: TokenDataset, fraction: float) -> tuple[TokenDataset, TokenDataset]:
    num_sequences = len(dataset)
    if num_sequences < 2:
        raise _too_little(f"{num_sequences} sequence")
    start = num_sequences - min(max(round(num_sequences * fraction), 1), num_sequences - 1)
    return dataset.part(0, start), dataset.part(start, num_sequences)


def _choose(weights: Sequence[int], fraction: float) -> set[int]:
    """Indices, in a fixed random order, that together weigh at most ``fraction`` of all; at least one, never all."""
    budget = round(sum(weights) * fraction)
    chosen: set[int] = set()
    for index in epoch_order(len(weights), SPLIT_SEED, 0).tolist():
        if weights[index] <= budget and len(chosen) < len(weights) - 1:
            chosen.add(index)
            budget -= weights[index]
    return chosen or {min(range(len(weights)), key=lambda index: weights[index])}


def _too_little(what: str) -> DataError:
    return DataError(
        f"data: {what} is too little to hold a part out for evaluation. Name evaluation data with data.eval, set "
        "data.eval_fraction = 0 for none, or train on more data"
    )
