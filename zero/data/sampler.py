"""The order of samples, where in it training is, and which of them a rank gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from zero.errors import DataError

T = TypeVar("T")


def epoch_order(
    num_samples: int, seed: int, epoch: int, shuffle: bool = True, first: int | None = None
) -> npt.NDArray[np.int64]:
    """The samples' order in an epoch, [num_samples]: a function of its arguments alone, no global random state.

    Args:
        num_samples: In an epoch.
        seed: Any integer.
        epoch: From 0.
        shuffle: False: in order.
        first: Sample that changes places with the very first one of a run.
    """
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    # A seed may be any int; the sequence mixes words, so that (seed 0, epoch 1) and (seed 1, epoch 0) differ.
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch])
    order = np.random.Generator(np.random.PCG64(words)).permutation(num_samples).astype(np.int64, copy=False)
    if first is not None and epoch == 0:
        place = int(np.flatnonzero(order == first)[0])
        order[[0, place]] = order[[place, 0]]
    return order


def longest_first(lengths: npt.NDArray[np.int64], seed: int) -> int | None:
    """The sample to begin a shuffled run with, so that no later batch needs more memory; None if that is so anyway.

    Whether a run fits shows with its first batch then, and the plan made from it holds.
    """
    begins = int(epoch_order(len(lengths), seed, 0)[0])
    longest = int(lengths.argmax())
    return longest if lengths[longest] > lengths[begins] else None


_SETTLES_ORDER = ("num_samples", "seed", "shuffle", "first")


class ResumableSampler(Sampler[int]):
    """Hands out sample indices in each epoch's own order, and can go on from any place in it.

    Each ``iter`` goes on from the present place to the end of the epoch; the next one is the next epoch. A loader that
    reads ahead takes more from here than it has delivered: its own state counts (see ``ResumableLoader``).

    Attributes:
        num_samples: Samples in an epoch.
        seed: With the epoch, settles the order.
        epoch: The present one, from 0.
        index: Samples of it handed out so far.
        shuffle: False: every epoch goes through the samples in order.
        first: Sample that a shuffled run begins with, whatever the order says.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        epoch: int = 0,
        index: int = 0,
        shuffle: bool = True,
        first: int | None = None,
    ) -> None:
        if num_samples < 1:
            raise DataError(f"data: {num_samples} samples; at least one is needed")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.first = first
        self.epoch = 0
        self.index = 0
        self.seek(epoch, index)

    def __len__(self) -> int:
        """Samples of a whole epoch, also where the present one is partly done."""
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.num_samples, self.seed, self.epoch, self.shuffle, self.first)
        while self.index < self.num_samples:
            self.index += 1
            yield int(order[self.index - 1])
        self.seek(self.epoch, self.index)

    def seek(self, epoch: int, index: int) -> None:
        """Goes to a place; the end of an epoch is the start of the next.

        Raises:
            DataError: There is no such place.
        """
        if epoch < 0 or not 0 <= index <= self.num_samples:
            raise DataError(f"data: epoch {epoch}, sample {index}: there are {self.num_samples} samples in an epoch")
        self.epoch, self.index = (epoch + 1, 0) if index == self.num_samples else (epoch, index)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and index, and what they mean something for."""
        state = {"epoch": self.epoch, "index": self.index}
        if self.index == self.num_samples:
            state = {"epoch": self.epoch + 1, "index": 0}
        return {**state, **{name: getattr(self, name) for name in _SETTLES_ORDER}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state`` was taken.

        Raises:
            DataError: It was taken over another number of samples, seed or shuffling: the place means nothing here.
        """
        for name in _SETTLES_ORDER:
            if state.get(name, "nothing said") != getattr(self, name):
                raise DataError(
                    f"data: the checkpoint was written with {name} = {state.get(name, 'nothing said')}, this run has "
                    f"{getattr(self, name)}: it cannot go on from there. Use the same data and settings, or start anew"
                )
        self.seek(int(state["epoch"]), int(state["index"]))


def rank_part(samples: Sequence[T], rank: int, num_ranks: int) -> Sequence[T]:
    """A rank's part of a global micro-batch: contiguous, as even as possible; empty where there are more ranks than
    samples. A full micro-batch of B x W samples gives each of W ranks its B."""
    share, rest = divmod(len(samples), num_ranks)
    start = rank * share + min(rank, rest)
    return samples[start : start + share + (rank < rest)]


class RankBatches(Sampler[list[int]]):
    """A rank's batches of indices, from the present place to the end of the epoch.

    The order of samples does not depend on the number of ranks: micro-batch after micro-batch, the next
    ``batch_size * num_ranks`` samples of it are divided among the ranks. The last ones of an epoch may be fewer.

    Args:
        place: Where in which order; goes on as batches are drawn.
        batch_size: Samples of a full micro-batch on one rank.
        rank: This one's number.
        num_ranks: How many there are.
        fill: Whether a rank that is left without a sample gets the first one of the micro-batch, to be read but not
            learned: its index is given as ``-1 - index`` (see ``BlankableDataset``). Else it gets no batch.
    """

    def __init__(
        self, place: ResumableSampler, batch_size: int, rank: int = 0, num_ranks: int = 1, fill: bool = True
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks}: it must be from 0 to below the number of ranks")
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} samples; at least one is needed")
        self.place = place
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.fill = fill

    @property
    def num_global(self) -> int:
        """Samples of a full micro-batch on all ranks together."""
        return self.batch_size * self.num_ranks

    def __len__(self) -> int:
        """Batches of a whole epoch; with ``fill`` the same on all ranks."""
        num_full, rest = divmod(self.place.num_samples, self.num_global)
        return num_full + (rest > (0 if self.fill else self.rank))

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.place)
        while whole := list(itertools.islice(indices, self.num_global)):
            part = list(rank_part(whole, self.rank, self.num_ranks))
            if part or self.fill:
                yield part or [-1 - whole[0]]
