"""The training loader: it knows what it has delivered, and seeds its workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from zero.data.packing import IGNORED_LABEL, TokenDataset
from zero.data.sampler import RankBatches, ResumableSampler
from zero.errors import DataError

Batch = dict[str, torch.Tensor]


def blank(sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sample of the same shape of which nothing is learned."""
    return {**sample, "labels": torch.full_like(sample["labels"], IGNORED_LABEL)}


class BlankableDataset(Dataset[dict[str, torch.Tensor]]):
    """A dataset whose sample ``i`` is also there as ``-1 - i``, with nothing of it to be learned.

    For ranks that have no sample of their own in an epoch's last micro-batch: they take part in it all the same.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        self.tokens = dataset

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.tokens[index] if index >= 0 else blank(self.tokens[-1 - index])


class ResumableLoader(DataLoader[Batch]):
    """A loader whose place is what all ranks together have delivered, however far its workers have read ahead.

    Each ``iter`` goes on from that place to the end of the epoch, and its length is that of a whole epoch: both are the
    same on all ranks. A rank that the last micro-batch of an epoch has no sample for gets one with all labels -100.

    Args:
        dataset: All samples, on every rank.
        sampler: Their order and the place in it.
        seed: Of the workers.
        batch_size: Samples of a full batch on one rank.
        rank: This one's number.
        num_ranks: How many share each micro-batch (see ``RankBatches``).
        options: Others of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sampler: ResumableSampler,
        seed: int,
        *,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        **options: Any,
    ) -> None:
        # A generator of its own: the global one, which dropout draws from, is left as it is. PyTorch seeds workers from
        # it (torch, random and numpy).
        self._batches = RankBatches(sampler, batch_size, rank, num_ranks)
        super().__init__(BlankableDataset(dataset), batch_sampler=self._batches, generator=torch.Generator(), **options)
        self._place = sampler
        self._seed = seed
        self._epoch, self._index = sampler.epoch, sampler.index

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._place.seek(self._epoch, self._index)
        self._epoch, self._index = self._place.epoch, self._place.index
        if self.generator is not None:
            self.generator.manual_seed(worker_seed(self._seed, self._epoch))
        for batch in super().__iter__():
            self._index = min(self._index + self._batches.num_global, self._place.num_samples)
            yield batch
        self._epoch, self._index = self._epoch + 1, 0

    @property
    def epochs_done(self) -> float:
        """Epochs delivered so far, the present one as a fraction."""
        return self._epoch + self._index / self._place.num_samples

    def state_dict(self) -> dict[str, Any]:
        """Epoch, samples of it delivered on all ranks together, and by what to know the data again.

        The same on all ranks, and good for any number of them and any batch size.
        """
        place = self._place
        here = ResumableSampler(len(place), self._seed, self._epoch, self._index, place.shuffle, place.first)
        return {**here.state_dict(), "fingerprint": self._data.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state`` was taken; call it between epochs' loops.

        Raises:
            DataError: It was taken over other data or in another order.
        """
        if state.get("fingerprint", self._data.fingerprint) != self._data.fingerprint:
            raise DataError(
                "data: the training data, tokenizer or [data] settings have changed since the checkpoint was written, "
                "so it cannot go on from there. Bring them back, or start anew from the checkpoint's weights"
            )
        self._place.load_state_dict(state)
        self._epoch, self._index = self._place.epoch, self._place.index

    @property
    def _data(self) -> TokenDataset:
        dataset = self.dataset
        if not isinstance(dataset, BlankableDataset):
            raise TypeError(f"a ResumableLoader reads a BlankableDataset, not a {type(dataset).__name__}")
        return dataset.tokens


def worker_seed(seed: int, epoch: int) -> int:
    """A seed for an epoch's workers, from 0 to 2^63 - 1."""
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
