"""The training loader over data that are read while training."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zero.data.collate import Collator
from zero.data.resumable import Batch, blank
from zero.data.sampler import rank_part
from zero.data.streaming import ShuffledStream, StreamPlace
from zero.errors import DataError

# A batch, or what is wrong with the data, and the place after it.
_Delivery = tuple[Batch | str, StreamPlace]


class _Deliveries(IterableDataset[_Delivery]):
    """A rank's batches from a place to the end of its epoch."""

    def __init__(
        self, stream: ShuffledStream, place: StreamPlace, collate: Collator, batch_size: int, rank: int, num_ranks: int
    ) -> None:
        self._stream = stream
        self._place = place
        self._collate = collate
        self._num_global = batch_size * num_ranks
        self._rank = rank
        self._num_ranks = num_ranks

    def __iter__(self) -> Iterator[_Delivery]:
        if get_worker_info() is not None:
            # Tokenizers' threads do not survive a fork, and they say so at length.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        place = self._place
        try:
            samples = self._stream.samples(place)
            while whole := list(itertools.islice(samples, self._num_global)):
                part = rank_part([sequence for sequence, _ in whole], self._rank, self._num_ranks)
                place = whole[-1][1]
                batch = [sequence.sample() for sequence in part] or [blank(whole[0][0].sample())]
                yield self._collate(batch), place
        except DataError as error:  # out of a worker it would come with a traceback for a message
            yield str(error), place


def _as_it_is(delivery: Any) -> Any:
    return delivery


class StreamingLoader:
    """Batches of data that are read while training; its place is what all ranks together have delivered.

    Each ``iter`` goes on from that place to the end of the epoch. Micro-batches are divided among ranks as those of
    ``ResumableLoader`` are. Reading, tokenising and packing follow one after another, so they are done by one process:
    the training process with ``num_workers`` 0, else one beside it.

    Args:
        stream: Every rank's own, over the same data.
        collate: Makes batches.
        batch_size: Samples of a full batch on one rank.
        identity: What makes it the same stream, as values of JSON: a place means nothing in another.
        rank: This one's number.
        num_ranks: How many share each micro-batch.
        num_workers: Whether another process reads.
        num_records: Records of an epoch, where that is known.
    """

    def __init__(
        self,
        stream: ShuffledStream,
        collate: Collator,
        batch_size: int,
        identity: Mapping[str, Any],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        num_records: int | None = None,
    ) -> None:
        self._stream = stream
        self._collate = collate
        self._batch_size = batch_size
        self._identity = dict(identity)
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_workers = min(num_workers, 1)
        self._num_records = num_records
        self._place = StreamPlace()

    def __len__(self) -> int:
        raise TypeError("a stream has no length before it is read to its end; see epochs_done")

    def __iter__(self) -> Iterator[Batch]:
        begun = self._place
        source = _Deliveries(self._stream, begun, self._collate, self._batch_size, self._rank, self._num_ranks)
        # A generator of its own: the global one, which dropout draws from, is left as it is.
        loader: DataLoader[_Delivery] = DataLoader(
            source,
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(0),
        )
        for batch, place in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            self._place = place
            yield batch
        if self._place == begun:
            raise DataError("data: no record has a token to learn")

    @property
    def epochs_done(self) -> float:
        """Epochs delivered so far; the present one as a fraction where it is known how many records it has."""
        point = self._place.point
        if self._num_records is None or point is None:
            return float(self._place.epoch)
        return self._place.epoch + min(point.position.num_records / self._num_records, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The place, the same on all ranks and good for any number of them and any batch size; values of JSON."""
        return {**self._place.state_dict(), **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state`` was taken; call it between epochs' loops.

        Raises:
            DataError: It was taken over other data or in another order.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                given = "" if name == "fingerprint" else f" ({name} was {state.get(name)}, now it is {value})"
                raise DataError(
                    "data: the training data, tokenizer or [data] settings have changed since the checkpoint was "
                    f"written{given}, so it cannot go on from there. Bring them back, or start anew from the "
                    "checkpoint's weights"
                )
        self._place = StreamPlace.from_state(state)
