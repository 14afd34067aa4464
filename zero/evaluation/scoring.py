"""Log-likelihoods of tokens under a model that an engine manages, in batches of sequences of any length."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gemini.plan import DoesNotFitError
from zero.engine import Engine
from zero.errors import UserError
from zero.evaluation.shares import Shares
from zero.generation.passes import without_traces
from zero.likelihoods import most_logits_on, scoring, scoring_inputs

logger = logging.getLogger("zero")

MOST_TOKENS = 1 << 14
"""Of a batch whose size nobody has said: enough for a model that comes over the link to be computed with as long."""
_MOST_ROWS = 512


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


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much goes through the model at a time.

    Attributes:
        most_rows: Sequences.
        most_tokens: Tokens, padding counted; a longer sequence goes alone.
    """

    most_rows: int = _MOST_ROWS
    most_tokens: int = MOST_TOKENS

    @classmethod
    def of(cls, batch_size: int | None) -> BatchLimits:
        """Of a number of sequences, whatever their length; None: by their tokens."""
        return cls() if batch_size is None else cls(batch_size, 1 << 62)

    def num_rows(self, num_tokens: int) -> int:
        """Sequences of so many tokens that go together."""
        return max(1, min(self.most_rows, self.most_tokens // num_tokens))


class Scorer:
    """Scores sequences, longest first, so that a batch that does not fit is met at once.

    A batch that does not fit the device is halved, and so are those after it. With several ranks each has its share of
    the batches; all must call.

    Args:
        engine: made without an optimizer, or with one between two steps.
        limits: of a batch; of those that the ranks give the least count.
        pad_id: token that fills short sequences of a batch; the model does not look at it.

    Attributes:
        most_tokens: of a batch, as it is by now on this rank.
        num_read: tokens that the model has read, over all ranks.
        elapsed_s: in which it did.
    """

    def __init__(self, engine: Engine, limits: BatchLimits = BatchLimits(), pad_id: int = 0) -> None:
        self._engine = engine
        self._pad_id = pad_id
        self._shares = Shares(engine)
        self._limits = BatchLimits(self._shares.least(limits.most_rows), self._shares.least(limits.most_tokens))
        self._most_logits = most_logits_on(engine.device)
        self.most_tokens = self._limits.most_tokens
        self.num_read = 0
        self.elapsed_s = 0.0

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
        started_s = time.perf_counter()
        module = self._engine.module
        was_training = module.training
        self._engine.eval()
        try:
            mine = [number for batch in self._shares.mine(self._batches(given)) for number in batch]
            found = self._score_all(given, mine)
        finally:
            self._engine.train(was_training)
        scores = self._shares.put_together(found, len(given))
        self.num_read += sum(sequence.num_read for sequence in given)
        self.elapsed_s += time.perf_counter() - started_s
        return [Score(*score) for score in scores]

    def _batches(self, given: list[Sequence]) -> list[list[int]]:
        """The same on all ranks, and where there are enough for each the same as in one process."""
        order = sorted(range(len(given)), key=lambda i: -given[i].num_read)
        share = -(-len(order) // self._shares.num_ranks)
        batches = []
        while order:
            num_rows = min(share, self._limits.num_rows(given[order[0]].num_read))
            batches.append(order[:num_rows])
            order = order[num_rows:]
        return batches

    def _score_all(self, given: list[Sequence], order: list[int]) -> dict[int, tuple[float, bool]]:
        """By number; ``order`` has the longest first."""
        found: dict[int, tuple[float, bool]] = {}
        while order:
            num_tokens = given[order[0]].num_read
            num_rows = BatchLimits(self._limits.most_rows, self.most_tokens).num_rows(num_tokens)
            batch = order[:num_rows]
            scores = self._try([given[number] for number in batch])
            if scores is not None:
                found.update(zip(batch, scores, strict=True))
                order = order[num_rows:]
        return found

    def _try(self, batch: list[Sequence]) -> list[tuple[float, bool]] | None:
        """The scores, or None and fewer tokens at a time."""
        try:
            return self._score(batch)
        except (torch.OutOfMemoryError, DoesNotFitError) as error:
            if len(batch) == 1:
                raise
            without_traces(error)  # else what has failed stays on the device until a collection of garbage
        num_rows, num_tokens = math.ceil(len(batch) / 2), batch[0].num_read
        self.most_tokens = num_rows * num_tokens
        logger.info("%d x %d tokens do not fit the device; %d rows at a time", len(batch), num_tokens, num_rows)
        return None

    @torch.no_grad()
    def _score(self, batch: list[Sequence]) -> list[tuple[float, bool]]:
        width = max(sequence.num_read for sequence in batch)
        tokens = torch.full((len(batch), width), self._pad_id)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        positions, targets = [], []
        for row, sequence in enumerate(batch):
            tokens[row, : sequence.num_read] = torch.tensor(sequence.tokens[:-1])
            mask[row, : sequence.num_read] = 1
            end = row * width + sequence.num_read
            positions.append(torch.arange(end - sequence.num_scored, end))
            targets.append(torch.tensor(sequence.tokens[-sequence.num_scored :]))
        inputs = scoring_inputs(self._engine.module, tokens, mask)
        device = self._engine.device.torch_device
        wanted = (torch.cat(positions).to(device), torch.cat(targets).to(device))
        with scoring(self._engine.module, *wanted, self._most_logits):
            found = self._engine(**inputs)
        lengths = [sequence.num_scored for sequence in batch]
        values, are_likeliest = found.values.cpu().split(lengths), found.are_likeliest.cpu().split(lengths)
        return [(math.fsum(some.tolist()), bool(are.all())) for some, are in zip(values, are_likeliest, strict=True)]
