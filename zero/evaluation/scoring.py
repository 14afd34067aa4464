"""Log-likelihoods of tokens under a model that an engine manages, in batches of sequences of any length."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gemini.plan import DoesNotFitError
from zero.engine import Engine
from zero.errors import UserError

logger = logging.getLogger("zero")

_MOST_LOGITS = 1 << 22
"""That are float64 at a time: 32 MiB, and as much again for their exponentials."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens of which the last are to be scored.

    Attributes:
        tokens: Token numbers; all but the last are read, all but the first could be scored.
        num_scored: How many at the end are.
    """

    tokens: tuple[int, ...]
    num_scored: int

    @property
    def num_read(self) -> int:
        """Tokens that the model reads."""
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Score:
    """Of a sequence.

    Attributes:
        loglikelihood: Of all scored tokens together, in nats, added up in float64.
        is_greedy: Whether each of them was the likeliest one.
    """

    loglikelihood: float
    is_greedy: bool


class Scorer:
    """Scores sequences, longest first, so that a batch that does not fit is met at once.

    A batch that does not fit the device is halved, and so are those after it.

    Args:
        engine: made without an optimizer, or with one between two steps.
        batch_size: sequences at a time.
        pad_id: token that fills short sequences of a batch; the model does not look at it.

    Attributes:
        batch_size: as it is by now.
    """

    def __init__(self, engine: Engine, batch_size: int, pad_id: int = 0) -> None:
        self._engine = engine
        self._pad_id = pad_id
        self.batch_size = batch_size
        known = inspect.signature(engine.module.forward).parameters
        self._keeps_few = "logits_to_keep" in known
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}

    def scores(self, sequences: Iterable[Sequence]) -> list[Score]:
        """The score of each sequence, in the order given.

        Raises:
            gemini.plan.DoesNotFitError: a sequence by itself does not fit the device.
            UserError: there is a sequence without anything to score or to read.
        """
        given = list(sequences)
        for sequence in given:
            if not 1 <= sequence.num_scored <= sequence.num_read:
                raise UserError(
                    f"{sequence.num_scored} tokens are to be scored, but {sequence.num_read} have one before them"
                )
        order = sorted(range(len(given)), key=lambda i: -given[i].num_read)
        found: list[Score | None] = [None] * len(given)
        module = self._engine.module
        was_training = module.training
        self._engine.eval()
        try:
            while order:
                batch, order = order[: self.batch_size], order[self.batch_size :]
                scores = self._try([given[i] for i in batch])
                if scores is None:  # halved
                    order = [*batch, *order]
                    continue
                for position, score in zip(batch, scores, strict=True):
                    found[position] = score
        finally:
            self._engine.train(was_training)
        return [score for score in found if score is not None]

    def _try(self, batch: list[Sequence]) -> list[Score] | None:
        """The scores, or None and a smaller batch size."""
        try:
            return list(self._score(batch))
        except (torch.OutOfMemoryError, DoesNotFitError):
            if len(batch) == 1:
                raise
        self.batch_size = math.ceil(len(batch) / 2)
        logger.info("%d sequences do not fit the device; %d at a time", len(batch), self.batch_size)
        return None

    @torch.no_grad()
    def _score(self, batch: list[Sequence]) -> Iterator[Score]:
        width = max(sequence.num_read for sequence in batch)
        tokens = torch.full((len(batch), width), self._pad_id)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, sequence in enumerate(batch):
            tokens[row, : sequence.num_read] = torch.tensor(sequence.tokens[:-1])
            mask[row, : sequence.num_read] = 1
        firsts = [sequence.num_read - sequence.num_scored for sequence in batch]
        options = dict(self._options)
        left_out = 0
        if self._keeps_few and min(firsts):
            left_out = min(firsts)
            options["logits_to_keep"] = width - left_out
        device = self._engine.device.torch_device
        logits = self._engine(input_ids=tokens.to(device), attention_mask=mask.to(device), **options).logits
        if logits.shape[1] == width:  # the model has computed all the same
            left_out = 0
        for row, (sequence, first) in enumerate(zip(batch, firsts, strict=True)):
            targets = torch.tensor(sequence.tokens[first + 1 :], device=logits.device)
            yield _score_of(logits[row, first - left_out : sequence.num_read - left_out], targets)


def _score_of(logits: torch.Tensor, targets: torch.Tensor) -> Score:
    """Of one sequence.

    Args:
        logits: [tokens, vocabulary].
        targets: [tokens].
    """
    num_rows = max(1, _MOST_LOGITS // logits.shape[-1])
    parts, is_greedy = [], True
    for rows, wanted in zip(logits.split(num_rows), targets.split(num_rows), strict=True):
        exact = rows.double()
        parts += (exact.gather(1, wanted[:, None])[:, 0] - exact.logsumexp(1)).tolist()
        is_greedy = is_greedy and bool((rows.argmax(1) == wanted).all())
    return Score(math.fsum(parts), is_greedy)
