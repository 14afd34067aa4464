"""From tokenised records to sequences: cut, packed, and kept as flat arrays."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

IGNORED_LABEL = -100
TokenIds = npt.NDArray[np.int32]
LossMask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A tokenised record.

    Attributes:
        where: Origin for messages: ``file:line``.
        token_ids: [tokens].
        in_loss: [tokens], True where the token is to be learned; None: all are.
        begins: False: it is plain text that goes on from the record before.
        ends: False: it is plain text that the next record goes on with.
    """

    where: str
    token_ids: TokenIds
    in_loss: LossMask | None = None
    begins: bool = True
    ends: bool = True

    @property
    def num_learned(self) -> int:
        """Tokens that are predicted in the loss. The first one never is: nothing stands before it."""
        if self.in_loss is None:
            return max(len(self.token_ids) - 1, 0)
        return int(np.count_nonzero(self.in_loss[1:]))


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of at most ``seq_length`` tokens, 4 to 5 bytes a token in memory.

    An item is a dict of int64 tensors [tokens]: ``input_ids``, and ``labels``, which are the same ids with -100 where a
    token is not to be learned. Labels are not shifted: transformers' models do that.

    Attributes:
        token_ids: [all tokens], sequence after sequence.
        in_loss: [all tokens]; None: all tokens are learned.
        offsets: [num_sequences + 1], where each sequence starts, and the end.
    """

    def __init__(self, token_ids: TokenIds, in_loss: LossMask | None, offsets: npt.NDArray[np.int64]) -> None:
        self.token_ids = token_ids
        self.in_loss = in_loss
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        input_ids = torch.from_numpy(self.token_ids[span].astype(np.int64))
        labels = input_ids.clone()
        if self.in_loss is not None:
            labels[torch.from_numpy(~self.in_loss[span])] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels}

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences; padding is none of them."""
        return len(self.token_ids)

    @cached_property
    def num_loss_tokens(self) -> int:
        """Tokens predicted in the loss: labels other than -100 that are not the first of their sequence."""
        first = self.offsets[:-1][np.diff(self.offsets) > 0]
        if self.in_loss is None:
            return len(self.token_ids) - len(first)
        return int(np.count_nonzero(self.in_loss)) - int(np.count_nonzero(self.in_loss[first]))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of tokens, mask and cuts, by which a checkpoint knows its data again."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.token_ids, self.in_loss, self.offsets):
            if array is not None:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
            digest.update(b"|")
        return digest.hexdigest()

    def part(self, start: int, stop: int) -> TokenDataset:
        """Sequences ``start`` to ``stop`` (not included) as a dataset of their own; shares the arrays' memory."""
        span = slice(int(self.offsets[start]), int(self.offsets[stop]))
        in_loss = None if self.in_loss is None else self.in_loss[span]
        return TokenDataset(self.token_ids[span], in_loss, self.offsets[start : stop + 1] - self.offsets[start])


def pack_stream(records: Sequence[TokenRecord], seq_length: int) -> TokenDataset:
    """Joins the records into one stream, cut every ``seq_length`` tokens; the rest is a last, shorter sequence."""
    flat, in_loss = _joined(records)
    return TokenDataset(flat, in_loss, _cuts(len(flat), seq_length))


def pack_windows(records: Sequence[TokenRecord], seq_length: int) -> TokenDataset:
    """Cuts each record by itself: a long one becomes several sequences, no sequence holds parts of two."""
    flat, in_loss = _joined(records)
    starts, offset = [np.zeros(1, np.int64)], 0
    num_tokens = 0
    for position, record in enumerate(records):
        num_tokens += len(record.token_ids)
        if record.ends or position == len(records) - 1:
            starts.append(_cuts(num_tokens, seq_length)[1:] + offset)
            offset, num_tokens = offset + num_tokens, 0
    return TokenDataset(flat, in_loss, np.concatenate(starts))


