"""Holds a part of the training data out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from zero.data.packing import TokenDataset, TokenRecord
from zero.data.records import Record
from zero.data.sampler import epoch_order
from zero.data.sources import Position, RecordReader
from zero.data.streaming import count_chars
from zero.data.tokenise import EncodeOptions, pack
from zero.errors import DataError

# Not the run's seed: runs that differ in their seed are evaluated on the same part.
SPLIT_SEED = 0
# Of data that are read while training, a fraction of the first of them is held out: of so many records, or of so many
# characters' worth.
FIRST_RECORDS = 10_000
FIRST_CHARS = 1 << 24


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


def hold_out_first(reader: RecordReader, fraction: float) -> tuple[list[Record], Position]:
    """Holds the first records out, of data whose end is not known.

    They are ``fraction`` of the first ``FIRST_RECORDS`` records, or of as many as there are: of the characters of plain
    text, of the number of other records. Of a .txt file each piece counts as a record.

    Returns:
        The records, at least one, and the position after them, where training begins; at least one is left for it.

    Raises:
        DataError: There is too little to divide.
    """
    first: list[tuple[Record, Position]] = []
    num_chars = 0
    for record, position in reader.records():
        first.append((record, position))
        num_chars += count_chars(record)
        if len(first) == FIRST_RECORDS or num_chars >= FIRST_CHARS:
            break
    if len(first) < 2:
        reader.finish([record for record, _ in first])
        raise _too_little(f"{len(first)} record")
    text = reader.kind == "text"
    weights = [count_chars(record) if text else 1 for record, _ in first]
    budget, count = round(sum(weights) * fraction), 0
    while count < len(first) - 1 and weights[count] <= budget:
        budget -= weights[count]
        count += 1
    count = max(count, 1)
    return [record for record, _ in first[:count]], first[count - 1][1]


def _too_little(what: str) -> DataError:
    return DataError(
        f"data: {what} is too little to hold a part out for evaluation. Name evaluation data with data.eval, set "
        "data.eval_fraction = 0 for none, or train on more data"
    )
