"""Data that are read while training: records to sequences to a seeded order, from any place in it.

Every rank reads and tokenises all of it, because where a sequence is cut depends on all records before it; each then
takes its part of every global micro-batch. In memory are a group of records and two blocks of ``shuffle_buffer``
sequences, however much there is to read.

A place in the stream is small and holds no data but the tokens carried from one group of records to the next: to go on
from it, one group and one block are read again.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from zero.data.packing import StreamPacker, TokenDataset, pack_whole, pack_windows
from zero.data.records import MessagesRecord, Problems, PromptRecord, Record, TextRecord
from zero.data.sources import Position, RecordReader
from zero.data.tokenise import EncodeOptions, EncodeReport, is_text, learnable

logger = logging.getLogger("zero")

# Records that go through the tokenizer, and are packed, together: as many, or as many characters' worth.
GROUP_RECORDS = 256
GROUP_CHARS = 1 << 18
# A sequence needs some four characters a token; a group is to fill many, so that packing finds records that fit.
_GROUP_CHARS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class Point:
    """Where the sequences of a stream can be laid out from again.

    Attributes:
        position: Before a group of records.
        carry: Tokens of earlier groups that are in no sequence yet.
        num_passed: Sequences from there that come before this point.
    """

    position: Position = field(default_factory=Position)
    carry: tuple[int, ...] = ()
    num_passed: int = 0


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where in a stream training is, over all ranks together.

    Attributes:
        epoch: From 0.
        num_samples: Sequences of it delivered so far.
        block: Number of the block of sequences that are shuffled among themselves.
        index: Sequences of the block delivered so far.
        point: Where the block begins; None: where the epoch does.
    """

    epoch: int = 0
    num_samples: int = 0
    block: int = 0
    index: int = 0
    point: Point | None = None

    def state_dict(self) -> dict[str, Any]:
        """As values of JSON."""
        state: dict[str, Any] = {
            "epoch": self.epoch, "index": self.num_samples, "block": self.block, "block_index": self.index, "point": None
        }  # fmt: skip
        if self.point is not None:
            state["point"] = [self.point.position.as_json(), list(self.point.carry), self.point.num_passed]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StreamPlace:
        """The place that ``state_dict`` wrote."""
        point = None
        if state["point"] is not None:
            position, carry, num_passed = state["point"]
            point = Point(Position.from_json(position), tuple(carry), int(num_passed))
        epoch, num_samples, block, index = (int(state[name]) for name in ("epoch", "index", "block", "block_index"))
        return cls(epoch, num_samples, block, index, point)


class StreamedSequence(NamedTuple):
    """A sequence in the dataset of its group, and the point after it."""

    dataset: TokenDataset
    number: int
    after: Point

    def sample(self) -> dict[str, torch.Tensor]:
        """Its ``input_ids`` and ``labels``."""
        return self.dataset[self.number]