class StreamPacker:
    """Lays plain text that comes bit by bit out as ``pack_stream`` and ``pack_windows`` lay it out as a whole.

    Args:
        seq_length: Most tokens of a sequence.
        packing: Join records into one stream; else each is cut by itself.

    Attributes:
        carry: [tokens], at most ``seq_length + 1`` that belong to no sequence yet.
    """

    def __init__(self, seq_length: int, packing: bool) -> None:
        self._seq_length = seq_length
        self._packing = packing
        self.carry: TokenIds = np.zeros(0, np.int32)

    def add(self, records: Sequence[TokenRecord]) -> TokenDataset:
        """The sequences that are sure with these records; the rest is carried."""
        parts: list[TokenIds] = []
        cuts = [np.zeros(1, np.int64)]
        for record in records:
            self._take(np.concatenate([self.carry, record.token_ids]), record.ends and not self._packing, parts, cuts)
        return self._laid_out(parts, cuts)

    def finish(self) -> TokenDataset:
        """The sequence that is left, if any, at the end of the data."""
        parts: list[TokenIds] = []
        cuts = [np.zeros(1, np.int64)]
        self._take(self.carry, True, parts, cuts)
        return self._laid_out(parts, cuts)

    def _take(self, flat: TokenIds, is_whole: bool, parts: list[TokenIds], cuts: list[npt.NDArray[np.int64]]) -> None:
        # Two tokens are kept back: a last sequence of one would take another from the one before (see `_cuts`).
        num_sure = len(flat) if is_whole else max(len(flat) - 2, 0) // self._seq_length * self._seq_length
        if num_sure > 1:  # nothing can be learned of a single token
            cuts.append(_cuts(num_sure, self._seq_length)[1:] + cuts[-1][-1])
            parts.append(flat[:num_sure])
        self.carry = flat[num_sure:]

    @staticmethod
    def _laid_out(parts: list[TokenIds], cuts: list[npt.NDArray[np.int64]]) -> TokenDataset:
        return TokenDataset(np.concatenate([np.zeros(0, np.int32), *parts]), None, np.concatenate(cuts))


def pack_whole(records: Sequence[TokenRecord], seq_length: int) -> TokenDataset:
    """Puts whole records together into sequences, as many as fit, by best fit.

    As in GPT's training, attention crosses from one record of a sequence to the next, and positions run on.
    """
    bins = best_fit([len(record.token_ids) for record in records], seq_length)
    flat, in_loss = _joined([records[index] for one in bins for index in one])
    lengths = [sum(len(records[index].token_ids) for index in one) for one in bins]
    return TokenDataset(flat, in_loss, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most ``capacity``: longest first, each into the fullest bin it fits.

    Args:
        lengths: Each at most ``capacity``.
        capacity: What a bin holds.

    Returns:
        Bins in order of their smallest index, indices in a bin in order, so that nothing hangs on the sorting.
    """
    bins: list[list[int]] = []
    # (free, bin), sorted: the first entry at or after (length, 0) is the bin that is left fullest.
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = room.pop(place)
        bins[number].append(index)
        bisect.insort(room, (free - length, number))
    return sorted(sorted(one) for one in bins)


def _cuts(num_tokens: int, seq_length: int) -> npt.NDArray[np.int64]:
    """Where sequences start, and the end. A last sequence of one token could not be learned from, as nothing stands
    before it: it gets a second token from its neighbour, where that has two to spare."""
    cuts = np.append(np.arange(0, num_tokens, seq_length, dtype=np.int64), num_tokens)
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1 and seq_length > 2:
        cuts[-2] -= 1
    return cuts


def _joined(records: Sequence[TokenRecord]) -> tuple[TokenIds, LossMask | None]:
    if not records:
        return np.zeros(0, np.int32), None
    flat = np.concatenate([record.token_ids for record in records])
    if all(record.in_loss is None for record in records):
        return flat, None
    masks = [np.ones(len(r.token_ids), np.bool_) if r.in_loss is None else r.in_loss for r in records]
    return flat, np.concatenate(masks)
