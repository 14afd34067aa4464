"""The training loader: it knows what it has delivered, and seeds its workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from zero.data.packing import TokenDataset
from zero.data.sampler import ResumableSampler
from zero.errors import DataError

Batch = dict[str, torch.Tensor]


class ResumableLoader(DataLoader[Batch]):
    """A loader whose place is what it has delivered, however far its workers have read ahead.

    Each ``iter`` goes on from that place to the end of the epoch, and its length is that of a whole epoch.
    """

    def __init__(self, dataset: TokenDataset, sampler: ResumableSampler, seed: int, **options: Any) -> None:
        # A generator of its own: the global one, which dropout draws from, is left as it is. PyTorch seeds workers from
        # it (torch, random and numpy).
        super().__init__(dataset, sampler=sampler, generator=torch.Generator(), **options)
        self._place = sampler
        self._seed = seed
        self._epoch, self._index = sampler.epoch, sampler.index

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._place.seek(self._epoch, self._index)
        self._epoch, self._index = self._place.epoch, self._place.index
        if self.generator is not None:
            self.generator.manual_seed(worker_seed(self._seed, self._epoch))
        for batch in super().__iter__():
            self._index += len(batch["input_ids"])
            yield batch
        self._epoch, self._index = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, samples of it delivered, and by what to know the data again."""
        place = ResumableSampler(len(self._place), self._seed, self._epoch, self._index, self._place.shuffle)
        return {**place.state_dict(), "fingerprint": self._data.fingerprint}

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
        if not isinstance(dataset, TokenDataset):
            raise TypeError(f"a ResumableLoader reads a TokenDataset, not a {type(dataset).__name__}")
        return dataset


def worker_seed(seed: int, epoch: int) -> int:
    """A seed for an epoch's workers, from 0 to 2^63 - 1."""
    words = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