class SequenceStream:
    """Sequences of an epoch, in the order of the records.

    Plain text is cut as it is where all data are read before training. Prompts and conversations are packed within
    groups of records.

    Args:
        reader: Reads the records.
        tokenizer: A transformers tokenizer.
        options: How sequences are laid out.
        problems: Takes records that nothing can be learned from.
        start: Where every epoch begins.

    Attributes:
        kind: "text", "prompt" or "messages", once the first record is read.
        report: What tokenising has done to the records so far.
    """

    def __init__(
        self,
        reader: RecordReader,
        tokenizer: Any,
        options: EncodeOptions,
        problems: Problems,
        start: Position,
    ) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._options = options
        self._problems = problems
        self.start = Point(start)
        self.kind = ""
        self.report = EncodeReport()

    def sequences(self, start: Point | None = None) -> Iterator[StreamedSequence]:
        """From a point to the end of the epoch."""
        point = start or self.start
        num_passed = point.num_passed
        for dataset, before in self._laid_out(point):
            for index in range(num_passed, len(dataset)):
                yield StreamedSequence(dataset, index, replace(before, num_passed=index + 1))
            num_passed = 0

    def _laid_out(self, start: Point) -> Iterator[tuple[TokenDataset, Point]]:
        """Each group's sequences, with the point before them; at last those of what is carried."""
        packer = StreamPacker(self._options.seq_length, self._options.packing)
        packer.carry = np.array(start.carry, np.int32)
        position = start.position
        for records, after in self._groups(position):
            before = Point(position, tuple(packer.carry.tolist()))
            kept = list(learnable(records, self._tokenizer, self._options, self._problems, self.report))
            self.report.num_records += len(records)
            if is_text(records):
                yield packer.add(kept), before
            else:
                pack = pack_whole if self._options.packing else pack_windows
                yield pack(kept, self._options.seq_length), before
            position = after
        before = Point(position, tuple(packer.carry.tolist()))
        yield packer.finish(), before
        self._say_skipped()

    def _say_skipped(self) -> None:
        """At the end of an epoch: the next one's begin to count anew."""
        if (skipped := self._problems.summary()) is not None:
            logger.warning("%s", skipped)
        self._problems.num_bad = 0
        self._problems.examples.clear()

    def _groups(self, start: Position) -> Iterator[tuple[list[Record], Position]]:
        most_chars = max(GROUP_CHARS, _GROUP_CHARS_PER_TOKEN * self._options.seq_length)
        group: list[Record] = []
        num_chars, after = 0, start
        reader = copy.copy(self._reader)  # it keeps what it knows of the present file, and loops may overlap
        for record, after in reader.records(start):
            self.kind = reader.kind
            group.append(record)
            num_chars += count_chars(record)
            if len(group) == GROUP_RECORDS or num_chars >= most_chars:
                yield group, after
                group, num_chars = [], 0
        if group:
            yield group, after


def count_chars(record: Record) -> int:
    """Characters of a record, by which reading ahead is bounded."""
    match record:
        case TextRecord():
            return len(record.text)
        case PromptRecord():
            return len(record.prompt) + len(record.completion)
        case MessagesRecord():
            return sum(len(str(message.get("content", ""))) for message in record.messages)


class ShuffledStream:
    """The sequences of every epoch in the order they are learned.

    Blocks of ``num_block`` sequences follow each other in the order of the data; within a block the order is random,
    and a function of seed, epoch and the block's number alone.

    Args:
        source: Gives the sequences.
        seed: Of the order.
        num_block: Sequences of a block, at least 1. With 1 the order is that of the data.
    """

    def __init__(self, source: SequenceStream, seed: int, num_block: int) -> None:
        self.source = source
        self.seed = seed
        self.num_block = num_block

    def samples(self, place: StreamPlace) -> Iterator[tuple[StreamedSequence, StreamPlace]]:
        """From a place to the end of its epoch, each with the place after it; the last one's is the next epoch."""
        coming = self.source.sequences(place.point)
        block = list(itertools.islice(coming, self.num_block))
        while block:
            order = self._order(len(block), place)
            following: list[StreamedSequence] = []
            for index in range(place.index, len(block)):
                # The next block fills up while this one is given out, so that no step waits for a whole one.
                following.extend(itertools.islice(coming, 1))
                place = replace(place, index=index + 1, num_samples=place.num_samples + 1)
                if index == len(block) - 1:
                    place = self._after_block(block, bool(following), place)
                yield block[order[index]], place
            following.extend(itertools.islice(coming, self.num_block - len(following)))
            block = following

    def _after_block(self, block: list[StreamedSequence], goes_on: bool, place: StreamPlace) -> StreamPlace:
        if not goes_on:
            return StreamPlace(place.epoch + 1)
        return StreamPlace(place.epoch, place.num_samples, place.block + 1, 0, block[-1].after)

    def _order(self, num_sequences: int, place: StreamPlace) -> list[int]:
        words = np.random.SeedSequence([self.seed & 0xFFFF_FFFF_FFFF_FFFF, place.epoch, place.block])
        order: list[int] = np.random.Generator(np.random.PCG64(words)).permutation(num_sequences).tolist()
        return order
