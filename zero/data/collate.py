"""Sequences of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zero.data.packing import IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right to the longest sequence of the batch.

    Attributes:
        pad_token_id: Fills ``input_ids``. Any id that the model has will do: padding is masked in ``attention_mask``
            and has label -100, so that it is neither seen nor learned.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stacks samples with ``input_ids`` and ``labels``, each a tensor or list of ints [tokens].

        Returns:
            int64 tensors [samples, longest]: ``input_ids``, ``attention_mask`` (1 token, 0 padding) and ``labels``.

        Raises:
            ValueError: No samples, or a sample whose labels are not as many as its ids.
        """
        if not samples:
            raise ValueError("a batch needs at least one sample")
        ids = [torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
        labels = [torch.as_tensor(sample["labels"], dtype=torch.int64) for sample in samples]
        for one, other in zip(ids, labels, strict=True):
            if one.shape != other.shape:
                raise ValueError(f"a sample has {one.numel()} input_ids but {other.numel()} labels")
        shape = (len(ids), max(one.numel() for one in ids))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED_LABEL),
        }
        for row, (one, other) in enumerate(zip(ids, labels, strict=True)):
            batch["input_ids"][row, : one.numel()] = one
            batch["attention_mask"][row, : one.numel()] = 1
            batch["labels"][row, : one.numel()] = other
        return batch


def pad_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """An id to pad with that the model has an embedding for: the tokenizer's pad token, else its end token, else 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and (vocab_size is None or token_id < vocab_size):
            return int(token_id)
    return 0
